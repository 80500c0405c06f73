"""The dataset card: what a version holds, for people. One self-contained HTML file, and its contact sheet as PNG."""

from __future__ import annotations

import base64
import hashlib
import html
import io
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from PIL import Image

from momalisa.contact_sheet import contact_sheet
from momalisa.dataset import Dataset, Version
from momalisa.dataset.inventory import inventory, megabytes
from momalisa.records import OK
from momalisa.report import STYLE
from momalisa.storage import Store

SHEET = (8, 5)  # columns and rows of the contact sheet
LISTED = 40  # lines of a table at most
ASPECTS = (0.0, 0.5, 0.67, 0.8, 0.95, 1.05, 1.25, 1.5, 2.0, float("inf"))  # width / height
CHARTS = """
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:1rem} .charts figure{background:#fff;
border:1px solid #ddd5c3;padding:.8rem 1rem} figcaption{font:13px system-ui,sans-serif;color:#665;margin-bottom:.4em}
svg{width:100%;display:block;font:11px system-ui,sans-serif} .card{flex-basis:100px} code{font-size:.85em}
td{overflow-wrap:anywhere}
"""


def write(dataset: Dataset, version: Version, name: str, captioner_id: str | None, store: Store, column: str = "short") -> None:
    """Write `index.html` and `contact.png`. `column`: which of the captioner's texts."""
    sheet = png(picture_sheet(dataset, version))
    store.write_bytes("contact.png", sheet)
    store.write_bytes("index.html", page(dataset, version, name, captioner_id, sheet, column).encode())


def page(dataset: Dataset, version: Version, name: str, captioner_id: str | None, sheet: bytes, column: str = "short") -> str:
    """The card as HTML, pictures inside."""
    found = inventory(dataset, version)
    works = [row for rows in dataset.columns(version.images) for row in rows]
    good = sorted((row for row in works if row["status"] == OK), key=lambda row: row["id"])
    texts = dataset.texts(version, captioner_id, column) if captioner_id else {}
    edits, again = dataset.edits(version), [row for rows in dataset.columns(version.duplicates) for row in rows]
    title, data = html.escape(name), base64.b64encode(sheet).decode()
    sections = [
        f"<h1>{title}: the collection</h1><p class=lede>Version <code>{version.sha256[:12]}</code>. "
        f"The same version has the same card.</p>",
        cards(found, texts),
        f'<h2>A sample</h2><figure><img alt="{title}: a sample of its works" src="data:image/png;base64,{data}"></figure>',
        "<h2>Sizes, shapes, words</h2>" + charts(good, texts, captioner_id, edits),
        "<h2>Captions</h2>" + captions(good, texts, edits),
        "<h2>Rights</h2>" + rights(good),
        "<h2>Works that could not be used</h2>" + rejected(found["rejected"]),
        "<h2>The same picture again</h2>" + duplicates(again),
        "<h2>Tables</h2>" + families(found["families"]),
    ]
    body = "\n".join(sections)
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{title}: the collection</title>"
    return f"<!doctype html><html lang=en>{head}<style>{STYLE}{CHARTS}</style>{body}"


def cards(found: dict[str, Any], texts: dict[str, str]) -> str:
    figures = {
        "works": f"{found['works']:,}",
        "could not be used": f"{sum(one['works'] for one in found['rejected'].values()):,}",
        "the same picture again": f"{found['duplicates']:,}",
        "captions to train on": f"{len(texts):,}",
        "of them by a curator": f"{found['edits']:,}",
        "on disk": megabytes(sum(family["bytes"] for family in found["families"].values())),
    }
    boxes = (f"<div class=card><b>{value}</b><span>{label}</span></div>" for label, value in figures.items())
    return f"<div class=cards>{''.join(boxes)}</div>"


def charts(good: Sequence[dict[str, Any]], texts: dict[str, str], captioner_id: str | None, edits: dict[str, str]) -> str:
    sides = [max(row["width"], row["height"]) for row in good]
    shapes = [row["width"] / row["height"] for row in good if row["height"]]
    words = [len(text.split()) for text in texts.values()]
    by = f"by {captioner_id}" if captioner_id else "no captioner"
    by += f" and, {len(edits)} of them, by a curator" if edits else ""
    drawn = [
        (bars(counted(sides, edges(sides))), "longer side, pixels"),
        (bars(counted(shapes, ASPECTS)), "width / height: upright left of 1, wide right of it"),
        (bars(counted(words, edges(words))), f"words in a caption, {html.escape(by)}"),
    ]
    return (
        "<div class=charts>"
        + "".join(f"<figure><figcaption>{label}</figcaption>{svg}</figure>" for svg, label in drawn)
        + "</div>"
    )


