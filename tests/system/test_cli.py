"""The command line: what a user types, what comes back, and with which exit code."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedbiscuit
from fedbiscuit import cli
from fedbiscuit.cli import entry
from fedbiscuit.config import load_config, parse_config
from fedbiscuit.terminal import ProgressLines, print_evaluation, print_next
from fedbiscuit.types import ConfigError, DataError, EnvironmentFault, FederationError, IntegrityError

EVALUATION = {
    "selectors": {
        "rows": [
            {"name": "group selectors", "accuracy": 0.9, "interval": [0.8, 0.95], "flip_rate": 0.1},
            {"name": "longer answer", "accuracy": 0.5},
        ],
        "adjusted_rand_index": 1.0,
    },
    "left_out": {"too long": 3},
    "policy": {
        "judges": [{"name": "selectors", "win_rate": 0.7, "interval": [0.6, 0.8], "wins": 7, "losses": 3, "ties": 0}]
    },
}


def command(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    env = {
        key: value for key, value in os.environ.items() if key not in ("FEDBISCUIT_DEBUG", "NO_COLOR", "FORCE_COLOR")
    }
    return subprocess.run(
        [sys.executable, "-m", "fedbiscuit", *words], capture_output=True, text=True, timeout=60, env=env, **options
    )


class Calls(list):
    """What the commands called, with a pipeline and a report that do nothing."""

    error: BaseException | None = None


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Calls]:
    made = Calls()
    pipeline, report = types.ModuleType("fedbiscuit.pipeline"), types.ModuleType("fedbiscuit.report")

    def stage(name: str):
        def work(cfg, *, progress, resume=True, checkpoints=False, devices=1):
            made.append((name, cfg, resume))
            progress(name, 1, 2, "accuracy 0.5")
            progress(name, 2, 2, "accuracy 0.6")
            if made.error is not None:
                raise made.error
            run_dir = Path(cfg.runs_dir) / cfg.name
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / "evaluation.json").write_text(json.dumps(EVALUATION))
            (run_dir / "labels.json").write_text(
                json.dumps({"pairs": 3, "left_out": {"tie": 0, "empty completion": 2}})
            )
            return run_dir

        return work

    for name in ("run_all", "train_selectors", "label", "align", "evaluate"):
        setattr(pipeline, name, stage(name))
    report.write_report = lambda run_dir: made.append(("write_report", run_dir)) or run_dir / "report.html"
    for module in (pipeline, report):
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(fedbiscuit, module.__name__.split(".")[1], module, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("name: a\nseed: 3\n")
    return made


# help and version


@pytest.mark.parametrize(
    "name",
    [
        "run",
        "train",
        "label",
        "align",
        "evaluate",
        "judge",
        "report",
        "export",
        "push",
        "config",
        "data check",
        "station",
        "station export",
    ],
)
def test_the_help_of_each_command_has_a_purpose_and_an_example(name, capsys):
    assert cli.main([*name.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"Usage: fedbiscuit {name}" in shown
    assert "Example" in shown
    assert f"fedbiscuit {name} " in shown.split("Example")[1]


def test_the_module_starts_in_a_subprocess_and_tells_its_version():
    shown = command("--version")
    assert (shown.returncode, shown.stdout.strip()) == (0, fedbiscuit.__version__)
    assert "train        Train the selectors federatedly" in command("--help").stdout


@pytest.mark.parametrize("words", [["--help"], ["config", "a.yaml"], ["data", "check", "a.jsonl"]])
def test_light_commands_load_nothing_heavy(words, tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 1\n")
    row = {"prompt": "p", "output_a": "x", "output_b": "y", "choice": 0, "client": "ann"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    heavy = "torch transformers peft matplotlib datasets trl scipy safetensors fastapi uvicorn"
    program = (
        f"import sys; from fedbiscuit.cli import main; code = main({words!r}); "
        f"print('LOADED', code, [name for name in {heavy!r}.split() if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert shown.stdout.splitlines()[-1] == "LOADED 0 []", shown.stderr


def test_importing_the_package_loads_nothing_else():
    program = "import sys; import fedbiscuit; print([n for n in ('torch', 'pydantic', 'cyclopts', 'yaml') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "[]"


def test_every_public_name_has_a_home():
    assert set(fedbiscuit.__all__) - {"__version__"} == set(fedbiscuit._MODULE_OF)
    assert fedbiscuit.load_config is load_config
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = fedbiscuit.nonsense


# settings


@pytest.mark.parametrize(
    "words",
    [
        ["a.yaml", "seed", "7", "selectors.local.lr=1e-5", "--resume"],
        ["--resume", "a.yaml", "seed=7", "selectors.local.lr", "1e-5"],
        ["a.yaml", "seed=7", "--resume", "selectors.local.lr", "1e-5"],
    ],
)
def test_resume_and_overrides_work_in_any_order(words, calls):
    assert cli.main(["run", *words]) == 0
    name, cfg, resume = calls[0]
    assert (name, cfg.seed, cfg.selectors.local.lr, resume) == ("run_all", 7, 1e-5, True)


def test_gpus_of_this_machine_train_no_clients_of_other_machines(calls, capsys, tmp_path):
    words = ["a.yaml", "--backend", "flower", "--deploy", str(tmp_path), "--gpus", "2"]
    assert cli.main(["train", *words]) == 2
    assert "--gpus 2: with --backend flower the clients train on their own machines" in capsys.readouterr().err
    assert cli.main(["run", *words]) == 2
    assert "no deploy.json" in capsys.readouterr().err, "the alignment of a run is here, and may have them"
    assert calls == []


def test_a_negative_value_is_a_value_and_not_an_option(calls, capsys):
    assert cli.main(["run", "a.yaml", "seed", "-1"]) == 2
    assert capsys.readouterr().err == (
        "error: command line: seed: -1 is not permitted; it must be a whole number from 0 to 9223372036854775807\n"
    )
    assert calls == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["run", "a.yaml", "--resmue"], "Unknown option: --resmue. Did you mean --resume?"),
        (["run", "a.yaml", "seed=1", "--dry-rnu"], "Unknown option: --dry-rnu."),
        (["config", "a.yaml", "--chekc"], "Did you mean --check?"),
        (["rnu", "a.yaml"], 'Did you mean "run"?'),
        (["a.yaml"], "Available commands: data, server, client, station, run, train, label, align, ..."),
        (["run"], "CONFIG requires an argument"),
        (["data", "check"], "FILES requires an argument"),
    ],
)
def test_what_is_misspelt_or_missing_is_caught_with_a_suggestion(words, told, calls, capsys):
    assert cli.main(words) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert told in shown
    assert "--help)" in shown
    assert calls == []


def test_config_prints_settings_that_read_back_the_same(calls, capsys):
    assert cli.main(["config", "a.yaml", "labels.vote=min"]) == 0
    assert parse_config(capsys.readouterr().out) == load_config("a.yaml", ["labels.vote=min"])


def test_config_check_prints_one_line_or_every_problem(calls, capsys):
    assert cli.main(["config", "a.yaml", "--check"]) == 0
    assert capsys.readouterr().out == "a.yaml: all settings are fine\n"
    Path("a.yaml").write_text("sed: 1\nlabels:\n  vote: all\n")
    assert cli.main(["config", "a.yaml", "--check"]) == 2
    assert [line.split(" is not")[0] for line in capsys.readouterr().err.splitlines()] == [
        "error: a.yaml:3: labels.vote: 'all'",
        "error: a.yaml:1: sed: unknown key; did you mean seed?",
    ]


def test_config_schema_prints_json(capsys):
    assert cli.main(["config", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "fedbiscuit config"
    assert cli.main(["config"]) == 2


# stages


@pytest.mark.parametrize(
    ("name", "function", "made"),
    [
        ("train", "train_selectors", "selectors"),
        ("label", "label", "preferences.jsonl"),
        ("align", "align", "policy"),
        ("evaluate", "evaluate", "evaluation.json"),
    ],
)
def test_each_stage_calls_its_function_and_names_the_next(name, function, made, calls, capsys):
    assert cli.main([name, "a.yaml"]) == 0
    assert [(call[0], call[2]) for call in calls] == [(function, name != "train")]
    assert f"runs/a/{made} is ready; next: " in capsys.readouterr().out


def test_a_run_folder_stands_for_its_config_and_is_continued(calls):
    (Path("runs") / "a").mkdir(parents=True)
    (Path("runs") / "a" / "config.yaml").write_text("name: a\nseed: 5\n")
    assert cli.main(["train", "runs/a"]) == 0
    assert (calls[0][1].seed, calls[0][2]) == (5, True)
    assert (calls[0][1].runs_dir, calls[0][1].name) == ("runs", "a")


def test_a_run_folder_that_was_moved_is_continued_where_it_is_now(calls, tmp_path):
    (tmp_path / "elsewhere" / "b").mkdir(parents=True)
    (tmp_path / "elsewhere" / "b" / "config.yaml").write_text("name: a\n")
    assert cli.main(["report", "elsewhere/b"]) == 0
    assert calls == [("write_report", tmp_path / "elsewhere" / "b")]


def test_a_folder_that_is_no_run_is_refused(calls, capsys):
    Path("x").mkdir()
    assert cli.main(["label", "x"]) == 2
    assert capsys.readouterr().err.startswith("error: x: no config.yaml in this folder; give a config file")


def test_run_ends_with_a_table_the_report_and_three_commands(calls, capsys):
    assert cli.main(["run", "a.yaml"]) == 0
    shown = capsys.readouterr()
    lines = [" ".join(line.split()) for line in shown.out.splitlines()]
    assert "group selectors 90.0% 80-95% 10.0%" in lines
    assert "longer answer 50.0%" in lines
    assert "selectors 70.0% 60-80% 7-0-3" in lines
    assert "Left out: too long: 3" in lines
    assert "Report: runs/a/report.html" in lines
    assert len(lines[lines.index("Next:") + 1 :]) == 3
    assert shown.err == "run_all 1/2  accuracy 0.5\nrun_all 2/2  accuracy 0.6\n"
    assert "\x1b" not in shown.out + shown.err


def test_without_a_policy_or_selectors_the_summary_still_has_the_report(capsys):
    print_evaluation({"selectors": None, "policy": None})
    print_next("r.html", [("x", "to try")])
    assert capsys.readouterr().out == "\nReport: r.html\n\nNext:\n  x  # to try\n"


def test_checkpoints_that_were_evaluated_have_their_own_tables(capsys):
    judge = {"name": "vote", "win_rate": 0.75, "interval": [0.5, 1.0], "wins": 3, "ties": 0, "losses": 1}
    selectors = EVALUATION["selectors"] | {"checkpoints": [{"round": 4, **EVALUATION["selectors"]["rows"][0]}]}
    policy = {"judges": [judge], "checkpoints": [{"step": 8, "words": 6.5, **judge}]}
    print_evaluation({"selectors": selectors, "policy": policy})
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "4 90.0% 80-95% 10.0%" in lines
    assert "vote 8 75.0% 50-100% 3-0-1 6.5" in lines


@pytest.mark.parametrize("on_terminal", [False, True])
def test_a_long_name_goes_on_in_the_next_line_and_no_number_is_cut(capsys, monkeypatch, on_terminal):
    monkeypatch.setattr("sys.stdout.isatty", lambda: on_terminal)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    name = "the vote of the selectors of " + "x" * 100 + ", which labeled"
    judge = {"name": name, "win_rate": 0.75, "interval": [0.5, 1.0], "wins": 300, "ties": 0, "losses": 100}
    row = {"step": 1000, "words": 6.5, **judge}
    print_evaluation({"selectors": None, "policy": {"judges": [judge], "checkpoints": [row]}})
    out = capsys.readouterr().out
    assert "…" not in out
    assert out.count("x") == 200
    tables = [line for line in out.splitlines() if not line.startswith("Policy")]
    assert max(map(len, tables)) <= 112 - 30 * on_terminal
    lines = [" ".join(line.split()) for line in tables]
    assert sum(line.endswith("75.0% 50-100% 300-0-100") for line in lines) == 1
    assert sum(line.endswith("1000 75.0% 50-100% 300-0-100 6.5") for line in lines) == 1


def test_plain_progress_prints_first_last_and_at_most_every_ten_seconds(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("fedbiscuit.terminal.time.monotonic", lambda: now[0])
    with ProgressLines() as progress:
        for step in range(1, 31):
            now[0] += 1.0
            progress("selectors", step, 30, "")
    assert capsys.readouterr().err.splitlines() == [
        "selectors 1/30",
        "selectors 11/30  0:19 left",
        "selectors 21/30  0:09 left",
        "selectors 30/30",
    ]


def test_progress_on_a_terminal_is_live_and_obeys_no_color(monkeypatch):
    pty = pytest.importorskip("pty")
    program = (
        "from fedbiscuit.terminal import ProgressLines\n"
        "with ProgressLines() as progress:\n    progress('selectors', 1, 2, '[red]note')\n"
    )
    main_end, other_end = pty.openpty()
    env = {**os.environ, "NO_COLOR": "1", "TERM": "xterm", "COLUMNS": "120"}
    subprocess.run([sys.executable, "-c", program], stderr=other_end, env=env, timeout=60, check=True)
    os.close(other_end)
    shown = os.read(main_end, 100_000).decode()
    os.close(main_end)
    assert "[red]note" in shown
    assert "1/2" in shown
    assert "\x1b[3" not in shown  # no colour


# data check


def test_data_check_counts_and_names_broken_lines(tmp_path):
    row = {"prompt": "p", "output_a": "x", "output_b": "y z", "choice": 1, "client": "ann"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n{broken\n" + json.dumps({**row, "choice": 2}) + "\n")
    shown = command("data", "check", "a.jsonl", cwd=tmp_path)
    assert shown.returncode == 2
    assert "a.jsonl:2:" in shown.stdout
    assert "a.jsonl:3: choice" in shown.stdout
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    shown = command("data", "check", "a.jsonl", cwd=tmp_path)
    assert shown.returncode == 0
    assert "ann" in shown.stdout


def test_data_check_of_a_config_reads_the_files_that_it_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    row = {"prompt": "p", "output_a": "x", "output_b": "y z", "choice": 1, "client": "ann"}
    Path("a.jsonl").write_text(json.dumps(row) + "\n")
    Path("my.yaml").write_text("data: {path: a.jsonl}\n")
    assert cli.main(["data", "check", "my.yaml"]) == 0
    assert capsys.readouterr().out.startswith("a.jsonl: ")


def test_data_check_of_a_published_set_shows_what_its_loader_makes_of_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("batch3.json").write_text(
        "".join(
            json.dumps(
                {
                    "info": {"id": f"t3_{i}", "post": f"post {i}", "title": "t", "subreddit": "s"},
                    "summaries": [{"text": f"plain {i}"}, {"text": f"lively {i}"}],
                    "choice": 1, "worker": "ann", "batch": "batch3", "split": "train",
                }
            ) + "\n"
            for i in range(4)
        )
    )  # fmt: skip
    Path("my.yaml").write_text("data: {source: tldr, path: ., val_fraction: 0.25}\n")
    assert cli.main(["data", "check", "my.yaml"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "4 comparisons of 1 clients; errors: 0, warnings: 4" in lines
    assert "ann 3 1 0" in lines
    assert "choice B in 100.0%" in lines
    at = lines.index("the first comparison, of ann:")
    number = lines[at + 1][-2]
    assert lines[at + 1 :] == [f"prompt 'post {number}'", f"preferred 'lively {number}'", f"other 'plain {number}'"]


def test_data_check_of_other_configs_shows_single_answers_prompts_and_files_beside(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    posts = [{"post": f"post {i}", "title": "t", "subreddit": "s", "summary": "one two"} for i in range(20)]
    for name in ("train", "valid", "test"):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(post) + "\n" for post in posts))
    Path("prompts.txt").write_text("one\ntwo\n")
    Path("sft.yaml").write_text("data: {source: tldr_sft, path: ., partition: {by: iid, num_clients: 5}}\n")
    Path("prompts.yaml").write_text("data: {prompts: prompts.txt}\n")
    assert cli.main(["data", "check", "sft.yaml", "prompts.yaml"]) == 0
    out = capsys.readouterr().out
    assert "choice            none: single good answers" in out
    assert "all are 0" not in out
    assert "longer answer" not in out
    assert "one answer                2       2       2       2" in out
    assert "  answer     'one two'" in out
    assert "prompts: 1 to align a policy on, 1 held out" in out
    row = {"prompt": "p", "output_a": "x", "output_b": "y z", "choice": 1, "client": "ann"}
    Path("a.jsonl").write_text(json.dumps(row) + "\n{broken\n")
    assert cli.main(["data", "check", "prompts.yaml", "a.jsonl"]) == 2
    assert "a.jsonl:2:" in capsys.readouterr().out


def test_labeling_says_which_pairs_were_left_out(calls, capsys):
    assert cli.main(["label", "a.yaml"]) == 0
    assert "  Left out, pairs of completions: empty completion: 2\n" in capsys.readouterr().out


def test_an_old_file_that_trains_selectors_points_to_the_file_that_aligns(calls, capsys):
    old = Path(__file__).parents[1] / "examples" / "original_selector.yaml"
    assert cli.main(["train", str(old), "federate.save_to", "checkpoints/mine.ckpt"]) == 0
    assert capsys.readouterr().out.endswith("fedbiscuit align RLHF.yaml --selector runs/mine\n")
    assert cli.main(["train", "a.yaml"]) == 0
    assert capsys.readouterr().out.endswith("fedbiscuit label runs/a\n")


def test_config_check_says_when_a_file_of_comparisons_is_not_there_yet(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("data: {path: a.jsonl}\n")
    assert cli.main(["config", "my.yaml", "--check"]) == 0
    assert capsys.readouterr().out == "my.yaml: all settings are fine\nnote: data.path: a.jsonl is not there yet\n"


def test_a_run_that_does_not_exist_is_told_from_a_config(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", "runs/mine"]) == 2
    assert (
        "runs/mine: no such file; give a config, such as configs/demo.yaml, or the folder of a run"
        in capsys.readouterr().err
    )


# ways out


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("no"), 2),
        (DataError("no"), 2),
        (EnvironmentFault("no"), 3),
        (FederationError("no"), 4),
        (IntegrityError("no"), 5),
    ],
)
def test_each_kind_of_error_has_its_exit_code_and_only_its_message(error, code, calls, capsys):
    calls.error = error
    assert cli.main(["train", "a.yaml"]) == code
    assert capsys.readouterr().err.splitlines()[-1] == "error: no"


def test_what_a_message_took_from_data_cannot_steer_the_terminal(calls, capsys):
    calls.error = DataError("a.jsonl:1: \x1b[2J\u202e")
    cli.main(["train", "a.yaml"])
    assert capsys.readouterr().err.splitlines()[-1] == "error: a.jsonl:1: \\x1b[2J\\u202e"


def test_mistake_16_an_unexpected_error_is_no_success_and_its_traceback_is_for_debug(calls, capsys, monkeypatch):
    monkeypatch.delenv("FEDBISCUIT_DEBUG", raising=False)
    calls.error = ValueError("odd")
    assert cli.main(["train", "a.yaml"]) == 1
    shown = capsys.readouterr().err
    assert shown.endswith("error: this should not happen: ValueError: odd (--debug shows where)\n")
    assert "Traceback" not in shown
    assert cli.main(["train", "--debug", "a.yaml"]) == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("FEDBISCUIT_DEBUG", "1")
    cli.main(["train", "a.yaml"])
    assert "Traceback" in capsys.readouterr().err


def test_a_warning_cannot_steer_the_terminal_nor_pass_for_a_line_of_ours(monkeypatch, capsys):
    monkeypatch.setattr(logging.root, "handlers", [])
    with entry._quiet_libraries():
        logging.getLogger("fedbiscuit").warning("nothing from %s: no\nerror: all is lost", "\x1b]0;pwn\x07\x1b[2Jann")
    assert capsys.readouterr().err == "warning: nothing from \\x1b]0;pwn\\x07\\x1b[2Jann: no\n  error: all is lost\n"


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate")],
)
def test_fault_85_and_88_what_the_machine_cannot_do_exits_with_3(error, calls, capsys):
    calls.error = error
    assert cli.main(["train", "a.yaml"]) == 3
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_fault_84_ctrl_c_says_how_to_resume_and_exits_with_130(calls, capsys):
    calls.error = KeyboardInterrupt()
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        assert cli.main(["train", "a.yaml", "seed", "4"]) == 130
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("stopped; to go on: ")
    assert last.endswith(" train a.yaml seed 4 --resume")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_fault_84_a_signal_to_the_process_exits_with_130(number, tmp_path):
    program = (
        "import signal, sys, time, types\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "import fedbiscuit\n"
        "from fedbiscuit import cli\n"
        "def work(cfg, **_):\n    print('working', flush=True)\n    time.sleep(60)\n"
        "sys.modules['fedbiscuit.pipeline'] = fedbiscuit.pipeline = types.SimpleNamespace(train_selectors=work)\n"
        "sys.exit(cli.main(['train', 'a.yaml']))\n"
    )
    (tmp_path / "a.yaml").write_text("name: a\n")
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    process.send_signal(number)
    _, shown = process.communicate(timeout=30)
    assert process.returncode == 130
    assert shown.splitlines()[-1].endswith("train a.yaml --resume")
    assert "Traceback" not in shown


def test_a_reader_that_leaves_early_is_no_error_message(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 1\n")
    line = f"{sys.executable} -m fedbiscuit config --schema | head -1"
    shown = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert shown.stdout == "{\n"
    assert shown.stderr == ""
