"""Every shipped configuration, found by itself, through the real entry point."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_crnet.config.loading import load_config, read_config
from megatron_crnet.config.model_size import total_parameters
from megatron_crnet.config.schema import Config
from megatron_crnet.planning.estimate import estimate
from megatron_crnet.planning.tables import dry_run_report
from tests.integration.conftest import ROOT, Corpus, lines_of, start, start_here

# studies are files of another kind: tests/unit/reporting/test_study.py
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("**/*.yaml") if path.parent.name != "studies")
LAYOUTS = [path for path in EXAMPLES if path.parent.name == "layouts"]
METHODS = [path for path in EXAMPLES if path.parent.name == "methods"]
PARAMETERS = {  # benchmark-protocol figures: CR-Net at CoLA's rank, and full rank
    "llama2_60m": (44.7e6, 58.1e6),
    "llama2_130m": (97.3e6, 134.1e6),
    "llama2_350m": (192.8e6, 368.0e6),
    "llama2_1b": (639.7e6, 1339.1e6),
    "llama2_3b": (1209.1e6, 2686e6),
    "llama2_7b": (2943e6, 6738e6),
    "llama2_13b": (5527e6, 13015e6),
}


METHOD_PARAMETERS = {  # published (CoLA 609M, CR-Net 583M), else by the formula
    "cola_1b": 609.3e6,
    "crnet_1b": 582.4e6,
    "crnet_350m": 192.8e6,
    "galore_1b": 1339.1e6,
    "relora_1b": 1339.1e6 + 24 * 128 * (11 * 2048 + 3 * 5461),
}


def files_of(path: Path) -> list[Path]:
    """A layout, MODEL_Ngpu.yaml, is laid over the example of its model."""
    return [ROOT / "examples" / f"{path.stem.rpartition('_')[0]}.yaml", path] if path in LAYOUTS else [path]


def gpus_of(path: Path) -> int:
    """GPUs that an example is made for."""
    if path in LAYOUTS:
        return int(path.stem.rpartition("_")[2].removesuffix("gpu"))
    # the text that Python ships is for a try on one machine
    return 1 if "data/quickstart/" in path.read_text() else 8


def config_of(path: Path) -> Config:
    return read_config([f"--config={file}" for file in files_of(path)])


def test_there_are_examples() -> None:
    assert {path.stem for path in EXAMPLES} >= {"quickstart", "qwen3_moe_small", "qwen3_30b_a3b", *PARAMETERS}
    layouts = {f"llama2_{size}_{gpus}gpu" for size in ("7b", "13b") for gpus in (8, 32, 128)}
    assert {path.stem for path in LAYOUTS} == layouts
    names, sizes = ("crnet", "cola", "galore", "relora"), ("60m", "130m", "350m", "1b")
    assert {path.stem for path in METHODS} >= {f"{name}_{s}" for name in names for s in sizes}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_those_of_the_protocol(name: str) -> None:
    path = ROOT / "examples" / f"{name}.yaml"
    crnet, full_rank = PARAMETERS[name]
    assert total_parameters(load_config(path).model) == pytest.approx(crnet, rel=1e-3)
    assert total_parameters(load_config(path, ["--model.variant", "full_rank"]).model) == pytest.approx(
        full_rank, rel=1e-3
    )


@pytest.mark.parametrize("name", METHOD_PARAMETERS)
def test_parameter_counts_of_methods(name: str) -> None:
    model = load_config(ROOT / "examples" / "methods" / f"{name}.yaml").model
    assert total_parameters(model) == pytest.approx(METHOD_PARAMETERS[name], rel=1e-3)


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_methods_example_has_the_shape_data_and_tokens_of_its_size(path: Path) -> None:
    size = path.stem.rpartition("_")[2]
    mine, theirs = load_config(path), load_config(ROOT / "examples" / f"llama2_{size}.yaml")
    for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size"):
        assert getattr(mine.model, name) == getattr(theirs.model, name), name
    assert (mine.data, mine.training) == (theirs.data, theirs.training)


def test_every_example_trains_a_few_steps_at_a_small_size(corpus: Corpus, tmp_path: Path) -> None:
    for path in EXAMPLES:
        # a step of each phase and a restart, where there are
        restarts = config_of(path).model.variant == "relora"
        few: dict[str, object] = {"relora__warm_start_steps": 1, "relora__restart_interval": 1} if restarts else {}
        few |= {"optimizer__lr_restart_warmup_steps": 1, "optimizer__lr_warmup_steps": 1}
        steps = 3 if restarts else 2
        options = corpus.options(
            tmp_path / path.stem,
            training__train_steps=steps,
            parallel__tensor_model_parallel_size=1,
            parallel__pipeline_model_parallel_size=1,
            parallel__expert_model_parallel_size=1,
            data__tokenizer_type="sentencepiece",
            model__num_query_groups="null",
            optimizer__galore_rank=4,
            **few,
        )
        outcome = start_here([*(f"--config={file}" for file in files_of(path)), *options])
        assert outcome.status == 0, outcome.stderr
        assert set(lines_of(tmp_path / path.stem, "loss")) == {*range(1, steps + 1)}
        if experts := config_of(path).model.num_experts:
            loads = lines_of(tmp_path / path.stem, "expert_load_max")
            assert all(1 <= load <= experts for load in loads.values())
            assert len(loads) == steps


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_can_be_examined_at_its_own_size(path: Path) -> None:
    assert "parameters (" in dry_run_report(config_of(path), world_size=gpus_of(path))


@pytest.mark.parametrize("path", LAYOUTS, ids=lambda path: path.stem)
def test_a_layout_fits_80_gb_with_room_for_what_the_estimate_leaves_out(path: Path) -> None:
    config = config_of(path)
    assert (config.training.seq_length, config.training.dtype) == (4096, "bf16")
    assert config.parallel.tensor_model_parallel_size <= 8  # inside a node
    found = estimate(config, gpus_of(path))
    memory = found.stages[found.fullest].memory
    assert memory.total < 0.7 * 80e9
    # the table of docs/cluster.md
    parts = (memory.weights, memory.gradients, memory.optimizer, memory.kept + memory.transient, memory.total)
    row = f"| `{path.stem}` | " + " | ".join(f"{part / 2**30:.1f}" for part in parts) + " |"
    assert row in (ROOT / "docs" / "cluster.md").read_text(), row


@pytest.mark.long
def test_the_quickstart_on_two_by_two_ranks_follows_one_process(corpus: Corpus, tmp_path: Path) -> None:
    common = {
        "data.train_data_path": f"[{corpus.train}]",
        "data.valid_data_path": f"[{corpus.valid}]",
        "data.tokenizer_model": corpus.tokenizer,
        "data.cache_path": tmp_path / "cache",
        "training.train_steps": 3,
        "training.eval_steps": 1,
        "optimizer.lr_warmup_steps": 1,
        "logging.log_interval": 1,
        "logging.sample_tokens": 0,
    }
    layout = {"parallel.tensor_model_parallel_size": 2, "parallel.pipeline_model_parallel_size": 2}
    for ranks, values in ((1, common), (4, {**common, **layout})):
        options = [f"--{key}={value}" for key, value in values.items()]
        output = f"--logging.output_dir={tmp_path / str(ranks)}"
        result = start(["--config", "examples/quickstart.yaml", *options, output], ranks)
        assert result.returncode == 0, result.stderr
    for key in ("loss", "grad_norm", "validation_loss"):
        assert lines_of(tmp_path / "4", key) == pytest.approx(lines_of(tmp_path / "1", key), rel=1e-5)


def cells(table: str) -> str:
    """A printed table without what aligns its columns and groups digits."""
    return re.sub(r"(?<=\d),(?=\d)", "", " ".join(table.split()))


@pytest.mark.long
def test_the_communication_tool_prints_and_writes_what_the_quickstart_sends(tmp_path: Path) -> None:
    options = ["--config", "examples/quickstart.yaml", "--training.dtype=bf16", "--json", str(tmp_path / "found.json")]
    options += ["--parallel.pipeline_model_parallel_size=2"]
    result = start(options, 2, "tools/measure_communication.py")
    assert result.returncode == 0, result.stderr
    width = 6 * 192 + 2 * 512
    assert f"| 0 | {width} | {2 * width} |" in cells(result.stdout)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["boundaries"] == {"0": {"elements": width, "bytes": 2 * width}, "1": {"elements": 0, "bytes": 0}}
    assert set(found["layers"]) == {"crnet", "low_rank", "cola", "full_rank", "relora"}


def recompute_figures(tmp_path: Path, *options: str) -> dict[str, dict[str, float]]:
    target = tmp_path / "found.json"
    command = [sys.executable, "tools/measure_recompute.py", "--overwrite", "--json", str(target), *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stderr
    assert "| replay, attention kept |" in cells(result.stdout)
    return {record["name"]: record for record in json.loads(target.read_text())["rows"]}


@pytest.mark.long
def test_fake_tensors_count_what_real_ones_do_and_the_formula_says(tmp_path: Path) -> None:
    options = ["--config", "examples/quickstart.yaml", "--training.seq_length=64", "--training.micro_batch_size=2"]
    options += ["--model.num_layers=9"]
    fake = recompute_figures(tmp_path, *options)
    assert recompute_figures(tmp_path, *options, "--tensors", "real") == fake
    entering = 192 * 64 * 2 * 4  # the hidden state that enters is not the layers' own
    rotation = 2 * 64 * 24 * 4  # cosines and sines are all layers', and not in the formula
    for name in ("replay", "inverse", "full"):
        # seven ratios of sizes for each of eight layers, in the pass and in the block, are inverse's guard
        guard = 2 * 8 * 7 * 4 if name == "inverse" else 0
        assert fake[name]["kept"] - guard - rotation + entering == pytest.approx(fake[name]["formula"], abs=64)
    for name in ("none", "replay, attention kept", "inverse, attention kept"):
        assert fake[name]["kept"] == pytest.approx(fake[name]["formula"], rel=0.03)


@pytest.mark.long
def test_the_targets_at_7b(tmp_path: Path) -> None:
    options = ["--config", "examples/llama2_7b.yaml", "--training.seq_length=4096", "--training.micro_batch_size=1"]
    found = recompute_figures(tmp_path, *options)
    # what `none` took when the targets were set; less since, as docs/results.md says
    before = 25_444 * 2**20
    assert found["none"]["peak"] <= 0.81 * before
    memory = {name: record["peak"] / before for name, record in found.items()}
    work = {name: record["flops"] / found["none"]["flops"] - 1 for name, record in found.items()}
    assert memory["replay, attention kept"] <= 0.30
    assert work["replay, attention kept"] <= 0.14
    assert work["replay, attention kept"] < work["full"] / 2
    assert memory["replay"] <= 0.26
    assert work["replay"] <= 0.19
    assert memory["inverse"] < memory["replay"]
    assert memory["inverse, attention kept"] < memory["replay, attention kept"]
