"""The station's page, asked as browsers and as attackers ask it: docs/faults.md, section "The station's page"."""

from __future__ import annotations

import html
import json
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from tests.station_world import made_run, made_site

from fedbiscuit.station.app import create_app
from fedbiscuit.station.looking import RoundAccuracy
from fedbiscuit.station.nouns import Pair
from fedbiscuit.station.queue import Asking, Progress
from fedbiscuit.station.safety import HEADERS, MAX_FORM, MAX_IMPORT, MAX_PROMPTS, hosts_of
from fedbiscuit.station.serving import serve
from fedbiscuit.station.shown import curve, share, shown, state_of, time_left
from fedbiscuit.station.station import Station
from fedbiscuit.station.store import Store
from fedbiscuit.station.writing import Writing
from fedbiscuit.types import ConfigError

HERE = "http://127.0.0.1:8700"
NASTY = '<img src=x onerror="alert(1)"><script>alert(2)</script> & {{ 7 * 7 }}'
FORM = {"content-type": "application/x-www-form-urlencoded"}


class Visitor:
    """A browser's requests to a station: with its cookie, its Host, its Origin, as far as they are not said otherwise."""

    def __init__(self, station: Station) -> None:
        self.station = station
        self.app = create_app(station, "the-token", hosts_of("127.0.0.1", 8700), once="once-only")
        self.client = TestClient(self.app, base_url=HERE, follow_redirects=False, raise_server_exceptions=False)

    def enter(self) -> Visitor:
        assert self.client.get("/?token=the-token").status_code == 303
        return self

    def get(self, path: str = "/", **headers: str) -> Any:
        return self.client.get(path, headers=headers)

    def post(self, path: str, data: dict[str, str], **headers: str) -> Any:
        return self.client.post(path, data=data, headers={"origin": HERE, **headers})

    def judge(self, picked: str = "first", **headers: str) -> Any:
        shown_now = self.station.present()
        assert shown_now is not None
        return self.post("/judge", {"token": shown_now.token, "picked": picked, "seconds": "2.5"}, **headers)

    def answers(self) -> list[Any]:
        return [e for e in self.station.store.history() if e.kind in ("judged", "skipped")]


@pytest.fixture
def visit(tmp_path: Path) -> Callable[..., Visitor]:
    """A visitor of a new station with these pairs, who has not shown the token yet."""

    def make(*pairs: tuple[str, str, str], **station: Any) -> Visitor:
        store = Store.open(tmp_path / "station", seed=1)
        store.add_pairs(
            [Pair.of(*pair) for pair in pairs or [(f"prompt {i}", f"one {i}", f"two {i}") for i in range(6)]]
        )
        return Visitor(Station(store, "me", **{"asking": Asking(repeat_every=0), **station}))

    return make


# Who is let in


@pytest.mark.parametrize(
    "host",
    [
        "evil.com",
        "evil.com:8700",
        "127.0.0.1",
        "127.0.0.1:8701",
        "localhost.evil.com:8700",
        "",
        "127.0.0.1:8700@evil.com",
    ],
)
def test_page_01_a_request_for_another_host_is_refused_whatever_it_carries(visit, host):
    visitor = visit().enter()
    for answer in (
        visitor.get("/", host=host),
        visitor.get("/?token=the-token", host=host),
        visitor.get("/static/station.css", host=host),
        visitor.judge(host=host, origin=f"http://{host}"),
    ):
        assert answer.status_code == 421
        assert "prompt" not in answer.text
        assert "set-cookie" not in answer.headers
    assert visitor.answers() == []


