"""What may not stand in the source at all: anything that would run code from a file, a model or a config."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fedbiscuit

SOURCE = Path(fedbiscuit.__file__).parent

BANNED_IMPORTS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
BANNED_CALLS = {
    "eval", "exec", "compile", "__import__", "torch.load", "torch.hub.load", "os.system", "os.popen", "os.execv",
    "np.load", "numpy.load", "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.full_load_all",
    "yaml.unsafe_load_all", "pandas.read_pickle", "pd.read_pickle", "subprocess.getoutput",
    "subprocess.getstatusoutput",
}  # fmt: skip
BANNED_NAMES = {"yaml.Loader", "yaml.UnsafeLoader", "yaml.FullLoader", "yaml.CLoader"}
BANNED_KEYWORDS = {"trust_remote_code": (False,), "shell": (False,), "weights_only": (True,), "allow_pickle": (False,)}
"""Keyword to the only literal values that it may have."""


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def faults_of(source: str) -> list[str]:
    """Line and reason of each thing in a source text that is not allowed."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            names = [f"{module[0]}.{name.name}" for name in node.names] if isinstance(node, ast.ImportFrom) else module
            if any(name.split(".")[0] in BANNED_IMPORTS for name in module):
                faults.append(f"{node.lineno}: import of {module[0]}")
            faults += [f"{node.lineno}: import of {name}" for name in names if name in BANNED_CALLS | BANNED_NAMES]
        elif isinstance(node, ast.Name | ast.Attribute):
            if _dotted(node) in BANNED_NAMES or (isinstance(node, ast.Attribute) and _dotted(node) in BANNED_CALLS):
                faults.append(f"{node.lineno}: {_dotted(node)}")
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in BANNED_CALLS:
                faults.append(f"{node.lineno}: {node.func.id}()")
            for keyword in node.keywords:
                allowed = BANNED_KEYWORDS.get(keyword.arg or "")
                if allowed is None:
                    continue
                if not (isinstance(keyword.value, ast.Constant) and keyword.value.value in allowed):
                    faults.append(f"{node.lineno}: {keyword.arg}=")
        elif isinstance(node, ast.Dict | ast.Subscript):
            keys = node.keys if isinstance(node, ast.Dict) else [node.slice]
            if any(isinstance(key, ast.Constant) and key.value == "trust_remote_code" for key in keys):
                faults.append(f"{node.lineno}: trust_remote_code")
    return faults


def test_fault_57_and_61_no_source_file_can_run_code_from_data() -> None:
    files = sorted(SOURCE.rglob("*.py"))
    assert len(files) > 5
    found = {str(file.relative_to(SOURCE)): faults_of(file.read_text("utf-8")) for file in files}
    assert {file: faults for file, faults in found.items() if faults} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from dill import loads",
        "import torch\ntorch.load('x.pt')",
        "import torch\nread = torch.load",
        "from torch import load",
        "torch.load(path, weights_only=False)",
        "anything(path, weights_only=False)",
        "anything(path, weights_only=flag)",
        "np.load(path, allow_pickle=True)",
        "eval('1')",
        "exec(text)",
        "compile(text, 'x', 'exec')",
        "__import__(name)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "class L(yaml.FullLoader): ...",
        "from yaml import UnsafeLoader",
        "from_pretrained(name, trust_remote_code=True)",
        "from_pretrained(name, trust_remote_code=trust)",
        "from_pretrained(name, **{'trust_remote_code': True})",
        "options['trust_remote_code'] = True",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
    ],
)
def test_fault_57_and_61_the_lint_sees(source: str) -> None:
    assert faults_of(source)


@pytest.mark.parametrize(
    "source",
    [
        "import re\nre.compile('x')",
        "model.eval()",
        "torch.compile(model)",
        "yaml.safe_load(text)",
        "yaml.SafeLoader(text)",
        "subprocess.run(['git'], shell=False)",
        "from_pretrained(name, trust_remote_code=False)",
        "'''never torch.load, eval or trust_remote_code'''",
        "json.load(file)",
    ],
)
def test_the_lint_leaves_harmless_code_alone(source: str) -> None:
    assert faults_of(source) == []
