"""A trained checkpoint through the real tools: out, asked, measured, and back into training."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_crnet.hf.evaluate import evaluate, padded_rows
from megatron_crnet.hf.generate import open_model
from tests.integration.conftest import LIMIT_S, Corpus, lines_of, start, start_here

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


def run_tools(commands: list[list[str]]) -> list[tuple[int, str, str]]:
    """Status, output and error of each command line of a tool."""
    found = [start(arguments, program=f"tools/{tool}.py") for tool, *arguments in commands]
    return [(done.returncode, done.stdout, done.stderr) for done in found]


@pytest.fixture(scope="module")
def run(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; the sequence is long enough for prompts."""
    output = tmp_path_factory.mktemp("run") / "run"
    outcome = start_here(corpus.options(output, training__seq_length=64, optimizer__lr=0.01))
    assert outcome.status == 0, outcome.stderr
    return output


@pytest.fixture(scope="module")
def export(run: Path) -> Path:
    ((status, printed, error),) = run_tools([["convert_checkpoint", "to-hf", str(run), str(run.parent / "hf")]])
    assert (status, error) == (0, "")
    assert "parameters of" in printed
    return run.parent / "hf"


@pytest.fixture(scope="module")
def answers(run: Path, export: Path, corpus: Corpus) -> dict[str, Any]:
    """What the tools print as JSON, by name."""
    source = str(Path(json.__file__).parents[1] / "logging")
    config, prompts = str(run / "config.yaml"), ["def read(self", "import", "x = 1\n    return"]
    greedy = ["--greedy", "--max-new-tokens", "12", "--json"]
    sampled = ["--temperature", "0.8", "--top-k", "50", "--top-p", "0.9", "--max-new-tokens", "12", "--json"]
    (run.parent / "prompts.txt").write_text("import\n\n")
    commands = {
        "validation, export": ["evaluate", "--model", str(export), "--validation-of", config, "--json"],
        "validation, run": ["evaluate", "--model", str(run), "--validation-of", config, "--json"],
        "data": ["evaluate", "--model", str(export), "--data", str(corpus.valid), "--json"],
        "text": ["evaluate", "--model", str(export), "--text", source, "--json", "--batch-size", "5"],
        "some": ["evaluate", "--model", str(export), "--data", str(corpus.valid), "--json", "--max-tokens", "777"],
        "greedy": ["generate", "--model", str(export), "--prompt", *prompts, *greedy],
        "greedy, run": ["generate", "--model", str(run), "--prompt", *prompts, *greedy],
        "uncached": ["generate", "--model", str(export), "--prompt", *prompts, *greedy, "--no-cache"],
        "alone": ["generate", "--model", str(export), "--prompt-file", str(run.parent / "prompts.txt"), *greedy],
        "seed 1": ["generate", "--model", str(export), "--prompt", *prompts, *sampled, "--seed", "1"],
        "seed 1 again": ["generate", "--model", str(export), "--prompt", *prompts, *sampled, "--seed", "1"],
        "seed 2": ["generate", "--model", str(export), "--prompt", *prompts, *sampled, "--seed", "2"],
    }
    found = run_tools(list(commands.values()))
    for name, (status, _, error) in zip(commands, found, strict=True):
        assert status == 0, (name, error)
    return {name: json.loads(out) for name, (_, out, _) in zip(commands, found, strict=True)}


def test_the_validation_loss_is_the_trainers(run: Path, answers: dict[str, Any]) -> None:
    wanted = lines_of(run, "validation_loss")[6]
    for name in ("validation, export", "validation, run"):
        found = answers[name]
        assert found["loss"] == pytest.approx(wanted, rel=1e-6)
        assert found["tokens"] == 2 * 4 * 64
        assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
        assert found["galore_compatible_loss"] == pytest.approx(wanted / 2, rel=1e-6), "one batch, divided by two"


def test_token_files_and_their_text_give_one_loss(corpus: Corpus, answers: dict[str, Any]) -> None:
    data, text = answers["data"], answers["text"]
    assert data["tokens"] == text["tokens"] == os.path.getsize(f"{corpus.valid}.bin") // 2 - 1
    assert text["loss"] == pytest.approx(data["loss"], rel=1e-6)
    assert data["galore_compatible_loss"] < data["loss"]
    assert text["batches"] > data["batches"]
    assert answers["some"]["tokens"] == 777