def test_page_01_two_hosts_in_one_request_are_refused(visit):
    visitor = visit().enter()
    assert visitor.client.get("/", headers=[("host", "127.0.0.1:8700"), ("host", "evil.com")]).status_code == 421


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/blind",
        "/me",
        "/data",
        "/ask",
        "/left",
        "/help",
        "/waiting",
        "/export/history.jsonl",
        "/static/station.css",
        "/openapi.json",
        "/docs",
    ],
)
def test_page_02_nothing_is_shown_without_the_token(visit, path):
    visitor = visit()
    for query in ("", "?token=", "?token=the-toke", "?token=wrong&token=the-token", "?session=the-token"):
        answer = visitor.get(path + query)
        assert answer.status_code == 403
        assert "prompt 0" not in answer.text
        assert "set-cookie" not in answer.headers
    assert visitor.get(path, cookie="fedbiscuit_station=the-token; x").status_code == 403, "the cookie is no token"


def test_page_02_the_token_becomes_a_strict_cookie_and_is_in_no_page(visit):
    visitor = visit()
    answer = visitor.get("/?token=the-token")
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(cookie.split("; "))
    assert "the-token" not in cookie
    for path in ("/", "/help", "/me", "/data", "/static/station.js"):
        assert "the-token" not in visitor.get(path).text


def test_page_02_the_token_that_a_browser_is_started_with_opens_one_door(visit):
    visitor = visit()
    assert visitor.get("/?token=once-only").status_code == 303
    visitor.client.cookies.clear()
    assert visitor.get("/?token=once-only").status_code == 403
    assert visitor.get("/?token=the-token").status_code == 303
    visitor.client.cookies.clear()
    assert visitor.get("/?token=the-token").status_code == 303


def test_page_02_cookies_of_other_programs_of_this_machine_do_not_lock_anybody_out(visit):
    visitor = visit()
    ours = visitor.get("/?token=the-token").headers["set-cookie"].split(";")[0]
    visitor.client.cookies.clear()
    assert visitor.get("/", cookie=f'broken="{{; x=1; {ours}; fedbiscuit_station=stale').status_code == 200
    assert visitor.get("/", cookie=f"x{ours}").status_code == 403


CROSS = {"sec-fetch-site": "cross-site", "origin": "https://evil.com"}


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain", **CROSS},
        {**FORM, **CROSS},
        {**FORM, "origin": "https://evil.com"},
        {**FORM, "origin": "null"},
        {**FORM, "origin": "http://127.0.0.1:8701"},
        {**FORM, "origin": "http://localhost:8700"},
        {**FORM, "origin": "https://127.0.0.1:8700"},
        {**FORM, "origin": HERE, "sec-fetch-site": "same-site"},
        {**FORM, "origin": HERE, "sec-fetch-site": "cross-site"},
        {**FORM, "origin": HERE, "sec-fetch-site": "none"},
    ],
)
def test_page_03_a_judgement_sent_by_another_page_is_refused(visit, headers):
    visitor = visit().enter()
    assert visitor.judge(**headers).status_code == 403
    assert visitor.answers() == []


def test_page_03_our_own_page_cannot_be_made_to_send_anything_but_forms(visit):
    visitor = visit().enter()
    token = visitor.station.present().token
    for kind in ("text/plain", "application/json", ""):
        body = f"token={token}&picked=first"
        assert (
            visitor.client.post("/judge", content=body, headers={"origin": HERE, "content-type": kind}).status_code
            == 415
        )
    assert visitor.answers() == []


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_page_03_another_page_cannot_load_anything_either(visit, site):
    visitor = visit().enter()
    for path in ("/", "/static/station.js", "/export/comparisons.jsonl"):
        assert visitor.get(path, **{"sec-fetch-site": site}).status_code == 403
    assert visitor.get("/", **{"sec-fetch-site": "none"}).status_code == 200


def test_page_04_a_judgement_without_origin_or_without_the_cookie_is_refused(visit):
    visitor = visit().enter()
    token = visitor.station.present().token
    form = {"token": token, "picked": "first"}
    assert visitor.client.post("/judge", data=form).status_code == 403
    visitor.client.cookies.clear()
    assert visitor.judge().status_code == 403
    assert visitor.client.post("/judge?token=the-token", data=form, headers={"origin": HERE}).status_code == 403
    assert visitor.answers() == []


