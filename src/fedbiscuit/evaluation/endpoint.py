"""A judge behind a server that speaks OpenAI's chat protocol: POST /chat/completions, with patience and limits.

Standard library only. The key is sent to that one host and nowhere else: redirects are not followed, and where the server
writes the key into a text, it is taken out before anybody sees it.
"""

from __future__ import annotations

import email.utils
import http.client
import ipaddress
import json
import queue
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedbiscuit.evaluation.judge import Reply
from fedbiscuit.types import ConfigError, EnvironmentFault, FedbiscuitError, rng_for

__all__ = ["Endpoint", "Pace", "ask_all", "is_local"]

LONGEST_BODY = 16 * 1024 * 1024
LONGEST_WAIT = 600.0
"""Seconds: a server that asks to wait longer is left for later."""
QUESTION = {400, 413, 422}
"""The server does not take this question: too long for it, or against its rules. Others may go well."""
PASSING = {408, 409, 425, 429}
"""May pass, as all from 500 on may."""
STEPS = {
    401: "the key is missing or not accepted; put a valid one into the environment variable that judge.api_key_env names",
    402: "the account has to be paid first",
    403: "the key may not use this model; ask for it, or use another key or judge.model",
    404: "no such model or path there; check judge.model and judge.endpoint, which usually ends in /v1",
    405: "no chat protocol at this path; check judge.endpoint, which usually ends in /v1",
}
"""What to do about a status that does not pass by itself."""


class _Stopped(Exception):
    """Another request has found that there is no point in going on."""


class _MayPass(Exception):
    """Worth another try; ``after``: seconds that the server asks to wait, or None."""

    def __init__(self, told: str, after: float | None = None, connected: bool = True):
        super().__init__(told)
        self.after = after
        self.connected = connected


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Follow nothing: the key is for one host."""


class Pace:
    """When the next request may start: at most ``per_minute`` of them (0: no limit), and none while the server asks to wait."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic):
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._clock = clock
        self._free = 0.0
        self._lock = threading.Lock()

    def turn(self) -> float:
        """Seconds to wait for the turn that is taken by this call."""
        with self._lock:
            now = self._clock()
            start = max(now, self._free)
            self._free = start + self._gap
            return start - now

    def hold(self, seconds: float) -> None:
        """Let nobody start within so many seconds."""
        with self._lock:
            self._free = max(self._free, self._clock() + seconds)


@dataclass
class Endpoint:
    """One model of one server. url: the base, such as http://127.0.0.1:8000/v1. timeout: seconds a request may take."""

    url: str
    model: str
    key: str = field(default="", repr=False)
    options: Mapping[str, Any] = field(default_factory=dict)
    """More fields of each request: the longest reply, the temperature."""
    pace: Pace = field(default_factory=lambda: Pace(0))
    retries: int = 5
    timeout: float = 120.0
    stop: threading.Event = field(default_factory=threading.Event)
    connected: bool = False

    def __post_init__(self) -> None:
        proxies = urllib.request.ProxyHandler({} if is_local(self.url) else None)
        self._opener = urllib.request.build_opener(proxies, _NoRedirect())
        self.url = self.url.rstrip("/")

    def ask(self, text: str) -> Reply:
        """The model's reply to one message, after as many tries as it takes.

        A question that the server does not take is a reply that says so. Raises ``EnvironmentFault`` where the server
        cannot be reached or keeps failing, ``ConfigError`` where it will never answer this way (a wrong key or name).
        """
        draw, attempt = rng_for("judge", text), 0
        while True:
            attempt += 1
            self._wait(self.pace.turn())
            try:
                return self._once(text, attempt)
            except _MayPass as failure:
                self._check_patience(failure, attempt)
                pause = max(_backoff(attempt, draw), failure.after or 0.0)
                if failure.after is not None:
                    self.pace.hold(pause)
                else:
                    self._wait(pause)

    def _check_patience(self, failure: _MayPass, attempt: int) -> None:
        """Raise where another try has no point."""
        if not failure.connected and not self.connected:
            raise EnvironmentFault(
                f"{self.url}: {failure}; start the server, or check judge.endpoint and the network"
            ) from None
        if attempt > self.retries:
            raise EnvironmentFault(
                f"{self.url}: {failure}, {attempt} times; try again later, with a smaller judge.concurrency, or with "
                "judge.requests_per_minute set"
            ) from None
        if (failure.after or 0.0) > LONGEST_WAIT:
            raise EnvironmentFault(
                f"{self.url}: {failure}, and asks to wait {failure.after:.0f} seconds; try again then"
            )

    def _wait(self, seconds: float) -> None:
        if self.stop.wait(seconds) if seconds > 0 else self.stop.is_set():
            raise _Stopped

    def _once(self, text: str, attempt: int) -> Reply:
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], **self.options}
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "fedbiscuit"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        deadline = time.monotonic() + self.timeout
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                self.connected = True
                data = _read(response, deadline)
        except urllib.error.HTTPError as error:
            self.connected = True
            return self._refused(error, attempt, deadline)
        except TimeoutError:
            raise _MayPass(f"no answer within {self.timeout:g} seconds") from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise _MayPass(f"no answer within {self.timeout:g} seconds") from None
            raise _MayPass(f"no connection ({_words(error.reason)})", connected=False) from None
        except (OSError, http.client.HTTPException) as error:
            raise _MayPass(f"the connection broke ({_words(error)})") from None
        return self._reply(data, attempt)

    def _reply(self, data: bytes, attempt: int) -> Reply:
        try:
            found = json.loads(data)
            choice = found["choices"][0]
            text = choice["message"].get("content") or ""
            if not isinstance(text, str):
                raise TypeError
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise _MayPass(f"an answer that is not of the chat protocol: {self._clean(data)[:100]!r}") from None
        usage = found.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        tokens = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        counts = [n if isinstance(n, int) and not isinstance(n, bool) and n >= 0 else None for n in tokens]
        return Reply(self._hide(text), choice.get("finish_reason") != "length", "", attempt, counts[0], counts[1])

    def _refused(self, error: urllib.error.HTTPError, attempt: int, deadline: float) -> Reply:
        """What an error status means: try again, this question not, or never."""
        status = error.code
        try:
            told = self._message(_read(error, deadline))
        except (OSError, http.client.HTTPException, _MayPass):
            told = ""
        said = f"status {status}" + (f" ({told})" if told else "")
        if status in PASSING or status >= 500:
            raise _MayPass(said, _retry_after(error.headers.get("Retry-After"), time.time())) from None
        if status in QUESTION:
            return Reply(refused=said, attempts=attempt)
        if 300 <= status < 400:
            where = self._hide(str(error.headers.get("Location")))
            raise ConfigError(f"{self.url}: {said}: it has moved to {where}; set judge.endpoint to where it is now")
        step = STEPS.get(status, "check judge.endpoint and judge.model")
        raise ConfigError(f"{self.url}: {said}: {step}")

    def _message(self, data: bytes) -> str:
        """The server's own words about an error, in one line."""
        try:
            found = json.loads(data)
            error = found.get("error", found)
            told = error.get("message") if isinstance(error, dict) else error
        except (ValueError, AttributeError, RecursionError):
            told = None
        return self._clean(told.encode() if isinstance(told, str) else data)[:300]

    def _clean(self, data: bytes) -> str:
        return self._hide(" ".join(data.decode("utf-8", "replace").split()))

    def _hide(self, text: str) -> str:
        return text.replace(self.key, "[the key]") if self.key else text


