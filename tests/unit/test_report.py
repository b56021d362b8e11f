"""The report: what a run folder holds is on the page, safely, and nothing that it does not hold."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fedbiscuit.config import dump_config, parse_config
from fedbiscuit.report import write_report
from fedbiscuit.report.markup import name_on_axis, shortened, visible
from fedbiscuit.report.reading import RunView, read_run
from fedbiscuit.report.style import DARK, GROUPS, LIGHT
from fedbiscuit.report.words import summary
from fedbiscuit.types import ConfigError, IntegrityError

FILES = (
    "metrics.jsonl",
    "global_metrics.jsonl",
    "completions.jsonl",
    "preferences.jsonl",
    "labels.json",
    "alignment.jsonl",
    "timings.jsonl",
    "evaluation.json",
)
NAMES = ["ann", "bo", "cem", "dana", "eli", "fatima", "gus", "hana", "ivo", "jin", "kofi", "lea"]


def write_fake_run(
    folder: Path,
    names: list[str] = NAMES,
    num_adapters: int = 2,
    rounds: int = 30,
    warmup: int = 4,
    steps: int = 120,
    text: str = "",
    overrides: tuple[str, ...] = (),
) -> Path:
    """A whole run as the pipeline leaves it, with numbers that rise as one hopes; ``text`` is put wherever users write."""
    rng = random.Random(0)
    folder.mkdir(parents=True)
    several = num_adapters > 1
    settings = [
        f"name={folder.name}", f"selectors.num_adapters={num_adapters}", f"selectors.rounds={rounds}",
        f"selectors.warmup_rounds={warmup}", "selectors.regroup_every=5", f"alignment.steps={steps}",
        f"evaluation.compare_global={str(several).lower()}", "data.path=people.jsonl", *overrides,
    ]  # fmt: skip
    (folder / "config.yaml").write_text(dump_config(parse_config("seed: 0", settings)))
    (folder / "manifest.json").write_text(
        json.dumps(
            {
                "fedbiscuit": "0.1.0", "torch": "2.11.0", "python": "3.12.1", "threads": 2, "gpu": None,
                "data": {f"people{text}.jsonl": "ab" * 32}, "model": "cd" * 32, "seed": 0,
            }
        )
    )  # fmt: skip
    write_lines(folder / "metrics.jsonl", fake_rounds(rng, names, num_adapters, rounds, warmup, text))
    if several:
        write_lines(folder / "global_metrics.jsonl", fake_rounds(rng, names, 1, rounds, 0, text))
    write_lines(
        folder / "completions.jsonl",
        [{"prompt": f"p{i}{text}", "completions": [{"text": "a", "tokens": 1, "finished": True}]} for i in range(9)],
    )
    (folder / "labels.json").write_text(json.dumps({"pairs": 140, "left_out": {"tie": 0, "equal completions": 3}}))
    left_out = {f"comparisons whose two answers do not fit max_tokens{text}": 4}
    (folder / "left_out.json").write_text(json.dumps({"clients": len(names), "left_out": left_out}))
    preference = {"prompt": "p0", "chosen": "a", "rejected": "b", "probability": 0.8, "disagreement": 0.1}
    write_lines(folder / "preferences.jsonl", [preference] * 140)
    margins = [1.4 * (1 - math.exp(-i / 50)) + rng.gauss(0, 0.4) for i in range(steps)]
    write_lines(
        folder / "alignment.jsonl",
        [
            {
                "step": i + 1, "loss": math.log1p(math.exp(-m)), "margin": m,
                "accuracy": min(1, max(0, round(4 * (0.5 + m / 3)) / 4)), "chosen_logp": -20.0, "rejected_logp": -21.0,
            }
            for i, m in enumerate(margins)
        ],
    )  # fmt: skip
    seconds = [("selectors", rounds, 3.2), ("global", rounds, 2.9), ("generation", 48, 0.6), ("alignment", steps, 0.4)]
    write_lines(
        folder / "timings.jsonl",
        [{"stage": s, "step": i + 1, "seconds": t} for s, n, t in seconds for i in range(n)]
        + [{"stage": "labels", "step": 140, "seconds": 22.5}, {"stage": "evaluation", "step": 1, "seconds": 41.0}],
    )
    (folder / "evaluation.json").write_text(json.dumps(fake_evaluation(rng, names, num_adapters, text)))
    for name in ("selectors", "policy", *(["global"] if several else [])):
        (folder / name).mkdir()
    return folder


def fake_rounds(
    rng: random.Random, names: list[str], num_adapters: int, rounds: int, warmup: int, text: str
) -> list[dict[str, Any]]:
    """Rows of ``metrics.jsonl``."""
    several, rows = num_adapters > 1, []
    warmups = num_adapters * warmup if several else 0
    for number in range(rounds):
        regrouped = several and number >= warmups and (number - warmups) % 5 == 0
        settled = min(1.0, (number - warmups) / 10)
        truth = {name: i % num_adapters for i, name in enumerate(names)}
        grouping = {
            n: u if rng.random() < 0.6 + 0.4 * settled else rng.randrange(num_adapters) for n, u in truth.items()
        }
        cohort = sorted(rng.sample(names, min(6, len(names))))
        bytes_each = 1_850_000
        row: dict[str, Any] = {
            "round": number,
            "phase": "warmup" if number < warmups else "federated",
            "cohort": cohort,
            "adapter_of": {name: grouping[name] for name in cohort},
            "regrouped": regrouped,
            **({"grouping": grouping} if regrouped else {}),
            "metrics": {"num_replies": 6, "delta_norm": {"0": 0.3}, "clipped": 0},
            "refused": {names[2]: f"its update is not finite{text}"} if number in (7, 11) else {},
            **({"kept_seats": {names[3]: f"it does not evaluate{text}"}} if regrouped else {}),
            **({"away": {f"site-c{text}": f"it is not connected{text}"}} if number in (2, 3, 4) else {}),
            "bytes_up": bytes_each * 6,
            "bytes_down": bytes_each * (6 + (num_adapters * len(names) if regrouped else 0)),
        }
        if number % 2 == 1:
            level = 0.5 + (0.3 if several else 0.18) * (1 - math.exp(-number / 9))
            by_client = {name: min(1.0, max(0.0, rng.gauss(level, 0.07))) for name in names}
            row["metrics"]["validation"] = {
                "loss": 0.69 - (level - 0.5), "accuracy": sum(by_client.values()) / len(names),
                "accuracy_comparisons": level, "flip_rate": max(0.02, 0.4 - level / 2 + rng.gauss(0, 0.01)),
                "calibration_error": 0.05, "clients": by_client,
            }  # fmt: skip
        rows.append(row)
    return rows


def fake_evaluation(rng: random.Random, names: list[str], num_adapters: int, text: str) -> dict[str, Any]:
    """``evaluation.json``."""
    measured = {"worst_decile": 0.65, "flip_rate": 0.06, "calibration_error": 0.041, "loss": 0.487}
    own = {"name": "selector of the client's group", "accuracy": 0.794, "interval": [0.752, 0.836]}
    shared = {"name": "one global selector", "accuracy": 0.668, "interval": [0.61, 0.721]}
    longer = {"name": "the longer answer", "accuracy": 0.553, "interval": [0.47, 0.62], "worst_decile": 0.15}
    rows = [own | measured, {"name": "vote of all selectors", "accuracy": 0.689, "interval": [0.63, 0.74]} | measured]
    rows = [*rows, shared | measured] if num_adapters > 1 else [shared | measured]
    rows += [longer | {"loss": None, "flip_rate": 0.0, "calibration_error": 0.447}]
    rows += [{"name": "chance", "accuracy": 0.5, "accuracy_comparisons": 0.5, "worst_decile": 0.5}]
    answer = "Take the bus; it is quicker than it looks and you can read on the way."
    return {
        "selectors": {
            "rows": rows,
            "clients": {
                name: {
                    "adapter": i % num_adapters, "accuracy": min(1.0, round(rng.gauss(0.79, 0.08) * 20) / 20),
                    "comparisons": 20, "baseline_longer": [0.85, 0.25][i % 2] + rng.randrange(-2, 3) / 20,
                }
                for i, name in enumerate(names)
            },
            "calibration": [
                {"p": 0.525 + b / 20, "accuracy": 0.53 + b / 22, "count": 8 + 6 * b} for b in range(10)
            ],
            "adjusted_rand_index": 1.0 if num_adapters > 1 else None,
        },
        "policy": {
            "judges": [
                {
                    "name": "the selectors' vote", "win_rate": 0.74, "interval": [0.62, 0.85],
                    "wins": 33, "losses": 10, "ties": 5,
                },
                {
                    "name": "known truth of the majority", "win_rate": 0.71, "interval": [0.58, 0.82],
                    "wins": 31, "losses": 11, "ties": 6,
                },
            ],
            "length": {"raw": 24.1, "aligned": 17.9},
            "examples": [
                {
                    "prompt": f"How do I get to the station in time?{text}",
                    "raw": f"{answer} {answer}\n\n- leave early\n- eat on the way{text}", "aligned": f"{answer}{text}",
                },
                {"prompt": "Was soll ich heute kochen?", "raw": "", "aligned": "Eine Suppe aus dem, was da ist."},
            ],
        },
    }  # fmt: skip


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """A JSON Lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# What is on the page


