"""The wing: a miniature museum over HTTP, in the schema of MoMA's own collection file.

    python -m momalisa.miniature.wing --port 8930
    curl http://127.0.0.1:8930/collection.csv
    python -m ray_jobs.collect --config configs/demo.yaml

It hangs 112 drawings in one style (`style.py`), and has what real collections have: works in storage, works without a
picture, files that are broken, unusual or missing. Everything is the same on every start and every machine.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import html
import io
import random
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from aiohttp import web
from PIL import Image

from momalisa.miniature import draw
from momalisa.miniature.style import in_style

HEADER = (
    "Title,Artist,ConstituentID,ArtistBio,Nationality,BeginDate,EndDate,Gender,Date,Medium,Dimensions,CreditLine,"
    "AccessionNumber,Classification,Department,DateAcquired,Cataloged,ObjectID,URL,ImageURL,OnView,Circumference (cm),"
    "Depth (cm),Diameter (cm),Height (cm),Length (cm),Weight (kg),Width (cm),Seat Height (cm),Duration (sec.)"
)
COLUMNS = HEADER.split(",")
GOOD = 112  # works on view with a picture that can be used, the unusual ones among them
IN_STORAGE = 12  # works that are not on view
WITHOUT_PICTURE = 6  # works on view without an ImageURL
FIRST_ID = 900_001
FURTHER_SEEDS = 1_000_000_000  # seeds from here on are never shown
BASE = "{base}"  # stands for the server's own address in a record

GIVEN = "Ada Bruno Chiara Dov Elif Farid Greta Hana Ivo Juno Kofi Lena Malik Nora Otto Pilar Quinn Rosa Sami Thea"
FAMILY = "Arden Bellini Castor Duval Ekman Ferro Grau Holm Iwata Jansen Kaya Lindt Moreau Novak Okoye Pardo Rossi Stern"
NATIONS = "American Brazilian Danish French Ghanaian Italian Japanese Mexican Spanish Turkish"
MEDIA = ("Oil on canvas", "Gouache on paper", "Risograph on warm paper", "Acrylic on canvas", "Screenprint", "Tempera on panel")
TITLES = ("{}", "Untitled ({})", "Study for <em>{}</em>", "Composition: {}", "{}, from the series\nMiniatures", "<em>{}</em>")


class Exhibit(NamedTuple):
    """A work on view whose picture can be used: its row of the collection file, and what was drawn from which seed."""

    record: dict[str, str]
    scene: draw.Scene
    seed: int


@dataclass(frozen=True)
class Work:
    """A row of the collection file, and how its picture is kept (a key of KEEPERS, or "" for no picture)."""

    record: dict[str, str]
    scene: draw.Scene
    seed: int
    keeper: str

    @property
    def file_name(self) -> str:
        """The last part of its ImageURL; empty if it has none."""
        return self.record["ImageURL"].rsplit("/", 1)[-1]


def hung(scene: draw.Scene, seed: int) -> Image.Image:
    """A drawing as it hangs in the wing: 128x128 RGB."""
    return in_style(draw.draw(scene, seed), seed)


def further_works(captions: int | Sequence[str], seed: int = 0) -> list[tuple[str, Image.Image]]:
    """(caption, picture) pairs in the wing's style that it never shows.

    A count takes the first so many of a fixed list of training captions, so two seeds give other pictures of the same
    captions; or name the captions yourself. Raises ValueError for one that describes no scene.
    """
    if isinstance(captions, int):
        rng = random.Random("further works")
        scenes = [draw.sample_scene(rng) for _ in range(captions)]
    else:
        scenes = [_known(caption) for caption in captions]
    first = FURTHER_SEEDS + seed * 1_000_000
    return [(scene.caption, hung(scene, first + number)) for number, scene in enumerate(scenes)]


def _known(caption: str) -> draw.Scene:
    scene = draw.scene_of(caption)
    if scene is None:
        raise ValueError(f"{caption!r} describes no scene of draw.all_scenes(), e.g. {draw.all_scenes()[0].caption!r}")
    return scene


# How a picture is kept: each returns the file's bytes. The first four are good, if unusual; the last are broken.


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def _png(image: Image.Image) -> bytes:
    return _encoded(image, "PNG")


def _jpeg(image: Image.Image) -> bytes:
    return _encoded(image, "JPEG", quality=94, subsampling=0)


def _animated_gif(image: Image.Image) -> bytes:
    frames = [image.quantize(256), image.rotate(180).quantize(256)]
    return _encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=400, loop=0)


def _cmyk_jpeg(image: Image.Image) -> bytes:
    return _encoded(image.convert("CMYK"), "JPEG", quality=94)


def _png_with_alpha(image: Image.Image) -> bytes:
    image = image.copy()
    alpha = Image.new("L", image.size, 0)
    alpha.paste(255, (2, 2, image.width - 2, image.height - 2))
    image.putalpha(alpha)
    return _encoded(image, "PNG")


def _rotated_jpeg(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees when shown
    return _encoded(image.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=94, subsampling=0, exif=exif)


def _page(image: Image.Image) -> bytes:
    return b"<!DOCTYPE html><html><body><h1>This work is on loan</h1></body></html>"


def _truncated_jpeg(image: Image.Image) -> bytes:
    data = _jpeg(image)
    return data[: len(data) // 3]


def _bomb(image: Image.Image) -> bytes:
    """A tiny PNG that claims 60,000x60,000 pixels: 10.8 GB, were it decoded."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 4096)) + chunk(b"IEND", b"")


