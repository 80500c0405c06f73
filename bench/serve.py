"""Pictures over HTTP beside a diffusers pipeline in Ray Serve, in one run: same model, requests, arrivals, precision.

    python bench/serve.py                     everything: peaks, Poisson arrivals at several rates, bursts
    python bench/serve.py --seconds 60 --set serve.compile=true --record
    python bench/serve.py --model sd14 --size 512 --device cuda --set serve.compile=true
                                              over HTTP on a GPU: Ray gives it to one system after the other
    python bench/serve.py --in-process        the engine alone beside pipeline calls: no Ray, no HTTP
    python bench/serve.py --in-process --threads 1
                                              CPU seconds a picture: for a machine that others use too
    python bench/serve.py --in-process --model sd14 --size 512 --device cuda --compile --pictures 128
                                              on a GPU, Stable Diffusion 1.4's size with random weights; with --max-rows 8 there
                                              are 4 shapes to compile instead of 8

Peers: `one` is a pipeline call for each request in a Serve deployment, as in Ray's own example; `batch` is the same
behind `@serve.batch`, where requests that arrive together and have steps, scale and mode in common share a call; both do all
that torch does in one thread, as ours does. Ours is `serve.app:build`. They run one after the other on the same cores; each
has as many threads as there are. Requests are a fixed mix: guided pictures of 20 steps, some of 10 and 30, some from a
picture. `one`'s peak is measured first; rates are shares of it, and of `batch`'s. A line for each measurement goes to
stderr; the last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import logging
import math
import os
import random
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import results
import sd14

HERE = Path(__file__).resolve()
SUBJECTS = ("three red circles on a blue ground", "a tree in autumn under a white sky", "a coffee", "nested squares")
SHARES_OF_ONE = (0.5, 0.9)
SHARES_OF_BATCH = (0.5, 0.8, 0.95)
BURST = 16
AT_ONCE = {"one": 4, "batch": 32, "ours": 32}  # requests in flight while a peak is measured: more would only wait
SYSTEMS = ("one", "batch", "ours")


def log(**what: Any) -> None:
    print(json.dumps(what), file=sys.stderr, flush=True)


def requests_of(count: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The mix, the same for every system: `image` is a PNG file in base64."""
    rng, made = random.Random(1929), []
    sink = io.BytesIO()
    from PIL import Image

    Image.linear_gradient("L").convert("RGB").resize((options.size, options.size)).save(sink, "PNG")
    picture = base64.b64encode(sink.getvalue()).decode()
    for number in range(count):
        request = {"prompt": f"A MOMA artwork of: {rng.choice(SUBJECTS)}", "seed": number, "steps": 20, "guidance_scale": 3.0}
        if not options.plain:
            kind = rng.random()
            request["steps"] = 10 if kind < 0.1 else 30 if kind < 0.2 else 20
            if kind > 0.8:
                request |= {"image": picture, "strength": 0.6}
        made.append(request)
    return made


# The peers: they run in replicas, so what they need is imported there.


class Pipelines:
    """diffusers' pipelines for text and for pictures around one set of weights."""

    def __init__(self, model: str, size: int, dtype: str, device: str) -> None:
        import diffusers
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        torch.backends.cudnn.allow_tf32 = dtype != "float32"  # as our engine
        self.size = size
        text: Any = diffusers.StableDiffusionPipeline.from_pretrained(model, safety_checker=None, dtype=getattr(torch, dtype)).to(
            device
        )
        text.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(text.scheduler.config)
        parts = {**text.components, "safety_checker": None, "feature_extractor": None}
        image: Any = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
        for pipeline in (text, image):
            pipeline.set_progress_bar_config(disable=True)
        self._text, self._image = text, image

    def call(self, requests: list[dict[str, Any]]) -> list[bytes]:
        """PNG files of requests that have steps, scale and mode in common: one pipeline call."""
        import torch
        from PIL import Image

        first = requests[0]
        common: dict[str, Any] = {
            "prompt": [request["prompt"] for request in requests],
            "num_inference_steps": first["steps"],
            "guidance_scale": first["guidance_scale"],
            "generator": [torch.Generator().manual_seed(request["seed"]) for request in requests],
        }
        if "image" in first:
            images = [Image.open(io.BytesIO(base64.b64decode(request["image"]))) for request in requests]
            pictures = self._image(image=images, strength=first["strength"], **common).images
        else:
            pictures = self._text(width=self.size, height=self.size, **common).images
        return [png(picture) for picture in pictures]

    def grouped(self, requests: list[dict[str, Any]]) -> list[bytes]:
        """PNG files of any requests: a call for each kind among them."""
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for index, request in enumerate(requests):
            kinds.setdefault((request["steps"], request["guidance_scale"], "image" in request), []).append(index)
        files: dict[int, bytes] = {}
        for indices in kinds.values():
            files.update(zip(indices, self.call([requests[index] for index in indices]), strict=True))
        return [files[index] for index in range(len(requests))]


