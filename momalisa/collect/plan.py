"""Which of a source's works a run asks for, and which it only corrects: new ones, known ones again, those told otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from momalisa.config import Collect
from momalisa.dataset import Place
from momalisa.records import REJECTED, TOLD, Artwork


@dataclass
class Plan:
    """Deals works into blocks as the source lists them, and counts. Holds ids, and one block at a time."""

    known: Mapping[str, Place]  # id -> its row's place in the dataset, and what it says
    settings: Collect
    stored: Mapping[str, Place] = field(default_factory=dict)  # of a run that was interrupted: neither asked for nor counted
    listed: int = field(default=0, init=False)  # works that are known, or asked for
    unforeseen: int = field(default=0, init=False)  # works that are dealt, though their ids do not count
    passed_by: int = field(default=0, init=False)  # known works that are left as they are
    passed_by_ok: int = field(default=0, init=False)

    def counts(self, id: str) -> bool:
        """Whether a work is among those that this run, or the one that was interrupted, asks for, as far as its id says."""
        return id in self.stored or self._wants(id)

    def _wants(self, id: str) -> bool:
        place = self.known.get(id)
        if self.settings.retry_failed:
            return place is not None and not place.ok
        return place is None or (self.settings.refresh and place.ok)

    def asks(self, work: Artwork) -> bool:
        """Whether a work's picture is asked for: by the settings, or because the source names another address now."""
        return self._wants(work.id) or self._has_moved(work)

    def _has_moved(self, work: Artwork) -> bool:
        """A folder's pictures are what they are wherever it lies."""
        place = self.known.get(work.id)
        if place is None or place.address is None or self.settings.retry_failed or self.settings.source.kind == "folder":
            return False
        return work.status != REJECTED and place.address != hash(work.image_url)

    def _is_told_otherwise(self, work: Artwork) -> bool:
        """Of a work of which nothing is told now (its folder's metadata file is missing) what was told stays; and a picture of
        the same name in another folder may be another work."""
        place, told = self.known.get(work.id), tuple(getattr(work, name) for name in TOLD)
        if place is None or place.told is None or self.settings.retry_failed or not any(told):
            return False
        if self.settings.source.kind == "folder" and place.address != hash(work.image_url):
            return False
        return place.told != hash(told)

    def blocks(self, works: Iterable[Artwork]) -> Iterator[list[Artwork]]:
        block: list[Artwork] = []
        for work in works:
            if work.id in self.stored:
                self.listed += 1
            elif self.asks(work) or self._is_told_otherwise(work):
                self.listed += 1
                self.unforeseen += not self._wants(work.id)
                block.append(work)
            elif (place := self.known.get(work.id)) is not None:
                self.listed += 1
                self.passed_by += 1
                self.passed_by_ok += place.ok
            if len(block) == self.settings.block_size:
                yield block
                block = []
        if block:
            yield block
