"""Errors, coefficients, cosines and spectra of a model's maps against SVDs of its whole outputs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megatron_crnet.analysis.observation import default_ranks, observe
from megatron_crnet.analysis.source import SourceModel
from megatron_crnet.analysis.stream import MIXTURE, STREAM
from megatron_crnet.cli.main import main
from tests.unit.analysis.models import activations, random_rows
from tests.unit.analysis.products import low_rank_error


@pytest.mark.parametrize(
    ("source", "devices"), [("dense", 1), ("dense", 2), ("dense_moe", 1), ("dense_gpt2", 1), ("dense_qwen3", 1)]
)
def test_what_is_observed_is_what_whole_outputs_give(source: str, devices: int, request: pytest.FixtureRequest) -> None:
    dense: SourceModel = request.getfixturevalue(source)
    positions = (*dense.table.architecture.names, MIXTURE, STREAM)
    rows, ranks = random_rows(8), [4, 8]
    outputs = [{p: y for p, (_, y) in layer.items() if p in positions} for layer in activations(dense, rows)]
    found = observe(dense, rows, ranks, [torch.device("cpu")] * devices, batch_size=3)
    found = [one for one in found if one.position in positions]
    assert [(one.layer, one.position) for one in found] == [(i, p) for i, layer in enumerate(outputs) for p in layer]
    for one in found:
        y = outputs[one.layer][one.position]
        sizes = torch.linalg.svdvals(y) / y.norm()
        for index, own, _ in one.spectrum:
            assert own == pytest.approx(float(sizes[int(index or 0) - 1]), rel=1e-3, abs=1e-4)
        p = outputs[one.layer - 1][one.position] if one.layer else None
        for errors in one.errors:
            plain = (low_rank_error(y, errors.rank) ** 0.5) / float(y.norm())
            assert errors.low_rank == pytest.approx(plain, rel=1e-3)
            if p is None or errors.coefficient is None or errors.difference is None:
                assert errors.difference is p is one.cosine is None
                continue
            best = min(low_rank_error(y - b * p, errors.rank) for b in torch.linspace(-1, 1, 41).tolist()) ** 0.5
            by_itself = low_rank_error(y - errors.coefficient * p, errors.rank) ** 0.5
            assert errors.difference == pytest.approx(by_itself / float(y.norm()), rel=1e-3)
            assert errors.difference <= min(best / float(y.norm()), errors.low_rank) * (1 + 1e-3)
            assert one.cosine == pytest.approx(float(F.cosine_similarity(y, p, dim=-1).mean()), abs=1e-4)


def test_maps_of_experts_are_observed_on_the_tokens_that_each_is_given(dense_moe: SourceModel) -> None:
    rows, ranks = random_rows(8), [4, 8]
    outputs = activations(dense_moe, rows)
    found = observe(dense_moe, rows, ranks, [torch.device("cpu")], batch_size=3)
    order = [one.position for one in found if one.layer == 1]
    assert order == ["q", "k", "v", "o", "gate", "up", "down", MIXTURE, STREAM]
    for one in (one for one in found if one.position in ("gate", "up", "down")):
        each = [outputs[one.layer][f"{one.position} {expert}"][1] for expert in range(4)]
        whole = sum(float(y.square().sum()) for y in each)
        for errors in one.errors:
            least = sum(low_rank_error(y, errors.rank) for y in each)
            assert errors.low_rank == pytest.approx((least / whole) ** 0.5, rel=1e-3)
            assert errors.difference is errors.coefficient is one.cosine is None


def test_ranks_of_small_models() -> None:
    assert default_ranks(4096) == [512, 1024, 2048]
    assert default_ranks(2) == [1]


def test_the_command_prints_records_and_reports(
    dense: SourceModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("def read(path):\n    return open(path)\n" * 40)
    run = tmp_path / "dense"
    for step in (1, 2, 3):
        shutil.copytree(dense.path, run / "checkpoints" / f"step_{step:08d}")
    text, record = f"--text={tmp_path / 'text.txt'}", tmp_path / "observation.json"
    # only the first is whole: the state of the others names another step
    assert main(["observe", str(run), "--every-checkpoint", text, f"--json={record}"]) == 0
    printed, errors = capsys.readouterr()
    assert errors.count("warning: ") == 2
    assert "dense, step 1: ratio of the errors at rank 8" in printed
    (model,) = json.loads(record.read_text())["models"]
    assert (model["step"], model["ranks"], len(model["maps"])) == (1, [4, 8, 16], 32)
    # k and v are 16 wide: at that rank their errors are rounding, whose ratio is any number
    (summary,) = (line.split("|") for line in printed.splitlines() if re.match(r"\| dense, step 1 +\| +16 ", line))
    assert 0.9 < float(summary[6]) <= float(summary[5]) <= float(summary[7]) <= 1
    later = {**model, "step": 5}
    record.write_text(json.dumps({**json.loads(record.read_text()), "models": [model, later]}))
    assert main(["report", str(record), "-o", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "Layers and the layers before them" in page
    for picture in (
        "over training, dense",
        "Ratio of errors at rank 8, dense, step 5",
        "Singular values, dense, layer",
    ):
        assert picture in page
    assert "observations: 1." in page
    whole = json.loads(record.read_text())
    for maps in ([], [model["maps"][0]] * 2, [{**model["maps"][0], "errors": []}]):
        record.write_text(json.dumps({**whole, "models": [{**model, "maps": maps}]}))
        assert main(["report", str(record), "-o", str(tmp_path / "damaged.html")]) == 2
        assert f"{record} " in capsys.readouterr().err
    assert main(["observe", str(run), text, f"--json={record}"]) == 2
    assert f"--json {record} exists already" in capsys.readouterr().err


def test_experts_have_a_table_of_their_own(
    dense: SourceModel, dense_moe: SourceModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("def read(path):\n    return open(path)\n" * 40)
    assert main(["observe", str(dense_moe.path), f"--text={tmp_path / 'text.txt'}", "--ranks", "4", "8"]) == 0
    first, experts, by_layer = re.findall(r"^\*\*.*\n\n(.*)$", capsys.readouterr().out, re.MULTILINE)
    assert "ratio of experts" in first
    assert experts.replace("|", "").split() == ["model", "rank", "gate", "up", "down"]
    assert by_layer.replace("|", "").split() == ["layer", "q", "k", "v", "o", "experts", "stream"]
    # k and v are no wider than this rank, and have no ratio, but no experts either
    assert main(["observe", str(dense.path), f"--text={tmp_path / 'text.txt'}", "--ranks", "16"]) == 0
    assert "maps of experts" not in capsys.readouterr().out
    # a rank above every map has no errors, and is not the one that the table by layer shows
    assert main(["observe", str(dense.path), f"--text={tmp_path / 'text.txt'}", "--ranks", "31", "40"]) == 0
    assert "ratio of the errors at rank 31" in capsys.readouterr().out
    too_large, record = ["--ranks", "999"], tmp_path / "record.json"
    assert main(["observe", str(dense.path), f"--text={tmp_path / 'text.txt'}", *too_large, f"--json={record}"]) == 2
    assert "--ranks 999 is not below 32, the largest rank of any map of dense" in capsys.readouterr().err
    assert not record.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "one of the arguments --text --prefix is required"),
        (["--text", "absent"], "absent is neither a file nor a folder"),
        (["--text", "absent", "--ranks", "4", "0"], "observation.ranks[1] is 0, but must be above 0"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    options: list[str], message: str, dense: SourceModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["observe", str(dense.path), *options]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
