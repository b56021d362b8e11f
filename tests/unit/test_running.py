"""The command that waits for a run at the server: every wait ends, and a run that goes on without it is found again."""

from __future__ import annotations

import json
import os
import re
import subprocess
from types import SimpleNamespace

import pytest

from fedbiscuit.config import Config, dump_config
from fedbiscuit.deployment import running
from fedbiscuit.deployment.server import Deploy, init
from fedbiscuit.rundir import RunDir
from fedbiscuit.rundir.folder import LOCK
from fedbiscuit.rundir.lock import FolderLock
from fedbiscuit.types import ConfigError, EnvironmentFault, FederationError, IntegrityError


class Link:
    """A SuperLink: whether it answers, what it says of a run, what it was asked."""

    def __init__(self) -> None:
        self.answers, self.status = True, "running"
        self.asked: list[tuple[str, ...]] = []

    def ask(self, deploy: Deploy, *words: str) -> dict[str, object]:
        self.asked.append(words)
        row = {"run-id": "7", "fab-name": "fedbiscuit-run", "status": self.status, "pending-at": "2026-01-02 03:04:05Z"}
        return {"success": True, "run-id": 7, "runs": [row]}


@pytest.fixture
def link(monkeypatch) -> Link:
    made = Link()
    monkeypatch.setattr(running, "ask", made.ask)
    monkeypatch.setattr(running, "is_healthy", lambda deploy: made.answers)
    monkeypatch.setattr(running, "POLL", 0.005)
    monkeypatch.setattr(running, "ASK_EVERY", 0.02)
    return made


@pytest.fixture
def world(tmp_path) -> SimpleNamespace:
    """A deploy folder and a run whose number is 5."""
    deploy = init(tmp_path / "deploy", insecure=True)
    cfg = Config(name="one", runs_dir=str(tmp_path / "runs"))
    jobs = deploy.folder / "jobs"
    jobs.mkdir()
    made = SimpleNamespace(deploy=deploy, cfg=cfg, jobs=jobs, run=tmp_path / "runs" / "one")
    was_begun(made, "one")
    (jobs / "one.yaml").write_text(dump_config(cfg))
    return made


def was_begun(world: SimpleNamespace, name: str) -> None:
    """The files of a run that was begun long ago."""
    asked = {"run": str(world.run.parent / name), "timeout": 60.0}
    (world.jobs / f"{name}.json").write_text(json.dumps(asked))
    (world.jobs / f"{name}.number").write_text("5")
    for end in ("json", "number"):
        os.utime(world.jobs / f"{name}.{end}", (1000, 1000))


def train(world: SimpleNamespace, resume: bool = True, timeout: float = 0.1) -> list[str]:
    notes: list[str] = []
    running.train_by_flower(
        world.cfg, world.deploy.folder, resume, timeout, lambda stage, step, total, note: notes.append(note)
    )
    return notes


def says_that_it_has_ended(world: SimpleNamespace, error: str = "", exit_code: int = 0, run: str = "7") -> None:
    (world.jobs / "one.ended.json").write_text(json.dumps({"error": error, "exit_code": exit_code, "run": run}))


def test_fault_83_a_server_that_does_not_answer_is_waited_for_so_long_and_no_longer(world, link, caplog, monkeypatch):
    begun: list[int] = []

    def goes(deploy: Deploy, *words: str) -> dict[str, object]:
        link.answers = False  # right behind the submission
        begun.append(1)
        return {"success": True, "run-id": 7}

    monkeypatch.setattr(running, "ask", goes)
    with pytest.raises(FederationError, match=r"has not answered for 0\.1 s \(--timeout\); start it"):
        train(world)
    assert "does not answer; waiting for it up to 0.1 s" in caplog.text
    assert caplog.text.count("does not answer") == 1
    assert len(begun) == 2, "what was left over was stopped, one was begun; nothing is asked of a server that is gone"


def test_a_run_that_nobody_begins_with_is_given_up_and_stopped(world, link):
    link.status = "pending"
    with pytest.raises(FederationError, match=r"has not begun with this run in 0\.1 s"):
        train(world)
    assert link.asked[-1] == ("stop", "7")


def test_a_run_that_waits_for_its_clients_says_so_once(world, link, caplog, monkeypatch):
    def goes(deploy: Deploy, *words: str) -> dict[str, object]:
        if words[0] == "run":
            assert not (world.jobs / "one.waiting").exists(), "of the run before"
            (world.jobs / "one.waiting").write_text("1 clients are there; waiting for 3")
        return link.ask(deploy, *words)

    (world.jobs / "one.waiting").write_text("0 clients are there; waiting for 9")
    monkeypatch.setattr(running, "ask", goes)
    link.status = "pending"
    with pytest.raises(FederationError, match=r"has not begun with this run in 0\.1 s"):
        train(world)
    assert [record.message for record in caplog.records] == ["1 clients are there; waiting for 3"]


def test_a_run_that_superlink_calls_ended_and_that_said_nothing_has_failed(world, link, monkeypatch):
    link.status = "finished:failed"
    monkeypatch.setattr(running, "_log_of", lambda deploy, number: "its last words")
    with pytest.raises(FederationError, match="'finished:failed'; its own words:\nits last words\ngo on with --resume"):
        train(world, timeout=30)


