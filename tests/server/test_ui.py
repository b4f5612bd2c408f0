"""The page at /: what is served, and what a person with a keyboard gets of it in Chromium."""

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from browser import Browser, Keys, open_browser
from fake_server import LiveServer, fake_app, wait_until
from real_server import RealServer
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cabochon.engine.errors import Overloaded
from cabochon.server.settings import load_settings
from cabochon.server.ui import PAGE, content_security_policy

HELLO = "hello world"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as one:
        yield one


@pytest.fixture
def page(browser: Browser, live: LiveServer) -> Iterator[Browser]:
    """The page of `live`, loaded. In the end it has asked nobody else for anything, and logged no error."""
    browser.driver.get("about:blank")  # the page of the test before asks its own server, until it is gone
    browser.read_logs()
    browser.requests.clear()
    browser.complaints.clear()
    open_page(browser, live.url)
    yield browser
    browser.read_logs()
    assert {urlsplit(url).netloc for url in browser.requests} == {f"127.0.0.1:{live.port}"}
    assert browser.complaints == []


def open_page(browser: Browser, url: str, **options: Any) -> None:
    browser.open(f"{url}/", **options)
    browser.wait_for("#kv", "%")
    browser.wait_for("#context", "Up to")


def choose_complete(browser: Browser) -> None:
    """By keys: back to the mode switch, and right."""
    browser.tab_to("mode-chat", back=True)
    browser.type(Keys.ARROW_RIGHT)
    assert browser.focus() == "mode-complete"
    browser.tab_to("prompt")


def set_max_tokens(browser: Browser, number: int) -> None:
    browser.driver.execute_script("document.getElementById('max_tokens').value = arguments[0]", number)


