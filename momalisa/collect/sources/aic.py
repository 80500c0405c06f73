"""The Art Institute of Chicago's API: its public domain works, with IIIF pictures (https://api.artic.edu/docs/).

What the museum asks of programs, and we do: the fields that are needed and no others, pictures at the width it
keeps ready (843 px), one request for records a second, one at a time, and a User-Agent that says who we are. A search
ends after 10,000 results; a larger selection is read from the listing of all works, of which most are passed by.

    {"pagination": {"total": 2, "limit": 100, "offset": 0, "total_pages": 1, "current_page": 1},
     "data": [{"id": 4, "title": "Priest and Boy", "image_id": "1a39...", "is_public_domain": true, ...}],
     "config": {"iiif_url": "https://www.artic.edu/iiif/2", "website_url": "https://www.artic.edu"}}
"""

from __future__ import annotations

import asyncio
import io
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

from momalisa.collect.downloader import Downloader
from momalisa.collect.sources.listing import NO_PICTURE, listed
from momalisa.collect.sources.selection import Wanted, selected
from momalisa.collect.sources.text import plain
from momalisa.config import AIC_API, Collect
from momalisa.records import Artwork, Reason

PAGE_SIZE = 100  # the API's largest
SEARCH_RESULTS = 10_000  # of one search, no more can be had
REQUESTS_PER_SECOND = 1.0
PAGE_BYTES = 64 << 20
PICTURE = "full/843,/0/default.jpg"
RIGHTS = "public domain (CC0), Art Institute of Chicago"
FIELDS = (
    "id,title,artist_title,artist_display,date_display,medium_display,credit_line,department_title,classification_title,"
    "image_id,is_public_domain,is_on_view"
)


class AicApi:
    """The public domain works that the API lists at `source.location`."""

    def __init__(self, settings: Collect, wanted: Wanted | None = None) -> None:
        self.source, self.left_out, self.wanted = settings.source, Counter[str](), wanted
        self.expected: int | None = None  # what the search finds, less what was listed since and is not wanted
        self.base = settings.source.location.rstrip("/")
        rate = min(settings.requests_per_second, REQUESTS_PER_SECOND)
        # Whoever wrote the settings named this address, so it may be private; the addresses in its answers may not.
        self._polite = settings.model_copy(update={"allow_private_addresses": True, "requests_per_second": rate, "per_host": 1})

    def works(self) -> Iterator[Artwork]:
        """Raises ValueError if the API cannot be read or answers in another format."""
        for work in selected(self._works(), self.source, self.left_out):
            if self.expected is not None and self.wanted is not None:
                self.expected -= not self.wanted(work.id)
            yield work

    def _works(self) -> Iterator[tuple[Artwork, bool]]:
        for page in self._pages():
            config = page.get("config") or {}
            for record in page["data"]:
                if record.get("is_public_domain") is True:
                    yield _work(record, config), bool(record.get("is_on_view"))
                else:
                    self.left_out["not in the public domain"] += 1

    def _pages(self) -> Iterator[dict[str, Any]]:
        query = {"query": {"bool": {"filter": self._filters()}}}
        search = {"params": json.dumps(query, separators=(",", ":"))}
        first = self._page("artworks/search", search, 1)
        total = first["pagination"]["total"]
        self.expected = min(total, self.source.limit or total)
        enough = self.source.limit is not None and self.source.limit <= SEARCH_RESULTS
        if total > SEARCH_RESULTS and not enough:
            yield from self._from("artworks", {}, self._page("artworks", {}, 1))
        else:
            yield from self._from("artworks/search", search, first, SEARCH_RESULTS // PAGE_SIZE)

    def _from(self, path: str, query: dict[str, str], first: dict[str, Any], most: int | None = None) -> Iterator[dict[str, Any]]:
        yield first
        pages = first["pagination"]["total_pages"]
        for number in range(2, min(pages, most or pages) + 1):
            yield self._page(path, query, number)

    def _filters(self) -> list[dict[str, Any]]:
        """What the search leaves out, in Elasticsearch's query language; `selected` looks again."""
        source = self.source
        names = {"department_title.keyword": source.departments, "classification_title.keyword": source.classifications}
        terms: list[dict[str, Any]] = [{"terms": {field: list(chosen)}} for field, chosen in names.items() if chosen]
        on_view = [{"term": {"is_on_view": True}}] if source.on_view_only else []
        return [{"term": {"is_public_domain": True}}, *on_view, *terms]

    def _page(self, path: str, query: dict[str, str], number: int) -> dict[str, Any]:
        """One page of results. Raises ValueError naming its address."""
        url = f"{self.base}/{path}?{urlencode({**query, 'fields': FIELDS, 'limit': PAGE_SIZE, 'page': number})}"
        body = io.BytesIO()
        fetched = asyncio.run(Downloader(self._polite).save(url, body, PAGE_BYTES))
        if fetched.reason != Reason.OK:
            raise ValueError(f"{url} cannot be read: {fetched.error}; collect.source.location is usually {AIC_API}")
        try:
            page: dict[str, Any] = json.loads(body.getvalue())
            int(page["pagination"]["total"]), int(page["pagination"]["total_pages"]), [record["id"] for record in page["data"]]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{url} does not answer as the Art Institute of Chicago's API does ({type(error).__name__}: {error}); "
                f"collect.source.location is usually {AIC_API}"
            ) from error
        return page


def _work(record: dict[str, Any], config: dict[str, Any]) -> Artwork:
    facts = {name: plain(str(value)) for name, value in record.items() if value is not None}
    image_id = facts.get("image_id", "")
    iiif = config.get("iiif_url") or "https://www.artic.edu/iiif/2"
    website = config.get("website_url") or "https://www.artic.edu"
    return listed(
        f"aic-{record['id']}",
        f"{iiif}/{image_id}/{PICTURE}" if image_id else "",
        "" if image_id else NO_PICTURE,
        title=facts.get("title", ""),
        artist=facts.get("artist_title") or facts.get("artist_display", ""),
        date=facts.get("date_display", ""),
        medium=facts.get("medium_display", ""),
        classification=facts.get("classification_title", ""),
        department=facts.get("department_title", ""),
        credit=facts.get("credit_line", ""),
        rights=RIGHTS,
        url=f"{website}/artworks/{record['id']}",
    )