@pytest.mark.parametrize("kind", [ConfigError, EnvironmentFault, FederationError, IntegrityError])
def test_an_error_of_the_server_app_is_the_commands_own(world, link, monkeypatch, kind):
    monkeypatch.setattr(
        running, "_submit", lambda *rest: says_that_it_has_ended(world, "so it is", kind.exit_code) or "7"
    )
    with pytest.raises(kind) as caught:
        train(world)
    resumable = kind in (EnvironmentFault, FederationError)
    assert str(caught.value) == ("so it is\ngo on with --resume" if resumable else "so it is")


def test_a_next_step_that_an_error_names_is_not_named_twice(world, link, monkeypatch):
    told = "mend them and go on with --resume"
    monkeypatch.setattr(running, "_submit", lambda *rest: says_that_it_has_ended(world, told, 4) or "7")
    with pytest.raises(FederationError) as caught:
        train(world)
    assert str(caught.value) == told


def test_the_ending_of_another_run_is_not_taken_for_this_ones(world, link, monkeypatch):
    monkeypatch.setattr(running, "_submit", lambda *rest: says_that_it_has_ended(world, "in use", 3, run="6") or "7")
    monkeypatch.setattr(running, "_log_of", lambda deploy, number: "its last words")
    link.status = "finished:completed"
    with pytest.raises(FederationError, match="its last words"):
        train(world, timeout=30)


def test_fault_83_a_run_that_loads_its_model_yet_is_under_way_too(world, link):
    world.run.mkdir(parents=True)
    (world.run / LOCK).touch()
    os.utime(world.run / LOCK, (500, 500))  # left by the run before
    (world.jobs / "one.number").touch()
    for link.status in ("pending", "starting", "running"):
        with pytest.raises(EnvironmentFault, match="run one is under way"):
            train(world, resume=False)
    assert {words[0] for words in link.asked} == {"list"}


def test_a_run_is_looked_for_where_it_was_begun_and_not_where_this_command_is(world, link, tmp_path):
    cfg = world.cfg.model_copy(update={"runs_dir": str(tmp_path / "elsewhere")})
    with RunDir.open(world.run, resume=False), pytest.raises(ConfigError, match="in the folder that it was begun in"):
        train(SimpleNamespace(**{**vars(world), "cfg": cfg}), resume=False)
    assert link.asked == [], "it was not stopped"


def test_two_runs_on_one_server_would_spoil_each_other_so_the_second_is_refused(world, link, tmp_path):
    was_begun(world, "other")
    told = "run other is under way on this server"
    with RunDir.open(tmp_path / "runs" / "other", resume=False), pytest.raises(EnvironmentFault, match=told):
        train(world)
    assert not any(words[0] == "run" for words in link.asked)
    link.status = "finished:failed"
    with pytest.raises(FederationError, match="the run ended as"):
        train(world)


def test_nothing_of_the_run_before_is_left_when_another_is_submitted(world, link, monkeypatch):
    def fails(deploy: Deploy, *words: str) -> dict[str, object]:
        return {"success": False, "error-message": "no room"}

    says_that_it_has_ended(world, run="5")
    monkeypatch.setattr(running, "ask", fails)
    with pytest.raises(FederationError, match="no room"):
        train(world)
    assert sorted(path.name for path in world.jobs.iterdir()) == ["one.json", "one.yaml", LOCK]


def test_while_flower_is_told_of_a_run_nobody_else_begins_one(world, link, monkeypatch):
    begun: list[tuple[str, ...]] = []
    (world.jobs / "one.number").unlink()
    (world.jobs / "one.json").unlink()

    def goes(deploy: Deploy, *words: str) -> dict[str, object]:
        if words[0] == "run":
            begun.append(words)
            assert len(begun) == 1, "a second one is begun"
            assert not (world.jobs / "one.number").exists()
            for name in ("one", "other"):
                second = world.cfg.model_copy(update={"name": name})
                with pytest.raises(EnvironmentFault, match=re.escape(str(world.jobs))):
                    train(SimpleNamespace(**{**vars(world), "cfg": second}), resume=False)
            says_that_it_has_ended(world)
        return link.ask(deploy, *words)

    monkeypatch.setattr(running, "ask", goes)
    assert train(world) == []
    assert [words[0] for words in link.asked] == ["run"]


def test_fault_83_a_run_whose_command_was_killed_while_it_began_is_found_and_followed(world, link, caplog, monkeypatch):
    monkeypatch.setattr(running, "_submit", lambda *rest: pytest.fail("it was begun again"))
    (world.jobs / "one.number").unlink()
    (world.jobs / "one.json").touch()
    with pytest.raises(EnvironmentFault, match="run one is under way; follow it with --resume"):
        train(world, resume=False)
    (world.jobs / "one.number").unlink()
    other = world.cfg.model_copy(update={"name": "other"})
    with pytest.raises(EnvironmentFault, match="run one is under way on this server"):
        train(SimpleNamespace(**{**vars(world), "cfg": other}))
    (world.jobs / "one.number").unlink()
    link.status = "pending"
    with pytest.raises(FederationError, match="has not begun with this run"):
        train(world)
    assert "run one is under way; it is followed" in caplog.text
    assert link.asked[-1] == ("stop", "7")


