"""Why this checkpoint: the same table for a terminal, and with a plot as one self-contained page."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import Any

from momalisa.config import Promote, Settings
from momalisa.promotion.decision import UNSEEN, Decision, Evidence, failures, forgotten, seen
from momalisa.quality import paired_difference
from momalisa.report import STYLE, curves
from momalisa.storage import Store
from momalisa.training.run import Plan

COLUMNS = ("checkpoint", "held-out loss", "against the base (95%)", "general", "alignment", "copies", "MMD² x 1000", "verdict")


def rows(settings: Promote, decision: Decision) -> list[tuple[str, ...]]:
    """One for the base and for every checkpoint, in COLUMNS."""
    found = [_row(settings, decision, one) for one in (decision.base, *decision.candidates)]
    return found + [(name, *[""] * (len(COLUMNS) - 2), f"not whole: {why}") for name, why in decision.broken.items()]


def _row(settings: Promote, decision: Decision, one: Evidence) -> tuple[str, ...]:
    against, worse, rate = "", forgotten(decision.base, one), one.copies
    if one.checkpoint:
        delta = paired_difference(decision.base.held_out, one.held_out)
        against = f"{delta.mean:+.5f} ({delta.low:+.5f} to {delta.high:+.5f})"
    return (
        one.name,
        f"{one.loss:.5f}",
        against,
        "" if worse is None or one.checkpoint is None else f"{worse:+.1%}",
        "" if one.alignment is None else f"{one.alignment.mean():.4f}",
        "" if rate is None else f"{rate.share:.0%} ({rate.low:.0%} to {rate.high:.0%})",
        "" if one.mmd is None else f"{one.mmd:.3f}",
        verdict(settings, decision, one),
    )


def verdict(settings: Promote, decision: Decision, one: Evidence) -> str:
    """What became of a checkpoint, in words."""
    if one.checkpoint is None:
        return "the base"
    wrong = "; ".join(failures(settings, decision.base, one))
    unseen = f" ({UNSEEN})" if settings.gate_pictures and one.looked_at and one.copies is None else ""
    if decision.best is one:
        return f"best: {decision.reason}" + (f" (although {wrong})" if wrong else "") + unseen
    return wrong or (f"passes{unseen}" if one.looked_at else "passes as far as it was measured")


def table(settings: Promote, decision: Decision) -> str:
    """The table as text, for a terminal of 160 columns."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(*COLUMNS, show_lines=False)
    for row in rows(settings, decision):
        shown.add_row(*row, style="bold" if decision.best and row[0] == decision.best.name else None)
    sink = io.StringIO()
    Console(file=sink, width=160, highlight=False).print(shown)
    return "\n".join([sink.getvalue() + _votes(decision), *_lengths(decision)]) + "\n"


def _votes(decision: Decision) -> str:
    said = decision.votes
    if said.over_leader is None:
        return f"{said.count} votes"
    mean, low, high = said.over_leader
    return f"{said.count} votes; {said.strongest} over the scores' leader by {mean:+.2f} log odds ({low:+.2f} to {high:+.2f})"


def _lengths(decision: Decision) -> list[str]:
    """Which length of the average has the lowest held-out loss; nothing where none was tried."""
    tried = [one for one in decision.candidates if one.length is not None]
    if not tried:
        return []
    best = min(tried, key=lambda one: one.loss)
    own = next(one for one in decision.candidates if one.length is None and seen(one) == seen(best))
    losses = ", ".join(f"{one.length:g}: {one.loss:.5f}" for one in tried)
    winner = "training's own" if own.loss <= best.loss else f"{best.length:g}"
    return [
        f"Lengths of the average at {seen(best)} images (sigma_rel: held-out loss): {losses}; training's own: {own.loss:.5f}. "
        f"Best: {winner}"
    ]