def test_greedy_text_is_the_same_cached_or_not_alone_or_in_a_batch(answers: dict[str, Any]) -> None:
    assert answers["greedy"] == answers["greedy, run"] == answers["uncached"]
    assert answers["alone"] == answers["greedy"][1:2]
    assert any(record["tokens"] for record in answers["greedy"])


def test_a_seed_repeats_its_text(answers: dict[str, Any]) -> None:
    assert answers["seed 1"] == answers["seed 1 again"] != answers["seed 2"]


def test_a_run_continues_from_an_export(run: Path, export: Path, corpus: Corpus, tmp_path: Path) -> None:
    """Under another layout, and with a rate at which nothing changes, so that the loss stays what it was."""
    output = tmp_path / "continued"
    ((status, _, error),) = run_tools([["convert_checkpoint", "from-hf", str(export), str(output / "checkpoints")]])
    assert status == 0, error
    still = {"optimizer__lr": 1e-30, "optimizer__weight_decay": 0, "training__train_steps": 2}
    layout = {"parallel__tensor_model_parallel_size": 2, "training__seq_length": 64}
    result = start(corpus.options(output, **still, **layout), ranks=2)
    assert result.returncode == 0, result.stderr
    assert "continuing from" in result.stdout
    assert "step_00000000, step 0" in result.stdout
    assert "another order" not in result.stdout, "nothing has been seen yet"
    wanted = lines_of(run, "validation_loss")[6]
    assert lines_of(output, "validation_loss")[2] == pytest.approx(wanted, rel=1e-6)