def test_what_was_left_by_a_command_that_never_reached_flower_is_in_nobodys_way(world, link, monkeypatch):
    original = running._submit
    monkeypatch.setattr(running, "_submit", lambda *rest: (original(*rest), says_that_it_has_ended(world))[0])
    was_begun(world, "other")
    (world.jobs / "other.yaml").touch()
    (world.jobs / "other.number").unlink()
    says_that_it_has_ended(world, run="5")
    link.status = "finished:completed"
    assert train(world) == []
    assert [words[0] for words in link.asked] == ["list", "run"]
    assert not (world.jobs / "other.json").exists()
    assert train(world) == []
    assert [words[0] for words in link.asked] == ["list", "run", "run"], "it is looked for once"


@pytest.mark.parametrize("has_begun", [True, False])
def test_fault_84_ctrl_c_while_a_run_is_begun_stops_what_has_begun(world, link, monkeypatch, has_begun):
    def goes(deploy: Deploy, *words: str) -> dict[str, object]:
        answer = link.ask(deploy, *words)
        if words[0] == "run":
            raise KeyboardInterrupt
        return answer if has_begun else answer | {"runs": []}

    says_that_it_has_ended(world, run="5")
    monkeypatch.setattr(running, "ask", goes)
    with pytest.raises(KeyboardInterrupt):
        train(world)
    assert [words[0] for words in link.asked] == ["run", "list", *(["stop"] if has_begun else [])]
    FolderLock.take(world.jobs / LOCK).release()


def test_a_log_that_flower_does_not_tell_in_time_is_named(world, monkeypatch):
    def hangs(*words, **options):
        raise subprocess.TimeoutExpired("flwr", 60)

    monkeypatch.setattr(running.subprocess, "run", hangs)
    assert str(world.deploy.folder / "superexec.log") in running._log_of(world.deploy, "7")


def test_rounds_are_read_once_and_a_file_that_was_cut_is_read_from_its_next_line_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert running._rounds(path, 0) == ([], 0)
    path.write_bytes(b'{"round": 0}\n{"rou')
    assert running._rounds(path, 0) == ([{"round": 0}], 13)
    path.write_bytes(b'{"round": 0}\n{"round": 1}\n')
    assert running._rounds(path, 13) == ([{"round": 1}], 26)
    assert running._rounds(path, 26) == ([], 26)
    path.write_bytes(b'{"round": 0}\n')
    assert running._rounds(path, 26) == ([], 13)
    path.write_bytes(b'{"round": 0, "more": 1}\n{"round": 1}\n')
    assert running._rounds(path, 13) == ([{"round": 1}], 37)
    path.write_bytes(b'{"round": 0, "more": 1}\n{"half')
    assert running._rounds(path, 13) == ([], 24)


def test_fault_83_a_run_whose_command_was_killed_is_followed_and_not_begun_again(world, link, caplog):
    with RunDir.open(world.run, resume=False):
        with pytest.raises(EnvironmentFault, match="run one is under way; follow it with --resume"):
            train(world, resume=False)
        other = world.cfg.model_copy(update={"seed": 9})
        with pytest.raises(ConfigError, match="under way with other settings"):
            train(SimpleNamespace(**{**vars(world), "cfg": other}))
        link.status = "finished:completed"
        with pytest.raises(FederationError, match="the run ended as"):
            train(world)
    assert "run one is under way; it is followed" in caplog.text
    assert not any(words[0] == "run" for words in link.asked)
    assert link.asked[-1] == ("stop", "5")


def test_a_run_that_is_left_over_is_stopped_before_the_next_begins(world, link, monkeypatch):
    original = running._submit
    monkeypatch.setattr(running, "_submit", lambda *rest: (original(*rest), says_that_it_has_ended(world))[0])
    world.run.mkdir(parents=True)
    (world.run / LOCK).touch()  # it had begun: nobody waits for a process that has died
    (world.jobs / "one.number").touch()
    assert train(world) == []
    assert [words[0] for words in link.asked] == ["stop", "run"]
    assert (world.jobs / "one.number").read_text() == "7"
    assert train(world) == []
    assert [words[0] for words in link.asked] == ["stop", "run", "run"], "one that has ended is none that is left over"


def test_who_is_missing_is_said_reason_by_reason():
    refused = {f"person-{k}": "no answer" for k in range(7)} | {"ann": "NaN"}
    assert list(running._missing({"refused": refused, "away": {"site-b": "it is not connected"}})) == [
        "site-b took no part: it is not connected",
        "nothing from ann: NaN",
        "nothing from person-0, person-1, person-2, person-3, person-4 and 2 more: no answer",
    ]
    assert list(running._missing({"refused": {}, "kept_seats": {"ann": "it was busy", "bo": "it was busy"}})) == [
        "no new seat for ann, bo: it was busy"
    ]
