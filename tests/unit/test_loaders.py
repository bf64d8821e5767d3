"""No file that is read is run: the source holds no call that could."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [*ROOT.glob("megatron_crnet/**/*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("*.py")]
FORBIDDEN = {
    *(
        "eval",
        "exec",
        "pickle.load",
        "pickle.loads",
        "pickle.Unpickler",
        "marshal.loads",
        "marshal.load",
        "shelve.open",
    ),
    *("torch.load", "torch.jit.load", "yaml.unsafe_load", "yaml.full_load", "joblib.load", "pd.read_pickle"),
}
SAFE = {"np.load": ("allow_pickle", False), "AutoTokenizer.from_pretrained": ("trust_remote_code", False)}
"""Calls that are harmless with the argument that they must have."""


def unsafe_calls(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func).replace("numpy.", "np.").replace("pandas.", "pd.")
        arguments = {key.arg: ast.unparse(key.value) for key in node.keywords}
        if name == "yaml.load" and "Safe" not in arguments.get("Loader", ""):
            found.append(name)
        if name in SAFE and arguments.get(SAFE[name][0]) != str(SAFE[name][1]):
            found.append(name)
        if name in FORBIDDEN or arguments.get("trust_remote_code") == "True" or arguments.get("allow_pickle") == "True":
            found.append(name)
    return found


@pytest.mark.fault("F1")
def test_no_source_file_calls_what_runs_a_file() -> None:
    assert len(SOURCES) > 100
    assert {path.name: calls for path in SOURCES if (calls := unsafe_calls(path.read_text()))} == {}


@pytest.mark.parametrize(
    "call",
    [
        "np.load(path)",
        "numpy.load(path, allow_pickle=True)",
        "torch.load(path)",
        "yaml.load(text, Loader=yaml.Loader)",
        "AutoTokenizer.from_pretrained(path)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "pd.read_pickle(path)",
        "eval(text)",
    ],
)
def test_calls_that_run_a_file_are_found(call: str) -> None:
    assert unsafe_calls(call)