TRANSFORMERS = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert "megatron_crnet" not in sys.modules
inputs = tokenizer(text, return_tensors="pt")
new = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
print(json.dumps({
    "class": type(model).__module__,
    "ids": inputs["input_ids"][0].tolist(),
    "logits": model(**inputs).logits[0].tolist(),
    "text": tokenizer.decode(new, skip_special_tokens=True),
}))
"""


def outside(command: list[str], home: Path) -> str:
    """Output of a command that knows nothing of this repository."""
    # nor of a launcher: another test may have left LOCAL_RANK, at which accelerate would look for more ranks
    ours = ("PYTHONPATH", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment |= {**OFFLINE, "HF_HOME": str(home)}
    result = subprocess.run(
        command, cwd=home, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_transformers_opens_the_export_without_this_package(
    export: Path, answers: dict[str, Any], tmp_path: Path
) -> None:
    text = answers["greedy"][0]["prompt"]
    found = json.loads(outside([sys.executable, "-c", TRANSFORMERS, str(export), text], tmp_path))
    opened = open_model(export)
    assert found["class"].startswith("transformers_modules.")
    assert found["ids"] == opened.tokenizer.tokenize(text)
    import torch

    logits = opened.model(torch.tensor([found["ids"]])).logits[0]
    torch.testing.assert_close(torch.tensor(found["logits"]), logits, rtol=1e-5, atol=1e-5)
    assert found["text"] == answers["greedy"][0]["text"]


@pytest.mark.long  # a library that is installed for it alone, and loads for ten seconds
def test_the_evaluation_harness_measures_what_evaluate_measures(export: Path, tmp_path: Path) -> None:
    texts = ["def f(x):\n    return x\n", "import json\n", "  é 漢字\n\n    pass"]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    task = {
        "task": "local_text",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "text.jsonl")}},
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(yaml.safe_dump(task))
    arguments = f"pretrained={export},trust_remote_code=True"
    command = ["-m", "lm_eval", "--model", "hf", "--model_args", arguments, "--tasks", "local_text"]
    command += ["--include_path", "tasks", "--device", "cpu", "--output_path", "out"]
    outside([sys.executable, *command], tmp_path)
    (results,) = (tmp_path / "out").rglob("results*.json")
    found = json.loads(results.read_text())["results"]["local_text"]["bits_per_byte,none"]
    opened = open_model(export)
    # the harness begins each text with the end-of-document token, too
    rows = [np.array([opened.tokenizer.eod, *opened.tokenizer.tokenize(text)]) for text in texts]
    ours = evaluate(opened.model, padded_rows(rows, opened.longest, opened.tokenizer.pad), 2)
    bits = ours.loss * ours.tokens / math.log(2) / sum(len(text.encode()) for text in texts)
    assert found == pytest.approx(bits, rel=1e-5)


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no checkpoint": (["convert_checkpoint", "to-hf", "absent", "{new}"], "absent holds no checkpoint"),
    "existing": (["convert_checkpoint", "to-hf", "{run}", "{export}"], "exists already"),
    "no export": (["convert_checkpoint", "to-hf", "{run}", "{run}", "--overwrite"], "is not an export"),
    "tokenizer": (["convert_checkpoint", "to-hf", "{run}", "{new}", "--tokenizer", "absent"], "absent cannot be read"),
    "shard size": (["convert_checkpoint", "to-hf", "{run}", "{new}", "--shard-size", "big"], "--shard-size"),
    "import": (["convert_checkpoint", "from-hf", "{run}", "{new}"], "config.json is not readable"),
    "import twice": (["convert_checkpoint", "from-hf", "{export}", "{run}/checkpoints"], "holds step_00000006"),
    "no model": (["generate", "--model", "absent", "--prompt", "x"], "absent holds no checkpoint"),
    "no prompt": (["generate", "--model", "{export}", "--prompt-file", "absent"], "--prompt-file absent"),
    "too long": (["generate", "--model", "{export}", "--prompt", "x", "--max-new-tokens", "64"], "max_position_emb"),
    "no tokens": (
        ["generate", "--model", "{export}", "--prompt", "x", "--max-new-tokens", "0"],
        "--max-new-tokens is 0",
    ),
    "top-p": (["generate", "--model", "{export}", "--prompt", "x", "--top-p", "1.5"], "--top-p is 1.5"),
    "no data": (["evaluate", "--model", "{export}", "--data", "absent"], "absent.bin does not exist"),
    "no text": (["evaluate", "--model", "{export}", "--text", "absent"], "absent"),
    "no configuration": (["evaluate", "--model", "{export}", "--validation-of", "absent"], "absent cannot be read"),
    "batch size": (["evaluate", "--model", "{export}", "--data", "x", "--batch-size", "0"], "batch_size is 0"),
    "benchmark": (["benchmark_decoding", "--config", "absent"], "absent cannot be read"),
    "positions": (
        ["benchmark_decoding", "--config", "examples/quickstart.yaml", "--new-tokens", "999"],
        "exceed the 256",
    ),
    "repeats": (["benchmark_decoding", "--config", "examples/quickstart.yaml", "--repeats", "0"], "repeats is 0"),
}


@pytest.fixture(scope="module")
def refusals(run: Path, export: Path) -> dict[str, tuple[int, str, str]]:
    places = {"run": run, "export": export, "new": run.parent / "new"}
    commands = [[part.format(**places) for part in command] for command, _ in MISTAKES.values()]
    before = sorted(path for path in run.parent.rglob("*"))
    found = dict(zip(MISTAKES, run_tools(commands), strict=True))
    assert sorted(path for path in run.parent.rglob("*")) == before, "a refused command leaves nothing behind"
    return found


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(name: str, refusals: dict[str, tuple[int, str, str]]) -> None:
    status, printed, error = refusals[name]
    assert (status, printed) == (2, ""), error
    assert len(error.splitlines()) == 1
    assert error.startswith("error: ")
    assert MISTAKES[name][1] in error


def test_decoding_is_measured_with_and_without_the_cache(tmp_path: Path) -> None:
    small = ["--prompt-tokens", "4", "--new-tokens", "3", "--repeats", "1", "--batch-size", "2"]
    command = ["benchmark_decoding", "--config", "examples/quickstart.yaml", *small, "--json", str(tmp_path / "f.json")]
    ((status, printed, error),) = run_tools([command])
    assert status == 0, error
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert [(row["variant"], row["cache"]) for row in rows] == [
        ("crnet", True),
        ("crnet", False),
        ("full_rank", True),
        ("full_rank", False),
    ]
    assert all(row["tokens_per_s"] == pytest.approx(6 / row["seconds"][0]) for row in rows)
    assert re.search(r"\| crnet +\| yes +\| +2\.9M \|", printed)
