"""The page at `/` in headless Chromium: `tox -e browser`. Nothing here asks another host than the server."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.serve.conftest import Running, Serve, until
from tests.serve.test_leaving import ENDLESS, Leaver

pytestmark = pytest.mark.browser
NAMES = ("chromium", "chromium-browser", "google-chrome")
MESSAGE = "the cat sat on a mat"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's Chromium, or playwright's own. No name is resolved, so that what would ask another host fails."""
    from playwright.sync_api import sync_playwright

    path = os.environ.get("LLAMA_FAST_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=path, args=["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        )
        yield found
        found.close()


class Visit:
    """A person at the page, what the browser asked for, and what it complained about."""

    def __init__(self, browser: Any, running: Running, **options: Any):
        self.page = browser.new_page(**options)
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.set_default_timeout(20_000)
        self.host = urlsplit(running.url).netloc
        self.page.goto(running.url)

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *error: object) -> None:
        self.page.close()
        assert {urlsplit(url).netloc for url in self.asked if not url.startswith("data:")} == {self.host}

    def say(self, text: str, most: int = 400) -> None:
        """Send a message; its reply is the likeliest one."""
        self.page.get_by_text("Settings").click()
        self.page.fill("#max_tokens", str(most))
        self.page.fill("#temperature", "0")
        self.page.get_by_text("Settings").click()
        self.page.fill("#text", text)
        self.page.keyboard.press("Enter")

    def until(self, reached: Any, seconds: float = 20.0) -> None:
        """Wait for something to come true, while the page lives on."""
        for _ in range(int(seconds * 50)):
            if reached():
                return
            self.page.wait_for_timeout(20)
        raise AssertionError("it did not come")

    def text(self, place: str) -> str:
        return str(self.page.locator(place).inner_text())

    @property
    def replies(self) -> list[str]:
        return [str(text) for text in self.page.locator(".assistant .text").all_inner_texts()]


@pytest.fixture
def visit(browser: Any, running: Running) -> Iterator[Visit]:
    with Visit(browser, running) as one:
        yield one
    assert not one.complaints
    until(running.is_empty)


