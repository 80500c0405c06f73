import csv
import io
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from momalisa.collect.hygiene import BadPicture, clean
from momalisa.config import Collect
from momalisa.miniature import draw, wing


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    with wing.serve_in_thread() as address:
        yield address


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as response:
        return response.read()


def rows_of(data: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline="")))


def test_the_collection_file_looks_like_moma_s(base: str) -> None:
    data = get(f"{base}/collection.csv")
    assert data.startswith(b"\xef\xbb\xbfTitle,Artist,")
    rows = rows_of(data)
    assert len(rows[0]) == 30
    assert data == get(f"{base}/collection.csv")
    on_view = [row for row in rows if row["OnView"]]
    assert all(row["OnView"].startswith('"MOMA Lisa, Wing, ') and row["OnView"].endswith('"') for row in on_view)
    assert len(rows) - len(on_view) == wing.IN_STORAGE
    assert sum(not row["ImageURL"] for row in on_view) == wing.WITHOUT_PICTURE
    assert any("\n" in row["Dimensions"] for row in rows)
    assert any(", " in row["Artist"] for row in rows)
    assert any("<em>" in row["Title"] for row in rows)
    assert len({row["ObjectID"] for row in rows}) == len(rows)


def test_every_picture_is_good_or_broken_as_planned(base: str) -> None:
    verdicts: Counter[str] = Counter()
    for row in rows_of(get(f"{base}/collection.csv")):
        if not row["OnView"] or not row["ImageURL"]:
            continue
        try:
            clean(get(row["ImageURL"]), Collect())
            verdicts["good"] += 1
        except (BadPicture, urllib.error.HTTPError) as error:
            verdicts[str(error)] += 1
    assert verdicts.pop("good") == wing.GOOD == len(wing.exhibits())
    assert len(verdicts) == verdicts.total() == len(wing.BROKEN)


@pytest.mark.parametrize("keeper", sorted(wing.UNUSUAL))
def test_an_unusual_file_shows_the_same_picture(keeper: str) -> None:
    work = next(work for work in wing.works() if work.keeper == keeper)
    data = wing.media(work.file_name)
    assert data is not None
    with Image.open(io.BytesIO(clean(data, Collect()).bytes)) as picture:
        shown = np.asarray(picture, np.float64)
    expected = np.asarray(wing.hung(work.scene, work.seed), np.float64)
    assert np.abs(shown - expected)[4:-4, 4:-4].mean() < 8


def test_what_hangs_is_made_of_training_scenes() -> None:
    assert {exhibit.scene for exhibit in wing.exhibits()} <= set(draw.training_scenes())
    assert all(exhibit.record["OnView"] for exhibit in wing.exhibits())


def test_further_works_are_never_shown_and_two_seeds_share_captions() -> None:
    first, second = wing.further_works(6, seed=1), wing.further_works(6, seed=2)
    assert [caption for caption, _ in first] == [caption for caption, _ in second]
    assert [caption for caption, _ in wing.further_works(3, seed=1)] == [caption for caption, _ in first[:3]]
    pictures = [picture.tobytes() for _, picture in first + second]
    assert len(set(pictures)) == 12
    assert not set(pictures) & {wing.hung(scene, seed).tobytes() for _, scene, seed in wing.exhibits()}
    assert max(seed for _, _, seed in wing.exhibits()) < wing.FURTHER_SEEDS


def test_further_works_of_named_captions() -> None:
    caption = draw.all_scenes()[5].caption
    assert [name for name, _ in wing.further_works([caption, caption])] == [caption, caption]
    with pytest.raises(ValueError, match="a red unicorn"):
        wing.further_works(["a red unicorn"])


def test_people_and_robots_find_their_pages(base: str) -> None:
    home = get(base).decode()
    assert home.count("<img") == wing.GOOD
    assert b"User-agent" in get(f"{base}/robots.txt")
    assert b"<h1>" in get(f"{base}/works/{wing.FIRST_ID}")
    for path in ("works/1", "media/none.png"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(f"{base}/{path}")
