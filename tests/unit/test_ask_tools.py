"""`evaluate`, `generate` and `convert_checkpoint` as typed: what is passed over is named, a mistake is one line."""

from __future__ import annotations

import io
import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_crnet.data.tokenizer import SentencePieceTokenizer
from megatron_crnet.hf.evaluate import check_memory, text_documents
from megatron_crnet.hf.generate import Sampling, open_model
from megatron_crnet.utils.progress import CountPrinter
from tests.unit.export_helpers import theirs, write_export

ROOT = Path(__file__).parents[2]
Tool = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("export"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tool:
    def tool(name: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            status = runpy.run_path(str(ROOT / "tools" / f"{name}.py"))["main"]()
        except SystemExit as stop:  # of the command line's own types
            status = int(stop.code or 0)
        return status, *capsys.readouterr()

    return tool


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(b'{"text": "import os"}\n{broken\n{"other": 1}\n{"text": "\xff"}\n')
    (folder / "b.txt").write_text("def read(self):\n    return 1\n")
    (folder / "c.txt").write_bytes(b"some text\xff")
    return folder


@pytest.mark.fault("D9")
def test_evaluate_names_what_it_passed_over_file_by_file(export: Path, corpus: Path, run: Tool) -> None:
    status, out, error = run("evaluate", "--model", export, "--text", corpus, "--json")
    assert status == 0
    assert json.loads(out)["tokens"] > 0
    assert "skipped 4" in error
    assert f"{corpus}/a.jsonl: " in error
    assert f"{corpus}/c.txt: 1 " in error
    only = corpus / "b.txt"
    status, out, error = run("evaluate", "--model", export, "--text", only, "--json")
    assert (status, "skipped" in error) == (0, False)


@pytest.mark.fault("D9")
def test_text_is_read_as_far_as_it_is_needed(corpus: Path, export: Path) -> None:
    tokenizer = SentencePieceTokenizer(str(export / "tokenizer.model"))
    every = text_documents(corpus, tokenizer)
    assert len(list(every)) == 2
    assert len(list(text_documents(corpus, tokenizer, 4, 4))) == 1
    assert len(list(text_documents(corpus, tokenizer, 4, 5))) == 2
    lengths = [len(one) for one in every]
    assert every.work(1000, padded=True) == (2, sum(lengths) - 2)
    assert every.work(2, padded=True) == (2, 4)
    assert every.work(2, padded=False) == (-(-(sum(lengths) - 1) // 2), sum(lengths) - 1)


@pytest.mark.fault("D10")
def test_rows_longer_than_the_model_are_measured_when_asked_for(export: Path, corpus: Path, run: Tool) -> None:
    asked = ("evaluate", "--model", export, "--text", corpus / "b.txt", "--json", "--seq-length")
    status, _, error = run(*asked, 17)
    assert status == 2
    assert "17 tokens is longer than the model's max_position_embeddings 16" in error
    assert "--allow-longer" in error
    assert run(*asked, 16)[0] == run(*asked, 17, "--allow-longer")[0] == 0


REFUSED = {
    "data": (["evaluate", "--data", ""], "--data is empty"),
    "text": (["evaluate", "--text", ""], "--text is empty"),
    "configuration": (["evaluate", "--validation-of", ""], "--validation-of is empty"),
    "tokenizer": (["evaluate", "--text", "b.txt", "--tokenizer", ""], "--tokenizer is empty"),
    "length": (["evaluate", "--text", "b.txt", "--seq-length", 10**9], "max_position_embeddings 16"),
    "length, asked for": (
        ["evaluate", "--text", "b.txt", "--seq-length", 10**9, "--allow-longer"],
        "longer than 1048576",
    ),
    "no length": (["evaluate", "--text", "b.txt", "--seq-length", 0], "seq_length is 0"),
    "no tokens": (["evaluate", "--text", "b.txt", "--max-tokens", -1], "max_tokens is -1"),
    "another length": (["evaluate", "--validation-of", "c.yaml", "--seq-length", 8], "--seq-length is the run's own"),
    "another format": (
        ["evaluate", "--validation-of", "c.yaml", "--sample-format", "padded"],
        "--sample-format is the run's own",
    ),
    "documents of a run": (
        ["evaluate", "--validation-of", "c.yaml", "--reset-attention-mask"],
        "is for packed rows of --data or --text",
    ),
    "prompt": (["generate", "--prompt", "ok", "a\udcffb"], "prompt 2 is not valid UTF-8"),
    "prompt file": (["generate", "--prompt-file", "bytes.txt"], "bytes.txt cannot be read"),
    "prompt folder": (["generate", "--prompt-file", ""], 'it is "", but must be a path'),
    "empty file": (["generate", "--prompt-file", "empty.txt"], "holds no prompt"),
    "cold": (["generate", "--prompt", "x", "--temperature", "1e-320"], "--temperature is 1e-320"),
    "hot": (["generate", "--prompt", "x", "--temperature", "inf"], "--temperature is inf"),
    "no number": (["generate", "--prompt", "x", "--temperature", "nan"], "--temperature is nan"),
    "below zero": (["generate", "--prompt", "x", "--temperature=-1"], "--temperature is -1"),
    "top-k": (["generate", "--prompt", "x", "--top-k=-1"], "--top-k is -1"),
    "top-p": (["generate", "--prompt", "x", "--top-p", "nan"], "--top-p is nan"),
    "seed": (["generate", "--prompt", "x", "--seed", 2**64], "--seed is 18446744073709551616"),
    "new tokens": (["generate", "--prompt", "x", "--max-new-tokens", 10**18], "max_position_embeddings"),
}


@pytest.mark.fault("F11")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_one_line_and_status_2(
    name: str, export: Path, corpus: Path, run: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(corpus)
    (corpus / "bytes.txt").write_bytes(b"prompt \xff")
    (corpus / "empty.txt").write_text("\n\r\n")
    (tool, *arguments), message = REFUSED[name]
    status, out, error = run(tool, "--model", export, *arguments)
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert (status, out, len(lines)) == (2, "", 1), error
    assert message in lines[0]


@pytest.mark.fault("F9")
@pytest.mark.parametrize("size", ["0KB", "000GB", "-1GB", "1.5GB", "5", "", "9" * 30 + "TB"])
def test_a_file_of_no_size_is_refused(size: str, export: Path, run: Tool, tmp_path: Path) -> None:
    asked = ["to-hf", export.parent / "step_00000001", tmp_path / "out", f"--shard-size={size}"]
    status, _, error = run("convert_checkpoint", *asked)
    assert (status, len(error.splitlines())) == (2, 1)
    assert f"--shard-size is {size}, but must be a number above 0" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.fault("F9")
def test_from_hf_takes_a_tokenizer(export: Path, run: Tool, tmp_path: Path) -> None:
    shutil.copytree(export, tmp_path / "export")
    (tmp_path / "export" / "tokenizer.model").unlink()
    asked = ["convert_checkpoint", "from-hf", tmp_path / "export", tmp_path / "back"]
    assert run(*asked)[0] == 2
    assert not (tmp_path / "back").exists()
    assert run(*asked, "--tokenizer", export / "tokenizer.model")[0] == 0


@pytest.mark.parametrize("name", ["gpt2", "qwen3, tied"])
def test_the_tools_take_models_of_transformers(name: str, export: Path, run: Tool, tmp_path: Path) -> None:
    theirs(tmp_path / "theirs", name)
    taken = ["--tokenizer", export / "tokenizer.model"]
    asked = ("convert_checkpoint", "from-hf", tmp_path / "theirs", tmp_path / "run" / "checkpoints")
    assert run(*asked)[0] == 2
    assert run(*asked, *taken)[0] == 0
    asked = ("convert_checkpoint", "to-hf", tmp_path / "run", tmp_path / "plain", "--plain")
    status, out, _ = run(*asked)
    assert (status, "parameters of" in out) == (0, True)
    (tmp_path / "text.txt").write_text("def read(self):\n    return 1\n")
    found = [
        (
            run("evaluate", "--model", path, "--text", tmp_path / "text.txt", "--json", *rest)[1],
            run("generate", "--model", path, "--prompt", "x", "import os", "--max-new-tokens", 4, "--json", *rest)[1],
        )
        for path, rest in ((tmp_path / "theirs", taken), (tmp_path / "plain", []), (tmp_path / "run", []))
    ]
    assert "loss" in json.loads(found[0][0])
    assert [text for _, text in found] == [found[0][1]] * 3
    losses = [json.loads(out)["loss"] for out, _ in found]
    assert losses == [losses[0]] * 3
    status, _, error = run("convert_checkpoint", "to-hf", export.parent / "step_00000001", tmp_path / "no", "--plain")
    assert (status, error.count("\n"), (tmp_path / "no").exists()) == (2, 1, False)
    assert "model.variant is crnet, but a LlamaForCausalLM holds full-rank weights: leave out --plain" in error


@pytest.mark.fault("F11")
def test_an_empty_model_path_is_not_this_folder(export: Path, run: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(export)
    for tool, rest in (("evaluate", ["--text", "config.json"]), ("generate", ["--prompt", "x"])):
        assert run(tool, "--model", "", *rest)[0] == 2
        assert "--model is empty" in run(tool, "--model", "", *rest)[2]
    assert run("generate", "--model", ".", "--prompt", "x", "--max-new-tokens", 2)[0] == 0


@pytest.mark.fault("F11")
@pytest.mark.parametrize("sampling", [(1e-4, 0, 1.0), (1e4, 10**30, 1e-320), (1.0, 1, 1.0)])
def test_the_ends_of_the_ranges_give_text(sampling: tuple[float, int, float], export: Path, run: Tool) -> None:
    temperature, top_k, top_p = sampling
    how = ["--temperature", temperature, "--top-k", top_k, "--top-p", top_p, "--seed", 2**64 - 1]
    status, out, error = run("generate", "--model", export, "--prompt", "x", "--max-new-tokens", 4, *how)
    assert status == 0, error
    assert out.startswith("x")
    Sampling(temperature, top_k, top_p, -(2**63))


@pytest.mark.fault("F11")
def test_a_prompt_file_has_one_prompt_per_line_whatever_else_ends_lines(
    export: Path, run: Tool, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_bytes("\ufeffone\u2028more\x0cpage\r\n\ntwo".encode())
    asked = ["--prompt-file", tmp_path / "prompts.txt", "--max-new-tokens", 1, "--greedy", "--json"]
    shutil.copytree(export, tmp_path / "export")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    (tmp_path / "export" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    status, out, error = run("generate", "--model", tmp_path / "export", *asked)
    assert status == 0, error
    assert [record["prompt"] for record in json.loads(out)] == ["one\u2028more\x0cpage", "two"]


@pytest.mark.fault("F11")
def test_a_batch_whose_logits_have_no_room_is_refused(export: Path) -> None:
    model = open_model(export).model
    check_memory(model, 8, 16)
    with pytest.raises(Exception, match=r"the logits of 1048576 rows of 1048576 tokens take .* GB.*lower --batch-size"):
        check_memory(model, 2**20, 2**20)


@pytest.mark.fault("M11")
def test_long_work_says_how_much_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("megatron_crnet.utils.progress.time.monotonic", lambda: now[0])
    out = io.StringIO()
    show = CountPrinter("tokens", 1000, stream=out)
    for seconds, done in ((1, 10), (4, 100), (5, 120), (14, 500), (30, 1000)):
        now[0] = 100.0 + seconds
        show(done)
    assert out.getvalue().splitlines() == [
        "100 of 1,000 tokens, about 36 s to go",
        "500 of 1,000 tokens, about 14 s to go",
    ]


@pytest.mark.fault("M11")
def test_generation_and_evaluation_report_as_they_go(
    export: Path, corpus: Path, run: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_crnet.utils.progress.FIRST_LINE_SECONDS", 0.0)
    monkeypatch.setattr(CountPrinter.__init__, "__defaults__", (0.0, None))
    torch.manual_seed(0)
    _, _, error = run("generate", "--model", export, "--prompt", "x", "--max-new-tokens", 8)
    assert "of 8 new tokens, about" in error
    (corpus / "b.txt").write_text("def read(self):\n    return 1\n" * 9)
    _, _, error = run("evaluate", "--model", export, "--text", corpus / "b.txt", "--batch-size", 1)
    assert "tokens, about" in error
