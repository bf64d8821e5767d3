"""The commands of the table, and how they end: errors in one line, Ctrl-C and a closed pipe without a traceback."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_crnet.cli.main import COMMANDS, Call, main, run_cli
from megatron_crnet.utils.environment import command_line
from megatron_crnet.utils.errors import ConfigError

ROOT = Path(__file__).parents[3]


def _raise(error: BaseException) -> int:
    raise error


def test_what_a_user_can_mend_is_one_line_and_its_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(lambda: 7) == 7
    assert run_cli(lambda: _raise(ConfigError("a\n  b"))) == 2
    assert capsys.readouterr().err == "error: a b\n"


def test_ctrl_c_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(lambda: _raise(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_the_broken_pipe_of_something_else_is_a_defect() -> None:
    with pytest.raises(BrokenPipeError):
        run_cli(lambda: _raise(BrokenPipeError()))


@pytest.mark.parametrize("flush", [False, True])
def test_a_reader_that_has_seen_enough_is_no_traceback(flush: bool) -> None:
    code = f"""
import sys
from megatron_crnet.cli.main import run_cli
sys.exit(run_cli(lambda: print("line " * 100000, flush={flush}) or 0))
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_every_module_of_the_room_is_a_command_and_has_a_door_that_is_one() -> None:
    modules = {path.stem for path in (ROOT / "megatron_crnet/cli").glob("*.py")} - {"__init__", "main"}
    assert modules == {module for module, _ in COMMANDS.values()}
    doors = [ROOT / "pretrain_crnet.py", *(ROOT / "tools").glob("*.py")]
    named = [re.findall(r'main = Door\("(.+)", __file__\)', path.read_text()) for path in doors]
    assert sorted(name for (name,) in named) == sorted(set(COMMANDS) - {"completion"})


HELP = """
import contextlib, io, json, sys
from megatron_crnet.cli.main import COMMANDS, main
found = {}
for name in COMMANDS:
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        main([name, "--help"])
    slow = {"torch", "deepspeed", "megatron", "transformers", "pandas", "matplotlib", "pyarrow"} & set(sys.modules)
    found[name] = (printed.getvalue(), sorted(slow))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def helps() -> dict[str, tuple[str, list[str]]]:
    """What `--help` of each command prints, and which slow libraries are imported by then."""
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
    found: dict[str, tuple[str, list[str]]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_and_waits_for_no_slow_library(name: str, helps: dict[str, tuple[str, list[str]]]) -> None:
    printed, libraries = helps[name]
    assert libraries == []
    assert printed.startswith(f"usage: crnet {name} ")
    assert re.search(rf"^    .*crnet ({name}|launch .*{name}) ", printed, re.MULTILINE), "an example"


def test_without_a_command_there_is_a_list_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in COMMANDS)
    assert main([]) == 2
    assert capsys.readouterr().err.endswith("error: no command is given: name one of them\n")
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "error: unknown command 'trian': did you mean train?\n"
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("megatron_crnet ")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_names_its_versions(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("megatron_crnet ")


def test_a_record_holds_the_command_as_it_was_typed() -> None:
    assert command_line(["/usr/bin/crnet", "plan", "--gpus", "8"]) == "crnet plan --gpus 8"
    assert command_line(["/x/megatron_crnet/__main__.py", "train"]) == "python -m megatron_crnet train"
    assert Call(("crnet", "plan"), []).prog == "crnet plan"
    assert Call((str(ROOT / "tools/plan.py"),), []).prog == "python tools/plan.py"


def test_the_error_of_another_rank_names_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert run_cli(lambda: _raise(ConfigError("x"))) == 2
    assert capsys.readouterr().err == "error (rank 3): x\n"


def test_a_completion_script_knows_every_command_and_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    printed = capsys.readouterr().out
    assert f"_shtab_crnet_subparsers=({' '.join(COMMANDS)})" in printed
    assert "--gpus-per-node" in printed
    assert "--model.num_layers" in printed


def test_without_the_library_completion_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert capsys.readouterr().err.endswith("not installed: pip install shtab\n")


def test_training_without_a_configuration_names_the_option_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 2
    assert capsys.readouterr().err == (
        "error: no configuration is given: add --config FILE, such as examples/quickstart.yaml\n"
    )
