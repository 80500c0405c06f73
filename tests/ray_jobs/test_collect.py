"""The collect job on a real local Ray: the wing, run again, interrupted, and too bad to publish."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from aiohttp import web
from PIL import Image

from momalisa import progress
from momalisa.collect import block
from momalisa.collect.news import Heard
from momalisa.collect.sources import open_source
from momalisa.config import Collect, Settings, Source
from momalisa.dataset import Dataset
from momalisa.miniature import wing
from momalisa.records import CAPTIONS, OK
from momalisa.storage import Store
from ray_jobs import _news, collect
from ray_jobs._job import job
from tests.faulty import Faulty

HOME = Path(__file__).parents[2]
EIGHT = [f"moma-{number}" for number in range(8)]  # ids of a `listing` of so many
integration = [pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]


def settings_for(root: Path, location: object, kind: str = "folder", **changes: Any) -> Settings:
    source = Source.model_validate({"kind": kind, "location": str(location), **changes.pop("source", {})})
    options = {"source": source, "allow_private_addresses": True, "max_side_px": 256, "block_size": 3, "attempts": 1}
    options = {**options, "requests_per_second": 1000, **changes}
    return Settings(root=str(root)).model_copy(update={"collect": Collect.model_validate(options), "ray_cpus_per_task": 0.5})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight pictures, one of them broken."""
    path = tmp_path / "artworks"
    path.mkdir()
    for number in range(8):
        Image.new("RGB", (32, 24), (number * 30, 80, 120)).save(path / f"{number}.png")
    (path / "3.png").write_bytes(b"<html>gone</html>")
    return path


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    with wing.serve_in_thread() as address:
        yield address


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