def test_page_05_a_body_of_unknown_or_huge_length_is_refused_before_it_is_read(visit):
    visitor = visit().enter()
    headers = {"origin": HERE, **FORM}
    for lengths in ([], [("content-length", str(MAX_FORM + 1))], [("content-length", "9" * 30)], [("content-length", "-1")],
                    [("content-length", "1e3")], [("content-length", "٣")], [("content-length", "10"), ("content-length", "20")],
                    [("content-length", "10"), ("transfer-encoding", "chunked")]):  # fmt: skip
        scope = scope_of(visitor, "/judge", [*headers.items(), *lengths])
        assert status_of(visitor, scope) == 413, lengths
    for path, limit in (("/ask", MAX_PROMPTS), ("/ask/file", MAX_IMPORT), ("/import", MAX_IMPORT)):
        longer = [*headers.items(), ("content-length", str(limit + 1))]
        assert status_of(visitor, scope_of(visitor, path, longer)) == 413, path
    assert visitor.answers() == []


@pytest.mark.parametrize("letter", ["日", "é", "\n"])
def test_page_05_as_much_as_the_field_for_prompts_takes_also_arrives(visit, letter):
    visitor = visit().enter()
    field = re.search(r'<textarea[^>]*name="prompts"[^>]*maxlength="(\d+)"', visitor.get("/ask").text)
    assert field is not None
    text = "x" + letter * (int(field[1]) - 2) + "y"
    sent = text.replace("\n", "\r\n")  # as browsers send the end of a line
    answer = visitor.post("/ask", {"prompts": sent, "whole": "1"})
    assert (answer.status_code, answer.headers.get("location")) == (303, "/ask?added=1")
    assert [one.text for one in visitor.station.store.prompts()] == [text]


def scope_of(
    visitor: Visitor, path: str, headers: list[tuple[str, str]], method: str = "POST", kind: str = "http"
) -> dict[str, Any]:
    """A request below the level of an HTTP client, which would not send all of it."""
    cookie = "; ".join(f"{name}={value}" for name, value in visitor.client.cookies.items())
    sent = [("host", "127.0.0.1:8700"), ("cookie", cookie), *headers]
    return {
        "type": kind, "method": method, "path": path, "query_string": b"", "http_version": "1.1", "scheme": "http", "raw_path": path.encode(),
        "headers": [(name.encode(), value.encode("utf-8")) for name, value in sent], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8700),
    }  # fmt: skip


def status_of(visitor: Visitor, scope: dict[str, Any]) -> int | None:
    """What a request gets whose body must not be read; None: no answer."""
    import asyncio

    statuses: list[int] = []

    async def receive() -> Any:
        raise AssertionError("the body was read")

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    asyncio.run(visitor.app(scope, receive, send))
    return statuses[0] if statuses else None


def test_page_06_what_a_model_writes_is_text_on_every_page(visit):
    visitor = visit((NASTY, NASTY + "a", NASTY + "b")).enter()
    visitor.station.store.add_prompts([NASTY + "c"])
    token = visitor.station.present().token
    first = visitor.get()
    assert visitor.post("/judge", {"token": token, "picked": "first", "reason": NASTY, "flag": "1"}).status_code == 303
    pages = [first, *(visitor.get(path) for path in ("/", "/me", "/data", "/ask", "/left", "/blind"))]
    for page in pages:
        assert page.status_code == 200
        assert "<img src=x" not in page.text
        assert "<script>" not in page.text
        assert "49" not in re.sub(r"[0-9a-f]{16,}|\d{4}-\d\d-\d\d \d\d:\d\d", "", page.text)
    assert html.escape(NASTY, quote=False) in first.text.replace("&#34;", '"')
    assert first.text.count("&lt;img src=x") >= 3