class Page(HTMLParser):
    """The tags, attributes and texts of a page, read strictly: what is opened is closed in order."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        """All that a reader sees, with single spaces."""
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def named(self, tag: str) -> list[dict[str, str]]:
        """The attributes of all tags of this name."""
        return [attrs for name, attrs in self.tags if name == tag]


def page_of(folder: Path) -> Page:
    """The report of this folder, made now."""
    return Page(write_report(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run, and its page."""
    folder = write_fake_run(tmp_path_factory.mktemp("runs") / "demo")
    return folder, write_report(folder).read_text(encoding="utf-8")


def test_a_finished_run_shows_all_its_tables_figures_examples_and_settings(whole: tuple[Path, str]) -> None:
    page = Page(whole[1])
    figures = [attrs["id"] for attrs in page.named("figure")]
    assert figures == ["accuracy", "clients", "groups", "flips", "calibration", "wins", "alignment", "bytes"]
    assert len(page.named("table")) == 8
    for text in (
        "site-c 3 it is not connected",
        "FedBiscuit: 2 group selectors",
        "selector of the client's group 79.4% 75–84% 65.0% 6.0% 0.041 0.487",
        "chance 50.0% 50.0% – – –",
        "known truth of the majority 71.0% 58–82% 31–6–11",
        "24.1 words on average raw, 17.9 aligned",
        "adjusted Rand index 1.00",
        "The last groups have 6 and 6 clients.",
        "333 MB up to the server",
        "Was soll ich heute kochen?",
        "cem 2 its update is not finite",
        "comparisons whose two answers do not fit max_tokens 4",
        "pairs of completions: equal completions 3",
        "training the selectors 1 min 36 s 30 rounds 3.2 s a round",
        "data: people.jsonl " + "ab" * 32,
        "num_adapters: 2 # U; 1 is FedBis, more is FedBiscuit",
    ):
        assert text in page.text
    assert "tie 0" not in page.text


