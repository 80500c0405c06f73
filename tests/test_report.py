"""The report: what a run came to, safely quoted, in one file."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from momalisa import config, report
from momalisa.config import Settings
from momalisa.dataset import Dataset
from momalisa.records import DUPLICATES, IMAGES, REJECTED, Artwork
from momalisa.storage import Store

HOSTILE = "<script>alert('x')</script>\"&"
SCORES = {
    "heldout_loss_base": 0.5,
    "heldout_loss_best": 0.25,
    "heldout_loss_delta_ci95": [-0.3, -0.2],
    "heldout_curve": [[0, 0.5], [64, 0.25]],
    "mmd_base": 12.5,
    "mmd_best": 3.5,
    "mmd_collection": None,
}


def stage(name: str, **more: Any) -> dict[str, Any]:
    return {"stage": name, "rows_in": 5, "rows_out": 4, "rejected": 1, "new": 4, "seconds": 1.25, "rows_per_s": 3.2, **more}


STAGES = [
    stage("collect"),
    stage("train", run="demo-1", losses=[[32, 0.9], [64, 0.7]]),
    stage("promote", checkpoint="checkpoints/demo-1/000000064", scores=SCORES),
]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    made = Settings(name="demo", root=str(tmp_path), train=config.Train(evaluation_prompts=(f"a boat {HOSTILE}",)))
    dataset = Dataset(made.dataset)
    good = Artwork(id="good", bytes=b"x", title="A good one")
    bad = Artwork(id=f"bad{HOSTILE}", status=REJECTED, error=f"not a picture {HOSTILE}", title=f"Title {HOSTILE}")
    dataset.publish(dataset.latest().with_images([dataset.put_rows("images", [good.row(), bad.row()], IMAGES)]))
    return made


def test_a_run_without_anything_new_leaves_the_report_of_the_one_before(settings: Settings) -> None:
    first = report.write(settings, STAGES, 61.26)
    before = Store(settings.root).read_bytes("report.html")
    again = report.write(settings, [{**done, "new": 0, "seconds": 0.0} for done in STAGES], 2.0)
    assert not again["new"]
    assert again["elapsed_s"] == first["elapsed_s"]
    assert Store(settings.root).read_bytes("report.html") == before


def test_the_summary_has_the_figures(settings: Settings) -> None:
    figures = report.write(settings, STAGES, 61.26)
    assert figures.pop("new")
    assert figures["report"] == f"{settings.root}/report.html"
    assert Store(settings.root).read_json("summary.json") == figures
    assert figures["elapsed_s"] == 61.3
    assert figures["checkpoint"] == "checkpoints/demo-1/000000064"
    assert figures["stages"][0] == stage("collect")
    assert set(figures) == {"name", "stages", "checkpoint", "elapsed_s", "report", *report.SCORES}
    assert (figures["mmd_best"], figures["mmd_collection"]) == (3.5, None)


def test_the_page_quotes_what_a_museum_may_have_written(settings: Settings) -> None:
    report.write(settings, STAGES, 61.0)
    page = Store(settings.root).read_bytes("report.html").decode()
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;&quot;&amp;") == 4  # id, title, error, prompt
    assert "A good one" not in page  # only what could not be used


def test_the_page_shows_stages_scores_and_pictures_inside_itself(settings: Settings) -> None:
    store, sink = Store(settings.root), io.BytesIO()
    Image.new("RGB", (4, 4)).save(sink, "PNG")
    for name in ("contact", "evaluation", "000000064"):
        store.write_bytes(f"reports/demo-1/{name}.png", sink.getvalue())
    report.write(settings, STAGES, 61.0)
    page = store.read_bytes("report.html").decode()
    assert page.count("data:image/png;base64,") == 2  # not each time's own sheet
    assert "No contact sheet" not in page
    assert all(source.startswith("data:") for source in re.findall(r"(?:src|href)=[\"']?([^\"' >]*)", page))
    for text in (
        "61 seconds",
        "<td>collect<td class=n>5<td class=n>4<td class=n>1<td class=n>1.2<td class=n>3.2<",
        "-0.3 to -0.2",
        ">3.5<",
    ):
        assert text in page
    assert "the collection to more of itself" not in page  # not measured


def test_a_run_without_pictures_or_rejections_says_so(tmp_path: Path) -> None:
    settings = Settings(root=str(tmp_path))
    page = report.page(settings, STAGES, report.summary(settings, STAGES, 600.0))
    assert "10.0 minutes" in page
    assert "No contact sheet" in page
    assert "<p>None.</p>" in page


def test_the_page_says_what_is_a_duplicate_of_what(settings: Settings) -> None:
    dataset = Dataset(settings.dataset)
    row = {"id": "good", "duplicate_of": f"other{HOSTILE}", "kind": "near", "distance": 3, "correlation": 0.97}
    dataset.publish(replace(dataset.latest(), duplicates=(dataset.put_rows("duplicates", [row], DUPLICATES),)))
    assert len(report.rejected(settings)) == 2
    page = report.page(settings, STAGES, report.summary(settings, STAGES, 1.0))
    assert "<td>good<td>A good one<td>near duplicate of other&lt;script&gt;" in page


def test_many_rejections_are_cut() -> None:
    rows = [{"id": str(i), "title": "", "error": "x"} for i in range(205)]
    assert "... and 5 more" in report._rejected(rows)


@pytest.mark.parametrize("points", [[], [(0, 0.5)], [(10, 1.0), (20, 1.0)], [(5, 3.0), (20, -1.0)]])
def test_curves_stay_inside_their_frame(points: list[tuple[int, float]]) -> None:
    drawn = report.curves(points, points[:1])
    for x, y in re.findall(r"(-?[\d.]+),(-?[\d.]+)", " ".join(re.findall(r'points="([^"]*)"', drawn))):
        assert 60 <= float(x) <= 950
        assert 10 <= float(y) <= 260