@pytest.fixture
def slow(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some 80 tokens/s, which an eye can follow."""
    engine = running.served.thread.engine
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.012), step())[1])


@pytest.mark.usefixtures("slow")
def test_a_reply_comes_in_pieces_while_rate_and_rows_are_told(visit: Visit, running: Running) -> None:
    page = visit.page
    visit.until(lambda: visit.text("#model") == "tiny")
    assert page.title() == "tiny" and page.locator("#hello").is_visible()
    visit.say(MESSAGE)
    assert visit.text(".user") == MESSAGE
    visit.until(lambda: visit.replies and visit.replies[0])
    lengths = [len(visit.replies[0])]
    visit.until(lambda: len(visit.replies[0]) > lengths[0] + 20)
    assert page.locator(".assistant.runs").count() == 1 and visit.text("#send") == "Stop"
    visit.until(lambda: visit.text("#rows") == "1 of 3" and int(visit.text("#rate")) > 0)
    page.locator(".foot").wait_for()
    assert "tokens, " in visit.text(".foot") and "the first after" in visit.text(".foot")
    assert page.locator(".assistant.runs").count() == 0 and visit.text("#send") == "Send"
    visit.until(lambda: visit.text("#rows") == "0 of 3" and visit.text("#rate") == "0")
    assert not page.locator("#hello").is_visible() and page.locator("#lamp.up").count() == 1


def test_what_is_shown_is_what_the_model_wrote(visit: Visit, running: Running) -> None:
    visit.page.get_by_text("Settings").click()
    visit.page.fill("#system", "dogs run")
    visit.page.get_by_text("Settings").click()
    visit.say(MESSAGE, most=30)
    visit.page.locator(".foot").wait_for()
    messages = [{"role": "system", "content": "dogs run"}, {"role": "user", "content": MESSAGE}]
    body = {"messages": messages, "max_tokens": 30, "temperature": 0}
    expected = running.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    assert " ".join(visit.replies[0].split()) == " ".join(expected.split())


@pytest.mark.usefixtures("slow")
def test_who_waits_is_told_and_has_its_turn(visit: Visit, running: Running) -> None:
    holders = [Leaver(running, {**ENDLESS, "stream": True}) for _ in range(3)]
    until(lambda: running.count("rows_in_use") == 3)
    visit.until(lambda: visit.text("#rows") == "3 of 3")
    visit.say(MESSAGE, most=5)
    visit.until(lambda: visit.text("#queue") == "1")
    assert visit.replies == [""]
    for holder in holders:
        holder.leave()
    visit.page.locator(".foot").wait_for()
    visit.until(lambda: visit.text("#queue") == "0")


@pytest.mark.usefixtures("slow")
def test_a_stopped_reply_stays_and_can_be_continued_or_replaced(visit: Visit, running: Running) -> None:
    page = visit.page
    visit.say(MESSAGE)
    visit.until(lambda: visit.replies and len(visit.replies[0]) > 20)
    page.get_by_text("Stop").click()
    page.locator(".foot").wait_for()
    until(running.is_empty)
    said = visit.replies[0]
    with page.expect_request("**/v1/chat/completions") as asked:
        page.get_by_text("Continue").click()
    messages = json.loads(asked.value.post_data)["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    visit.until(lambda: len(visit.replies[0]) > len(said) + 10)
    assert " ".join(visit.replies[0].split()).startswith(" ".join(said.split()))
    page.get_by_text("Stop").click()
    page.locator(".foot").wait_for()
    with page.expect_request("**/v1/chat/completions") as asked:
        page.get_by_text("Another reply").click()
    assert json.loads(asked.value.post_data)["messages"] == [{"role": "user", "content": MESSAGE}]
    page.get_by_text("New conversation").click()
    assert visit.replies == [] and page.locator("#hello").is_visible()
    until(running.is_empty)
    visit.say("dogs", most=3)
    page.locator(".foot").wait_for()
    assert len(visit.replies) == 1


def test_a_key_is_asked_for_and_used(browser: Any, serve: Serve) -> None:
    with serve(api_key="sesame") as running, Visit(browser, running) as visit:
        page = visit.page
        page.locator("#door").wait_for()
        assert not page.locator("#form").is_visible()
        page.fill("#key", "open")
        page.keyboard.press("Enter")
        visit.until(lambda: sum(url.endswith("/v1/models") for url in visit.asked) == 2)
        assert page.locator("#door").is_visible()
        page.fill("#key", "sesame")
        page.keyboard.press("Enter")
        page.locator("#form").wait_for()
        visit.say(MESSAGE, most=5)
        page.locator(".foot").wait_for()
        visit.until(lambda: visit.text("#rows") == "0 of 3")
        assert not page.locator("#door").is_visible()
        assert all("401" in complaint for complaint in visit.complaints) and visit.complaints


def test_a_refusal_is_shown_and_can_be_tried_again(visit: Visit) -> None:
    visit.say("dogs " * 3000, most=5)
    visit.page.locator(".error").wait_for()
    assert "positions of a row" in visit.text(".error")
    with visit.page.expect_request("**/v1/chat/completions"):
        visit.page.get_by_text("Try again").click()
    visit.page.locator(".error").wait_for()
    visit.say("dogs", most=5)
    visit.page.locator(".foot").wait_for()
    visit.complaints[:] = [one for one in visit.complaints if "400" not in one]


def test_a_server_that_has_ended_is_noticed(browser: Any, serve: Serve) -> None:
    with serve() as running, Visit(browser, running) as visit:
        visit.page.locator("#lamp.up").wait_for()
        running.server.should_exit = True
        visit.page.locator("#lamp.down").wait_for()
        visit.say(MESSAGE)
        visit.page.locator(".error").wait_for()
        assert visit.text(".error").startswith("the server cannot be reached")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_both_schemes_are_readable_at_every_width(browser: Any, running: Running, scheme: str, width: int) -> None:
    """WCAG's contrast of at least 4.5 for every text, and no text beyond the screen."""
    options = {"color_scheme": scheme, "viewport": {"width": width, "height": 800}, "bypass_csp": True}
    with Visit(browser, running, **options) as visit:
        visit.say("mat" * 300, most=20)
        visit.page.locator(".foot").wait_for()
        visit.page.get_by_text("Settings").click()
        found = visit.page.evaluate(Path(__file__).with_name("contrast.js").read_text())
        assert len(found["contrasts"]) > 10
        assert not {name: ratio for name, ratio in found["contrasts"].items() if ratio < 4.5}
        assert (found["paper"] < 0.1) == (scheme == "dark")
        assert found["overhang"] <= 0