def test_the_first_sentence_says_what_came_out(whole: tuple[Path, str]) -> None:
    assert summary(read_run(whole[0])) == [
        "The selector of a client’s group agrees with 79% of people’s choices it has not seen (against 69% for the vote "
        "of all selectors, 67% for one global selector, 55% for the longer answer, 50% for chance), and the aligned "
        "policy’s answer wins against the raw policy’s on 71% of prompts, as judged by the known truth."
    ]


def test_the_choices_of_the_demo_world_are_not_called_those_of_people(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "demo", overrides=("data.source=demo",))
    assert "79% of the demo world’s simulated people’s choices" in summary(read_run(folder))[0]


def changed(run: RunView, own: dict[str, Any] | None = None, judge: dict[str, Any] | None = None) -> RunView:
    """The same run with other numbers for its selectors and, as its only judge, another one."""
    evaluation = json.loads(json.dumps(run.evaluation))
    evaluation["selectors"]["rows"][0] |= own or {}
    evaluation["policy"]["judges"] = [evaluation["policy"]["judges"][0] | (judge or {})]
    return RunView(**{**vars(run), "evaluation": evaluation})


def test_a_result_that_is_no_better_than_a_simple_rule_is_called_so(whole: tuple[Path, str]) -> None:
    run = read_run(whole[0])
    assert any("not clearly better than chance" in s for s in summary(changed(run, {"interval": [0.46, 0.6]})))
    assert any("longer answer would have done" in s for s in summary(changed(run, {"accuracy": 0.55})))
    assert any("one global selector did as well" in s for s in summary(changed(run, {"accuracy": 0.66})))
    assert any("could be a draw" in s for s in summary(changed(run, judge={"interval": [0.48, 0.9]})))
    assert any("order still counts" in s for s in summary(changed(run, {"flip_rate": 0.4})))
    assert any("people may judge otherwise" in s for s in summary(changed(run)))


