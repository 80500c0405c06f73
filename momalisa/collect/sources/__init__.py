"""Where artworks come from. A source yields `Artwork` rows without bytes: metadata, and where the picture is.

    status ""          its picture is at `image_url`: an address, or for `folder` a path or gs:// address
    status "rejected"  the source has no picture of it; `error` says so

    moma.py     a collection file in MoMA's CSV schema
    folder.py   a folder or gs:// prefix of pictures, with optional metadata.jsonl or metadata.csv
    aic.py      the Art Institute of Chicago's API

To add a museum, write a class with `works()`, `left_out` and `expected`, and name it in `open_source` and `config.Source.kind`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Protocol

from momalisa.collect.sources.aic import AicApi
from momalisa.collect.sources.folder import PictureFolder
from momalisa.collect.sources.moma import MomaFile
from momalisa.collect.sources.selection import Wanted
from momalisa.config import Collect
from momalisa.records import Artwork
from momalisa.storage import Store

__all__ = ["ArtworkSource", "open_source"]


class ArtworkSource(Protocol):
    left_out: Counter[str]  # works passed by so far, by why: "not on view", "another department", ...
    expected: int | None  # wanted works that it will list, as far as that can be told: None before it has begun to

    def works(self) -> Iterator[Artwork]:
        """Each work once, as it is read: nothing holds them all. Raises ValueError for a source that cannot be read."""
        ...


def open_source(settings: Collect, beside: Store | None = None, wanted: Wanted | None = None) -> ArtworkSource:
    """The source that the settings name. Nothing is read yet.

    `beside`: the dataset's store, where a source may keep what spares it a download the next time.
    `wanted`: which works the run asks for; without it the source does not count what to expect.
    """
    if settings.source.kind == "moma":
        return MomaFile(settings, beside, wanted)
    kinds: dict[str, Callable[[Collect, Wanted | None], ArtworkSource]] = {"folder": PictureFolder, "aic": AicApi}
    return kinds[settings.source.kind](settings, wanted)