def _noise(image: Image.Image) -> bytes:
    return random.Random("noise").randbytes(3_000)


def _empty(image: Image.Image) -> bytes:
    return b""


Keeper = Callable[[Image.Image], bytes]
PLAIN: dict[str, tuple[str, Keeper]] = {"png": ("png", _png), "jpeg": ("jpg", _jpeg)}
UNUSUAL: dict[str, tuple[str, Keeper]] = {
    "animated": ("gif", _animated_gif),
    "cmyk": ("jpg", _cmyk_jpeg),
    "alpha": ("png", _png_with_alpha),
    "rotated": ("jpg", _rotated_jpeg),
}
BROKEN: dict[str, tuple[str, Keeper]] = {
    "page": ("jpg", _page),
    "truncated": ("jpg", _truncated_jpeg),
    "bomb": ("png", _bomb),
    "noise": ("png", _noise),
    "empty": ("jpg", _empty),
    "missing": ("jpg", _empty),  # a 404
}
KEEPERS = PLAIN | UNUSUAL | BROKEN


@lru_cache(maxsize=1)
def works() -> tuple[Work, ...]:
    """All rows of the collection, in a fixed mixed order."""
    plain = list(PLAIN)
    plan = [(keeper, True) for keeper in [*UNUSUAL, *BROKEN]] + [("", True)] * WITHOUT_PICTURE
    plan += [(plain[number % 2], True) for number in range(GOOD - len(UNUSUAL))]
    plan += [(plain[number % 2], False) for number in range(IN_STORAGE)]
    rng = random.Random("the wing")
    rng.shuffle(plan)
    return tuple(_work(FIRST_ID + number, keeper, on_view, rng) for number, (keeper, on_view) in enumerate(plan))


def exhibits() -> list[Exhibit]:
    """The works on view whose pictures can be used: what collecting should bring in."""
    usable = PLAIN.keys() | UNUSUAL.keys()
    return [Exhibit(work.record, work.scene, work.seed) for work in works() if work.keeper in usable and work.record["OnView"]]


def _work(number: int, keeper: str, on_view: bool, rng: random.Random) -> Work:
    scene = draw.sample_scene(rng)
    artists = [f"{rng.choice(GIVEN.split())} {rng.choice(FAMILY.split())}" for _ in range(2 if rng.random() < 0.1 else 1)]
    nations, born = [rng.choice(NATIONS.split()) for _ in artists], [rng.randint(1890, 1990) for _ in artists]
    year = rng.randint(max(born) + 20, 2025)
    record = dict.fromkeys(COLUMNS, "") | {
        "Title": rng.choice(TITLES).format(scene.caption[0].upper() + scene.caption[1:]),
        "Artist": ", ".join(artists),
        "ConstituentID": ", ".join(str(number * 10 + place) for place, _ in enumerate(artists)),
        "ArtistBio": ", ".join(f"({nation}, born {year})" for nation, year in zip(nations, born, strict=True)),
        "Nationality": " ".join(f"({nation})" for nation in nations),
        "BeginDate": " ".join(f"({year})" for year in born),
        "EndDate": " ".join("(0)" for _ in artists),
        "Date": str(year) if rng.random() < 0.8 else f"c. {year}",
        "Medium": rng.choice(MEDIA),
        "Dimensions": '5 x 5"\n(12.8 x 12.8 cm)' if rng.random() < 0.2 else '5 x 5" (12.8 x 12.8 cm)',
        "CreditLine": "Drawn by the procedural artist. CC0",
        "AccessionNumber": f"{number - FIRST_ID + 1}.{year}",
        "Classification": "Drawing",
        "Department": "Drawings & Prints",
        "DateAcquired": f"{year}-06-01",
        "Cataloged": "Y",
        "ObjectID": str(number),
        "URL": f"{BASE}/works/{number}",
        "ImageURL": f"{BASE}/media/{number}.{KEEPERS[keeper][0]}" if keeper else "",
        "OnView": f'"MOMA Lisa, Wing, {rng.randint(1, 4)}"' if on_view else "",
        "Height (cm)": "12.8",
        "Width (cm)": "12.8",
    }
    return Work(record, scene, number, keeper)


