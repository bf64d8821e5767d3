"""What the pages and examples tell a reader to type is taken by the parsers: options, values and configurations."""

from __future__ import annotations

import ast
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from megatron_crnet import load_config
from megatron_crnet.cli.main import COMMANDS
from megatron_crnet.config.loading import ConfigParser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CALL = re.compile(r"^(?:\$ |    |`)?(?:[A-Z_]+=\S+ )*crnet (?:launch (?:--?\S+ )*)?([a-z][a-z-]*) +([^`\n]*)")
ABSENT = re.compile(r"--config (plan|ranks)\.yaml ?")
"""What an earlier command of a page writes."""


def _calls() -> list[tuple[str, str, str]]:
    found = []
    for page in PAGES:
        text = re.sub(r" *\\\n *", " ", page.read_text())
        pieces = [*text.splitlines(), *re.findall(r"`crnet [^`\n]*`", text)]
        calls = [match.groups() for match in map(CALL.match, pieces) if match]
        found += [
            (page.name, name, words)
            for name, words in calls
            if name in COMMANDS and len(words.split()) > 1 and not {"FILE", "..."} & {*words.split()}
        ]
    return sorted({*found})


@pytest.mark.parametrize(("page", "name", "words"), _calls())
def test_a_documented_command_is_taken(page: str, name: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    parser = import_module(f"megatron_crnet.cli.{COMMANDS[name][0]}").build_parser(f"crnet {name}")
    argv = shlex.split(ABSENT.sub("", words.replace("[OPTIONS]", "")), comments=True)
    if isinstance(parser, ConfigParser):
        if ABSENT.search(words) and "--config" not in argv:
            argv += ["--config", "examples/llama2_7b.yaml"]
        parser.read(argv)
    else:
        parser.parse_args(argv)


def test_the_pages_name_commands() -> None:
    assert {name for _, name, _ in _calls()} > {"train", "plan", "convert", "report", "tokenizer", "generate"}


@pytest.mark.parametrize("source", re.findall(r'load_config\(("examples/[^)]*)\)', (ROOT / "README.md").read_text()))
def test_the_configuration_of_readmes_python_is_taken(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    path, overrides = ast.literal_eval(f"({source})")
    assert load_config(path, overrides).training.train_steps > 0


@pytest.mark.parametrize("script", ["slurm/pretrain.sbatch", "slurm/chain.sh", "deepspeed/pretrain.sh"])
def test_the_options_in_a_scripts_usage_fit_its_default_configuration(
    script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    found = re.findall(r"(?:pretrain\.s\w+) (--training\.train_steps) (\d+)", (ROOT / "examples" / script).read_text())
    assert found
    for name, steps in found:
        load_config("examples/llama2_7b.yaml", [f"{name}={steps}"])