def png(picture: Any) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, "PNG")
    return sink.getvalue()


def peer(system: str, options: argparse.Namespace) -> Any:
    """The Serve application of a peer."""
    from ray import serve
    from starlette.requests import Request
    from starlette.responses import Response

    arguments = (str(options.folder), options.size, options.dtype, options.device)

    class One:
        def __init__(self) -> None:
            self.thread = ThreadPoolExecutor(1)  # for all that torch does: OpenMP's workers are one thread's
            self.pipelines = self.thread.submit(Pipelines, *arguments).result()

        async def __call__(self, request: Request) -> Response:
            body = await request.json()
            (file,) = await asyncio.get_running_loop().run_in_executor(self.thread, self.pipelines.call, [body])
            return Response(file, media_type="image/png")

    class Batched(One):
        @serve.batch(max_batch_size=BURST, batch_wait_timeout_s=0.05)
        async def paint(self, requests: list[dict[str, Any]]) -> list[bytes]:
            return await asyncio.get_running_loop().run_in_executor(self.thread, self.pipelines.grouped, requests)

        async def __call__(self, request: Request) -> Response:
            return Response(await self.paint(await request.json()), media_type="image/png")

    kind, at_once = (One, 1) if system == "one" else (Batched, 4 * BURST)
    resources = {"num_cpus": 1, "num_gpus": gpus(options)}
    return serve.deployment(max_ongoing_requests=at_once, ray_actor_options=resources)(kind).bind()


def gpus(options: argparse.Namespace) -> int:
    """Those of a replica: the same for every system, one at a time."""
    return int(options.device == "cuda")


def ours(root: Path, options: argparse.Namespace) -> Any:
    """Our application over a store whose refs/best is the model itself."""
    from momalisa import checkpoint
    from momalisa.config import Diffusion
    from momalisa.storage import Store
    from serve.app import ServeArgs, application, load_settings

    diffusion, store = Diffusion(model=str(options.folder)), Store(str(root / "store"))
    checkpoint.save_weights(checkpoint.load_base_unet(diffusion), root / "weights", lora=False)
    entry = checkpoint.Checkpoint("checkpoints/bench/1", "bench", 1, diffusion.model_dump(), files={})
    checkpoint.write(store, entry, root / "weights")
    store.write_json(checkpoint.BEST, {"checkpoint": entry.path})
    precision = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[options.dtype]
    chosen = [
        f"--root={store.root}",
        f"--serve.size_px={options.size}",
        f"--serve.precision={precision}",
        *(f"--{each}" for each in options.set),
    ]
    settings = load_settings(ServeArgs(config=str(HERE.parents[1] / "configs" / "demo.yaml"), overrides=chosen))
    return application(settings, gpus(options))


# The load.


class Client:
    """Asks a system for pictures, and looks at each one."""

    def __init__(self, session: Any, system: str, address: str, size: int) -> None:
        self.session, self.system, self.address, self.size = session, system, address, size

    async def ask(self, request: dict[str, Any]) -> float:
        """Seconds until the picture is here."""
        began = time.perf_counter()
        picture = await (self._ours(request) if self.system == "ours" else self._peer(request))
        elapsed = time.perf_counter() - began
        if not picture.startswith(b"\x89PNG"):
            raise SystemExit(f"{self.system} answered {picture[:200]!r}")
        return elapsed

    async def _peer(self, request: dict[str, Any]) -> bytes:
        async with self.session.post(f"{self.address}/", json=request) as answer:
            return bytes(await answer.read())

    async def _ours(self, request: dict[str, Any]) -> bytes:
        import aiohttp

        fields = {**request, "size": f"{self.size}x{self.size}", "response_format": "b64_json"}
        if "image" in request:
            form = aiohttp.FormData({name: str(value) for name, value in fields.items() if name != "image"})
            form.add_field("image", base64.b64decode(request["image"]), filename="image.png", content_type="image/png")
            posted = self.session.post(f"{self.address}/v1/images/edits", data=form)
        else:
            posted = self.session.post(f"{self.address}/v1/images/generations", json=fields)
        async with posted as answer:
            body = await answer.json()
        return base64.b64decode(body["data"][0]["b64_json"]) if "data" in body else json.dumps(body).encode()


