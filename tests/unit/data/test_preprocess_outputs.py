"""Where preprocessing writes: what is refused before any work."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from megatron_crnet.data.preprocess import preprocess
from megatron_crnet.utils.errors import ConfigError, DataError
from tests.unit.data_helpers import TEXTS, give_standard_input, lines, train_small_tokenizer, write_jsonl

TOOL = Path(__file__).parents[3] / "tools" / "preprocess_data.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return train_small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.fault("F11")
@pytest.mark.parametrize("prefix", ["", ".", "..", "d/", "d/.", "a\0b"])
def test_an_output_without_a_name_is_refused(model: str, tmp_path: Path, prefix: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(DataError, match="must end in the name of the files"):
        preprocess([tmp_path / "a.jsonl"], prefix, "sentencepiece", model)


@pytest.mark.fault("F11")
def test_names_that_are_too_long_are_refused(model: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(DataError, match=r"cannot be used .File name too long"):
        preprocess([path], tmp_path / ("x" * 300), "sentencepiece", model)
    with pytest.raises(DataError, match=r"cannot be read .File name too long"):
        preprocess([tmp_path / ("x" * 300)], tmp_path / "out", "sentencepiece", model)


@pytest.mark.fault("F11")
@pytest.mark.parametrize("workers", [-1, 2000])
def test_a_number_of_workers_beyond_sense_is_refused(model: str, tmp_path: Path, workers: int) -> None:
    with pytest.raises(ConfigError, match=f"workers is {workers}, but must be 0 to"):
        preprocess([tmp_path], tmp_path / "out", "sentencepiece", model, workers=workers)


def test_an_output_in_the_input_is_refused(model: str, tmp_path: Path) -> None:
    (tmp_path / "in" / "below").mkdir(parents=True)
    write_jsonl(tmp_path / "in" / "a.jsonl", TEXTS)
    (tmp_path / "link").symlink_to("in")
    for folder in ("in", "in/below", "link", "in/new"):
        with pytest.raises(DataError, match="lies inside the input folder"):
            preprocess([tmp_path / "in"], tmp_path / folder / "out", "sentencepiece", model)
    (tmp_path / "out.bin").write_text("text")
    with pytest.raises(DataError, match=r"out\.bin is also the input"):
        preprocess([tmp_path / "out.bin"], tmp_path / "out", "sentencepiece", model, overwrite=True)
    assert (tmp_path / "out.bin").read_text() == "text"
    write_jsonl(tmp_path / "a.fingerprint.json", TEXTS)
    with pytest.raises(DataError, match=r"a\.fingerprint\.json is also the input"):
        preprocess([tmp_path / "a.fingerprint.json"], tmp_path / "a", "sentencepiece", model)


def run_tool(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """preprocess_data.py in this process, which has imported Megatron-Core already; returns its status."""
    monkeypatch.setattr(sys, "argv", [str(TOOL), *arguments])
    status: int = runpy.run_path(str(TOOL))["main"]()
    return status


@pytest.mark.fault("D2", "D3", "M11")
def test_the_tool_reads_standard_input_and_names_what_it_left_out(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    give_standard_input(monkeypatch, lines() + b"no JSON\n")
    command = ["-", "--output", str(tmp_path / "out"), "--tokenizer-model", model, "--workers=0"]
    assert run_tool(monkeypatch, *command) == 2
    assert capsys.readouterr().err.startswith("error: standard input (-) has no suffix")
    assert run_tool(monkeypatch, *command, "--format=jsonl") == 0
    printed = capsys.readouterr()
    assert "out: 3 documents" in printed.out
    assert "\n  standard input: 1 not a JSON object (first at 4)\n" in printed.out
    assert printed.err == "reading 1 files, of unknown size\n"
    give_standard_input(monkeypatch, lines() + b"no JSON\n")
    assert run_tool(monkeypatch, *command, "--format=jsonl", "--strict", "--overwrite") == 2
    assert "standard input:4 is not a JSON object" in capsys.readouterr().err


@pytest.mark.fault("F11")
@pytest.mark.parametrize("output", ["", "d/"])
def test_the_tool_refuses_an_output_without_a_name(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], output: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert run_tool(monkeypatch, "a.jsonl", "--output", output, "--tokenizer-model", model) == 2
    assert capsys.readouterr().err.startswith(f"error: the output prefix is {output!r}")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