def page(settings: Settings, decision: Decision, losses: Sequence[tuple[int, float]]) -> str:
    """The report as HTML. `losses`: (images seen, training loss)."""
    chosen = settings.promote
    title = html.escape(f"{settings.name}: {decision.best.name if decision.best else 'nothing to promote'}")
    head = "".join(f"<th>{name}" for name in COLUMNS)
    lines = ["".join(f"<td>{html.escape(cell)}" for cell in row) for row in rows(chosen, decision)]
    best = decision.best.name if decision.best else None
    body = "".join(
        f"<tr{' style=font-weight:bold' if name == best else ''}>{line}</tr>"
        for line, (name, *_) in zip(lines, rows(chosen, decision), strict=True)
    )
    plots = "<h2>Loss</h2>" + curves(losses, decision.curve)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}body{{max-width:1300px}}</style>"
        f"<h1>{title}</h1><p class=lede>{html.escape(decision.reason)}</p>{plots}{_plots(chosen, decision)}"
        f"<h2>The table</h2><table><tr>{head}</tr>{body}</table>"
        + "".join(f"<p>{html.escape(line)}</p>" for line in (_votes(decision), *_lengths(decision)))
    )


def _plots(settings: Promote, decision: Decision) -> str:
    """The gates over images seen, each with its limit."""
    own = [one for one in decision.candidates if one.length is None]
    rates = [(seen(one), rate.share) for one in own if (rate := one.copies)]
    general = [(seen(one), worse) for one in own if (worse := forgotten(decision.base, one)) is not None]
    parts = [
        ("Copies of training pictures, as a share of its pictures", rates, settings.copy_rate),
        ("General captions: loss against the base's", general, settings.general_tolerance),
    ]
    return "".join(f"<h2>{title}</h2>{_plot(points, limit)}" for title, points, limit in parts if points)


def _plot(points: Sequence[tuple[int, float]], limit: float) -> str:
    width, height, left, bottom = 960, 180, 60, 40
    top, low = max([limit, *(y for _, y in points)]) * 1.1 or 1.0, min([0.0, *(y for _, y in points)])
    span, right = top - low, max(x for x, _ in points) or 1

    def across(x: float) -> float:
        return left + x / right * (width - left - 20)

    def down(y: float) -> float:
        return 10 + (top - y) / span * (height - bottom - 10)

    dots = "".join(f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="4" fill="#b5432a"/>' for x, y in points)
    line = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in points)
    marks = "".join(
        f'<text x="{left - 8}" y="{down(y) + 4:.1f}" text-anchor="end">{y:.0%}</text>' for y in sorted({low, limit, top})
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" style="width:100%;background:#fff;border:1px solid #ddd5c3;font:12px system-ui">'
        f'<line x1="{left}" x2="{width - 20}" y1="{down(limit):.1f}" y2="{down(limit):.1f}" stroke="#8a8f98" '
        f'stroke-dasharray="4"/><polyline points="{line}" fill="none" stroke="#b5432a" stroke-width="2"/>{dots}{marks}'
        f'<text x="{width - 20}" y="{height - 12}" text-anchor="end">images seen (to {right}); dashed: the limit</text></svg>'
    )


def facts(settings: Promote, decision: Decision) -> dict[str, Any]:
    """The same for programs."""
    return {
        "best": decision.best.name if decision.best else None,
        "reason": decision.reason,
        "votes": decision.votes.count,
        "checkpoints": [dict(zip(COLUMNS, row, strict=True)) for row in rows(settings, decision)],
    }


def write(settings: Settings, planned: Plan, decision: Decision) -> str:
    """Write reports/<run>/promotion.html and .json; returns the page's address."""
    store = Store(settings.root)
    newest = decision.candidates[-1].checkpoint if decision.candidates else None
    losses = [(int(x), float(y)) for x, y in (newest.training.get("losses", []) if newest else [])]
    store.write_json(f"reports/{planned.name}/promotion.json", facts(settings.promote, decision))
    store.write_bytes(f"reports/{planned.name}/promotion.html", page(settings, decision, losses).encode())
    return store.url(f"reports/{planned.name}/promotion.html")
