"""The visitors' page in a real browser, over a real generator: `make test-slow`.

Needs Debian's `chromium` (apt-get install chromium) and the dev extra `playwright`, which downloads nothing.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from momalisa import config
from momalisa.config import Settings
from tests.serve.conftest import listening

pytestmark = [pytest.mark.slow, pytest.mark.integration]

LIMITS = config.Serve(size_px=64, steps=4, max_prompt_chars=200, watch_s=0)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def serving(root: str, limits: config.Serve) -> Iterator[str]:
    """The service over what is promoted below `root`, at an address of its own."""
    from serve.api import create_app
    from serve.replica import Generator

    settings = Settings.model_construct(**{**dict(Settings.model_construct()), "root": root, "serve": limits})
    generator = Generator(settings)
    with listening(create_app(generator, limits)) as address:
        yield f"{address}/"
    generator.close()


@pytest.fixture(scope="module")
def server(promoted_root: Path) -> Iterator[str]:
    with serving(str(promoted_root), LIMITS) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright here: pip install -e '.[dev]'")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium here: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield made
        made.close()


@pytest.fixture
def page(browser: Any, server: str) -> Iterator[Any]:
    made = browser.new_page(viewport={"width": 1280, "height": 900})
    complaints: list[str] = []
    made.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    made.on("pageerror", lambda error: complaints.append(str(error)))
    made.goto(server)
    yield made
    made.close()
    assert [text for text in complaints if "status of 400" not in text] == []


def test_words_become_a_picture_that_can_be_kept(page: Any, tmp_path: Path) -> None:
    page.fill("#prompt", "a red boat on a blue sea")
    page.keyboard.press("Enter")
    page.wait_for_selector("#canvas[data-state=done]", timeout=30_000)
    assert page.evaluate("document.getElementById('picture').naturalWidth") == 64
    assert page.is_hidden("#compare")  # there is no second checkpoint
    assert page.inner_text("#title") == "a red boat on a blue sea"
    assert page.inner_text("#checkpoint") == "tiny-64"
    seed = page.inner_text("#seed")
    with page.expect_download() as kept:
        page.click("#download")
    assert kept.value.suggested_filename == f"a-red-boat-on-a-blue-sea-{seed}.png"
    page.screenshot(path=os.environ.get("MOMALISA_SCREENSHOT", str(tmp_path / "page.png")), full_page=True)
    page.click("#another")
    page.locator("#seed").filter(has_not_text=seed).wait_for(timeout=30_000)  # the page's policy forbids wait_for_function
    assert page.inner_text("#title") == "a red boat on a blue sea"


def test_previews_come_while_it_paints(page: Any) -> None:
    page.evaluate(
        """() => {
            window.seen = [];
            new MutationObserver(() => { if (!document.getElementById("preview").hidden) window.seen.push(1); })
                .observe(document.getElementById("preview"), { attributes: true });
        }"""
    )
    page.fill("#prompt", "a red boat")
    page.keyboard.press("Enter")
    page.wait_for_selector("#canvas[data-state=done]", timeout=30_000)
    assert page.evaluate("window.seen.length") > 0
    assert page.is_hidden("#preview")


def test_more_like_this_and_a_picture_of_ones_own(page: Any, tmp_path: Path) -> None:
    from PIL import Image

    page.fill("#prompt", "a red boat")
    page.keyboard.press("Enter")
    page.wait_for_selector("#canvas[data-state=done]", timeout=30_000)
    seed = page.inner_text("#seed")
    with page.expect_request("**/v1/images/edits"):
        page.click("#like")
    page.locator("#seed").filter(has_not_text=seed).wait_for(timeout=30_000)
    seed = page.inner_text("#seed")
    Image.new("RGB", (300, 200), "blue").save(tmp_path / "own.jpg")
    with page.expect_request("**/v1/images/edits"):
        page.set_input_files("#own", str(tmp_path / "own.jpg"))
    page.locator("#seed").filter(has_not_text=seed).wait_for(timeout=30_000)
    assert page.inner_text("#problem") == ""


def test_a_kiosks_key_travels_in_the_fragment_and_is_not_left_there(browser: Any, server: str) -> None:
    kiosk = browser.new_page()
    kiosk.goto(f"{server}#key=moma_secret")
    assert "secret" not in kiosk.url
    kiosk.fill("#prompt", "a boat")
    with kiosk.expect_request("**/v1/images/generations") as asked:
        kiosk.keyboard.press("Enter")
    assert asked.value.headers["authorization"] == "Bearer moma_secret"
    kiosk.close()


def test_an_idea_is_one_click(page: Any) -> None:
    page.click("text=a coffee")
    page.wait_for_selector("#canvas[data-state=done]", timeout=30_000)
    assert page.input_value("#prompt") == "a coffee"


def test_no_words_is_said_kindly_and_the_field_gets_the_cursor(page: Any) -> None:
    page.fill("#prompt", "   ")
    page.click("#paint")
    assert "Please say what the artwork should show" in page.inner_text("#problem")
    assert page.evaluate("document.activeElement.id") == "prompt"
    assert page.is_hidden("#picture")


def test_the_servers_own_words_are_shown(page: Any) -> None:
    page.fill("#prompt", "x" * 201)
    page.click("#paint")
    page.locator("#problem").filter(has_text="at most 200").wait_for()


def test_what_a_visitor_types_stays_text(page: Any) -> None:
    words = "<img src=x onerror=alert(1)>"
    page.fill("#prompt", words)
    page.click("#paint")
    page.wait_for_selector("#canvas[data-state=done]", timeout=30_000)
    assert page.inner_text("#title") == words
    time.sleep(0.2)  # a dialog or an error would come now


def test_a_phone_needs_no_sideways_scrolling(browser: Any, server: str) -> None:
    phone = browser.new_page(viewport={"width": 320, "height": 640})
    phone.goto(server)
    phone.click("text=a coffee")
    phone.wait_for_selector("#canvas[data-state=done]", timeout=30_000)
    assert phone.evaluate("document.documentElement.scrollWidth") <= 320
    phone.close()


def test_a_visitor_compares_two_and_votes(browser: Any, promoted_root: Path, tmp_path: Path) -> None:
    from momalisa import votes
    from momalisa.storage import Store
    from tests.serve.test_watch import publish

    store = Store(str(shutil.copytree(promoted_root, tmp_path / "root")))
    publish(store, tmp_path, 128)
    with serving(store.root, LIMITS.model_copy(update={"challenger": "tiny@128"})) as address:
        phone = browser.new_page(viewport={"width": 320, "height": 640})
        complaints: list[str] = []
        phone.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        phone.on("pageerror", lambda error: complaints.append(str(error)))
        phone.goto(address)
        phone.click("text=a coffee")
        phone.wait_for_selector("#canvas[data-state=done]", timeout=30_000)
        phone.click("#compare")
        phone.wait_for_selector("#pair", timeout=30_000)
        for picture in ("first", "second"):
            phone.locator(f"#{picture}").evaluate("image => image.decode()")
            assert phone.evaluate(f"document.getElementById('{picture}').naturalWidth") == 64
        assert "tiny-" not in phone.inner_text("#pair")
        assert phone.evaluate("document.documentElement.scrollWidth") <= 320
        phone.screenshot(path=os.environ.get("MOMALISA_PAIR_SCREENSHOT", str(tmp_path / "pair.png")), full_page=True)
        phone.click("text=The second")
        phone.locator("#thanks").filter(has_text="Thank you").wait_for()
        assert phone.is_hidden("#pair")
        phone.click("#compare")
        phone.wait_for_selector("#pair", timeout=30_000)
        phone.click("#skip")
        assert phone.is_hidden("#pair")
        phone.close()
    [vote] = votes.read(store)
    assert {vote.winner, vote.loser} == {"tiny-64", "tiny-128"}
    assert complaints == []
