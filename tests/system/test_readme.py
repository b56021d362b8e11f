"""The documentation is true: its examples run, its files exist, its references lead somewhere."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from fedbiscuit.config import load_config

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = [path for folder in ("src", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
THIS = Path(__file__).resolve()


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, with the comment above it: ``file: NAME`` or ``run``, or nothing."""

    comment: str
    language: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    found = re.findall(
        r"(?:^<!-- ([^\n]+) -->\n)?^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    return [Block(*parts) for parts in found]


def section(page: str, title: str) -> str:
    """The text below a heading of level two."""
    return re.split(r"^## ", (ROOT / page).read_text("utf-8").split(f"\n## {title}", 1)[1], flags=re.MULTILINE)[0]


def agrees(shown: str, written: str) -> bool:
    """Whether output is as written; ``...`` stands for anything up to the end of a line."""
    lines = [re.escape(line).replace(re.escape("..."), ".*") for line in written.rstrip().split("\n")]
    return re.fullmatch("\n".join(line.rstrip() for line in lines), shown.rstrip()) is not None


# The examples


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(b.comment == "run" for b in blocks_of(p))], ids=lambda p: p.name
)
def test_the_commands_of_a_page_print_what_the_page_says(page, tmp_path):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for block in blocks_of(page):
        if block.comment.startswith("file: "):
            (tmp_path / block.comment.removeprefix("file: ")).write_text(block.text, "utf-8")
        elif block.comment == "run":
            for command, written in re.findall(r"^\$ (.+)\n((?:(?!\$ ).*\n)*)", block.text, re.MULTILINE):
                words = shlex.split(command)
                if words[0] == "fedbiscuit":
                    words = [sys.executable, "-m", *words]
                done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
                assert done.stderr == ""
                assert not written or agrees(done.stdout, written), done.stdout
                faulty = "error: " in written
                assert done.returncode == (2 if faulty else 0), done.stdout


TINY = [
    "model.device=cpu",
    "model.threads=1",
    "model.lora.r=2",
    "model.lora.layers_to_transform=[]",
    "policy_model=null",
    "data.demo.num_clients=4",
    "data.demo.comparisons_per_client=6",
    "data.demo.validation_per_client=2",
    "data.demo.test_per_client=2",
    "selectors.rounds=3",
    "selectors.warmup_rounds=1",
    "selectors.regroup_every=1",
    "selectors.cohort_size=2",
    "selectors.local.steps=1",
    "selectors.local.batch_size=2",
    "selectors.eval_every=2",
    "generation.num_prompts=4",
    "generation.num_completions=2",
    "generation.max_new_tokens=6",
    "generation.temperature=1.0",
    "generation.batch_size=4",
    "labels.min_margin=0.0",
    "alignment.steps=2",
    "alignment.batch_size=2",
    "alignment.grad_accum=1",
    "evaluation.num_prompts=3",
    "evaluation.bootstrap=20",
]
"""The demo with a two-layer model, cut down to seconds."""


def test_the_notebook_example_runs_as_it_stands_with_a_tiny_model(tiny_model, tmp_path, monkeypatch, capsys):
    """Only the settings of ``load_config`` get tiny sizes on top; every other letter is run as written."""
    (block,) = [block for block in blocks_of(ROOT / "README.md") if block.language == "python"]
    assert len(block.text.splitlines()) <= 25
    settings = '["name=notebook", "seed=1"]'
    assert block.text.count(settings) == 1
    program = block.text.replace(settings, '["name=notebook", "seed=1", *TINY]')
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "README.md", "exec"), {"TINY": [*TINY, f"model.base={tiny_model}"]})
    shown = capsys.readouterr().out
    assert "2 selectors, 3 rounds" in shown
    assert "selector of the client's group" in shown
    assert "known truth of the majority" in shown
    assert (tmp_path / "runs" / "notebook" / "report.html").is_file()


def test_the_tiny_settings_are_settings_of_the_demo():
    assert load_config(ROOT / "configs" / "demo.yaml", TINY).selectors.rounds == 3


# The files


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_loads_and_is_named_after_its_file(path):
    cfg = load_config(path)
    assert cfg.name == {"your_data": "mine"}.get(path.stem, path.stem)
    assert path.name in (ROOT / "README.md").read_text("utf-8")