def collection_csv(base: str) -> bytes:
    """The collection file, its links starting with `base`: UTF-8 with a byte order mark."""
    sink = io.StringIO(newline="")
    writer = csv.DictWriter(sink, COLUMNS)
    writer.writeheader()
    writer.writerows({key: value.replace(BASE, base) for key, value in work.record.items()} for work in works())
    return sink.getvalue().encode("utf-8-sig")


@lru_cache(maxsize=1)
def _by_file_name() -> dict[str, Work]:
    return {work.file_name: work for work in works() if work.keeper and work.keeper != "missing"}


@lru_cache(maxsize=256)
def media(file_name: str) -> bytes | None:
    """A picture file's bytes, broken as they may be; None if there is no such file."""
    work = _by_file_name().get(file_name)
    return None if work is None else KEEPERS[work.keeper][1](hung(work.scene, work.seed))


TYPES = {"png": "image/png", "jpg": "image/jpeg", "gif": "image/gif"}


async def _get_collection(request: web.Request) -> web.Response:
    data = collection_csv(str(request.url.origin()))
    return web.Response(body=data, content_type="text/csv", charset="utf-8")


async def _get_media(request: web.Request) -> web.Response:
    name = request.match_info["name"]
    data = await asyncio.to_thread(media, name)
    if data is None:
        raise web.HTTPNotFound(text=f"no picture is called {name}")
    return web.Response(body=data, content_type=TYPES[name.rsplit(".", 1)[-1]])


async def _get_robots(request: web.Request) -> web.Response:
    return web.Response(text="User-agent: *\nAllow: /\n")


async def _get_work(request: web.Request) -> web.Response:
    number = request.match_info["number"]
    for work in works():
        if work.record["ObjectID"] == number:
            picture = f"<p><img src=/media/{work.file_name} width=384 alt=''>" if work.keeper else "<p>No picture."
            record = {key: work.record[key] for key in ("Artist", "Date", "Medium", "CreditLine", "OnView")}
            rows = "".join(f"<dt>{key}<dd>{html.escape(value)}" for key, value in record.items())
            return _html(f"<h1>{work.record['Title']}</h1>{picture}<dl>{rows}</dl><p><a href=/>The wing</a>")
    raise web.HTTPNotFound(text=f"no work has the number {number}; see /collection.csv")


async def _get_home(request: web.Request) -> web.Response:
    pictures = "".join(
        f"<a href=/works/{record['ObjectID']}><img src={record['ImageURL'].replace(BASE, '')} width=128 height=128 "
        f"loading=lazy alt='{html.escape(scene.caption)}'></a>\n"
        for record, scene, _ in exhibits()
    )
    text = f"<p>{GOOD} drawings on view, all CC0. The catalogue: <a href=/collection.csv>collection.csv</a>."
    return _html(f"<h1>The wing</h1>{text}<div class=wall>{pictures}</div>")


STYLE = (
    "body{font:17px/1.5 Georgia,serif;background:#f2ede2;color:#2b2520;max-width:1120px;margin:0 auto;padding:2rem}"
    "h1{font-weight:normal} .wall{display:flex;flex-wrap:wrap;gap:18px} img{display:block;box-shadow:0 3px 8px #0004}"
)


def _html(body: str) -> web.Response:
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>The wing</title><style>{STYLE}</style>{body}"
    return web.Response(text=page, content_type="text/html")


def application() -> web.Application:
    """The museum's web application."""
    app = web.Application()
    app.router.add_get("/", _get_home)
    app.router.add_get("/collection.csv", _get_collection)
    app.router.add_get("/media/{name}", _get_media)
    app.router.add_get("/works/{number}", _get_work)
    app.router.add_get("/robots.txt", _get_robots)
    return app


@contextmanager
def serve_in_thread(app: web.Application | None = None) -> Iterator[str]:
    """Run the wing, or another application, in a thread on a free loopback port; yields its base URL."""
    loop, started = asyncio.new_event_loop(), threading.Event()
    runner = web.AppRunner(app or application(), shutdown_timeout=1)

    async def start() -> None:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()

    def run() -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(start())
        finally:
            started.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=run, name="wing", daemon=True)
    thread.start()
    started.wait()
    host, port = runner.addresses[0][:2]
    try:
        yield f"http://{host}:{port}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m momalisa.miniature.wing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=8930)
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: this machine only)")
    options = parser.parse_args()
    print(f"The wing is open at http://{options.host}:{options.port}/ ({GOOD} works on view)", flush=True)
    web.run_app(application(), host=options.host, port=options.port, print=None)


if __name__ == "__main__":
    main()