def set_offline(browser: Browser, is_offline: bool) -> None:
    limits = {"offline": is_offline, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    browser.driver.execute_cdp_cmd("Network.emulateNetworkConditions", limits)


def in_pieces(app: ASGIApp) -> ASGIApp:
    """Sends each byte by itself, so that events and characters are cut anywhere."""

    async def cut(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_cut(message: Message) -> None:
            if message["type"] != "http.response.body" or not scope["path"].startswith("/v1/"):
                await send(message)
                return
            for byte in message.get("body", b""):
                await send({"type": "http.response.body", "body": bytes([byte]), "more_body": True})
                await asyncio.sleep(0)
            if not message.get("more_body"):
                await send({"type": "http.response.body", "body": b"", "more_body": False})

        await app(scope, receive, send_cut)

    return cut


def test_the_page_is_served_as_it_is_in_the_file(shared: LiveServer) -> None:
    answer = shared.http.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.content == PAGE.read_bytes()


def test_the_page_names_no_other_place() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"(?i)https?:|//\w|@import|url\((?!#)|\bsrc\s*=", page) == []


def test_the_page_never_makes_html_of_a_text() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|\son\w+=", page) == []


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two colours, #rgb or #rrggbb."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(digit * 2 for digit in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_stands_out_from_what_it_is_on(scheme: int) -> None:
    themes = re.findall(r":root \{(.*?)\}", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#\w+)", themes[scheme]))
    grounds = [colours[name] for name in ("page", "side", "field")]
    pairs = [(colours[text], ground) for text in ("ink", "muted", "accent", "danger") for ground in grounds]
    pairs += [(colours["ink"], colours["tint"]), (colours["on-accent"], colours["accent"])]
    assert min(contrast(*pair) for pair in pairs) >= 4.5  # WCAG 2, AA
    assert min(contrast(colours["edge"], ground) for ground in grounds) >= 3  # of what one must see to use it


def test_only_what_stands_in_the_page_may_run(shared: LiveServer) -> None:
    policy = shared.http.get("/").headers["content-security-policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["connect-src"] == "'self'"
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", rules["script-src"])
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", rules["style-src"])


def test_the_policy_names_the_hash_of_a_script() -> None:
    policy = content_security_policy("<style></style><script>alert(1)</script>")
    # printf 'alert(1)' | openssl dgst -sha256 -binary | base64
    assert "script-src 'sha256-bhHHL3z2vDgxUt0W3dWQOrprscmda2Y5pLsLg4GF+pI='" in policy


def test_without_the_page_its_path_is_unknown() -> None:
    assert load_settings([]).server.ui is True
    assert load_settings(["--no-ui"]).server.ui is False
    with TestClient(fake_app(ui=False)) as client:
        answer = client.get("/")
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "unknown_path"
        assert client.get("/docs").status_code == 200


def test_the_environment_turns_the_page_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CABOCHON_UI", "false")
    assert load_settings([]).server.ui is False


def test_a_mounted_page_is_found_with_and_without_a_slash() -> None:
    with TestClient(Starlette(routes=[Mount("/app", fake_app())])) as client:
        for path in ("/app", "/app/"):
            assert client.get(path).content == PAGE.read_bytes()


def test_a_text_typed_by_keyboard_is_continued(page: Browser, live: LiveServer) -> None:
    assert page.focus() == "prompt"
    choose_complete(page)
    set_max_tokens(page, 6)
    live.faults.cached_tokens, live.faults.delay_s = 2, 0.02
    page.type(HELLO, Keys.ENTER)
    stats = page.wait_for(".stats", "at max tokens")
    assert page.text(".said") == "hello worldhello world"  # <bos> hello world, twice
    assert re.search(r"\d tok/sfirst token \d+ ms6 tokensprompt 3 tokens, 2 cached", stats)
    assert page.focus() == "prompt"
    assert page.find("#prompt").get_attribute("value") == ""


def test_tokens_that_came_all_at_once_have_no_rate(page: Browser) -> None:
    flow: dict[str, object] = {"startMs": 0, "firstMs": 12, "lastMs": 12, "firstTokens": 1}
    for tokens in (1, 6):
        flow |= {"usage": {"prompt_tokens": 3, "completion_tokens": tokens}}
        told = page.driver.execute_script("return statsOf(arguments[0])[0].textContent", flow)
        assert told == "– tok/s"


def test_escape_stops_the_stream_and_the_engine(page: Browser, live: LiveServer) -> None:
    live.faults.delay_s = 0.02
    page.type(HELLO, Keys.ENTER)
    wait_until(lambda: len(page.text(".said")) > 10)
    seen = page.text(".said")
    wait_until(lambda: len(page.text(".said")) > len(seen))
    assert page.wait_for("#running", "1") == "1"
    page.type(Keys.ESCAPE)
    page.wait_for(".stats", "stopped")
    wait_until(lambda: len(live.engine.aborted) == 1)
    assert page.wait_for("#running", "0") == "0"
    assert "tok/s" in page.text(".stats")


def test_the_stop_button_stops(page: Browser, live: LiveServer) -> None:
    live.faults.is_paused = True
    page.type(HELLO, Keys.ENTER)
    page.wait_for(".stats", "Waiting")
    page.tab_to("stop")
    page.type(Keys.SPACE)
    page.wait_for(".stats", "stopped")
    wait_until(lambda: len(live.engine.aborted) == 1)
    assert page.focus() == "prompt"


def test_shift_and_enter_make_a_new_line(page: Browser, live: LiveServer) -> None:
    page.type("hello")
    page.type_with_shift(Keys.ENTER)
    page.type("world")
    assert page.find("#prompt").get_attribute("value") == "hello\nworld"
    assert live.engine.seen == []


def test_a_chat_is_sent_whole_and_without_failed_turns(page: Browser, live: LiveServer) -> None:
    set_max_tokens(page, 4)
    page.type("hello", Keys.ENTER)
    page.wait_for(".stats", "at max")
    live.faults.delay_s = 1
    page.type("lost", Keys.ENTER)
    page.wait_for(".stats", "Waiting")
    page.type(Keys.ESCAPE)
    page.wait_for(".stats", "stopped")
    live.faults.delay_s = 0
    page.find("#system").send_keys("  ")  # as good as none
    page.find("#prompt").click()
    page.type("world", Keys.ENTER)
    page.wait_for(".stats", "at max")
    text = live.post("/detokenize", {"tokens": live.engine.seen[-1].prompt_ids}).json()["prompt"]
    turn = "<start_of_turn>{}\n{}<end_of_turn>\n"
    answer = page.all(".said")[0].get_property("textContent").strip()
    said = turn.format("user", "hello") + turn.format("model", answer) + turn.format("user", "world")
    assert text == f"<bos>{said}<start_of_turn>model\n"


def test_parameters_are_sent_as_they_are_set(page: Browser, live: LiveServer) -> None:
    page.tab_to("temperature", back=True)
    page.type(Keys.ARROW_RIGHT)
    assert page.text("#temperature-value") == "0.75"
    page.tab_to("top_p")
    page.type(Keys.ARROW_LEFT)
    page.tab_to("max_tokens")
    page.type("7")  # what was there is selected
    page.tab_to("seed")
    page.type("42")
    page.tab_to("stop-string")
    page.type(r"d\n")
    page.tab_to("prompt")
    page.type("world")
    page.type_with_shift(Keys.ENTER)
    page.type("world", Keys.ENTER)
    page.wait_for(".stats", "finished")
    assert page.text(".said") == "user\nworl"  # up to the stop string
    params = live.engine.seen[0].params
    assert (params.temperature, params.top_p, params.max_tokens, params.seed) == (0.75, 0.9, 7, 42)


def test_continue_goes_on_where_the_answer_ended(page: Browser, live: LiveServer) -> None:
    choose_complete(page)
    set_max_tokens(page, 3)
    page.type(HELLO, Keys.ENTER)
    page.wait_for(".stats", "at max")
    next(one for one in page.all(".actions button") if one.text == "Continue").click()
    wait_until(lambda: page.text(".said") == HELLO * 2)
    assert len(live.engine.seen[1].prompt_ids) == 5  # <bos> hello world hello world


def test_start_over_forgets_the_conversation(page: Browser) -> None:
    page.type("hello", Keys.ENTER)
    page.wait_for(".stats", "at max")
    page.tab_to("reset")
    page.type(Keys.ENTER)
    assert page.all(".turn") == []
    assert page.find("#empty").is_displayed()
    assert page.focus() == "prompt"


def test_an_answer_that_looks_like_html_stays_text(page: Browser) -> None:
    choose_complete(page)
    text = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    page.type(text, Keys.ENTER)
    page.wait_for(".stats", "at max")
    assert text in page.text(".said")
    assert page.all(".turn img, .turn script") == []


def test_characters_and_events_survive_any_cut(browser: Browser) -> None:
    with LiveServer(around=in_pieces) as live:
        open_page(browser, live.url)
        choose_complete(browser)
        browser.driver.execute_script("document.getElementById('prompt').value = '👍é'")
        browser.type(Keys.ENTER)
        browser.wait_for(".stats", "at max")
        assert browser.text(".said").startswith("👍é👍é")


def test_the_page_works_under_a_prefix(browser: Browser) -> None:
    with LiveServer(around=lambda app: Starlette(routes=[Mount("/app", app)])) as live:
        open_page(browser, f"{live.url}/app")
        browser.type("hello", Keys.ENTER)
        browser.wait_for(".stats", "at max")
        assert browser.find("[data-path=docs]").get_property("href") == f"{live.url}/app/docs"


def test_the_servers_own_words_explain_an_error(browser: Browser, live: LiveServer) -> None:
    open_page(browser, live.url)
    live.faults.refuses = Overloaded("the server is full: try again", 3)
    browser.type("hello", Keys.ENTER)
    browser.wait_for(".turn .error", "the server is full: try again")
    live.faults.refuses = None
    assert [one.text for one in browser.all(".actions button") if one.is_displayed()] == ["Retry", "Edit"]
    browser.all(".actions button")[1].click()
    browser.wait_for(".stats", "at max")
    assert not browser.find(".turn .error").is_displayed()


def test_an_error_in_the_stream_is_shown_under_what_came(browser: Browser, live: LiveServer) -> None:
    open_page(browser, live.url)
    live.faults.dies_after_tokens = 20
    browser.type("hello", Keys.ENTER)
    browser.wait_for(".turn .error", "restart the server")
    assert browser.text(".said") != ""


def test_a_key_is_asked_for_and_kept_in_the_tab(browser: Browser, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("schlüssel\n", encoding="utf-8")
    with LiveServer(api_key_file=str(keys)) as live:
        browser.open(f"{live.url}/")
        wait_until(lambda: browser.focus() == "key")
        browser.type("wrong", Keys.ENTER)
        browser.wait_for("#key-reason", "does not know")
        browser.type("schlüssel", Keys.ENTER)
        browser.wait_for("#context", "Up to")
        browser.find("#prompt").click()
        browser.type("hello", Keys.ENTER)
        browser.wait_for(".stats", "at max")
        kept = browser.driver.execute_script("return [localStorage.length, sessionStorage.length]")
        assert kept == [0, 1]


def test_a_server_that_is_gone_is_told_and_found_again(browser: Browser) -> None:
    with LiveServer() as live:
        open_page(browser, live.url)
        set_offline(browser, True)
        browser.wait_for("#offline", "cannot be reached")
        browser.type("hello", Keys.ENTER)
        browser.wait_for(".turn .error", "cannot be reached")
        set_offline(browser, False)
        wait_until(lambda: browser.text("#offline") == "")


def test_every_field_has_a_label_and_every_button_a_name(page: Browser) -> None:
    code = """return [...document.querySelectorAll('input, select, textarea')]
        .filter((field) => !field.labels.length).map((field) => field.id)"""
    assert page.driver.execute_script(code) == []
    assert all(button.get_property("textContent").strip() for button in page.all("button"))
    assert page.find("#scroll").get_attribute("aria-live") == "polite"


@pytest.mark.parametrize("width", [320, 900])
def test_nothing_sticks_out_of_the_window(browser: Browser, live: LiveServer, width: int) -> None:
    open_page(browser, live.url, width=width, height=700)
    browser.find("#prompt").click()
    for turn in (1, 2):
        browser.type("long" * 50, Keys.ENTER)
        browser.wait_for(f".turn:nth-child({turn}) .stats", "at max tokens")
    code = "const node = document.querySelector(arguments[0]); return node.scroll{0} - node.client{0}"
    for selector, side in (("html", "Width"), ("html", "Height"), ("#scroll", "Width")):
        assert browser.driver.execute_script(code.replace("{0}", side), selector) == 0


def test_nothing_moves_for_whoever_prefers_it_so(browser: Browser, live: LiveServer) -> None:
    open_page(browser, live.url, prefers_reduced_motion="reduce")
    live.faults.delay_s = 0.05
    browser.type("hello", Keys.ENTER)
    browser.wait_for(".said", "h")
    assert browser.driver.execute_script("return document.getAnimations().length") == 0
    browser.type(Keys.ESCAPE)


@pytest.mark.slow
def test_the_demo_answers_in_a_browser(browser: Browser, demo_dir: Path) -> None:
    with RealServer("demo", kv_cache_gib=0.3) as server:
        browser.read_logs()
        browser.requests.clear()
        browser.complaints.clear()
        open_page(browser, server.url)
        assert browser.find("#mode-complete").is_selected()
        browser.type("The capital of France is", Keys.ENTER)
        wait_until(lambda: len(browser.text(".said").split()) > 3, 60)
        assert browser.wait_for("#running", "1") == "1"
        wait_until(lambda: browser.text("#kv") not in ("–", "0.0 %"))
        browser.type(Keys.ESCAPE)
        stats = browser.wait_for(".stats", "stopped")
        rate = re.match(r"([\d.]+) tok/s", stats)
        assert rate is not None
        assert 0.5 < float(rate[1]) < 1000
        wait_until(lambda: server.metric("num_requests_running") == 0)
        assert server.metric("request_success_total", finished_reason="abort") == 1
        browser.read_logs()
        assert {urlsplit(url).scheme + "://" + urlsplit(url).netloc for url in browser.requests} == {
            server.url
        }
        assert browser.complaints == []
