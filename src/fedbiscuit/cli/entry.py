"""The way in, ``main``, and the ways out: exit codes, signals, the words of every error."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence

from cyclopts import CycloptsError

from fedbiscuit.cli.shared import app, program
from fedbiscuit.types import FedbiscuitError

__all__ = ["main"]

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (2 user, 3 machine, 4 clients, 5 files, 130 interrupted, else 1).

    Under ``accelerate launch`` or ``torchrun`` the number of processes is that of ``--gpus``.
    """
    from fedbiscuit.terminal import print_error

    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words or bool(os.environ.get("FEDBISCUIT_DEBUG"))
    words = [word for word in words if word != "--debug"]
    if "TORCHELASTIC_RUN_ID" in os.environ:  # set by torchrun, which accelerate launch is for several processes
        rank, count = os.environ["RANK"], os.environ["WORLD_SIZE"]
        if count != os.environ["LOCAL_WORLD_SIZE"]:
            print_error("started on several machines at once, which one run cannot use; start it on one of them")
            return 3
        if rank != "0":
            print(f"process {rank} of {count} ends: the first one spreads the work by itself", file=sys.stderr)
            return 0
        if words[:1] in (["run"], ["train"], ["align"]) and not any(
            word.partition("=")[0] == "--gpus" for word in words
        ):
            words += ["--gpus", count]
    try:
        with _signals(), _quiet_libraries():
            returned = app(
                words, exit_on_error=False, print_error=False, help_on_error=False, result_action="return_value"
            )
        sys.stdout.flush()
        return returned if isinstance(returned, int) else 0
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):
                signal.signal(number, signal.SIG_IGN)
        print(f"stopped{_how_to_resume(words)}", file=sys.stderr)
        return INTERRUPTED
    except CycloptsError as error:
        print_error(f"{_first_paragraph(error)} (see {program()} {_command_of(words)}--help)")
        return 2
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            import traceback

            traceback.print_exc()
        if isinstance(error, FedbiscuitError):
            print_error(str(error))
            return error.exit_code
        print_error(_unexpected(error, debug))
        return 3 if isinstance(error, OSError) or _is_lack_of_memory(error) else 1


def _is_lack_of_memory(error: Exception) -> bool:
    """Of Python, of a GPU, or of torch on a CPU; found by their words, since torch is not imported for it."""
    return isinstance(error, MemoryError) or any(
        w in str(error).lower() for w in ("out of memory", "can't allocate memory")
    )


def _unexpected(error: Exception, debug: bool) -> str:
    told = " ".join(str(error).split())[:500]
    if _is_lack_of_memory(error):
        less = "smaller batch sizes or max_tokens, model.gradient_checkpointing: true and model.quantize: nf4 need less"
        return f"out of memory ({told}); {less} (docs/your-data.md)"
    kind = "" if isinstance(error, OSError) else "this should not happen: "
    return f"{kind}{type(error).__name__}: {told}" + ("" if debug else " (--debug shows where)")


def _first_paragraph(error: CycloptsError) -> str:
    return " ".join(str(error).split("\n\n")[0].split())


def _command_of(words: Sequence[str]) -> str:
    """The command in a command line, with a space behind it, or nothing."""
    found, level = "", app
    for word in words:
        if word.startswith("-") or word not in set(level):
            break
        found, level = f"{found}{word} ", level[word]
    return found


def _how_to_resume(words: Sequence[str]) -> str:
    if not words or words[0] not in ("run", "train", "label", "align", "evaluate", "judge"):
        return ""
    again = [word for word in words if word != "--resume"]
    if words[0] in ("run", "train"):  # the later stages always go on
        again.append("--resume")
    return f"; to go on: {program()} {shlex.join(again)}"


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM stops like Ctrl-C."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _CleanLines(logging.Formatter):
    """A warning may quote what a client of another machine has said: it steers no terminal, and its further lines are indented,
    so that none of them passes for one of ours.
    """

    def format(self, record: logging.LogRecord) -> str:
        from fedbiscuit.terminal import clean

        return clean(super().format(record)).replace("\n", "\n  ")


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Warnings as one plain line each, and no bars or reports to the outside from the libraries below."""
    for name, value in (
        ("HF_HUB_DISABLE_TELEMETRY", "1"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("TRANSFORMERS_VERBOSITY", "error"),
    ):
        os.environ.setdefault(name, value)
    to_stderr = logging.StreamHandler()
    to_stderr.setFormatter(_CleanLines("warning: %(message)s"))
    logging.basicConfig(handlers=[to_stderr], level=logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        yield