class TestOnRay:
    pytestmark = integration

    def test_the_wing_is_collected_as_planned(self, tmp_path: Path, base: str, capsys: pytest.CaptureFixture[str]) -> None:
        settings = settings_for(tmp_path / "root", f"{base}/collection.csv", "moma", block_size=40)
        summary = collect.run(settings)
        assert summary | {"seconds": 0, "rows_per_s": 0} == {
            "stage": "collect", "rows_in": 124, "rows_out": 112, "rejected": 12, "duplicates": 0, "new": 124, "replaced": 0,
            "skipped": 0, "not_on_view": 12, "seconds": 0, "rows_per_s": 0,
            "reasons": {"no_picture": 6, "not_a_picture": 5, "not_found": 1},
        }  # fmt: skip
        printed = capsys.readouterr().out.splitlines()
        assert printed[-1].startswith("collect: 124/124 works, 12 rejected")
        assert re.fullmatch(
            r"112 works, 124 new, 12 rejected, 0 duplicates, 12 not on view, \d+ s, [\d.]+ pictures/s", collect.said(summary)
        )
        dataset = Dataset(settings.dataset)
        rows = {row["id"]: row for row in dataset.rows(dataset.latest().images)}
        planned = {f"moma-{record['ObjectID']}" for record, _, _ in wing.exhibits()}
        assert {id for id, row in rows.items() if row["status"] == OK} == planned
        assert all(row["bytes"] if row["status"] == OK else row["error"] and not row["bytes"] for row in rows.values())
        assert {(row["width"], row["height"]) for row in rows.values() if row["status"] == OK} == {(128, 128)}
        assert sum(row["error"] == "no picture" for row in rows.values()) == wing.WITHOUT_PICTURE

    def test_what_is_left_is_told_while_it_goes_on(
        self, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(progress, "EVERY_S", 0.0)
        collect.run(settings_for(tmp_path / "root", folder, source={"limit": 2}))
        assert "collect: 2/2 works" in capsys.readouterr().out
        collect.run(settings_for(tmp_path / "root", folder))
        said = capsys.readouterr().out.splitlines()
        assert re.fullmatch(r"collect: 3/6 works, \d rejected, [\d.]+/s, \d+ s left", said[0])
        assert said[-1].startswith("collect: 6/6 works, 1 rejected")
        lines = (json.dumps({"file_name": f"{number}.png", "title": "Sea"}) for number in range(8))
        (folder / "metadata.jsonl").write_text("\n".join(lines))
        for number in (8, 9):
            Image.new("RGB", (32, 24), (number * 20, 0, 0)).save(folder / f"{number}.png")
        collect.run(settings_for(tmp_path / "root", folder, tasks=1))
        counts = re.findall(r"collect: (\d+)/(\d+) works", capsys.readouterr().out)
        assert counts == [("3", "8"), ("6", "10"), ("9", "10"), ("10", "10")]  # corrections are foreseen once they are dealt

    def test_a_second_run_does_nothing_and_a_later_one_only_what_is_new(
        self, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        settings = settings_for(tmp_path / "root", folder)
        first = collect.run(settings)
        assert (first["rows_in"], first["rows_out"], first["rejected"], first["new"]) == (8, 7, 1, 8)
        store = Dataset(settings.dataset).store
        before = store.list("")
        capsys.readouterr()
        second = collect.run(settings)
        assert capsys.readouterr().out == "collect: nothing new (7 works)\n"
        assert second | {"seconds": 0} == first | {"seconds": 0, "rows_per_s": 0, "new": 0, "skipped": 8, "reasons": {}}
        assert store.list("") == before
        Image.new("RGB", (32, 24), "gold").save(folder / "new.png")
        third = collect.run(settings)
        assert (third["rows_in"], third["rows_out"], third["new"], third["skipped"]) == (9, 8, 1, 8)
        assert set(before) < set(store.list(""))

    def test_the_version_does_not_depend_on_tasks_or_on_the_run(self, tmp_path: Path, folder: Path) -> None:
        versions = []
        for tasks in (1, 2):
            settings = settings_for(tmp_path / f"root{tasks}", folder, tasks=tasks)
            collect.run(settings)
            versions.append(Dataset(settings.dataset).latest().sha256)
        assert versions[0] == versions[1]

    def test_a_run_that_dies_leaves_the_published_version_alone(
        self, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settings = settings_for(tmp_path / "root", folder)
        collect.run(settings_for(tmp_path / "root", folder, source={"limit": 3}))
        store = Dataset(settings.dataset).store
        published, files = store.read_bytes("refs/latest"), store.list("images")
        with monkeypatch.context() as patched:
            patched.setattr(collect.Tally, "judge", interrupted)
            with pytest.raises(KeyboardInterrupt):
                collect.run(settings)
        assert store.read_bytes("refs/latest") == published
        assert len(store.list("images")) > len(files)  # tables that nobody reads
        assert collect.run(settings)["rows_out"] == 7

    def test_too_many_bad_pictures_publish_nothing_and_say_why(self, tmp_path: Path, folder: Path) -> None:
        for number in range(5):
            (folder / f"{number}.png").write_bytes(b"")
        settings = settings_for(tmp_path / "root", folder)
        for _ in range(2):  # what failed is not a result that a second run could take over
            with pytest.raises(
                ValueError, match=r"5 of 8 works were rejected.*max_bad_fraction=0.5.*5 x not_a_picture \(the file is empty\)"
            ):
                collect.run(settings)
            assert Dataset(settings.dataset).latest().images == ()
        collect.run(settings_for(tmp_path / "root", folder, max_bad_fraction=0.7))
        assert Dataset(settings.dataset).latest().images

    def test_when_the_pictures_are_mended_the_same_command_asks_for_them_again(self, tmp_path: Path, folder: Path) -> None:
        for number in range(7):
            (folder / f"{number}.png").write_bytes(b"")
        settings = settings_for(tmp_path / "root", folder)
        with pytest.raises(ValueError, match="7 of 8 works were rejected"):
            collect.run(settings)
        for number in range(7):
            Image.new("RGB", (32, 24), (number * 30, 80, 120)).save(folder / f"{number}.png")
        summary = collect.run(settings)
        assert (summary["rows_in"], summary["rows_out"], summary["new"]) == (8, 8, 8)

    def test_a_killed_run_goes_on_by_gentler_settings_and_judges_all_that_it_stored(
        self, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for number in range(5):
            (folder / f"{number}.png").write_bytes(b"")
        with monkeypatch.context() as patched:
            patched.setattr(collect.Tally, "judge", interrupted)
            with pytest.raises(KeyboardInterrupt):
                collect.run(settings_for(tmp_path / "root", folder))
        capsys.readouterr()
        gentler = {"requests_per_second": 0.5, "user_agent": "momalisa/0.2 (me@museum.example)", "duplicates": "keep"}
        with pytest.raises(ValueError, match=r"5 of 8 works were rejected.*5 x not_a_picture \(the file is empty\)"):
            collect.run(settings_for(tmp_path / "root", folder, **gentler))
        assert "collect: going on after 8 works of a run that was interrupted" in capsys.readouterr().out

    def test_a_resumed_run_counts_what_it_did_itself(
        self, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        settings = settings_for(tmp_path / "root", folder)
        with monkeypatch.context() as patched:
            patched.setattr(collect.Tally, "judge", interrupted)
            with pytest.raises(KeyboardInterrupt):
                collect.run(settings)
        summary = collect.run(settings)
        assert "collect: going on after 8 works of a run that was interrupted" in capsys.readouterr().out
        assert (summary["new"], summary["rows_out"], summary["rows_per_s"]) == (8, 7, 0)
        assert summary["reasons"] == {"not_a_picture": 1}

    def test_a_full_disk_publishes_nothing_and_the_next_run_goes_on(
        self, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As full as the kernel says it is to the process that stores the second block."""
        settings, real, stored = (
            settings_for(tmp_path / "root", folder, tasks=1),
            block.store_block,
            tmp_path / "root" / "dataset",
        )

        def limited(*arguments: Any) -> Any:
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            if (stored / "images").exists():
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
            try:
                return real(*arguments)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

        with monkeypatch.context() as patched:
            patched.setattr(block, "store_block", limited)
            patched.setattr(sys, "argv", ["collect", "--config", str(HOME / "configs" / "demo.yaml")])
            with pytest.raises(SystemExit, match=r"^collect: .*parquet.* bytes to write, .* Nothing was published; .* run again"):
                job("", "collect", lambda _: collect.run(settings), collect.said)
        assert Dataset(settings.dataset).latest().images == ()
        assert not list(stored.rglob("*.partial"))
        summary = collect.run(settings)
        assert (summary["new"], summary["rows_out"]) == (8, 7)

    @pytest.mark.parametrize(("per_host", "tasks"), [(1, 2), (3, 2)])
    def test_connections_to_a_host_are_few_over_all_tasks(self, tmp_path: Path, per_host: int, tasks: int) -> None:
        busy = Busy()
        with wing.serve_in_thread(busy.app) as address:
            path = listing(tmp_path, address, 12)
            collect.run(settings_for(tmp_path / "root", path, "moma", per_host=per_host, tasks=tasks))
        assert busy.asked == {"robots.txt": 1, **{f"{number}.png": 1 for number in range(12)}}  # one robots.txt for all tasks
        assert busy.most_open <= per_host

    def test_requests_to_a_host_are_so_many_a_second_over_all_tasks(self, tmp_path: Path) -> None:
        busy = Busy()
        with wing.serve_in_thread(busy.app) as address:
            path = listing(tmp_path, address, 24)
            collect.run(settings_for(tmp_path / "root", path, "moma", per_host=8, tasks=2, requests_per_second=8))
        assert busy.asked.total() == 25
        assert busy.times[-1] - busy.times[0] >= 23 / 8  # 24 intervals, but for what a request is late
        assert max(sum(start <= at < start + 1 for at in busy.times) for start in busy.times) <= 10

    def test_changed_pictures_replace_what_was_there_and_what_was_made_of_it(self, tmp_path: Path) -> None:
        busy = Busy()
        with wing.serve_in_thread(busy.app) as address:
            path = listing(tmp_path, address, 8)
            settings = settings_for(tmp_path / "root", path, "moma")
            collect.run(settings)
            dataset = Dataset(settings.dataset)
            dataset.publish(dataset.latest().with_captions("blip", [captions(dataset, EIGHT)]))
            before, refresh = dataset.latest(), settings_for(tmp_path / "root", path, "moma", refresh=True)
            busy.asked.clear()
            same = collect.run(refresh)
            assert (same["new"], same["reasons"], busy.asked["3.png"], busy.sent_again) == (0, {"not_modified": 8}, 1, 0)
            assert dataset.latest() == before
            busy.versions["3.png"] = 1
            changed = collect.run(refresh)
            after = dataset.latest()
            assert (changed["new"], changed["rows_in"], changed["rows_out"], busy.sent_again) == (1, 8, 8, 1)
            assert sorted(row["id"] for row in dataset.rows(after.images)) == sorted(EIGHT)
            assert dataset.ids(after.captions["blip"]) == {*EIGHT} - {"moma-3"}
            assert collect.run(refresh)["reasons"] == {"not_modified": 8}  # the copied tables know their validators
            assert busy.sent_again == 1

    def test_a_correction_replaces_a_row_and_only_what_was_made_of_its_words(self, tmp_path: Path) -> None:
        busy = Busy()
        with wing.serve_in_thread(busy.app) as address:
            path = listing(tmp_path, address, 8)
            collect.run(settings_for(tmp_path / "root", path, "moma"))
            refresh = settings_for(tmp_path / "root", path, "moma", refresh=True)
            dataset = Dataset(refresh.dataset)
            dataset.publish(dataset.latest().with_captions("blip", [captions(dataset, EIGHT)]))
            before = {row["id"]: row for row in dataset.rows(dataset.latest().images)}
            path.write_text(path.read_text().replace("\n3,a,", "\n3,Right,").replace("ImageURL", "Department,ImageURL"))
            path.write_text(path.read_text().replace(",b,", ",b,,").replace("\n5,a,b,,", "\n5,a,b,Prints,"))
            summary = collect.run(refresh)
            assert (summary["new"], summary["rows_out"], summary["reasons"]) == (2, 8, {"not_modified": 8})
            before["moma-3"]["title"], before["moma-5"]["department"] = "Right", "Prints"
            after = dataset.latest()
            assert {row["id"]: row for row in dataset.rows(after.images)} == before
            assert dataset.ids(after.captions["blip"]) == before.keys() - {"moma-3"}
            assert collect.run(refresh)["new"] == 0
            assert busy.sent_again == 0

    def test_a_plain_run_takes_corrections_and_asks_no_host(self, tmp_path: Path) -> None:
        busy = Busy()
        busy.missing = {"1.png"}
        with wing.serve_in_thread(busy.app) as address:
            path = listing(tmp_path, address, 8)
            settings = settings_for(tmp_path / "root", path, "moma")
            collect.run(settings)
            dataset = Dataset(settings.dataset)
            dataset.publish(dataset.latest().with_captions("blip", [captions(dataset, EIGHT)]))
            version, files = dataset.latest(), dataset.store.files("")
            busy.asked.clear()
            assert collect.run(settings)["new"] == 0
            assert (dataset.latest(), dataset.store.files("")) == (version, files)
            before = {row["id"]: row for row in dataset.rows(version.images)}
            path.write_text(path.read_text().replace("\n1,a,", "\n1,Gone,").replace("\n3,a,", "\n3,Right,"))
            path.write_text(path.read_text().replace(",ImageURL", ",CreditLine,Weight (kg),ImageURL").replace(",b,", ",b,,7,"))
            path.write_text(path.read_text().replace("\n5,a,b,,", "\n5,a,b,Gift of Ann,"))
            summary = collect.run(settings)
            counts = {"rows_in": 8, "rows_out": 7, "rejected": 1, "new": 3, "replaced": 3, "skipped": 5, "reasons": {}}
            assert {name: summary[name] for name in counts} == counts
            assert collect.said(summary).startswith("7 works, 3 new (3 in place of older rows), 1 rejected, ")
            before["moma-1"]["title"], before["moma-3"]["title"], before["moma-5"]["credit"] = "Gone", "Right", "Gift of Ann"
            after = dataset.latest()
            assert {row["id"]: row for row in dataset.rows(after.images)} == before
            assert dataset.ids(after.captions["blip"]) == before.keys() - {"moma-1", "moma-3"}
            assert collect.run(settings)["new"] == 0
            assert dataset.latest() == after
            assert not busy.asked
            refresh = settings_for(tmp_path / "root", path, "moma", refresh=True)
            assert collect.run(refresh)["reasons"] == {"not_modified": 7}
            assert busy.sent_again == 0

    def test_a_picture_with_another_address_is_fetched_from_there_and_no_other_one_is(self, tmp_path: Path) -> None:
        busy = Busy()
        busy.missing, busy.silent, busy.versions["new.png"] = {"1.png"}, {"silent.png"}, 1
        with wing.serve_in_thread(busy.app) as address:
            path = listing(tmp_path, address, 8)
            settings = settings_for(tmp_path / "root", path, "moma")
            collect.run(settings)
            dataset = Dataset(settings.dataset)
            before = {row["id"]: row for row in dataset.rows(dataset.latest().images)}
            moved = {"1": "found", "3": "new", "5": "moved", "6": "silent"}
            for old, new in moved.items():
                path.write_text(path.read_text().replace(f"/{old}.png", f"/{new}.png"))
            busy.asked.clear()
            summary = collect.run(settings)
            assert busy.asked == {"robots.txt": 1, **{f"{name}.png": 1 for name in moved.values()}}
            assert (summary["rows_in"], summary["rows_out"], summary["new"], summary["skipped"]) == (8, 8, 4, 4)
            after = {row["id"]: row for row in dataset.rows(dataset.latest().images)}
            assert after["moma-1"]["status"] == OK
            assert after["moma-3"]["sha256"] != before["moma-3"]["sha256"]
            for number, name in ((5, "moved"), (6, "silent")):
                assert after[f"moma-{number}"] == before[f"moma-{number}"] | {"image_url": f"{address}/{name}.png"}
            assert collect.run(settings)["new"] == 0
            assert busy.asked.total() == 5
            refresh = settings_for(tmp_path / "root", path, "moma", refresh=True)
            assert collect.run(refresh)["reasons"] == {"not_modified": 8}
            assert busy.sent_again == 0  # what is said back is what was said there

    def test_captions_that_are_published_meanwhile_stay_but_for_corrected_works(
        self, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settings = settings_for(tmp_path / "root", folder)
        collect.run(settings)
        dataset, judge = Dataset(settings.dataset), collect.Tally.judge
        ids = sorted(dataset.ids(dataset.latest().images))
        (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "title": "Red"}\n')

        def published_meanwhile(*arguments: Any) -> None:
            dataset.add("captions/blip", [captions(dataset, ids)], dataset.latest())
            judge(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(collect.Tally, "judge", published_meanwhile)
            assert collect.run(settings)["new"] == 1
        version = dataset.latest()
        red = next(row["id"] for row in dataset.rows(version.images) if row["title"] == "Red")
        assert dataset.ids(version.captions["blip"]) == set(ids) - {red}

    def test_two_runs_that_correct_other_works_at_once_both_count(
        self, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settings = settings_for(tmp_path / "root", folder)
        collect.run(settings)
        dataset = Dataset(settings.dataset)
        before = {row["id"]: row for row in dataset.rows(dataset.latest().images)}
        (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "title": "Red"}\n')
        judge = collect.Tally.judge

        def overtaken(*arguments: Any) -> None:
            monkeypatch.setattr(collect.Tally, "judge", judge)
            (folder / "metadata.jsonl").write_text('{"file_name": "1.png", "title": "Blue"}\n')
            assert collect.run(settings_for(tmp_path / "root", folder, block_size=2))["replaced"] == 1
            judge(*arguments)

        monkeypatch.setattr(collect.Tally, "judge", overtaken)
        assert collect.run(settings)["replaced"] == 1
        after = {row["id"]: row for row in dataset.rows(dataset.latest().images)}
        changed = {row["title"] for id, row in after.items() if row != before[id]}
        assert (after.keys(), changed) == (before.keys(), {"Red", "Blue"})

    def test_corrections_that_are_interrupted_go_on_and_come_to_the_same(
        self, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        settings = settings_for(tmp_path / "root", folder)
        collect.run(settings)
        shutil.copytree(tmp_path / "root", tmp_path / "other")
        lines = (json.dumps({"file_name": f"{number}.png", "title": "Sea"}) for number in range(8))
        (folder / "metadata.jsonl").write_text("\n".join(lines))
        Image.new("RGB", (32, 24), "gold").save(folder / "8.png")
        with monkeypatch.context() as patched:
            patched.setattr(collect, "_publish", interrupted)
            with pytest.raises(KeyboardInterrupt):
                collect.run(settings)
        capsys.readouterr()
        summary = collect.run(settings)
        assert "collect: going on after 9 works of a run that was interrupted" in capsys.readouterr().out
        assert (summary["replaced"], summary["rows_in"], summary["rows_out"]) == (8, 9, 8)
        other = settings_for(tmp_path / "other", folder)
        assert collect.run(other)["replaced"] == 8
        assert Dataset(settings.dataset).latest() == Dataset(other.dataset).latest()

    def test_two_runs_that_correct_at_once_are_a_conflict_and_the_loser_runs_again(
        self, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settings = settings_for(tmp_path / "root", folder)
        collect.run(settings)
        (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "title": "Red"}\n')
        judge = collect.Tally.judge

        def overtaken(*arguments: Any) -> None:
            monkeypatch.setattr(collect.Tally, "judge", judge)
            collect.run(settings_for(tmp_path / "root", folder, block_size=2))
            judge(*arguments)

        monkeypatch.setattr(collect.Tally, "judge", overtaken)
        said = r"another run has replaced 1 of these works in the meantime, for example .*; nothing was published. Run again"
        with pytest.raises(ValueError, match=said):
            collect.run(settings)
        version = Dataset(settings.dataset).latest()
        assert collect.run(settings)["new"] == 0
        assert Dataset(settings.dataset).latest() == version

    def test_a_host_that_asks_one_task_to_wait_is_left_alone_by_all(self, tmp_path: Path) -> None:
        strained = Strained(10, web.Response(status=429, headers={"Retry-After": str(Strained.PAUSE_S)}))
        with wing.serve_in_thread(strained.app) as address:
            path, manners = listing(tmp_path, address, 20), {"obey_robots": False, "attempts": 3, "timeout_s": 100.0}
            limits = {"block_size": 10, "tasks": 2, "per_host": 4, "requests_per_second": 6}
            summary = collect.run(settings_for(tmp_path / "root", path, "moma", **manners, **limits))
        assert summary["rows_out"] == 20
        late = [at - strained.sent_away_at for at, _ in strained.asked]
        assert not [at for at in late if 2 < at < strained.PAUSE_S]
        assert {block for at, block in strained.asked if at > strained.sent_away_at + strained.PAUSE_S} == {0, 1}

    def test_a_host_that_answers_one_task_with_a_challenge_is_asked_no_more_by_any(self, tmp_path: Path) -> None:
        strained = Strained(20, web.Response(status=403, headers={"cf-mitigated": "challenge"}))
        with wing.serve_in_thread(strained.app) as address:
            path, manners = listing(tmp_path, address, 40), {"obey_robots": False, "max_bad_fraction": 1.0}
            limits = {"block_size": 20, "tasks": 2, "per_host": 4, "requests_per_second": 4}
            summary = collect.run(settings_for(tmp_path / "root", path, "moma", **manners, **limits))
        assert summary["reasons"]["blocked"] == summary["rejected"] >= 20
        assert not [at for at, _ in strained.asked if at > strained.sent_away_at + 4]  # the others would last 9 s

    def test_only_rejected_works_are_asked_for_again(self, tmp_path: Path) -> None:
        busy = Busy()
        busy.missing = {"1.png", "5.png"}
        with wing.serve_in_thread(busy.app) as address:
            settings = settings_for(tmp_path / "root", listing(tmp_path, address, 8), "moma")
            dataset = Dataset(settings.dataset)
            assert collect.run(settings)["reasons"] == {"not_found": 2}
            busy.missing = {"5.png"}
            retry = settings_for(tmp_path / "root", listing(tmp_path, address, 9), "moma", retry_failed=True)
            busy.asked.clear()
            summary = collect.run(retry)
            assert busy.asked == {"robots.txt": 1, "1.png": 1, "5.png": 1}
            assert (summary["rows_in"], summary["rows_out"], summary["rejected"], summary["new"]) == (8, 7, 1, 1)
            reasons = {row["id"]: row["reason"] for row in dataset.rows(dataset.latest().images)}
            assert reasons == {f"moma-{number}": "not_found" if number == 5 else "ok" for number in range(8)}
            version = dataset.latest()
            assert collect.run(retry)["new"] == 0
            assert dataset.latest() == version

    def test_tasks_whose_book_of_news_is_lost_go_on_by_themselves(self, monkeypatch: pytest.MonkeyPatch) -> None:
        news, known = _news.SharedNews(), Heard({"museum": 7.0}, {"palace"})

        async def asked() -> list[Heard]:
            await news.pause("museum", 7.0)
            await news.block("palace")
            heard = [await news.beyond(None)]
            ray.kill(news._book)
            monkeypatch.setattr(_news, "PATIENCE_S", 0.1)
            while await news.beyond(None) != Heard():  # until it is gone
                pass
            await news.pause("elsewhere", 8.0)
            return [*heard, await news.beyond(known)]

        assert asyncio.run(asked()) == [known, known]


def test_corrections_do_not_make_up_for_works_that_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"5 of 10 works were rejected, more than max_bad_fraction=0\.05"):
        collect.Tally(works=1010, ok=1005, corrected=1000).judge(Collect(max_bad_fraction=0.05))


def captions(dataset: Dataset, ids: Iterable[str]) -> str:
    """A table of them, for these works."""
    rest = {"short": "a", "long": "", "fused": "", "status": OK, "error": ""}
    return dataset.put_rows("captions/blip", [{"id": id, **rest} for id in ids], CAPTIONS)


def listing(tmp_path: Path, address: str, count: int) -> Path:
    """A collection file of so many works whose pictures are at the address."""
    path = tmp_path / "collection.csv"
    rows = [f"{number},a,b,{address}/{number}.png,F" for number in range(count)]
    path.write_text("\n".join(["ObjectID,Title,Artist,ImageURL,OnView", *rows]))
    return path


class Busy:
    """A museum that counts its visitors, and what it sent to those who came again."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.open = self.most_open = self.sent_again = 0
        self.times: list[float] = []
        self.versions: Counter[str] = Counter()
        self.missing: set[str] = set()
        self.silent: set[str] = set()  # without ETags
        self.pictures = [wing.media(work.file_name) for work in wing.works() if work.keeper == "png"][:2]
        self.app = web.Application()
        self.app.router.add_get("/{name}", self.answer)

    async def answer(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        self.asked[name] += 1
        self.times.append(time.monotonic())
        if name == "robots.txt" or name in self.missing:
            return web.Response(status=404)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        await asyncio.sleep(0.05)
        self.open -= 1
        tag, said = "" if name in self.silent else f'"{self.versions[name]}"', request.headers.get("If-None-Match")
        self.sent_again += said not in (None, tag)
        if said == tag:
            return web.Response(status=304)
        return web.Response(body=self.pictures[self.versions[name]], headers={"ETag": tag} if tag else {})


class Strained:
    """A museum that lets nobody in before works of two blocks are asked for, and then sends the first visitor away."""

    PAUSE_S = 5

    def __init__(self, block_size: int, farewell: web.Response) -> None:
        self.block_size, self.farewell, self.sent_away_at, self.open = block_size, farewell, 0.0, asyncio.Event()
        self.asked: list[tuple[float, int]] = []  # when, and a work of which block
        self.picture = next(wing.media(work.file_name) for work in wing.works() if work.keeper == "png")
        self.app = web.Application()
        self.app.router.add_get("/{number}.png", self.answer)

    async def answer(self, request: web.Request) -> web.Response:
        self.asked.append((time.time(), int(request.match_info["number"]) // self.block_size))
        if len({block for _, block in self.asked}) == 2:
            self.open.set()
        await self.open.wait()
        if not self.sent_away_at:
            self.sent_away_at = time.time()
            return self.farewell
        return web.Response(body=self.picture)


def test_a_source_without_works_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "collection.csv"
    path.write_text("ObjectID,Title,Artist,ImageURL,OnView\n1,a,b,c,\n")
    with pytest.raises(ValueError, match=r"collection.csv lists no work to collect \(1 are not on view\)"):
        collect.run(settings_for(tmp_path / "root", path, "moma"))
    assert not (tmp_path / "root").exists()


def test_help_is_quick_and_names_the_command() -> None:
    code = "import sys; sys.argv[1:] = ['--help']; import ray_jobs.collect as job\ntry: job.main()\nexcept SystemExit: pass\n"
    code += "print(sorted({'ray', 'torch', 'PIL', 'aiohttp', 'pyarrow'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=HOME, capture_output=True, text=True, check=True)
    assert "python -m ray_jobs.collect --config" in done.stdout
    assert done.stdout.endswith("[]\n")


def test_an_unreadable_collection_ends_with_a_message_and_not_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ray_jobs.collect", "--config", "configs/demo.yaml", f"--root={tmp_path}"]
    done = subprocess.run(
        [*command, f"--collect.source.location={tmp_path}/none.csv"], cwd=HOME, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "none.csv cannot be read: no such file" in done.stderr
    assert "Traceback" not in done.stderr


def ended(patched: pytest.MonkeyPatch, *options: str) -> str:
    """What the job says as a program that cannot go on."""
    patched.setattr(sys, "argv", ["collect", "--config", str(HOME / "configs" / "demo.yaml"), *options])
    with pytest.raises(SystemExit) as raised:
        collect.main()
    return str(raised.value.code)


def test_a_file_in_another_schema_ends_the_job_with_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd.csv").write_text("Titel,Artist\na,b\n")
    said = ended(monkeypatch, f"--root={tmp_path}/root", f"--collect.source.location={tmp_path}/odd.csv")
    assert re.match(r"collect: .*odd.csv lacks the columns ObjectID, Title, .* \(found: Titel, Artist\); give a CSV file", said)
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("mode", "root", "said"),
    [
        ("nobody", "gs://moma/out", "GOOGLE_APPLICATION_CREDENTIALS is not set.* Set GOOGLE_APPLICATION_CREDENTIALS to"),
        ("forbidden", "gs://moma/out", "this account may not do that: .*Grant it roles/storage.objectUser on the bucket"),
        ("nobody", "", "set GOOGLE_APPLICATION_CREDENTIALS to the path .* that account roles/storage.objectViewer on gs://moma"),
        ("forbidden", "", "grant the account .*GOOGLE_APPLICATION_CREDENTIALS.* roles/storage.objectViewer on gs://moma"),
    ],
)
def test_a_bucket_that_may_not_be_used_ends_the_job_with_the_variable_and_the_role(
    faulty: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, root: str, said: str
) -> None:
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    faulty.mode = mode
    source = ("--collect.source.kind=folder", "--collect.source.location=gs://moma/art")
    assert re.match(f"collect: .*{said}", ended(monkeypatch, f"--root={root or tmp_path / 'root'}", *source))
    assert not (tmp_path / "root").exists()


def test_a_bucket_that_cannot_be_reached_ends_the_job_and_nothing_is_published(
    faulty: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gcsfs.retry

    async def at_once(_: float) -> None: ...

    monkeypatch.setattr(gcsfs.retry, "asyncio", SimpleNamespace(sleep=at_once))
    monkeypatch.setattr(Store, "patience_s", 0.5)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{free.getsockname()[1]}")
    said = ended(monkeypatch, "--root=gs://moma/out", "--collect.source.kind=folder", f"--collect.source.location={tmp_path}")
    assert re.match(r"collect: gs://moma/out.* could not be reached for 0 s: .*Nothing was published; run again", said)


@pytest.mark.slow
def test_a_collection_file_of_200_mb_is_no_load_for_the_job(tmp_path: Path) -> None:
    """Of works that are not on view nothing is held."""
    small, large, row = tmp_path / "small.csv", tmp_path / "large.csv", f"a,b,u,,{'x' * 480}\n"
    peaks_mib = []
    for path, count in ((small, 10), (large, 400_000)):
        with open(path, "w") as file:
            file.write("ObjectID,Title,Artist,ImageURL,OnView,Notes\n")
            file.writelines(f"{number},{row}" for number in range(count))
        where = [f"--root={tmp_path}/root", f"--collect.source.location={path}"]
        command = [sys.executable, "-m", "ray_jobs.collect", "--config", "configs/demo.yaml", *where]
        with open(tmp_path / "log", "wb") as log:
            process = subprocess.Popen(command, cwd=HOME, stdout=log, stderr=log)
            _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 1
        assert f"lists no work to collect ({count} are not on view)" in (tmp_path / "log").read_text()
        peaks_mib.append(used.ru_maxrss / 1024)
    assert large.stat().st_size > 195_000_000
    assert peaks_mib[1] - peaks_mib[0] < 60


def test_the_wing_lists_what_the_source_reads(base: str, tmp_path: Path) -> None:
    source = open_source(settings_for(tmp_path, f"{base}/collection.csv", "moma").collect)
    assert len(list(source.works())) == wing.GOOD + len(wing.BROKEN) + wing.WITHOUT_PICTURE