async def peak(client: Client, requests: list[dict[str, Any]], seconds: float) -> float:
    """Pictures a second with always so many in flight."""
    line, done, began = iter(requests * 1000), 0, time.perf_counter()

    async def visitor() -> None:
        nonlocal done
        while time.perf_counter() - began < seconds:
            await client.ask(next(line))
            done += 1

    await asyncio.gather(*(visitor() for _ in range(AT_ONCE[client.system])))
    return done / (time.perf_counter() - began)


async def arrivals(client: Client, requests: list[dict[str, Any]], times: list[float]) -> list[float]:
    """Latencies of requests sent at these times, whether or not earlier ones have been answered."""
    began = time.perf_counter()

    async def send(request: dict[str, Any], at: float) -> float:
        await asyncio.sleep(max(0.0, at - (time.perf_counter() - began)))
        return await client.ask(request)

    return list(await asyncio.gather(*(send(request, at) for request, at in zip(requests, times, strict=False))))


def poisson(rate: float, seconds: float) -> list[float]:
    rng, times = random.Random(7), [0.0]
    while (now := times[-1] + rng.expovariate(rate)) < seconds:
        times.append(now)
    return times


def bursts(rate: float, seconds: float) -> list[float]:
    """So many at once, as often as the rate allows."""
    every = BURST / rate
    return [number * every for number in range(max(1, int(seconds / every))) for _ in range(BURST)]


def percentile(values: list[float], share: float) -> float:
    """The value that this share of the values does not exceed."""
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)


@contextmanager
def served(system: str, options: argparse.Namespace, root: Path) -> Iterator[str]:
    """A system behind HTTP, alone."""
    from ray import serve

    application = ours(root, options) if system == "ours" else peer(system, options)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": 600})
    serve.run(application, name="bench", route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


async def measure(system: str, address: str, options: argparse.Namespace, loads: dict[str, list[float]]) -> dict[str, Any]:
    """A system's peak, and its latencies under each load; `one` and `batch` set the loads for those after them."""
    import aiohttp

    requests = requests_of(2000, options)
    timeout, connector = aiohttp.ClientTimeout(total=600), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        client = Client(session, system, address, options.size)
        await arrivals(client, requests[:BURST], [0.0] * AT_ONCE[system])  # to warm up
        highest = await peak(client, requests, options.seconds)
        log(system=system, peak=round(highest, 2))
        if system == "one":
            loads |= {f"{share:.0%} of one": poisson(share * highest, options.seconds) for share in SHARES_OF_ONE}
            loads["bursts"] = bursts(0.7 * highest, options.seconds)
        if system == "batch":
            loads |= {f"{share:.0%} of batch": poisson(share * highest, options.seconds) for share in SHARES_OF_BATCH}
        found: dict[str, Any] = {"peak": round(highest, 2)}
        for name, times in loads.items():
            latencies = await arrivals(client, requests, times)
            found[name] = {"p50": percentile(latencies, 0.5), "p95": percentile(latencies, 0.95), "pictures": len(latencies)}
            log(system=system, load=name, rate=round(len(times) / options.seconds, 2), **found[name])
    return found


def over_http(options: argparse.Namespace) -> dict[str, Any]:
    import ray

    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000)
    loads: dict[str, list[float]] = {}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for system in SYSTEMS:
            with served(system, options, Path(folder)) as address:
                found[system] = asyncio.run(measure(system, address, options, loads))
    ray.shutdown()
    peers = {name: found[name] for name in ("one", "batch")}
    p95 = {f"p95 at {load}": {name: found[name][load]["p95"] for name in SYSTEMS if load in found[name]} for load in loads}
    return {
        "claim": f"pictures/s over HTTP at peak, {options.size}x{options.size}, a mix around 20 guided steps, {options.dtype}, "
        "against a pipeline call a request in Ray Serve",
        "ours": found["ours"]["peak"],
        "peer": peers["one"]["peak"],
        "ratio": round(found["ours"]["peak"] / peers["one"]["peak"], 2),
        "hardware": hardware(options),
        "ratio to @serve.batch": round(found["ours"]["peak"] / peers["batch"]["peak"], 2),
        **p95,
    }


# Without Ray.