@pytest.mark.parametrize(
    ("kept", "sentence", "figures"),
    [
        (0, "training the selectors, round 0 of 30 done", []),
        (2, "the selectors are trained", ["accuracy", "groups", "flips", "bytes"]),
        (3, "the policy has answered 9 prompts", ["accuracy", "groups", "flips", "bytes"]),
        (5, "140 pairs labeled", ["accuracy", "groups", "flips", "bytes"]),
        (6, "aligning the policy, step 120 of 120", ["accuracy", "groups", "flips", "alignment", "bytes"]),
    ],
)
def test_an_unfinished_run_shows_what_there_is_and_says_where_it_is(
    tmp_path: Path, kept: int, sentence: str, figures: list[str]
) -> None:
    folder = write_fake_run(tmp_path / "demo")
    for name in FILES[kept:]:
        (folder / name).unlink()
    (folder / "policy").rmdir()
    if kept == 0:
        (folder / "selectors").rmdir()
    page = page_of(folder)
    assert f"This run is not finished: {sentence}" in page.text
    assert [attrs["id"] for attrs in page.named("figure")] == figures
    assert not {"nan", "None", "null"} & set(page.text.split(" All settings")[0].split())


def test_a_run_of_which_only_the_settings_are_there_has_a_page(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "demo")
    for path in folder.iterdir():
        if path.is_dir():
            path.rmdir()
        elif path.name != "config.yaml":
            path.unlink()
    page = page_of(folder)
    assert "round 0 of 30" in page.text
    assert not page.named("table")


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "demo")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"round": 30, "phase": "fed')
    assert page_of(folder).named("figure")


def test_one_selector_has_no_groups_and_is_not_compared_with_itself(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "demo", num_adapters=1)
    page = page_of(folder)
    assert "groups" not in [attrs["id"] for attrs in page.named("figure")]
    assert "FedBis: one selector" in page.text
    assert "selectors of the groups" not in page.text
    assert summary(read_run(folder)) == [
        "The selector agrees with 67% of people’s choices it has not seen (against 55% for the longer answer, 50% for "
        "chance), and the aligned policy’s answer wins against the raw policy’s on 71% of prompts, as judged by the "
        "known truth."
    ]


def test_a_baseline_that_trains_the_policy_itself_has_a_page_without_selectors(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "demo", num_adapters=1, overrides=("selectors.local.objective=sft",))
    evaluation = json.loads((folder / "evaluation.json").read_text())
    (folder / "evaluation.json").write_text(json.dumps({"selectors": None, "policy": evaluation["policy"]}))
    assert "the policy itself by SFT, trained federatedly (a baseline)" in page_of(folder).text
    evaluation["policy"]["judges"] = []
    (folder / "evaluation.json").write_text(json.dumps({"selectors": None, "policy": evaluation["policy"]}))
    page = page_of(folder)
    assert "nothing in this run can judge it" in page.text
    assert "wins" not in [attrs["id"] for attrs in page.named("figure")]


def test_clients_that_train_alone_are_not_shown_as_groups(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "demo", num_adapters=1, overrides=("selectors.population=local",))
    write_lines(folder / "metrics.jsonl", fake_rounds(random.Random(0), NAMES, len(NAMES), 6, 0, ""))
    page = page_of(folder)
    assert "groups" not in [attrs["id"] for attrs in page.named("figure")]
    assert "selectors, trained by each client alone (a baseline)" in page.text
    assert "A client’s own selector agrees" in page.text


def test_many_clients_are_shown_by_the_size_of_their_groups_on_a_page_that_stays_small(tmp_path: Path) -> None:
    names = [f"worker-{i:04}" for i in range(400)]
    folder = write_fake_run(tmp_path / "demo", names=names, num_adapters=8, rounds=80, warmup=2)
    page = write_report(folder).read_text(encoding="utf-8")
    assert "How many clients had which selector" in page
    assert "worker-0001" not in page
    assert len(page) < 500_000


