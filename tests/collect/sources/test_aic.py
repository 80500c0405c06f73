"""The Art Institute of Chicago's API, by a server that answers in its documented format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from aiohttp import web

from momalisa.collect.sources import aic, open_source
from momalisa.config import AIC_API, Collect, Source
from momalisa.miniature.wing import serve_in_thread
from momalisa.records import REJECTED, Artwork, Reason

PRIEST = {
    "id": 4, "title": "Priest and <em>Boy</em>", "artist_title": "Lawrence Carmichael Earle",
    "artist_display": "Lawrence Carmichael Earle\nAmerican, 1845-1921", "date_display": "n.d.",
    "medium_display": "Watercolor over graphite on cream wove paper", "credit_line": "Gift of the artist",
    "department_title": "Prints and Drawings", "classification_title": "watercolor",
    "image_id": "1a396e09-08f3-518e-8460-30c9ca19241f", "is_public_domain": True, "is_on_view": True,
}  # fmt: skip


def record(number: int, **changes: Any) -> dict[str, Any]:
    return {**PRIEST, "id": number, **changes}


class Institute:
    """The listing and the search of artworks: pages of at most 100, no search beyond 10,000 results, only fields asked for."""

    def __init__(self) -> None:
        self.records = [PRIEST]
        self.pretended_total = 0
        self.asked: list[str] = []
        self.queries: list[dict[str, Any]] = []
        self.app = web.Application()
        self.app.router.add_get("/api/v1/artworks", self.listing)
        self.app.router.add_get("/api/v1/artworks/search", self.search)
        self.app.router.add_get("/api/v1/broken/artworks/search", self.broken)

    async def listing(self, request: web.Request) -> web.Response:
        return self.page(request, self.records)

    async def search(self, request: web.Request) -> web.Response:
        self.queries.append(json.loads(request.query["params"]))
        if int(request.query["page"]) * int(request.query["limit"]) > 10_000:
            return web.json_response({"status": 403, "error": "Invalid limit", "detail": "..."}, status=403)
        terms = [term for one in self.queries[-1]["query"]["bool"]["filter"] for term in one.items()]
        found = [one for one in self.records if all(self.matches(one, kind, term) for kind, term in terms)]
        return self.page(request, found)

    def matches(self, one: dict[str, Any], kind: str, term: dict[str, Any]) -> bool:
        (name, wanted), value = next(iter(term.items())), one[next(iter(term)).removesuffix(".keyword")]
        assert name == "is_public_domain" or name == "is_on_view" or name.endswith("_title.keyword")
        return value in wanted if kind == "terms" else value == wanted

    def page(self, request: web.Request, found: list[dict[str, Any]]) -> web.Response:
        self.asked.append(request.path)
        limit, number = int(request.query["limit"]), int(request.query["page"])
        assert limit <= 100
        assert request.headers["User-Agent"].startswith("momalisa")
        fields = request.query["fields"].split(",")
        part = found[(number - 1) * limit : number * limit]
        total = self.pretended_total or len(found)
        pagination = {"total": total, "limit": limit, "offset": (number - 1) * limit, "total_pages": -(-total // limit)}
        return web.json_response(
            {
                "pagination": pagination | {"current_page": number},
                "data": [{name: one[name] for name in fields} for one in part],
                "info": {"license_text": "...", "version": "1.13"},
                "config": {"iiif_url": "https://www.artic.edu/iiif/2", "website_url": "https://www.artic.edu"},
            }
        )

    async def broken(self, request: web.Request) -> web.Response:
        return web.json_response({"data": []})


@pytest.fixture
def institute(monkeypatch: pytest.MonkeyPatch) -> Institute:
    monkeypatch.setattr(aic, "REQUESTS_PER_SECOND", 1000.0)
    return Institute()


@pytest.fixture
def base(institute: Institute) -> Iterator[str]:
    with serve_in_thread(institute.app) as address:
        yield f"{address}/api/v1"


def settings(base: str, **source: Any) -> Collect:
    return Collect(
        source=Source.model_validate({"kind": "aic", "location": base, **source}), attempts=1, requests_per_second=1000
    )


def works(base: str, **source: Any) -> list[Artwork]:
    return list(open_source(settings(base, **source)).works())


def test_what_the_search_finds_is_expected_less_what_is_known(institute: Institute, base: str) -> None:
    institute.records = [record(number) for number in range(7)] + [record(8, is_public_domain=False)]
    source = open_source(settings(base), wanted=lambda id: id != "aic-3")
    listing = source.works()
    next(listing)
    assert source.expected == 7
    assert len(list(listing)) == 6
    assert source.expected == 6
    limited = open_source(settings(base, limit=2), wanted=lambda id: True)
    assert (len(list(limited.works())), limited.expected) == (2, 2)


def test_a_record_becomes_a_work_with_its_rights(base: str) -> None:
    assert works(base) == [
        Artwork(
            id="aic-4",
            status="",
            title="Priest and Boy",
            artist="Lawrence Carmichael Earle",
            date="n.d.",
            medium="Watercolor over graphite on cream wove paper",
            classification="watercolor",
            department="Prints and Drawings",
            credit="Gift of the artist",
            rights=aic.RIGHTS,
            url="https://www.artic.edu/artworks/4",
            image_url="https://www.artic.edu/iiif/2/1a396e09-08f3-518e-8460-30c9ca19241f/full/843,/0/default.jpg",
        )
    ]


def test_all_pages_are_read_and_no_more(institute: Institute, base: str) -> None:
    institute.records = [record(number) for number in range(250)]
    assert [work.id for work in works(base)] == [f"aic-{number}" for number in range(250)]
    assert len(institute.asked) == 3
    assert len(works(base, limit=100)) == 100
    assert len(institute.asked) == 4


def test_only_the_public_domain_and_what_is_chosen(institute: Institute, base: str) -> None:
    institute.records = [
        record(1, is_public_domain=False), record(2, is_on_view=False), record(3, department_title="Textiles"), record(4),
        record(5, classification_title=None),
    ]  # fmt: skip
    assert [work.id for work in works(base)] == ["aic-3", "aic-4", "aic-5"]
    assert [work.id for work in works(base, on_view_only=False)] == ["aic-2", "aic-3", "aic-4", "aic-5"]
    chosen = works(base, departments=["Prints and Drawings"], classifications=["watercolor"])
    assert [work.id for work in chosen] == ["aic-4"]


def test_a_record_without_fields_or_picture_is_still_a_row(institute: Institute, base: str) -> None:
    kept = {"id": 7, "is_public_domain": True, "is_on_view": True}
    institute.records = [dict.fromkeys(PRIEST) | kept]
    (work,) = works(base)
    assert (work.id, work.title, work.status, work.reason) == ("aic-7", "", REJECTED, Reason.NO_PICTURE)


def test_more_than_a_search_may_return_is_read_from_the_listing(institute: Institute, base: str) -> None:
    institute.records = [record(1), record(2, is_public_domain=False), record(3)]
    institute.pretended_total = 10_001
    source = open_source(settings(base, limit=20_000))
    found = source.works()
    assert [next(found).id, next(found).id] == ["aic-1", "aic-3"]
    assert institute.asked == ["/api/v1/artworks/search", "/api/v1/artworks"]
    assert source.left_out == {"not in the public domain": 1}
    assert next(iter(open_source(settings(base, limit=10)).works())).id == "aic-1"  # the search is enough for ten
    assert institute.asked[2:] == ["/api/v1/artworks/search"]


def test_records_are_asked_for_once_a_second(base: str, institute: Institute, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aic, "REQUESTS_PER_SECOND", 1.0)
    source = aic.AicApi(settings(base))
    assert source._polite.requests_per_second == 1.0
    assert source._polite.per_host == 1


@pytest.mark.parametrize(("path", "said"), [("/nothing", "HTTP 404"), ("/broken", "does not answer as.*KeyError: 'pagination'")])
def test_another_address_is_an_error_that_names_it(base: str, path: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"{base}{path}/artworks/search.*{said}.*usually {AIC_API}"):
        works(base + path)


def test_the_museum_s_own_address_is_the_default() -> None:
    assert Source(kind="aic").location == AIC_API
    assert Source(kind="aic", location="http://127.0.0.1:1/v1").location == "http://127.0.0.1:1/v1"
