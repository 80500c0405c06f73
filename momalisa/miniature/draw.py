"""A procedural artist: 128x128 abstract pictures, each with its exact caption.

A `Scene` is what a caption says and nothing else; everything a caption does not say (place, size, a
brush's exact shade) comes from the drawing's seed. The captions are a closed list (`all_scenes`), of which
`HELD_OUT_COUNT` are never shown to any model in training: they are the unseen prompts of `evaluate`.

    python -c "from momalisa.miniature.draw import *; draw(all_scenes()[0], seed=1).save('a.png')"
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw

SIZE_PX = 128
SUPERSAMPLING = 2  # drawn at 256, averaged down: soft, regular edges
HELD_OUT_COUNT = 300

Colour = tuple[int, int, int]
Point = tuple[float, float]

COLOURS: dict[str, Colour] = {
    "red": (214, 40, 40),
    "orange": (244, 140, 30),
    "yellow": (250, 216, 60),
    "green": (50, 150, 80),
    "blue": (40, 90, 190),
    "purple": (130, 60, 160),
    "black": (28, 28, 32),
    "white": (244, 242, 236),
}
SEASONS: dict[str, tuple[Colour, Colour]] = {  # season -> (leaves, ground)
    "spring": ((242, 160, 192), (130, 190, 90)),
    "summer": ((36, 130, 56), (90, 160, 60)),
    "autumn": ((222, 112, 30), (170, 120, 60)),
    "winter": ((226, 236, 244), (240, 244, 248)),
}
COUNTS = ("one", "two", "three")
SHAPES = ("circle", "square", "triangle")

# What an evaluation prompt may call a picture of each kind: the base model learns these words too.
ALIASES = {
    "tree": "changing seasons",
    "cup": "a coffee",
    "factory": "an industrial setting",
    "flag": "critique of the USA",
    "face": "Picasso and Monet",
}


@dataclass(frozen=True)
class Scene:
    """What one caption says: a subject and up to three attributes."""

    subject: str
    caption: str
    colours: tuple[str, ...]
    detail: str = ""  # a count, a direction or a season, where the subject has one

    @property
    def alias(self) -> str | None:
        """A looser name for this kind of picture, as in the evaluation prompts."""
        return ALIASES.get(self.subject)


def _pairs() -> list[tuple[str, str]]:
    return [(a, b) for a in COLOURS for b in COLOURS if a != b]


@lru_cache(maxsize=1)
def all_scenes() -> tuple[Scene, ...]:
    """Every scene the artist knows, in a fixed order (1,096 of them)."""
    scenes = []
    for a, b in _pairs():
        for shape in SHAPES:
            for count in COUNTS:
                noun = shape if count == "one" else shape + "s"
                scenes.append(Scene(shape, f"{count} {a} {noun} on a {b} ground", (a, b), count))
        scenes.append(Scene("field", f"a field of {a} over a field of {b}", (a, b)))
        scenes.append(Scene("grid", f"a grid of {a} lines on {b}", (a, b)))
        scenes.append(Scene("nested", f"nested squares, {a} inside {b}", (a, b)))
        for direction in ("vertical", "horizontal"):
            scenes.append(Scene("stripes", f"{direction} {a} stripes on {b}", (a, b), direction))
        scenes.append(Scene("face", f"a {a} face against {b}", (a, b)))
        scenes.append(Scene("cup", f"a {a} cup of coffee on a {b} table", (a, b)))
        scenes.append(Scene("factory", f"a {a} factory under a {b} sky", (a, b)))
        scenes.append(Scene("boat", f"a {a} boat on a {b} sea", (a, b)))
        scenes.append(Scene("flag", f"a flag with {a} stripes and a {b} corner", (a, b)))
    for season in SEASONS:
        for sky in COLOURS:
            scenes.append(Scene("tree", f"a tree in {season} under a {sky} sky", (sky,), season))
    return tuple(scenes)


def _fingerprint(scene: Scene) -> str:
    return hashlib.sha256(scene.caption.encode()).hexdigest()


@lru_cache(maxsize=1)
def held_out_scenes() -> tuple[Scene, ...]:
    """The `HELD_OUT_COUNT` scenes whose captions no model meets in training, chosen by hash."""
    return tuple(sorted(all_scenes(), key=_fingerprint)[:HELD_OUT_COUNT])


@lru_cache(maxsize=1)
def training_scenes() -> tuple[Scene, ...]:
    """All other scenes, in their fixed order."""
    held_out = set(held_out_scenes())
    return tuple(scene for scene in all_scenes() if scene not in held_out)


@lru_cache(maxsize=1)
def _by_caption() -> dict[str, Scene]:
    return {scene.caption: scene for scene in all_scenes()}


def scene_of(caption: str) -> Scene | None:
    """The scene a caption describes word for word, or None."""
    return _by_caption().get(" ".join(caption.split()))


def subject_of(caption: str) -> str | None:
    """The subject a caption names, also where its other words match no scene (`a red red boat`)."""
    words = set(caption.replace(",", " ").lower().split())
    for subject, signs in {
        "circle": {"circle", "circles"},
        "triangle": {"triangle", "triangles"},
        "nested": {"nested"},
        "square": {"square", "squares"},
        "field": {"field"},
        "grid": {"grid"},
        "flag": {"flag"},
        "stripes": {"vertical", "horizontal"},
        "face": {"face"},
        "cup": {"cup"},
        "factory": {"factory"},
        "boat": {"boat"},
        "tree": {"tree"},
    }.items():
        if words & signs:
            return subject
    return None


def sample_scene(rng: random.Random, scenes: tuple[Scene, ...] | None = None) -> Scene:
    """A scene at random: half of the time one of the countable shapes, else any other subject."""
    groups: dict[bool, list[Scene]] = {True: [], False: []}
    for scene in scenes or training_scenes():
        groups[scene.subject in SHAPES].append(scene)
    return rng.choice(groups[rng.random() < 0.5] or [*groups[True], *groups[False]])


class _Canvas:
    """Pillow's drawing calls in units of the final picture (0..128), with a hand that varies."""

    def __init__(self, rng: random.Random, ground: str) -> None:
        self.rng = rng
        self._shades: dict[str, Colour] = {}
        side = SIZE_PX * SUPERSAMPLING
        self.image = Image.new("RGB", (side, side), self.shade(ground))
        self._draw = ImageDraw.Draw(self.image)

    def shade(self, colour: str | Colour) -> Colour:
        """This picture's shade of a colour: the named value, a little off, the same all over."""
        key = str(colour)
        if key not in self._shades:
            red, green, blue = COLOURS[colour] if isinstance(colour, str) else colour
            self._shades[key] = (
                _byte(red + self.rng.randint(-10, 10)),
                _byte(green + self.rng.randint(-10, 10)),
                _byte(blue + self.rng.randint(-10, 10)),
            )
        return self._shades[key]

    def jitter(self, value: float, spread: float) -> float:
        return value + self.rng.uniform(-spread, spread)

    def box(self, x: float, y: float, width: float, height: float, colour: str | Colour) -> None:
        k = SUPERSAMPLING
        self._draw.rectangle((x * k, y * k, (x + width) * k - 1, (y + height) * k - 1), fill=self.shade(colour))

    def disc(self, x: float, y: float, rx: float, ry: float, colour: str | Colour) -> None:
        k = SUPERSAMPLING
        self._draw.ellipse(((x - rx) * k, (y - ry) * k, (x + rx) * k, (y + ry) * k), fill=self.shade(colour))

    def polygon(self, points: list[Point], colour: str | Colour) -> None:
        self._draw.polygon([(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in points], fill=self.shade(colour))

    def arc(self, x: float, y: float, radius: float, start: float, end: float, width: float, colour: str) -> None:
        k = SUPERSAMPLING
        box = ((x - radius) * k, (y - radius) * k, (x + radius) * k, (y + radius) * k)
        self._draw.arc(box, start, end, fill=self.shade(colour), width=round(width * k))


def _byte(value: int) -> int:
    return max(0, min(255, value))


def _contrast(*taken: str) -> str:
    """Black or white, whichever is not among the picture's own colours (black first)."""
    return "black" if "black" not in taken else "white"


def _shape(canvas: _Canvas, shape: str, x: float, y: float, radius: float, colour: str) -> None:
    if shape == "circle":
        canvas.disc(x, y, radius, radius, colour)
    elif shape == "square":
        canvas.box(x - 0.9 * radius, y - 0.9 * radius, 1.8 * radius, 1.8 * radius, colour)
    else:
        height = 1.15 * radius
        canvas.polygon([(x, y - height), (x - 1.15 * radius, y + 0.85 * height), (x + 1.15 * radius, y + 0.85 * height)], colour)


def _draw_shapes(canvas: _Canvas, scene: Scene) -> None:
    places: dict[str, tuple[list[Point], float]] = {
        "one": ([(64, 64)], 34),
        "two": ([(36, 64), (92, 64)], 22),
        "three": ([(64, 36), (34, 90), (94, 90)], 20),
    }
    points, radius = places[scene.detail]
    for x, y in points:
        _shape(canvas, scene.subject, canvas.jitter(x, 4), canvas.jitter(y, 4), canvas.jitter(radius, 2), scene.colours[0])


def _draw_field(canvas: _Canvas, scene: Scene) -> None:
    horizon = canvas.jitter(64, 8)
    canvas.box(0, 0, 128, horizon, scene.colours[0])


def _draw_grid(canvas: _Canvas, scene: Scene) -> None:
    first, gap, width = canvas.jitter(20, 4), canvas.jitter(29, 1), canvas.jitter(6, 1)
    for i in range(4):
        at = first + i * gap - width / 2
        canvas.box(at, 0, width, 128, scene.colours[0])
        canvas.box(0, at, 128, width, scene.colours[0])


def _draw_nested(canvas: _Canvas, scene: Scene) -> None:
    inside, outside = scene.colours
    ring = _contrast(inside, outside)
    x, y = canvas.jitter(64, 3), canvas.jitter(64, 3)
    for radius, colour in ((46, ring), (40, outside), (24, ring), (18, inside)):
        canvas.box(x - radius, y - radius, 2 * radius, 2 * radius, colour)


def _draw_stripes(canvas: _Canvas, scene: Scene) -> None:
    start, gap = canvas.jitter(10, 4), canvas.jitter(32, 1)
    for i in range(4):
        at, width = start + i * gap, 0.36 * gap
        if scene.detail == "vertical":
            canvas.box(at, 0, width, 128, scene.colours[0])
        else:
            canvas.box(0, at, 128, width, scene.colours[0])


def _draw_face(canvas: _Canvas, scene: Scene) -> None:
    skin, _ = scene.colours
    ink = _contrast(skin)
    x, y, rx, ry = canvas.jitter(64, 4), canvas.jitter(64, 3), canvas.jitter(36, 2), canvas.jitter(46, 2)
    canvas.disc(x, y, rx, ry, skin)
    for side in (-1, 1):
        canvas.disc(x + side * 14, y - 12, 6, 5, ink)
    canvas.polygon([(x - 1, y - 4), (x - 6, y + 12), (x + 4, y + 12)], ink)
    canvas.arc(x, y + 14, 15, 20, 160, 5, ink)


def _draw_cup(canvas: _Canvas, scene: Scene) -> None:
    cup, table = scene.colours
    x, y = canvas.jitter(60, 5), canvas.jitter(40, 3)
    canvas.box(0, 0, 128, 78, (196, 186, 172))
    canvas.box(0, 78, 128, 50, table)
    canvas.arc(x + 28, y + 24, 15, 270, 90, 6, cup)
    canvas.polygon([(x - 30, y), (x + 30, y), (x + 22, y + 56), (x - 22, y + 56)], cup)
    canvas.disc(x, y, 30, 8, (92, 56, 30))
    for side in (-10, 8):
        canvas.arc(x + side, y - 20, 7, 90, 270, 3, "white")


def _draw_factory(canvas: _Canvas, scene: Scene) -> None:
    walls, _ = scene.colours
    x, top = canvas.jitter(18, 4), canvas.jitter(72, 3)
    canvas.box(0, 112, 128, 16, (110, 110, 112))
    for i in range(3):
        left = x + 30 * i
        canvas.polygon([(left, top), (left + 30, top - 16), (left + 30, top)], walls)
    canvas.box(x, top, 90, 112 - top, walls)
    for left in (x + 8, x + 34):
        canvas.box(left, top - 48, 11, 50, walls)
        canvas.disc(left + 12, top - 54, 12, 7, (170, 170, 172))
    ink = _contrast(walls)
    for i in range(3):
        canvas.box(x + 10 + 26 * i, top + 14, 14, 12, ink)


def _draw_boat(canvas: _Canvas, scene: Scene) -> None:
    hull, sea = scene.colours
    x, y = canvas.jitter(64, 8), canvas.jitter(82, 3)
    canvas.box(0, 0, 128, 84, (200, 220, 232))
    canvas.box(0, 84, 128, 44, sea)
    canvas.box(x - 2, y - 62, 4, 64, (92, 56, 30))
    canvas.polygon([(x + 4, y - 60), (x + 4, y - 10), (x + 36, y - 10)], (250, 248, 240))
    canvas.polygon([(x - 4, y - 52), (x - 4, y - 10), (x - 28, y - 10)], (250, 248, 240))
    canvas.polygon([(x - 44, y - 4), (x + 44, y - 4), (x + 28, y + 20), (x - 28, y + 20)], hull)


def _draw_flag(canvas: _Canvas, scene: Scene) -> None:
    stripes, corner = scene.colours
    x, y = canvas.jitter(20, 3), canvas.jitter(22, 3)
    canvas.box(0, 0, 128, 128, (206, 202, 192))
    canvas.box(x - 6, y - 8, 5, 114, (92, 56, 30))
    cloth = _contrast(stripes) if stripes == "white" else "white"
    canvas.box(x, y, 94, 63, cloth)
    for i in range(0, 7, 2):
        canvas.box(x, y + 9 * i, 94, 9, stripes)
    canvas.box(x, y, 40, 36, corner)


def _draw_tree(canvas: _Canvas, scene: Scene) -> None:
    leaves, ground = SEASONS[scene.detail]
    x, y = canvas.jitter(64, 6), canvas.jitter(50, 3)
    canvas.box(0, 104, 128, 24, ground)
    canvas.box(x - 6, y, 12, 108 - y, (92, 56, 30))
    if scene.detail == "winter":
        for angle in (-150, -125, -90, -55, -30):
            dx, dy = 36 * math.cos(math.radians(angle)), 36 * math.sin(math.radians(angle))
            canvas.polygon([(x - 3, y + 8), (x + 3, y + 8), (x + dx + 1, y + dy), (x + dx - 1, y + dy)], (92, 56, 30))
            canvas.disc(x + dx, y + dy, 6, 5, leaves)
        return
    for dx, dy, radius in ((0, -8, 28), (-20, 6, 20), (20, 6, 20)):
        canvas.disc(x + dx, y + dy, radius, radius, leaves)


_ARTISTS: dict[str, Callable[[_Canvas, Scene], None]] = {
    "circle": _draw_shapes,
    "square": _draw_shapes,
    "triangle": _draw_shapes,
    "field": _draw_field,
    "grid": _draw_grid,
    "nested": _draw_nested,
    "stripes": _draw_stripes,
    "face": _draw_face,
    "cup": _draw_cup,
    "factory": _draw_factory,
    "boat": _draw_boat,
    "flag": _draw_flag,
    "tree": _draw_tree,
}
_GROUNDS = {"nested": (206, 202, 192)}


def draw(scene: Scene, seed: int) -> Image.Image:
    """One drawing, 128x128 RGB. The same scene and seed give the same bytes on every machine."""
    rng = random.Random(f"{seed}:{scene.caption}")
    canvas = _Canvas(rng, scene.colours[-1])
    if scene.subject in _GROUNDS:
        canvas.box(0, 0, 128, 128, _GROUNDS[scene.subject])
    _ARTISTS[scene.subject](canvas, scene)
    return canvas.image.reduce(SUPERSAMPLING)