def test_checkpoints_that_were_judged_add_the_win_rate_by_step(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "demo")
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert "DPO step" not in page_of(folder).text
    evaluation["policy"]["checkpoints"] = [
        {"step": 40 * i, "name": judge, "win_rate": 0.5 + i / 10} for i in range(4) for judge in ("vote", "truth")
    ]
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    assert "DPO step" in page_of(folder).text
    assert "words an answer" not in page_of(folder).text
    for row in evaluation["policy"]["checkpoints"]:
        row |= {"words": 20.0 - row["step"] / 40, "kl": row["step"] / 10}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    text = page_of(folder).text
    assert "words an answer" in text
    assert "nats from the raw policy" in text


def test_the_judge_to_trust_is_the_truth_then_selectors_of_other_people_then_the_run_s_own(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "demo")
    evaluation = json.loads((folder / "evaluation.json").read_text())
    own, truth = evaluation["policy"]["judges"]
    others = own | {"name": "the selectors of others, 12 other clients", "win_rate": 0.66, "independent": True}
    evaluation["policy"]["judges"], evaluation["policy"]["kl"] = [own, others], 3.25
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    text = page_of(folder).text
    assert "on 66% of prompts, as judged by the selectors of others, 12 other clients" in text
    assert "trained to please these same selectors" not in text
    assert "by 3.2 nats an answer" in text
    evaluation["policy"]["judges"] = [own, others, truth]
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    assert "on 71% of prompts, as judged by the known truth" in page_of(folder).text


# Safety


ATTACK = "</text></svg></title></style><img src=x onerror=alert(1)><script>alert(2)</script>\"'&amp;$x_1$"


def test_no_text_of_a_user_or_a_model_can_become_markup(tmp_path: Path) -> None:
    calm = write_fake_run(tmp_path / "calm")
    wild = write_fake_run(tmp_path / "wild", names=[f"{i}{ATTACK}" for i in range(12)], text=ATTACK)
    before, after = page_of(calm), page_of(wild)
    assert Counter(tag for tag, _ in after.tags) == Counter(tag for tag, _ in before.tags)
    assert not any(key.startswith("on") or "javascript:" in value for _, a in after.tags for key, value in a.items())
    assert after.text.count(f"in time?{ATTACK}") == 1
    assert f"2{ATTACK}" in after.text  # the refused client
    assert before.text.count("it does not evaluate") == 1, "a client that keeps its seat has a table of its own"


def test_a_name_that_looks_like_one_of_our_colours_or_ids_stays_as_it_is(tmp_path: Path) -> None:
    names = ["#0a00ff", '<a id="x">', 'style="#0a0001"', "1.23456789", "$x_1$", *NAMES[:7]]
    page = page_of(write_fake_run(tmp_path / "demo", names=names))
    assert {"#0a00ff", '<a id="x">', 'style="#0a0001"', "1.23456789", "$x_1$"} <= set(page.texts)


def test_fault_28_characters_that_hide_or_reorder_text_are_written_out(tmp_path: Path) -> None:
    assert visible("a\u202eb\u200bc\x00d\ufeffe\ud800f\r\ng") == "a\\u202eb\\u200bc\\x00d\\ufeffe\\ud800f\ng"
    assert visible("می\u200cروم 👩\u200d🌾 日本\tx") == "می\u200cروم 👩\u200d🌾 日本\tx"
    hidden = "\u202e\u2066\ud800\x1b[2J\x7f"
    names = [f"{hidden}{i}" for i in range(12)]
    page = write_report(write_fake_run(tmp_path / "demo", names=names, text=hidden)).read_text(encoding="utf-8")
    assert not set("\u202e\u2066\x1b\x7f") & set(page)
    assert "\\u202e\\u2066\\ud800\\x1b[2J\\x7f" in page