def test_the_file_map_names_every_file_of_the_package_and_no_other():
    listing = section("README.md", "File map").split("```")[1]
    named, folders = [], [Path()]
    for line in listing.strip().splitlines()[1:]:
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        assert len(line.split()) > 1, f"{name}: no phrase"
        folders[depth:] = [folders[depth - 1] / name]
        if not name.endswith("/"):
            named.append(folders[depth].as_posix())
    package = ROOT / "src" / "fedbiscuit"
    there = [path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()]
    assert sorted(named) == sorted(name for name in there if "__pycache__" not in name)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_every_link_and_every_named_file_of_a_page_is_there(page):
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:|#", target):
            path, _, anchor = target.partition("#")
            assert (page.parent / path).is_file(), target
            assert not anchor or anchor in anchors_of(page.parent / path), target
    for name in re.findall(r"`((?:src|tests|configs|docs|scripts|benchmarks)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name


def anchors_of(page: Path) -> set[str]:
    """The names of a page's headings as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_citation_names_the_paper_and_the_licence_is_apache():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["preferred-citation"]["title"].startswith("Towards Federated RLHF")
    licence = (ROOT / "LICENSE").read_text("utf-8")
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence


# The references


def names_of_tests() -> set[str]:
    return {
        name
        for path in CODE
        for name in re.findall(r"^(?:async )?def (test_\w+)", path.read_text("utf-8"), re.MULTILINE)
    }


def numbers_in(name: str, kind: str) -> set[int]:
    """``test_fault_01_to_03_x`` -> {1, 2, 3}; ``test_fault_57_and_61_x`` -> {57, 61}."""
    found: set[int] = set()
    for listed in re.findall(rf"{kind}_(\d\d(?:_(?:and_|to_)?\d\d)*)(?=_)", name):
        numbers = [int(number) for number in re.findall(r"\d\d", listed)]
        found |= set(range(numbers[0], numbers[-1] + 1)) if "_to_" in listed else set(numbers)
    return found


def rows_of(page: str, letter: str = "") -> dict[int, str]:
    """The numbered rows of the tables of a page, whose numbers stand after a letter."""
    rows = re.findall(rf"^\| {letter}(\d+) \|(.*)$", (ROOT / page).read_text("utf-8"), re.MULTILINE)
    return {int(number): row for number, row in rows if row.count("|") >= 3}


def test_every_section_and_row_that_the_code_names_is_there():
    sections = {
        int(n) for n in re.findall(r"^## (\d+)\.", (ROOT / "docs" / "algorithm.md").read_text("utf-8"), re.MULTILINE)
    }
    assert sections == set(range(1, 10))
    rows = {"faults": rows_of("docs/faults.md"), "algorithm": dict.fromkeys(sections)}
    num_seen = 0
    for path in CODE:
        if path == THIS:
            continue
        for page, first, last in re.findall(
            r"docs/(algorithm|faults)\.md (?:sections?|rows?) (\d+)(?:(?: to |-)(\d+))?", path.read_text("utf-8")
        ):
            num_seen += 1
            assert set(range(int(first), int(last or first) + 1)) <= rows[page].keys(), (
                f"{path}: docs/{page}.md {first}"
            )
    assert num_seen >= 8


@pytest.mark.parametrize(
    ("kind", "page", "letter", "last"),
    [
        ("fault", "docs/faults.md", "", 92),
        ("page", "docs/faults.md", "P", 13),
        ("mistake", "docs/algorithm.md", "", 18),
    ],
)
def test_every_numbered_test_stands_in_its_row_and_every_test_in_a_row_exists(kind, page, letter, last):
    rows, there = rows_of(page, letter), names_of_tests()
    assert rows.keys() == set(range(1, last + 1))
    for number, row in rows.items():
        named = set(re.findall(r"`(test_\w+)`", row))
        assert named <= there, f"{page} row {number}: no such test: {named - there}"
        numbered = {name for name in there if number in numbers_in(name, kind)}
        assert numbered <= named, f"{page} row {number}: not named: {numbered - named}"
