"""The command that waits for a run at the server: every wait ends, and a run that goes on without it is found again."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from fedbiscuit.config import Config, dump_config
from fedbiscuit.deployment import running
from fedbiscuit.deployment.server import Deploy, init
from fedbiscuit.rundir import RunDir
from fedbiscuit.types import ConfigError, EnvironmentFault, FederationError, IntegrityError


class Link:
    """A SuperLink: whether it answers, what it says of a run, what it was asked."""

    def __init__(self) -> None:
        self.answers, self.status = True, "running"
        self.asked: list[tuple[str, ...]] = []

    def ask(self, deploy: Deploy, *words: str) -> dict[str, object]:
        self.asked.append(words)
        return {"success": True, "run-id": 7, "runs": [{"status": self.status}]}


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
    (jobs / "one.number").write_text("5")
    (jobs / "one.yaml").write_text(dump_config(cfg))
    (jobs / "one.json").write_text(json.dumps({"folder": str(tmp_path)}))
    return SimpleNamespace(deploy=deploy, cfg=cfg, jobs=jobs, run=tmp_path / "runs" / "one")


def train(world: SimpleNamespace, resume: bool = True, timeout: float = 0.1) -> list[str]:
    notes: list[str] = []
    running.train_by_flower(
        world.cfg, world.deploy.folder, resume, timeout, lambda stage, step, total, note: notes.append(note)
    )
    return notes


def says_that_it_has_ended(world: SimpleNamespace, error: str = "", exit_code: int = 0) -> None:
    (world.jobs / "one.ended.json").write_text(json.dumps({"error": error, "exit_code": exit_code}))


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
    with pytest.raises(kind, match="so it is\ngo on with --resume"):
        train(world)


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


def test_a_run_under_way_is_found_also_from_another_folder_than_the_one_that_it_was_begun_in(world, link, tmp_path):
    with RunDir.open(world.run, resume=False):
        there = world.cfg.model_copy(update={"runs_dir": str(tmp_path / "elsewhere")})
        with pytest.raises(EnvironmentFault, match="run one is under way"):
            train(SimpleNamespace(**{**vars(world), "cfg": there}), resume=False)
    assert link.asked == []


def test_a_run_that_is_left_over_is_stopped_before_the_next_begins(world, link, monkeypatch):
    original = running._submit
    monkeypatch.setattr(running, "_submit", lambda *rest: (original(*rest), says_that_it_has_ended(world))[0])
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