def edges(values: Sequence[float], bins: int = 10) -> tuple[float, ...]:
    """Even borders at whole numbers around all values, at most `bins` + 1 wide steps."""
    low, high = (int(min(values)), int(max(values))) if values else (0, 1)
    step = max(1, -(-(high - low + 1) // bins))
    return tuple(float(low + step * n) for n in range((high - low) // step + 2))


def counted(values: Sequence[float], borders: Sequence[float]) -> list[tuple[str, int]]:
    """[(label, count)]: each value in the bin from its border up to, but not including, the next."""
    return [(_span(low, high), sum(low <= value < high for value in values)) for low, high in pairwise(borders)]


def _span(low: float, high: float) -> str:
    if high == float("inf"):
        return f"≥ {low:g}"
    whole = low == int(low) and high == int(high)
    if whole and low > 0:
        return f"{low:g}" if high - low == 1 else f"{low:g}–{high - 1:g}"
    return f"< {high:g}" if low == 0 else f"{low:g}–{high:g}"


def bars(counts: Sequence[tuple[str, int]]) -> str:
    """A bar chart as SVG; each bar says its number, and its range on the axis."""
    if not any(count for _, count in counts):
        return "<p>None.</p>"
    height, step, base = 190, 46, 140
    most, width = max(count for _, count in counts), step * len(counts) + 36
    parts = []
    for place, (label, count) in enumerate(counts):
        x, tall = 32 + place * step, count / most * (base - 22)
        middle = x + (step - 6) / 2
        parts.append(f'<rect x="{x}" y="{base - tall:.1f}" width="{step - 6}" height="{tall:.1f}" fill="#b5432a"/>')
        said = f"{count:,}" if count else ""
        parts.append(f'<text x="{middle:.0f}" y="{base - tall - 5:.1f}" text-anchor="middle" fill="#665">{said}</text>')
        turned = f'transform="rotate(-32 {middle:.0f} {base + 14})" text-anchor="end"'
        parts.append(f'<text x="{middle + 4:.0f}" y="{base + 16}" {turned}>{html.escape(label)}</text>')
    axis = f'<line x1="28" y1="{base}" x2="{width - 4}" y2="{base}" stroke="#8a8f98"/>'
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}{axis}</svg>'


def captions(good: Sequence[dict[str, Any]], texts: dict[str, str], edits: dict[str, str]) -> str:
    """A curator's first, then a sample of the captioner's."""
    described = [row for row in good if row["id"] in texts]
    own = sample([row for row in described if row["id"] in edits], LISTED // 4)
    rest = sample([row for row in described if row["id"] not in edits], LISTED // 2)
    lines = [
        (row["id"], row["title"], texts[row["id"]], by) for rows, by in ((own, "curator"), (rest, "captioner")) for row in rows
    ]
    return table(("work", "title", "caption", "by"), lines)


def rights(good: Sequence[dict[str, Any]]) -> str:
    said = Counter(row["rights"].strip() or "nothing is said" for row in good)
    lede = "<p class=lede>As the source gives them. You need permission for what you train on and show.</p>"
    credits = Counter(row["credit"].strip() or "no credit line" for row in good)
    return lede + tally(said, "rights", "works") + tally(credits, "credit line", "works")


def tally(counts: dict[str, int], label: str, unit: str) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return table((label, unit), [(text, f"{count:,}") for text, count in ordered], numbers={1})


def rejected(found: dict[str, dict[str, Any]]) -> str:
    lines = [(reason, one["example"], f"{one['works']:,}") for reason, one in found.items()]
    return table(("why", "for example", "works"), lines, numbers={2})


def duplicates(rows: Sequence[dict[str, Any]]) -> str:
    lines = [(row["id"], row["duplicate_of"], row["kind"]) for row in sorted(rows, key=lambda row: row["id"])]
    return table(("work", "is again", "how"), lines)


def families(found: dict[str, dict[str, int]]) -> str:
    lines = [
        (folder, f"{family['rows']:,}", f"{family.get('failed', 0):,}", f"{family['tables']:,}", megabytes(family["bytes"]))
        for folder, family in found.items()
    ]
    return table(("family", "rows", "without a result", "tables", "size"), lines, numbers={1, 2, 3, 4})


def table(head: Sequence[str], lines: Sequence[Sequence[str]], numbers: set[int] | frozenset[int] = frozenset()) -> str:
    if not lines:
        return "<p>None.</p>"

    def row(cells: Sequence[str], tag: str) -> str:
        marks = (f"<{tag} class=n>" if place in numbers else f"<{tag}>" for place in range(len(cells)))
        return "<tr>" + "".join(mark + html.escape(str(cell)) for mark, cell in zip(marks, cells, strict=True)) + "</tr>"

    more = f"<p>... and {len(lines) - LISTED:,} more.</p>" if len(lines) > LISTED else ""
    return f"<table>{row(head, 'th')}{''.join(row(line, 'td') for line in lines[:LISTED])}</table>{more}"


def sample(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Chosen by the hash of the id, so that a collection that grows keeps most of them; in order of id."""
    ordered = sorted(rows, key=lambda row: hashlib.sha256(row["id"].encode()).hexdigest())
    return sorted(ordered[:count], key=lambda row: str(row["id"]))


def picture_sheet(dataset: Dataset, version: Version, side_px: int = 120) -> Image.Image:
    """A sample of the good pictures, side by side; only tables that hold some of them are read whole."""
    columns, lines = SHEET
    paths = sorted(version.images)
    tables = dict(zip(paths, dataset.columns(paths, ["id", "status"]), strict=True))
    chosen = {
        row["id"] for row in sample([row for rows in tables.values() for row in rows if row["status"] == OK], columns * lines)
    }
    read = [path for path, rows in tables.items() if chosen & {row["id"] for row in rows}]
    found = {row["id"]: row["bytes"] for row in dataset.rows(read, ["id", "bytes"]) if row["id"] in chosen and row["bytes"]}
    pictures = [_small(found[id], side_px) for id in sorted(found)]
    if not pictures:
        return Image.new("RGB", (side_px, side_px), "white")
    return contact_sheet([("", pictures[start : start + columns]) for start in range(0, len(pictures), columns)], side_px)


def _small(data: bytes, side_px: int) -> Image.Image:
    with Image.open(io.BytesIO(data)) as picture:
        small = picture.convert("RGB")
    small.thumbnail((2 * side_px, 2 * side_px))
    return small


def png(picture: Image.Image) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, "PNG", optimize=True)
    return sink.getvalue()
