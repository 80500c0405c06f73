"""TLS between nodes as SECURITY.md says it: certificates by its commands, two nodes with its variables, nobody else."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import grpc
import pytest

from tests.deploy.namespaces import BIN, HOME
from tests.deploy.test_submit import TOKEN, free_port

HOSTS = ["127.0.0.2", "127.0.0.3"]  # Ray takes 127.0.0.1 for the machine's outer address
BLOCKS = re.findall(r"```bash\n(.*?)```", (HOME / "SECURITY.md").read_text(), re.DOTALL)
CODE = """
import ray
ray.init(address="{address}", _node_ip_address="{address}".split(":")[0], log_to_driver=False)
where = ray.remote(lambda: ray.get_runtime_context().get_node_id())
nodes = {{ray.get(where.options(resources={{name: 1}}).remote()) for name in ("first", "second")}}
print(len(nodes), "nodes worked")
"""


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    (making,) = (block for block in BLOCKS if block.startswith("openssl req -x509"))
    assert "IP:127.0.0.1" in making
    making = making.replace("IP:127.0.0.1", ",".join(f"IP:{host}" for host in HOSTS))
    subprocess.run(["bash", "-e", "-c", making], cwd=tmp_path, check=True, capture_output=True)
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_nodes_work_over_tls_and_a_stranger_is_cut_off(certificates: Path) -> None:
    (exports,) = (block for block in BLOCKS if block.startswith("export RAY_USE_TLS=1"))
    names = dict(re.findall(r"(RAY_\w+)=(\S+)", exports.replace("/certs", str(certificates))))
    assert set(names) == {"RAY_USE_TLS", "RAY_TLS_CA_CERT", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY"}
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment = {**inherited, **names, "RAY_worker_niceness": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    port = free_port()
    address = f"{HOSTS[0]}:{port}"
    common = ["--block", "--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats"]
    starts = [
        ["--head", f"--port={port}", f"--node-ip-address={HOSTS[0]}", "--include-dashboard=false", '--resources={"first": 1}'],
        [f"--address={address}", f"--node-ip-address={HOSTS[1]}", '--resources={"second": 1}'],
    ]
    nodes = []
    with open(certificates / "log", "wb") as log:
        try:
            for start in starts:
                command = [str(BIN / "ray"), "start", *start, *common]
                nodes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))
                if len(nodes) == 1:
                    wait_for(port)
            driver = [str(BIN / "python"), "-c", CODE.format(address=address)]
            done = subprocess.run(driver, env=environment, capture_output=True, text=True, check=False, timeout=150)
            assert "2 nodes worked" in done.stdout, done.stderr[-3000:] + (certificates / "log").read_text()[-3000:]
            ca, key, own = ((certificates / name).read_bytes() for name in ("ca.crt", "tls.key", "tls.crt"))
            assert nodes_seen(address, root_certificates=ca, private_key=key, certificate_chain=own) == 2
            with pytest.raises(grpc.RpcError, match="UNAVAILABLE"):  # the token alone does not do
                nodes_seen(address, root_certificates=ca)
        finally:
            end(nodes)


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection((HOSTS[0], port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.2)


def nodes_seen(address: str, **certificate: bytes) -> int:
    """How many nodes the GCS names to somebody with the token and this certificate. Raises grpc.RpcError."""
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    with grpc.secure_channel(address, grpc.ssl_channel_credentials(**certificate)) as channel:
        ask = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).GetAllNodeInfo
        answer = ask(gcs_service_pb2.GetAllNodeInfoRequest(), metadata=[("authorization", f"Bearer {TOKEN}")], timeout=20)
        return len(answer.node_info_list)


def end(nodes: list[subprocess.Popen[bytes]]) -> None:
    for node in nodes:
        os.killpg(node.pid, signal.SIGTERM)
    for node in nodes:
        try:
            node.wait(timeout=5)
        except subprocess.TimeoutExpired:  # Ray drains for 30 s
            os.killpg(node.pid, signal.SIGKILL)
            node.wait()