def test_page_06_no_page_has_a_script_or_style_of_its_own_and_the_policy_forbids_them(visit):
    visitor = visit().enter()
    for path in ("/", "/blind", "/me", "/data", "/ask", "/left", "/help", "/nowhere"):
        page = visitor.get(path).text
        assert not re.search(r"<script(?![^>]*\ssrc=\"/static/)|<style|\sstyle=|\son\w+=|javascript:", page), path
        assert not re.search(r"(?:src|href|action|hx-get|hx-post)=\"(?!/|#)", page), path
        assert "http://" not in page.replace('xmlns="http://www.w3.org', "")
        assert "https://" not in page
    policy = visitor.get().headers["content-security-policy"]
    assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "base-uri 'none'"} <= set(
        policy.split("; ")
    )
    assert "unsafe" not in policy


def test_page_07_our_own_page_with_the_cookie_keeps_one_judgement(visit):
    visitor = visit().enter()
    answer = visitor.judge("second", **{"sec-fetch-site": "same-origin"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/?said=second")
    (kept,) = visitor.answers()
    assert (kept.kind, kept.first_preferred, kept.seconds) == ("judged", False, 2.5)
    assert "You chose B." in visitor.get("/?said=second").text


def test_page_08_every_answer_carries_the_protecting_headers(visit):
    visitor = visit().enter()
    answers = [
        visitor.get(), visitor.get("/nowhere"), visitor.get("/static/station.css"), visitor.get(host="evil.com"), visitor.judge(),
        visitor.get("/export/history.jsonl"), visitor.post("/judge", {}), visitor.client.get("/?token=the-token"),
        visitor.client.options("/"),
    ]  # fmt: skip
    for answer in answers:
        for name, value in HEADERS.items():
            assert answer.headers.get_list(name) == [value]
        assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert HEADERS["x-content-type-options"] == "nosniff"
    assert HEADERS["cache-control"] == "no-store"
    assert HEADERS["referrer-policy"] == "same-origin", "no-referrer would send `Origin: null` with forms of this page"


@pytest.mark.parametrize("method", ["OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT"])
def test_page_09_other_methods_are_refused(visit, method):
    assert visit().enter().client.request(method, "/").status_code == 405


def test_page_09_websockets_and_generated_pages_and_paths_out_of_the_folder_are_not_there(visit):
    visitor = visit().enter()
    assert status_of(visitor, scope_of(visitor, "/", [], kind="websocket")) is None
    for path in (
        "/docs",
        "/redoc",
        "/openapi.json",
        "/static/../app.py",
        "/static/..%2fapp.py",
        "/static/%2e%2e/app.py",
        "/export/x.jsonl",
        "/export/history",
    ):
        assert visitor.get(path).status_code == 404, path


def test_page_10_two_tabs_do_not_double_a_judgement(visit):
    visitor = visit().enter()
    token = visitor.station.present().token
    first = visitor.post("/judge", {"token": token, "picked": "first"})
    second = visitor.post("/judge", {"token": token, "picked": "second"})
    assert (first.headers["location"], second.headers["location"]) == ("/?said=first", "/?said=already")
    (kept,) = visitor.answers()
    assert kept.first_preferred is True
    flagged = visitor.post("/judge", {"token": token, "picked": "skip", "flag": "1"})
    assert flagged.headers["location"] == "/?said=already"
    assert len(visitor.station.store.history()) == 1


def test_page_10_two_undos_of_the_same_page_are_one(visit):
    visitor = visit().enter()
    visitor.judge()
    visitor.judge()
    last = re.search(r'name="last" value="(\w+)"', visitor.get().text, re.DOTALL)[1]
    assert visitor.post("/undo", {"last": last}).headers["location"] == "/?said=undo"
    assert visitor.post("/undo", {"last": last}).headers["location"] == "/?said=nothing"
    assert [e.undone for e in visitor.answers()] == [False, True]


def test_page_10_a_page_of_a_pair_that_was_removed_changes_nothing(visit):
    visitor = visit().enter()
    shown_now = visitor.station.present()
    visitor.station.forget_pair(shown_now.pair.id)
    assert visitor.post("/judge", {"token": shown_now.token, "picked": "first"}).headers["location"] == "/?said=gone"
    assert visitor.post("/forget/pair", {"pair": shown_now.pair.id}).headers["location"] == "/data?said=gone"
    assert visitor.answers() == []


def test_page_11_what_the_page_says_is_chosen_by_a_word_and_never_taken_from_the_address(visit):
    page = visit().enter().get("/?said=%3Cb%3EYour%20session%20has%20expired")
    assert page.status_code == 200
    assert "expired" not in page.text


@pytest.mark.parametrize(
    "form", [{"picked": "first"}, {"token": "x", "picked": "third"}, {"token": "x" * 9000, "picked": "first"}]
)
def test_page_11_a_form_that_is_not_ours_is_refused_in_words(visit, form):
    visitor = visit().enter()
    answer = visitor.post("/judge", form)
    assert answer.status_code == 422
    assert "Load the page again" in answer.text
    assert visitor.answers() == []


@pytest.mark.parametrize("name", ["../../evil.jsonl", "/etc/passwd", "a\\..\\b.jsonl", "", "x" * 5000, "<b>.jsonl"])
def test_page_12_the_name_of_an_upload_is_never_a_path(visit, name):
    visitor = visit().enter()
    folder = visitor.station.store.folder
    before = set(folder.parent.rglob("*"))
    answer = visitor.client.post("/import", files={"file": (name or "f", b"{broken\n")}, headers={"origin": HERE})
    assert answer.status_code == 400
    assert "<b>" not in answer.text
    assert str(folder / ".upload") not in answer.text
    assert set(folder.parent.rglob("*")) == before


# What is shown


HIDDEN = "a\u202eb\u200bc\u2066d\x07e\ufefff"


def test_fault_28_the_station_shows_characters_that_hide_or_reorder_text(visit):
    page = visit((f"p{HIDDEN}", f"x{HIDDEN}", "y")).enter().get().text
    assert not set(HIDDEN) - set("abcdef") & set(page)
    for code in ("\\u202e", "\\u200b", "\\u2066", "\\x07", "\\ufeff"):
        assert page.count(f">{code}</span>") == 2
    assert 'title="U+202E RIGHT-TO-LEFT OVERRIDE"' in page


def test_ordinary_writing_is_left_alone():
    text = "می\u200cروم 👩\u200d🌾 日本語\tx\nline"
    assert shown(text) == text
    assert shown("\\u202e written out") == "\\u202e written out"
    assert shown("a\r\nb<") == "a\nb&lt;"


def test_texts_say_their_own_direction_and_keep_their_lines(visit):
    page = visit(("مرحبا", "سطر\n\n  two", "日本")).enter().get().text
    assert page.count('dir="auto"') >= 3
    assert "سطر\n\n  two" in page


def test_the_page_has_a_state_for_every_moment():
    counts = {"ties": 0, "skipped": 0, "repeats": 0, "minutes_left": None, "last": None}
    none = Progress(judged=0, left=0, waiting=0, **counts)
    some = Progress(judged=3, left=0, waiting=0, **counts)
    waits = Progress(judged=3, left=0, waiting=2, **counts)
    writing = {state: Writing(state, 0.5, 1, 2, 0) for state in ("idle", "loading", "writing", "full", "failed")}
    assert state_of(None, none, None) == "empty"
    assert state_of(None, some, None) == "done"
    assert state_of(None, some, writing["idle"]) == "done"
    assert [state_of(None, waits, writing[state]) for state in ("idle", "loading", "writing")] == ["writing"] * 3
    assert state_of(None, waits, writing["full"]) == "elsewhere"
    assert state_of(None, waits, writing["failed"]) == "failed"


def test_the_time_left_is_a_plain_sentence():
    assert [time_left(m) for m in (None, 0.2, 1.2, 6.4, 130)] == [
        "", "less than a minute left", "about 1 minute left", "about 6 minutes left", "about 2 hours left",
    ]  # fmt: skip


def test_the_interval_of_a_share_ends_where_a_true_share_would_be_196_standard_errors_away():
    for part, whole in ((0, 5), (3, 3), (7, 10), (40, 90)):
        middle, low, high = share(part, whole)
        assert middle == part / whole
        for bound in {low, high} - {0.0, 1.0}:
            assert abs(middle - bound) == pytest.approx(1.959964 * (bound * (1 - bound) / whole) ** 0.5)
        assert 0 <= low <= middle <= high <= 1
    assert share(0, 0) is None


def test_a_curve_needs_two_rounds_and_stays_in_its_box():
    assert curve([RoundAccuracy(1, 0.5)]) is None
    found = curve([RoundAccuracy(3, 0.0), RoundAccuracy(5, 1.0)])
    assert found.points == "52.0,184.0 622.0,16.0"
    assert [number for _, number in found.rounds] == [3, 5]


# Going through it


def test_a_person_judges_ties_skips_undoes_and_sees_the_progress(visit):
    visitor = visit().enter()
    assert "0 of 6" in visitor.get().text
    for picked in ("first", "tie", "skip"):
        visitor.judge(picked)
    page = visitor.get().text
    assert "3 of 6" in page
    assert "left</span>" in page
    last = re.search(r'name="last" value="(\w+)"', page, re.DOTALL)[1]
    visitor.post("/undo", {"last": last})
    assert "2 of 6" in visitor.get().text
    for _ in range(4):
        visitor.judge()
    assert "All answered" in visitor.get().text
    assert "5 pairs judged" not in visitor.get().text
    assert "6 pairs judged (1 tie)" in visitor.get().text


def test_a_reason_and_a_flag_are_kept_with_the_answer(visit):
    visitor = visit().enter()
    token = visitor.station.present().token
    visitor.post("/judge", {"token": token, "picked": "skip", "reason": "it names me", "flag": "1", "seconds": "nan"})
    assert [(e.kind, e.reason) for e in visitor.station.store.history()] == [
        ("flagged", "it names me"),
        ("skipped", "it names me"),
    ]
    assert "it names me" in visitor.get("/data").text


def test_without_javascript_every_action_is_a_form(visit):
    page = visit().enter().get().text
    assert re.findall(r'(?:<form[^>]* |form)action="(/\w+)"', page) == ["/judge", "/undo"]
    assert set(re.findall(r'name="picked" value="(\w+)"', page)) == {"first", "second", "tie", "skip"}
    first_button = re.search(r"<form[^>]*action=\"/judge\".*?(<button[^>]*>)", page, re.DOTALL)[1]
    assert "disabled" in first_button, "Enter in a field would press the first button"


def test_prompts_are_typed_one_a_line_or_as_one(visit):
    visitor = visit().enter()
    assert visitor.post("/ask", {"prompts": "one\r\n\r\ntwo\r\n"}).headers["location"] == "/ask?added=2"
    assert visitor.post("/ask", {"prompts": "one\nmore of it", "whole": "1"}).headers["location"] == "/ask?added=1"
    assert visitor.post("/ask", {"prompts": "two"}).headers["location"] == "/ask?added=0"
    assert [p.text for p in visitor.station.store.prompts()] == ["one", "two", "one\nmore of it"]
    assert "There is no prompt in it" in visitor.post("/ask", {"prompts": " \n"}).text
    assert "NUL" in visitor.post("/ask", {"prompts": "a\x00b"}).text


@pytest.mark.parametrize("name", ["p.txt", "PROMPTS.TXT"])
def test_prompts_come_from_a_file_too(visit, name):
    visitor = visit().enter()
    answer = visitor.client.post("/ask/file", files={"file": (name, b"eins\nzwei\n")}, headers={"origin": HERE})
    assert answer.headers["location"] == "/ask?added=2"
    assert [p.text for p in visitor.station.store.prompts()] == ["eins", "zwei"]


def test_comparisons_go_out_and_come_in_again(visit, tmp_path):
    visitor = visit().enter()
    visitor.judge("first")
    visitor.judge("second")
    out = visitor.get("/export/comparisons.jsonl")
    assert "attachment" in out.headers["content-disposition"]
    records = [json.loads(line) for line in out.text.splitlines()]
    assert len(records) == 2
    assert {"prompt", "output_a", "output_b", "choice"} <= records[0].keys()
    assert {"chosen", "rejected"} <= json.loads(visitor.get("/export/trl.jsonl").text.splitlines()[0]).keys()
    other = Visitor(Station(Store.open(tmp_path / "other", seed=2))).enter()
    answer = other.client.post("/import", files={"file": ("c.jsonl", out.content)}, headers={"origin": HERE})
    assert "2 new pairs" in answer.text
    assert other.answers() == [], "what somebody else chose is not what this person chose"
    history = visitor.get("/export/history.jsonl")
    other.client.post("/import", files={"file": ("h.jsonl", history.content)}, headers={"origin": HERE})
    assert len(other.answers()) == 2


def test_a_broken_file_is_named_with_its_line(visit):
    visitor = visit().enter()
    answer = visitor.client.post(
        "/import", files={"file": ("mine.jsonl", b'{"prompt": 1}\n')}, headers={"origin": HERE}
    )
    assert answer.status_code == 400
    assert "mine.jsonl:1" in answer.text


def test_one_pair_or_everything_is_forgotten_on_request_only(visit):
    visitor = visit().enter()
    visitor.judge()
    pair = visitor.answers()[0].pair
    assert visitor.post("/forget/pair", {"pair": pair}).headers["location"] == "/data?said=forgot-pair"
    assert visitor.answers() == []
    visitor.judge()
    assert visitor.post("/forget", {"what": "all", "word": "yes"}).status_code == 400
    assert len(visitor.answers()) == 1
    assert (
        visitor.post("/forget", {"what": "person", "word": "Forget "}).headers["location"] == "/data?said=forgot-person"
    )
    assert (visitor.answers(), len(visitor.station.store.pairs())) == ([], 5)
    assert visitor.post("/forget", {"what": "all", "word": "forget"}).headers["location"] == "/data?said=forgot-all"
    assert visitor.station.store.pairs() == []


def test_a_pair_is_removed_at_the_second_press_only_also_without_javascript(visit):
    visitor = visit().enter()
    visitor.judge()
    page = visitor.get("/data").text
    [first_press] = re.findall(r"<details(?:(?!<details).)*/forget/pair.*?</details>", page, re.DOTALL)
    summary, second_press = first_press.split("</summary>")
    assert "<button" not in summary
    assert "Remove for good" in second_press
    assert page.count('action="/forget/pair"') == 1, "outside of it no press removes a pair"


def test_what_a_screen_reader_is_told_has_the_heading_of_the_place_without_a_pair(visit):
    visitor = visit(("p", "x", "y")).enter()
    assert "Pair 1 of 1. p" in told(visitor.get().text)
    visitor.judge()
    assert told(visitor.get("/?said=first").text) == "You chose A. All answered. Thank you"
    assert told(visitor.get("/blind").text) == "Nothing to compare yet"


# What it says of oneself, and of what left


def test_my_page_says_how_steady_i_am_and_whether_i_like_a_place(visit):
    visitor = visit(*[(f"p{i}", f"x{i}", f"y{i}") for i in range(8)], asking=Asking(repeat_every=4)).enter()
    before = words(visitor.get("/me").text)
    assert "came again – no pair with a choice has come again yet" in before
    assert "Chose the first answer (A) – no choice yet" in before
    seen: list[str] = []
    while shown_now := visitor.station.present():
        # The first place always, but of the first pair that comes again, in the other order, the same answer.
        steady = shown_now.pair.id in seen and len(seen) == len(set(seen))
        visitor.judge("second" if steady else "first")
        seen.append(shown_now.pair.id)
    assert (len(seen), len(set(seen))) == (10, 8)
    page = words(visitor.get("/me").text)
    assert "Judged 8 0 ties, 0 skipped" in page
    assert "The same answer when a pair came again 50% 1 of 2 repeats; 95% interval 9% to 91%" in page
    assert "Chose the first answer (A) 90% of 10 choices; 95% interval 60% to 98%" in page
    assert "it was the same place 1 time: 1 time A, 0 times B." in page


def test_my_page_shows_what_my_selector_learned_as_facts_a_curve_and_a_table(visit, tmp_path):
    page = visit(run=made_run(tmp_path / "mine")).enter().get("/me").text
    said = words(page)
    assert "Agrees with my held-out choices 75% on 8 judgements that nobody trained on" in said
    assert "My group 2 of 3, counted from 0" in said
    assert "Chooses as the global selector does 62%" in said
    assert '<polyline class="line" points="52.0,100.0 622.0,83.2"/>' in page
    assert "Round Accuracy 2 50% 4 60%" in said
    assert "Run mine , client me ." in said
    assert "Nothing yet" not in said


def test_a_run_that_is_no_folder_is_named_on_my_page(visit, tmp_path):
    said = words(visit(run=tmp_path / "nowhere").enter().get("/me").text)
    assert "nowhere: no config.yaml in this folder" in said


def test_what_left_is_listed_by_round_newest_first(visit, tmp_path):
    said = words(visit(site=made_site(tmp_path / "site")).enter().get("/left").text)
    assert "2 changes of an adapter and 2 numbers of a group left this machine, 1.0 kB in all." in said
    assert "Left this machine 1.0 kB Came to this machine 30 bytes" in said
    rows = "autumn 1 1 × evaluate, 2 × seat 0 2 20 bytes 10 bytes autumn 0 2 × train 2 0 1.0 kB 10 bytes – – 0 0 5 bytes 10 bytes"
    assert f"Run Round Asked Adapter changes Seats Out In {rows} A change of an adapter is" in said


def words(page: str) -> str:
    """What is to be read on a page, tags and line ends left out."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


def told(page: str) -> str:
    found = re.search(r'data-say="([^"]*)"', page)
    assert found is not None
    return found[1].strip()


# Where it listens


@pytest.mark.parametrize("address", ["192.0.2.7", "2001:db8::1"])
def test_page_13_another_address_is_refused_without_the_flag(visit, address):
    with pytest.raises(ConfigError, match=r"other machines may reach it.*--other-address"):
        serve(visit().station, address)


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "station.example", "127.0.0.1.evil.com"])
def test_page_13_every_address_at_once_and_names_are_refused_always(visit, address):
    with pytest.raises(ConfigError, match="address"):
        serve(visit().station, address, other_address=True)


def test_page_13_only_numbers_and_localhost_are_hosts():
    assert hosts_of("127.0.0.1", 80) == (
        "127.0.0.1:80",
        "localhost:80",
        "127.0.0.1",
        "localhost",
    )  # browsers leave 80 out
    assert hosts_of("127.0.0.1", 5) == ("127.0.0.1:5", "localhost:5")
    assert hosts_of("::1", 5) == ("[::1]:5", "localhost:5")
    assert hosts_of("192.0.2.7", 5) == ("192.0.2.7:5",)


def test_fault_91_a_port_that_is_in_use_is_passed_over_and_said(visit, monkeypatch):
    import uvicorn

    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    said: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        serve(visit().station, port=port, open_browser=False, say=said.append)
    assert said[0].startswith(f"Port {port} is in use; this station has ")
    assert re.fullmatch(r"The station is at http://127\.0\.0\.1:\d+/\?token=[\w-]{43}", said[1])


def test_page_13_with_the_flag_it_is_said_what_another_address_means(visit, monkeypatch):
    import uvicorn

    def listen(address: tuple[str, int], **_: object) -> socket.socket:
        return create_server(("127.0.0.1", address[1]))

    create_server = socket.create_server
    monkeypatch.setattr(socket, "create_server", listen)
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    said: list[str] = []
    serve(visit().station, "192.0.2.7", other_address=True, open_browser=False, say=said.append)
    assert "not encrypted" in said[0]
    assert "http://192.0.2.7:" in said[1]
