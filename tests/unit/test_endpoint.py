"""A judge behind a server: what is sent, what is tried again and when, what is given up, and where the key does not go."""

from __future__ import annotations

import email.utils
import json
import socket
import threading
import time

import pytest

from fedbiscuit.config import parse_config
from fedbiscuit.evaluation.endpoint import Endpoint, Pace, _retry_after, ask_all, is_local
from fedbiscuit.types import ConfigError, EnvironmentFault

KEY = "sk-very-secret-0123"


class Held(threading.Event):
    """Waits without waiting, and writes down for how long it was to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout or 0.0)
        return self.is_set()


def endpoint(server, **changes):
    return Endpoint(**{"url": server.url, "model": "m", "key": KEY, "retries": 3, "stop": Held(), **changes})


def test_a_request_is_what_the_protocol_says_and_the_reply_is_read_from_json(chat_server):
    chat_server.reply = lambda text: f'Score: 3\n"{text}"\n[[A]]'
    reply = endpoint(chat_server, options={"max_tokens": 9, "temperature": 0.0}).ask("who?")
    assert (reply.text, reply.finished, reply.attempts) == ('Score: 3\n"who?"\n[[A]]', True, 1)
    assert (reply.tokens_in, reply.tokens_out, reply.refused) == (7, 2, "")
    (request,) = chat_server.requests
    assert request["path"] == "/v1/chat/completions"
    assert request["headers"]["Authorization"] == f"Bearer {KEY}"
    assert request["body"] == {
        "model": "m", "messages": [{"role": "user", "content": "who?"}], "max_tokens": 9, "temperature": 0.0,
    }  # fmt: skip


def test_without_a_key_no_authorization_is_sent(chat_server):
    endpoint(chat_server, key="", url=chat_server.url + "/").ask("x")
    assert "Authorization" not in chat_server.requests[0]["headers"]
    assert chat_server.requests[0]["path"] == "/v1/chat/completions"


@pytest.mark.parametrize(
    "trouble",
    [
        500,
        503,
        429,
        408,
        (200, {}, "{not json"),
        (200, {}, "[]"),
        (200, {}, '{"choices": []}'),
        (200, {}, '{"choices": [{"message": {"content": 5}}]}'),
        (200, {"Content-Length": "100000"}, '{"choices": '),
        (200, {}, "[" * 100_000),
    ],
)
def test_what_may_pass_is_tried_again_with_growing_pauses(trouble, chat_server):
    chat_server.script = [trouble, trouble, None]
    asked = endpoint(chat_server, timeout=1.0)
    reply = asked.ask("x")
    assert (reply.text, reply.attempts, len(chat_server.requests)) == ("[[A]]", 3, 3)
    first, second = asked.stop.waits
    assert 0.75 <= first <= 1.25
    assert 1.5 <= second <= 2.5


def test_a_server_that_keeps_failing_is_given_up_with_url_status_and_next_step(chat_server):
    chat_server.script = [(503, {}, '{"error": {"message": "overloaded"}}')] * 9
    told = rf"{chat_server.url}: status 503 \(overloaded\), 4 times; try again later, .*requests_per_minute"
    with pytest.raises(EnvironmentFault, match=told):
        endpoint(chat_server).ask("x")
    assert len(chat_server.requests) == 4


def test_a_slow_server_is_left_at_the_timeout(chat_server):
    chat_server.script = [0.6, None]
    assert endpoint(chat_server, timeout=0.2).ask("x").attempts == 2
    chat_server.script = [0.6]
    with pytest.raises(EnvironmentFault, match=r"no answer within 0\.2 seconds, 1 times"):
        endpoint(chat_server, timeout=0.2, retries=0).ask("x")


def test_a_body_that_drips_does_not_outlast_the_timeout():
    """Each byte is in time; all of them are not."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
                for _ in range(100):
                    try:
                        connection.sendall(b" ")
                    except OSError:
                        return
                    time.sleep(0.05)

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        asked = Endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", "m", retries=0, timeout=0.3)
        started = time.monotonic()
        with pytest.raises(EnvironmentFault, match="no answer within"):
            asked.ask("x")
        assert time.monotonic() - started < 2.0
        thread.join(6.0)


