"""What a run came to, for people (report.html, one self-contained file) and for programs (summary.json)."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from typing import Any

from momalisa.config import Settings
from momalisa.contact_sheet import SHEET
from momalisa.dataset import Dataset
from momalisa.records import OK
from momalisa.storage import Store

STYLE = """
:root{color-scheme:light}
body{font:16px/1.55 Georgia,serif;color:#222;background:#f6f3ec;margin:0 auto;max-width:1060px;padding:2.5rem 1.5rem}
h1{font-weight:normal;font-size:2.4rem;margin:0 0 .2em}
h2{font-weight:normal;margin:2.2em 0 .5em;border-bottom:1px solid #cbc3b1}
table{border-collapse:collapse;width:100%;font:14px/1.5 system-ui,sans-serif} th,td{text-align:left;padding:.35em .8em .35em 0;
border-bottom:1px solid #e2dccd;vertical-align:top} td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.lede{color:#665;font-style:italic} figure{margin:0;display:inline-block}
img{max-width:100%;background:#fff;border:1px solid #ddd5c3}
.cards{display:flex;flex-wrap:wrap;gap:1rem} .card{background:#fff;border:1px solid #ddd5c3;padding:1rem 1.2rem;flex:1 1 200px}
.card b{display:block;font-size:1.7rem;font-weight:normal} .card span{color:#665;font:13px system-ui,sans-serif}
"""


def summary(settings: Settings, stages: Sequence[dict[str, Any]], elapsed_s: float) -> dict[str, Any]:
    """The figures of a whole run: stages (rows in, out, rejected, seconds), the scores, the time."""
    scores = stages[-1].get("scores", {})
    kept = {key: scores.get(key) for key in SCORES}
    kept_of_stage = ("stage", "rows_in", "rows_out", "rejected", "duplicates", "new", "seconds", "rows_per_s")
    rows = [{key: stage[key] for key in kept_of_stage if key in stage} for stage in stages]
    return {
        "name": settings.name,
        "stages": rows,
        "checkpoint": stages[-1].get("checkpoint"),
        "elapsed_s": round(elapsed_s, 1),
        "report": Store(settings.root).url("report.html"),
        **kept,
    }


SUMMARY = "summary.json"
SCORES = (
    "heldout_loss_base", "heldout_loss_best", "heldout_loss_delta_ci95", "general_change", "alignment_base", "alignment_best",
    "copy_rate_base", "copy_rate_best", "mmd_base", "mmd_best", "mmd_collection",
)  # fmt: skip


def rejected(settings: Settings) -> list[dict[str, str]]:
    """Works that are a row with an error instead of a picture, or whose picture is another work's again."""
    dataset = Dataset(settings.dataset)
    version = dataset.latest()
    again = {row["id"]: f"{row['kind']} duplicate of {row['duplicate_of']}" for row in dataset.rows(version.duplicates)}
    rows = dataset.rows(version.images, ["id", "title", "status", "error", "image_url"])
    found = [{**row, "error": row["error"] or again.get(row["id"], "")} for row in rows]
    return [row for row in found if row["status"] != OK or row["id"] in again]


def page(settings: Settings, stages: Sequence[dict[str, Any]], figures: dict[str, Any]) -> str:
    """The report as HTML, pictures inside."""
    by_stage = {stage["stage"]: stage for stage in stages}
    run, name = by_stage["train"]["run"], html.escape(settings.name)
    sections = [
        f"<h1>{name}</h1><p class=lede>A collection became a generator in {_duration(figures['elapsed_s'])}.</p>",
        _cards(figures),
        "<h2>Stages</h2>" + _stages(stages),
        "<h2>Base (left of each pair) and fine-tuned (right), equal seeds</h2>",
        _picture(settings, f"reports/{run}/contact.png", "contact sheet"),
        "<h2>Loss</h2>" + curves(by_stage["train"]["losses"], by_stage["promote"]["scores"].get("heldout_curve", [])),
        "<h2>The evaluation prompts while training</h2>" + _evaluations(settings, run),
        "<h2>Works that could not be used</h2>" + _rejected(rejected(settings)),
    ]
    body = "\n".join(sections)
    return f"<!doctype html><html lang=en><meta charset=utf-8><title>{name}</title><style>{STYLE}</style>{body}"


def write(settings: Settings, stages: Sequence[dict[str, Any]], elapsed_s: float) -> dict[str, Any]:
    """Write report.html and summary.json below the root; returns the summary.

    Where no stage had anything new, the report of the run that did stands.
    """
    store = Store(settings.root)
    if store.exists(SUMMARY) and not any(stage["new"] for stage in stages):
        return {**store.read_json(SUMMARY), "new": False}
    figures = summary(settings, stages, elapsed_s)
    store.write_bytes("report.html", page(settings, stages, figures).encode())
    store.write_json(SUMMARY, figures)
    return {**figures, "new": True}


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.1f} minutes"


def _number(value: Any) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, list):
        return " to ".join(_number(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cards(figures: dict[str, Any]) -> str:
    labels = {
        "heldout_loss_base": "held-out loss, base",
        "heldout_loss_best": "held-out loss, fine-tuned",
        "heldout_loss_delta_ci95": "their difference, 95% interval over works",
        "general_change": "loss on general captions against the base's",
        "copy_rate_best": "of its pictures are copies of training pictures",
        "mmd_base": "distance to the collection, base (MMD² x 1000)",
        "mmd_best": "distance to the collection, fine-tuned",
        "mmd_collection": "the collection to more of itself",
    }
    cards = [
        f"<div class=card><b>{_number(figures[key])}</b><span>{label}</span></div>"
        for key, label in labels.items()
        if figures.get(key) is not None
    ]
    return f"<div class=cards>{''.join(cards)}</div>"


def _stages(stages: Sequence[dict[str, Any]]) -> str:
    head = "<tr><th>stage<th class=n>in<th class=n>out<th class=n>rejected<th class=n>seconds<th class=n>per second</tr>"
    rows = [
        f"<tr><td>{stage['stage']}<td class=n>{stage['rows_in']}<td class=n>{stage['rows_out']}"
        f"<td class=n>{stage['rejected']}<td class=n>{stage['seconds']:.1f}<td class=n>{_rate(stage.get('rows_per_s'))}</tr>"
        for stage in stages
    ]
    return f"<table>{head}{''.join(rows)}</table>"


def _rate(rows_per_s: float | None) -> str:
    return f"{rows_per_s:.1f}" if rows_per_s else ""


def _rejected(rows: Sequence[dict[str, str]]) -> str:
    if not rows:
        return "<p>None.</p>"
    head = "<tr><th>id<th>title<th>why</tr>"
    lines = [f"<tr><td>{html.escape(r['id'])}<td>{html.escape(r['title'])}<td>{html.escape(r['error'])}</tr>" for r in rows[:200]]
    more = f"<p>... and {len(rows) - 200} more.</p>" if len(rows) > 200 else ""
    return f"<table>{head}{''.join(lines)}</table>{more}"


def _picture(settings: Settings, path: str, label: str) -> str:
    store = Store(settings.root)
    if not store.exists(path):
        return f"<p>No {html.escape(label)}.</p>"
    data = base64.b64encode(store.read_bytes(path)).decode()
    return f'<figure><img alt="{html.escape(label)}" src="data:image/png;base64,{data}"></figure>'


def _evaluations(settings: Settings, run: str) -> str:
    prompts = "; ".join((*settings.train.evaluation_prompts, *settings.train.more_prompts))
    sheet = _picture(settings, f"reports/{run}/{SHEET}", "evaluation prompts over time")
    return f"<p class=lede>{html.escape(prompts)}</p>{sheet}"


def curves(losses: Sequence[tuple[int, float]], held_out: Sequence[tuple[int, float]]) -> str:
    """Training and held-out loss over images seen, as SVG."""
    width, height, left, bottom = 960, 300, 60, 40
    xs = [point[0] for point in (*losses, *held_out)] or [0]
    ys = [point[1] for point in (*losses, *held_out)] or [0.0]
    x_max, y_min, y_max = max(max(xs), 1), min(ys), max(ys)
    span = (y_max - y_min) or 1.0

    def place(point: Sequence[float]) -> str:
        x = left + point[0] / x_max * (width - left - 10)
        y = 10 + (y_max - point[1]) / span * (height - bottom - 20)
        return f"{x:.1f},{y:.1f}"

    def label(share: float) -> str:
        y = 10 + share * (height - bottom - 20) + 4
        return f'<text x="{left - 8}" y="{y:.0f}" text-anchor="end">{y_max - share * span:.3f}</text>'

    def dot(point: Sequence[float]) -> str:
        x, y = place(point).split(",")
        return f'<circle cx="{x}" cy="{y}" r="4" fill="#b5432a"/>'

    dots, labels = "".join(map(dot, held_out)), "".join(map(label, (0, 0.5, 1)))
    return (
        f'<svg viewBox="0 0 {width} {height}" style="width:100%;background:#fff;border:1px solid #ddd5c3;font:12px system-ui">'
        f'<polyline points="{" ".join(map(place, losses))}" fill="none" stroke="#8a8f98" stroke-width="1.2"/>'
        f'<polyline points="{" ".join(map(place, held_out))}" fill="none" stroke="#b5432a" stroke-width="2"/>{dots}{labels}'
        f'<text x="{width - 12}" y="{height - 12}" text-anchor="end">images seen (0 to {x_max})</text>'
        f'<text x="{left}" y="{height - 12}" fill="#8a8f98">training, each step\'s own noise</text>'
        f'<text x="{left + 220}" y="{height - 12}" fill="#b5432a">held-out works, fixed noise (0: the base)</text></svg>'
    )
