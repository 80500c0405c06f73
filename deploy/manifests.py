"""Writes cluster.yaml, serve/runpod.yaml and deploy/gke/ from one settings file, so that they cannot drift apart.

python -m deploy.manifests --config configs/sd14.yaml          write them
python -m deploy.manifests --config configs/sd14.yaml --check  exit 1 and name the file that is not what they say
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from deploy import kuberay, runpod_cluster
from momalisa.config import Settings, from_file

HOME = Path(__file__).parents[1]
NOTE = "# Made by `python -m deploy.manifests --config {config}` from the section `cluster` of its settings: change it there.\n"


def rendered(settings: Settings, config: str) -> dict[Path, str]:
    """{path in the repository: text}."""
    files: dict[Path, str] = {}
    if not settings.cluster.tls:  # RunPod's nodes would not have it
        files[Path("cluster.yaml")] = runpod_cluster.HEADER + dump([runpod_cluster.document(settings.cluster)])
    files[Path("serve/runpod.yaml")] = runpod_cluster.SERVED + dump([runpod_cluster.served(settings.cluster, config)])
    files[Path("deploy/gke/cluster.env")] = kuberay.script_settings(settings)
    files |= {Path("deploy/gke") / name: dump(documents) for name, documents in kuberay.documents(settings, config, HOME).items()}
    return {path: NOTE.format(config=config) + text for path, text in files.items()}


def drifted(settings: Settings, config: str) -> dict[Path, str]:
    """Of `rendered`, what the repository has not, or otherwise."""
    return {
        path: text
        for path, text in rendered(settings, config).items()
        if not (HOME / path).is_file() or (HOME / path).read_text() != text
    }


def dump(documents: list[dict[str, Any]]) -> str:
    class Literal(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Literal.add_representer(str, text)
    return yaml.dump_all(documents, Dumper=Literal, sort_keys=False, width=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.manifests", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/sd14.yaml")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    try:
        settings = from_file(str(HOME / options.config))
        files = drifted(settings, options.config)
    except ValueError as error:
        sys.exit(str(error))
    if settings.cluster.tls:
        print(
            "cluster.yaml is left as it is: cluster.tls=true is for GKE alone, RunPod's nodes have no certificates (SECURITY.md)"
        )
    for path, text in files.items():
        if options.check:
            sys.exit(f"{path} is not what {options.config} says; run `make manifests`")
        (HOME / path).parent.mkdir(parents=True, exist_ok=True)
        (HOME / path).write_text(text)
        print(path)


if __name__ == "__main__":
    main()