def test_retry_after_is_obeyed_by_all_who_ask(chat_server):
    chat_server.script = [(429, {"Retry-After": "40"}, "{}"), None]
    clock = [100.0]
    asked = endpoint(chat_server, pace=Pace(0, lambda: clock[0]))
    assert asked.ask("x").attempts == 2
    assert asked.stop.waits == [40.0]
    assert asked.pace.turn() == 40.0  # another one would wait too


def test_a_server_that_asks_for_an_hour_is_left_for_later(chat_server):
    chat_server.script = [(429, {"Retry-After": "3600"}, "{}")]
    with pytest.raises(EnvironmentFault, match="asks to wait 3600 seconds; try again then"):
        endpoint(chat_server).ask("x")


def test_retry_after_is_seconds_or_a_date_or_nothing():
    at = email.utils.formatdate(1_000_030, usegmt=True)
    assert _retry_after("1.5", 0.0) == 1.5
    assert _retry_after(at, 1_000_000.0) == 30.0
    assert _retry_after(at, 2_000_000.0) == 0.0
    assert [_retry_after(odd, 0.0) for odd in (None, "soon", "nan", "")] == [None] * 4


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (401, r"status 401 \(no, 401\): the key is missing or not accepted; .*judge.api_key_env"),
        (402, "has to be paid"),
        (403, "may not use this model"),
        (404, "check judge.model and judge.endpoint"),
        (418, "check judge.endpoint and judge.model"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(status, told, chat_server):
    chat_server.script = [status]
    with pytest.raises(ConfigError, match=told):
        endpoint(chat_server).ask("x")
    assert len(chat_server.requests) == 1


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_question_that_is_refused_is_a_reply_that_says_so(status, chat_server):
    chat_server.script = [status]
    assert endpoint(chat_server).ask("x").refused == f"status {status} (no, {status})"


def test_an_empty_reply_and_one_that_was_cut_off_are_replies(chat_server):
    sent = {"choices": [{"message": {"content": None}, "finish_reason": "length"}], "usage": {"prompt_tokens": True}}
    chat_server.script = [(200, {}, json.dumps(sent))]
    reply = endpoint(chat_server).ask("x")
    assert (reply.text, reply.finished, reply.tokens_in, reply.refused) == ("", False, None, "")


def test_nobody_at_the_address_is_said_at_once():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    asked = Endpoint(f"http://127.0.0.1:{port}/v1", "m", stop=Held())
    with pytest.raises(EnvironmentFault, match=rf"127.0.0.1:{port}/v1: no connection \(.*refused\); start the server"):
        asked.ask("x")
    assert asked.stop.waits == []


def test_the_key_goes_to_no_other_host_and_into_no_message(chat_server):
    elsewhere = type(chat_server)()
    try:
        chat_server.script = [(302, {"Location": f"{elsewhere.url}/chat/completions?k={KEY}"}, f"see {KEY}")]
        with pytest.raises(ConfigError, match="it has moved to") as caught:
            endpoint(chat_server).ask("x")
        assert KEY not in str(caught.value)
        assert elsewhere.requests == []
    finally:
        elsewhere.close()
    for status, kind in ((401, ConfigError), (500, EnvironmentFault)):
        chat_server.script = [(status, {}, json.dumps({"error": {"message": f"bad key {KEY}"}}))] * 4
        with pytest.raises(kind) as caught:
            endpoint(chat_server).ask("x")
        assert "bad key [the key]" in str(caught.value)
        assert KEY not in str(caught.value)
    chat_server.script = [(400, {}, f"plain {KEY}")]
    assert endpoint(chat_server).ask("x").refused == "status 400 (plain [the key])"
    chat_server.reply = lambda text: f"my key is {KEY}"
    assert endpoint(chat_server).ask("x").text == "my key is [the key]"
    assert KEY not in repr(endpoint(chat_server))


# Several at a time


def test_all_texts_are_answered_with_a_bounded_number_under_way(chat_server):
    chat_server.script = [0.05] * 12
    chat_server.reply = str.upper
    texts = [f"text {i}" for i in range(12)]
    found = dict(ask_all(Endpoint(chat_server.url, "m"), texts, 3))
    assert {i: reply.text for i, reply in found.items()} == {i: text.upper() for i, text in enumerate(texts)}
    assert chat_server.most_at_once == 3


def test_after_a_failure_nothing_new_is_started_and_what_is_under_way_is_handed_out(chat_server):
    chat_server.script = [2.0, [1.0, (401, {}, "{}")], 2.0]
    found = []
    with pytest.raises(ConfigError, match="401"):
        found.extend(ask_all(Endpoint(chat_server.url, "m"), ["x"] * 20, 3))
    assert [reply.text for _, reply in found] == ["[[A]]"] * 2
    assert len(chat_server.requests) == 3


def test_a_pause_between_tries_ends_when_another_request_fails_for_good(chat_server):
    chat_server.script = [[1.0, (503, {"Retry-After": "300"}, "{}")], [2.0, (401, {}, "{}")]]
    started = time.monotonic()
    with pytest.raises(ConfigError, match="401"):
        list(ask_all(Endpoint(chat_server.url, "m"), ["x"] * 2, 2))
    assert time.monotonic() - started < 60.0


def test_who_stops_reading_stops_the_asking(chat_server):
    replies = ask_all(Endpoint(chat_server.url, "m"), ["x"] * 50, 2)
    next(replies)
    time.sleep(0.3)
    assert len(chat_server.requests) <= 2  # nobody runs ahead of a reader who is slow
    replies.close()
    time.sleep(0.2)
    assert len(chat_server.requests) <= 2


def test_requests_keep_their_distance():
    clock = [0.0]
    pace = Pace(30, lambda: clock[0])  # one every two seconds
    assert [pace.turn() for _ in range(3)] == [0.0, 2.0, 4.0]
    clock[0] = 100.0
    assert [pace.turn(), pace.turn()] == [0.0, 2.0]
    assert [Pace(0, lambda: 5.0).turn() for _ in range(2)] == [0.0, 0.0]


def test_requests_a_minute_are_kept_at_a_real_server(chat_server):
    list(ask_all(Endpoint(chat_server.url, "m", pace=Pace(600)), ["x"] * 6, 4))
    assert chat_server.times[-1] - chat_server.times[0] >= 0.45  # five gaps of a tenth of a second


# Addresses


def test_only_this_machine_is_this_machine():
    local = ["http://127.0.0.1:8/v1", "http://localhost/v1", "http://[::1]:8/v1"]
    remote = ["https://127.0.0.1.example.org/v1", "http://10.0.0.1/v1", "https://localhost.org/v1", "http://[x"]
    assert [is_local(url) for url in local + remote] == [True] * 3 + [False] * 4


@pytest.mark.parametrize(
    "setting",
    [
        f"judge.endpoint=https://user:{KEY}@example.org/v1",
        f"judge.endpoint=https://example.org/v1?key={KEY}",
        f"judge.endpoint={KEY}",
        "judge.endpoint=http://[::1/v1",
        "judge.endpoint=http://h:123456/v1",
        "judge.endpoint=ftp://h/v1",
        f"judge.api_key_env={KEY}",
        "judge.api_key_env=lower",
    ],
)
def test_a_key_has_no_place_in_the_settings_and_is_not_repeated(setting):
    with pytest.raises(ConfigError) as caught:
        parse_config("", [setting])
    assert setting.split("=")[0] in str(caught.value)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["https://api.example.org/v1", "http://[::1]:8000/v1/", "http://host_1:80", "http://h/a/b-c"]
)
def test_ordinary_addresses_are_taken(url):
    assert parse_config("", [f"judge.endpoint={url}"]).judge.endpoint == url