def in_process(options: argparse.Namespace) -> dict[str, Any]:
    """The engine beside pipeline calls, all pictures there at once; on a GPU also how long one picture takes alone."""
    import torch

    from momalisa.config import Diffusion
    from momalisa.engine import Engine, Preview, Request

    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    diffusion = Diffusion(model=str(options.folder))
    engine = Engine.load(diffusion, device=options.device, dtype=dtype, max_rows=options.max_rows)
    if options.compile:
        began = time.perf_counter()
        logging.basicConfig(level=logging.INFO, format="%(message)s")  # every shape, as it is compiled
        if not engine.compile([options.size], options.cache_dir):
            raise SystemExit("the compiler failed, so there is nothing to measure; without --compile plain PyTorch is")
        log(compiled_s=round(time.perf_counter() - began, 1), rows=options.max_rows)
    pipelines = Pipelines(str(options.folder), options.size, options.dtype, options.device)
    asked = requests_of(options.pictures, argparse.Namespace(size=options.size, plain=True))
    requests = [Request(size_px=options.size, **fields) for fields in asked]

    def timed(work: Callable[[], Any]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    few = asked[: max(4, options.pictures // 8)]
    sides: dict[str, tuple[int, Callable[[], Any]]] = {  # pictures, and what draws them
        "ours": (len(requests), lambda: engine.generate(requests)),
        "one": (len(few), lambda: [pipelines.call([fields]) for fields in few]),
        "batch": (BURST, lambda: pipelines.call(asked[:BURST])),
        "reproducible": (4, lambda: engine.generate([_reproducible(request) for request in requests[:4]])),
    }
    engine.generate(requests[: options.max_rows // 2])
    pipelines.call(asked[:1])
    best, cpu_s = dict.fromkeys(sides, 0.0), dict.fromkeys(sides, math.inf)
    for turn in range(options.rounds):
        for name, (count, side) in sides.items():
            began = time.process_time()
            rate = count / timed(side)
            spent = (time.process_time() - began) / count
            best[name], cpu_s[name] = max(best[name], rate), min(cpu_s[name], spent)
            log(round=turn + 1, side=name, rate=round(rate, 2), cpu_s=round(spent, 4))
    alone = sorted(timed(lambda: engine.generate(requests[:1])) for _ in range(7))[3]

    def first_preview(previews: int) -> float:
        """Of so many, on an idle engine."""
        number = engine.submit(Request(size_px=options.size, previews=previews, **asked[0]))
        seconds = timed(lambda: next(event for _ in iter(int, 1) for event in engine.tick() if isinstance(event, Preview)))
        engine.cancel(number)
        return seconds

    first_preview(3)  # fits the projection, once in an engine's life
    previews = {count: sorted(first_preview(count) for _ in range(7))[3] for count in (19, 3)}
    return {
        "claim": f"pictures/s in one process, {options.size}x{options.size}, 20 guided steps, {options.dtype}, "
        f"{options.max_rows} rows{', compiled' if options.compile else ''}, against a pipeline call a picture",
        "ours": round(best["ours"], 2),
        "peer": round(best["one"], 2),
        "ratio": round(best["ours"] / best["one"], 2),
        "hardware": hardware(options),
        "pipeline, batches of 16": round(best["batch"], 2),
        "reproducible": round(best["reproducible"], 2),
        "CPU seconds a picture": {name: round(seconds, 4) for name, seconds in cpu_s.items()},
        "one picture on an idle engine, s": round(alone, 3),
        "first preview, after 1 of 20 steps, s": round(previews[19], 3),
        "first preview of the API's 3, after 5 of 20 steps, s": round(previews[3], 3),
    }


def _reproducible(request: Any) -> Any:
    from dataclasses import replace

    return replace(request, reproducible=True)


def hardware(options: argparse.Namespace) -> str:
    import torch

    if options.device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{options.threads} threads of {os.cpu_count()} x {results.processor()}"


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--model", default="miniature://diffusion", help="a folder, or sd14: random weights of that size")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of both sides")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--plain", action="store_true", help="20 steps from text only")
    parser.add_argument("--seconds", type=float, default=30, help="of each measurement over HTTP")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="of ours: serve.max_rows=32")
    parser.add_argument("--in-process", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of every side")
    parser.add_argument("--max-rows", type=int, default=32, help="in process; over HTTP it is --set serve.max_rows=N")
    parser.add_argument("--pictures", type=int, default=32, help="in process")
    parser.add_argument("--rounds", type=int, default=2, help="in process: the best counts")
    parser.add_argument("--compile", action="store_true", help="in process")
    parser.add_argument("--cache-dir", help="in process: where compiled kernels are kept")
    options = parser.parse_args()
    sys.path[0] = str(HERE.parents[1])  # this file has the name of a package there
    from momalisa.weights import locate

    with tempfile.TemporaryDirectory() as folder:
        options.folder = sd14.save(Path(folder)) if options.model == "sd14" else Path(locate(options.model))
        figures = in_process(options) if options.in_process else over_http(options)
    results.report(figures, options.record)


if __name__ == "__main__":
    main()