def ask_all(endpoint: Endpoint, texts: Sequence[str], concurrency: int) -> Generator[tuple[int, Reply], None, None]:
    """(number of the text, reply) as replies come in, with at most ``concurrency`` requests under way.

    A request counts as under way until its reply has been dealt with, so no more than that can be lost by a kill. When one
    fails for good no further one is started; what is under way is still handed out, since it is paid for; then its error is
    raised.
    """
    todo: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Reply] | BaseException | None] = queue.SimpleQueue()
    for one in enumerate(texts):
        todo.put(one)

    def work() -> None:
        try:
            while room.acquire() and not endpoint.stop.is_set():
                number, text = todo.get_nowait()
                done.put((number, endpoint.ask(text)))
        except (queue.Empty, _Stopped):
            pass
        except BaseException as error:  # handed to the caller's thread
            endpoint.stop.set()
            done.put(error)
        finally:
            done.put(None)

    workers = min(concurrency, len(texts))
    room = threading.Semaphore(workers)
    for _ in range(workers):
        threading.Thread(target=work, daemon=True).start()
    failure: BaseException | None = None
    try:
        while workers:
            item = done.get()
            if item is None:
                workers -= 1
            elif isinstance(item, BaseException):
                failure = failure if isinstance(failure, FedbiscuitError) else item
            else:
                yield item
                room.release()
    finally:
        endpoint.stop.set()
        room.release(concurrency)
    if failure is not None:
        raise failure


def is_local(url: str) -> bool:
    """Whether a URL leads to this very machine."""
    try:
        host = urllib.parse.urlsplit(url).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read(response: Any, deadline: float) -> bytes:
    """The whole body, within the time that the request has and not without end."""
    parts: list[bytes] = []
    size = 0
    while part := response.read1(65536):
        parts.append(part)
        size += len(part)
        if size > LONGEST_BODY:
            raise _MayPass(f"an answer of more than {LONGEST_BODY} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError
    return b"".join(parts)


def _backoff(attempt: int, draw: random.Random) -> float:
    """Seconds: about 1, 2, 4, ..., at most 60, spread so that several do not come back together."""
    return min(60.0, 2.0 ** (attempt - 1)) * draw.uniform(0.75, 1.25)


def _retry_after(value: str | None, now: float) -> float | None:
    """Seconds from a Retry-After header, which is a number of them or a date; None where it is neither."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - now
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, seconds) if seconds == seconds else None


def _words(error: object) -> str:
    """What the operating system says, in one line."""
    told = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(told).split())[:200]