def test_the_page_needs_nothing_from_outside_and_no_script(whole: tuple[Path, str]) -> None:
    page = Page(whole[1])
    assert not {"script", "link", "img", "iframe", "object", "image", "foreignobject"} & {tag for tag, _ in page.tags}
    without_names = re.sub(r' xmlns(:xlink)?="http://www.w3.org/[^"]*"', "", whole[1])
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", without_names.replace("-//", ""))
    policies = [a["content"] for a in page.named("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"]


def test_the_page_says_nothing_of_the_machine_that_made_it(whole: tuple[Path, str]) -> None:
    assert str(whole[0].parent) not in whole[1]
    assert "matplotlib" not in whole[1].lower()


def test_a_link_in_place_of_the_report_is_replaced_and_not_followed(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "demo")
    other = tmp_path / "other.txt"
    other.write_text("mine")
    (folder / "report.html").symlink_to(other)
    write_report(folder)
    assert other.read_text() == "mine"
    assert not (folder / "report.html").is_symlink()


def test_a_folder_without_a_run_and_a_broken_file_are_errors_that_name_the_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no run here"):
        write_report(tmp_path / "nothing")
    folder = write_fake_run(tmp_path / "demo")
    (folder / "evaluation.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"evaluation\.json"):
        write_report(folder)
    (folder / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        write_report(folder)


# The same bytes, for everybody


def test_the_same_run_gives_the_same_bytes_in_another_process_with_other_settings(
    whole: tuple[Path, str], tmp_path: Path
) -> None:
    folder = write_fake_run(tmp_path / "demo")
    (tmp_path / "matplotlibrc").write_text(
        "axes.xmargin: 0.3\nxtick.direction: in\naxes.spines.bottom: False\nsvg.fonttype: path\n"
    )
    code = "import sys; from pathlib import Path; from fedbiscuit.report import write_report; write_report(Path(sys.argv[1]))"
    environment = {"PYTHONHASHSEED": "7", "MATPLOTLIBRC": str(tmp_path), "TZ": "Asia/Tokyo", "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, env=environment)
    assert (folder / "report.html").read_text(encoding="utf-8") == whole[1]


def test_figures_tables_and_headings_can_be_read_without_seeing_them(whole: tuple[Path, str]) -> None:
    page = Page(whole[1])
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    assert all(a.get("role") == "img" and len(a["aria-label"]) > 20 for a in page.named("svg"))
    assert all(a.get("scope") in ("col", "row") for a in page.named("th"))
    assert page.named("html") == [{"lang": "en"}]
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    wanted = {name for _, a in page.tags for value in a.values() for name in re.findall(r"url\(#([^)]+)\)", value)}
    wanted |= {a["xlink:href"].removeprefix("#") for a in page.named("use")}
    assert wanted <= set(ids)


def luminance(colour: str) -> float:
    """WCAG's relative luminance of ``#rrggbb``."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """WCAG's contrast of two colours, 1 to 21."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_text_and_lines_stand_out_from_what_is_behind_them(colours: dict[str, str]) -> None:
    for text in ("ink", "muted", "link"):
        assert all(contrast(colours[text], colours[behind]) >= 4.5 for behind in ("paper", "card", "shade"))
    for line in (*GROUPS, "main", "muted"):
        assert contrast(colours[line], colours["card"]) >= 3


def test_a_long_text_is_cut_and_the_rest_is_counted() -> None:
    assert shortened("abc", 3) == "abc"
    assert shortened("abcd", 3) == "ab…"
    assert name_on_axis("worker") == "worker"
    assert name_on_axis("a worker of number 12345") == "a worker…r 12345"
    assert shortened("x" * 1510, 1500) == "x" * 1500 + "… (10 more characters)"


def test_the_report_loads_matplotlib_only_when_it_draws() -> None:
    code = "import sys, fedbiscuit.report; sys.exit(any(m in sys.modules for m in ('matplotlib', 'torch', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_new_clients_and_a_fitted_temperature_are_told_where_a_run_has_them(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "demo")
    path = folder / "evaluation.json"
    evaluation = json.loads(path.read_text())
    before = page_of(folder).text
    evaluation["selectors"]["temperature"] = 2.5
    evaluation["selectors"]["rows"][0]["calibration_error_at_temperature"] = 0.0123
    evaluation["selectors"]["rows"].append({"name": "new clients, the best fitting selector", "accuracy": 0.612})
    path.write_text(json.dumps(evaluation))
    text = page_of(folder).text
    assert (
        "At a temperature of 2.50, fitted on validation comparisons, the first row’s calibration error is 0.012."
        in text
    )
    assert "new clients, the best fitting selector 61.2%" in text
    assert summary(read_run(folder))[0] in before  # the sentence at the top is about those who took part
