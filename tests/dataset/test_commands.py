"""The commands: what they print, what they change, and how they fail."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from momalisa.dataset import Dataset
from momalisa.dataset.__main__ import main
from momalisa.records import REJECTED, Artwork, Reason
from tests.dataset.conftest import BLIP, add, caption, work

HOME = Path(__file__).parents[2]
Said = Callable[..., str]


@pytest.fixture
def said(config: str, capsys: pytest.CaptureFixture[str]) -> Said:
    def run(*arguments: str) -> str:
        capsys.readouterr()
        main([*arguments, "--config", config])
        return capsys.readouterr().out

    return run


def fails(capsys: pytest.CaptureFixture[str], config: str, *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--config", config])
    return str(end.value.code)


def test_log_show_and_diff(collection: Dataset, said: Said) -> None:
    lines = said("log").splitlines()
    assert len(lines) == 3
    newest = collection.latest().sha256
    assert newest[:12] in lines[0]
    assert "8 images, 1 duplicates, 6 captions" in lines[0]
    assert "3 images" in lines[2]
    assert "captions" not in lines[2]
    assert [entry["sequence"] for entry in json.loads(said("log", "--json", "--limit", "2"))] == [3, 2]
    shown = said("show")
    assert f"version {newest}\n6 works, 2 rejected, 1 duplicates, 0 captions edited\n" in shown
    assert "      2 x not_a_picture (the file is empty)\n" in shown
    assert "captions/blip-1: 6 rows, 1 without a result, 1 tables, " in shown
    oldest = json.loads(said("log", "--json"))[-1]["sha256"]
    assert json.loads(said("show", oldest[:9], "--json"))["works"] == 3
    difference = json.loads(said("diff", oldest[:9], "latest", "--json"))
    assert difference["images"]["added"] == ["bad0", "bad1", "w3", "w4", "w5"]
    assert "images: 5 added, 0 removed, 0 changed" in said("diff", oldest, "latest")


def test_rejects_are_counted_by_reason_with_their_commonest_error(dataset: Dataset, said: Said) -> None:
    """Errors name addresses and numbers of bytes: of a large collection there are thousands."""
    errors = ["HTTP 500", "HTTP 503", *("HTTP 500 (4 attempts)" for _ in range(2)), *("HTTP 403" for _ in range(2))]
    works = [Artwork(f"e{n}", REJECTED, error, Reason.HTTP_ERROR if n else Reason.TOO_LARGE) for n, error in enumerate(errors)]
    add(dataset, works)
    lines = [line for line in said("show").splitlines() if line.startswith("  ")]
    assert lines == ["        5 x http_error (HTTP 403)", "        1 x too_large (HTTP 500)"]
    assert json.loads(said("show", "--json"))["rejected"]["http_error"] == {"works": 5, "example": "HTTP 403"}


def test_the_words_are_those_that_are_trained_on(dataset: Dataset, said: Said, tmp_path: Path) -> None:
    add(dataset, [work(0)], [{**caption("w0"), "fused": "fused <words>"}])
    said("export", "imagefolder", str(tmp_path / "folder"), "--encode.caption=fused")
    assert json.loads((tmp_path / "folder" / "train" / "metadata.jsonl").read_text())["text"] == "fused <words>"
    said("captions", "export", str(tmp_path / "captions.csv"), "--encode.caption=fused")
    assert "fused <words>,no" in (tmp_path / "captions.csv").read_text()
    said("card", str(tmp_path / "card"), "--encode.caption=fused")
    assert "<td>fused &lt;words&gt;<td>captioner" in (tmp_path / "card" / "index.html").read_text()


def test_checkout_and_gc(collection: Dataset, said: Said) -> None:
    newest, oldest = collection.published()[0], collection.published()[-1]
    assert f"latest is {oldest[:12]}: 1 tables, 0 of them copied here" in said("checkout", oldest[:9])
    assert collection.latest().sha256 == oldest
    files = collection.store.files("")
    told = said("gc", "--delete-version", newest, "--grace-hours", "0", "--dry-run")
    assert f"manifests/{newest}.json" in told
    assert "2 files" in told
    assert "would be deleted" in told
    assert collection.store.files("") == files
    assert "2 files" in said("gc", "--delete-version", newest, "--grace-hours", "0")
    assert "deleted" in said("log").splitlines()[1]
    assert "0 files, 0.0 kB deleted" in said("gc", "--grace-hours", "0")


def test_export_card_and_captions(collection: Dataset, said: Said, tmp_path: Path) -> None:
    assert "4 pictures" in said("export", "imagefolder", str(tmp_path / "folder"))
    assert f"describes version {collection.latest().sha256[:12]}" in said("card", str(tmp_path / "card"))
    file = tmp_path / "curator" / "captions.csv"
    said("captions", "export", str(file))
    file.write_text(file.read_text("utf-8-sig").replace("A MOMA artwork of: w1", "A MOMA artwork of: a boat"))
    assert "1 captions edited, 0 edits withdrawn" in said("captions", "import", str(file))
    assert collection.texts(collection.latest(), BLIP)["w1"] == "A MOMA artwork of: a boat"


def test_of_several_captioners_one_is_named_or_configured(
    collection: Dataset,
    said: Said,
    config: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add(collection, [], [caption("w0", "anew")], captioner="large-2")
    assert "1 pictures" in said("export", "imagefolder", str(tmp_path / "a"), "--captioner", "large")
    monkeypatch.setattr("momalisa.captioner.captioner_id", lambda settings: "blip-1")
    assert "4 pictures" in said("export", "imagefolder", str(tmp_path / "b"))
    wrong = fails(capsys, config, "card", str(tmp_path / "c"), "--captioner", "x")
    assert wrong == "dataset card: x is not one captioner of this version; --captioner can be blip-1, large-2"


def test_errors_are_one_line(dataset: Dataset, config: str, capsys: pytest.CaptureFixture[str], said: Said) -> None:
    assert said("log") == "nothing was published yet\n"
    assert "dataset show: " in fails(capsys, config, "show")
    assert "holds no version: run the collect job first" in fails(capsys, config, "show")
    add(dataset, [work(0)])
    assert fails(capsys, config, "checkout") == "dataset checkout: name either a version or a file: --manifest data/manifest.json"
    assert "xyz is no published version" in fails(capsys, config, "diff", "xyz", "latest")
    with pytest.raises(SystemExit) as end:
        main(["log", "--config", config, "--colect.tasks=1"])
    assert end.value.code == 2
    assert "colect" in capsys.readouterr().err


def test_settings_can_follow(dataset: Dataset, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Dataset(str(tmp_path / "other" / "dataset"))
    version = add(other, [work(0)])
    main(["log", "--config", config, f"--root={tmp_path / 'other'}"])
    assert version.sha256[:12] in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["gc", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys, runpy; sys.argv = ['x', *sys.argv[1:]]\n"
        "try: runpy.run_module('momalisa.dataset', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'ray', 'transformers', 'pyarrow', 'fsspec', 'pydantic', 'PIL'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=HOME, check=True, capture_output=True, text=True)
    assert "usage: python -m momalisa.dataset" in done.stdout
