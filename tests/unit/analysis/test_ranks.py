"""Ranks under a budget: against every choice there is, within the budget, and as a configuration takes them."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from megatron_crnet.analysis.ranks import (
    Budget,
    Ranks,
    Spectrum,
    choose_ranks,
    has_largest_ranks,
    largest_rank,
    operation_budget,
    parameter_budget,
    rank_multiple,
    rank_setting,
    spectra_of,
    uniform_rank,
)
from megatron_crnet.analysis.source import SourceModel
from megatron_crnet.cli.main import main
from megatron_crnet.config.loading import load_config, resolved
from megatron_crnet.config.model_size import flops_per_token, total_parameters
from megatron_crnet.config.positions import position_table
from megatron_crnet.config.schema import ModelConfig
from tests.helpers import ARCHITECTURES, TINY_MODEL
from tests.unit.analysis.models import activations, random_rows
from tests.unit.analysis.products import low_rank_error

SMALL = ModelConfig(**{**TINY_MODEL, "num_layers": 2, "rank": 1})
MOE = ModelConfig(**{**TINY_MODEL, "num_layers": 2, "rank": 1, **ARCHITECTURES["qwen3_moe"]})


def random_spectra(seed: int, width: int = 30) -> list[Spectrum]:
    """Of the seven maps of layer 1, decaying at different rates."""
    draw = random.Random(seed)
    found = []
    for position in ("q", "k", "v", "o", "gate", "up", "down"):
        decay, size = draw.uniform(0.6, 0.98), draw.uniform(0.2, 3)
        energies = sorted((size * decay**i * draw.uniform(0.5, 1.5) for i in range(width)), reverse=True)
        found.append(Spectrum(1, position, 0.5, energies, sum(energies)))
    return found


def kept(spectra: list[Spectrum], ranks: Ranks) -> float:
    return sum(sum(one.energies[: ranks[one.layer, one.position]]) for one in spectra)


def every_choice(multiple: int) -> list[Ranks]:
    shapes = {"q": (32, 32), "k": (32, 32), "v": (32, 32), "o": (32, 32)}
    shapes |= {"gate": (32, 48), "up": (32, 48), "down": (48, 32)}
    ranges = [range(multiple, largest_rank(*shape, multiple) + 1, multiple) for shape in shapes.values()]
    return [{(1, p): rank for p, rank in zip(shapes, ranks, strict=True)} for ranks in itertools.product(*ranges)]


def with_ranks(ranks: Ranks, model: ModelConfig = SMALL) -> ModelConfig:
    return replace(model, rank=rank_setting(ranks, 2))


def test_no_choice_keeps_more_than_one_step() -> None:
    """All 4^4 x 4^3 choices of multiples of 4; equal where the budget is met exactly."""
    choices = [(ranks, total_parameters(with_ranks(ranks))) for ranks in every_choice(4)]
    for seed in range(4):
        spectra = random_spectra(seed)
        kept_by = [(kept(spectra, ranks), parameters) for ranks, parameters in choices]
        for share in (0.3, 0.5, 0.8):
            sizes = sorted(parameters for _, parameters in choices)
            budget = parameter_budget(SMALL, sizes[int(share * len(sizes))])
            found = choose_ranks(SMALL, spectra, budget, 4)
            assert total_parameters(with_ranks(found)) <= budget.limit
            best = max(value for value, size in kept_by if size <= budget.limit)
            assert kept(spectra, found) >= 0.99 * best
            step = max(sum(one.energies[found[1, one.position] :][:4]) for one in spectra)
            assert best - kept(spectra, found) <= step + 1e-9


@pytest.mark.parametrize(
    ("model", "widest", "active"),
    [(SMALL, 80, 80), (MOE, 4 * 52, 2 * 52), (replace(MOE, full_rank_experts=True), 64, 64)],
)
def test_a_budget_counts_the_whole_model(model: ModelConfig, widest: int, active: int) -> None:
    """To less than a rank of the widest map, which of experts are all in parameters, and two in operations."""
    factored = position_table(model).factored(1)
    spectra, ten = [one for one in random_spectra(1) if one.position in factored], replace(model, rank=10)
    for budget, cost, most in (
        (parameter_budget(model, total_parameters(ten)), total_parameters, widest),
        (operation_budget(model, flops_per_token(ten, 16), 16), lambda one: flops_per_token(one, 16), active),
    ):
        assert uniform_rank(model, budget) == 10
        ranks = choose_ranks(model, spectra, budget, 1)
        used = cost(with_ranks(ranks, model))
        assert used <= budget.limit < used + most * budget.factor
        assert len({*ranks.values()}) > 2
        assert kept(spectra, ranks) > kept(spectra, dict.fromkeys(ranks, 10))


def test_ranks_are_multiples_below_the_cost_of_a_full_map() -> None:
    assert [rank_multiple(h) for h in (32, 128, 192, 1024, 4096)] == [1, 8, 8, 64, 64]
    assert (largest_rank(32, 32, 8), largest_rank(32, 16, 8), largest_rank(32, 16, 16)) == (8, 8, 10)
    endless = Budget(1e9, 0, 1.0, "parameters")
    ranks = choose_ranks(SMALL, random_spectra(1), endless, 8)
    assert has_largest_ranks(SMALL, ranks, endless, 8)
    tight = parameter_budget(SMALL, total_parameters(with_ranks(ranks)))
    assert choose_ranks(SMALL, random_spectra(1), tight, 8) == ranks
    assert not has_largest_ranks(SMALL, ranks, tight, 8)
    assert {*ranks.values()} == {8, 16}
    for (_, position), rank in ranks.items():
        assert rank == largest_rank(*((32, 32) if position in "qkvo" else (32, 48)), 8)


def test_experts_share_the_ranks_of_a_layer(dense_moe: SourceModel) -> None:
    """A rank keeps what every expert keeps by it of its outputs, on the tokens that it is given."""
    rows = random_rows(6)
    (layer, *_) = activations(dense_moe, rows)
    target = replace(dense_moe.config.model, variant="low_rank", rank=4, full_rank_layers=None)
    found = spectra_of(dense_moe, target, rows, 4, [torch.device("cpu")])
    assert [one.position for one in found] == 4 * ["q", "k", "v", "o", "gate", "up", "down"]
    for one in found[4:7]:
        outputs = [layer[f"{one.position} {expert}"][1] for expert in range(4)]
        whole = sum(float(y.square().sum()) for y in outputs)
        assert one.scale is None
        assert one.total == pytest.approx(1.0)
        for rank in (0, 5, 12):
            wanted = (sum(low_rank_error(y, rank) for y in outputs) / whole) ** 0.5
            assert one.error(rank) == pytest.approx(wanted, rel=1e-3)


def test_full_rank_experts_are_given_no_ranks(dense_moe: SourceModel) -> None:
    model = replace(dense_moe.config.model, variant="crnet", rank=4, full_rank_layers=[0], full_rank_experts=True)
    found = spectra_of(dense_moe, model, random_rows(6), 4, [torch.device("cpu")])
    assert [(one.layer, one.position) for one in found] == [*itertools.product((1, 2, 3), "qkvo")]
    budget = parameter_budget(model, total_parameters(replace(model, rank=6)))
    chosen = replace(model, rank=rank_setting(choose_ranks(model, found, budget, 1), model.num_layers))
    assert budget.limit - 64 < total_parameters(chosen) <= budget.limit


def test_spectra_are_those_of_the_outputs(dense: SourceModel) -> None:
    rows = random_rows(6)
    outputs = [{p: y for p, (_, y) in layer.items()} for layer in activations(dense, rows)]
    target = replace(dense.config.model, variant="crnet", rank=4, full_rank_layers=[0, 2])
    found = spectra_of(dense, target, rows, 4, [torch.device("cpu")])
    assert {one.layer for one in found} == {1, 3}
    for one in found:
        y = outputs[one.layer][one.position] - (one.scale or 0.0) * outputs[one.layer - 1][one.position]
        whole = float(outputs[one.layer][one.position].norm())
        sizes = torch.linalg.svdvals(y) / whole
        assert one.error(5) == pytest.approx(float(sizes[5:].norm()), rel=1e-3)
    low_rank = replace(target, variant="low_rank", full_rank_layers=None)
    found = spectra_of(dense, low_rank, rows, 4, [torch.device("cpu")])
    assert len(found) == 28
    assert {one.scale for one in found} == {None}


@pytest.mark.parametrize(("source", "widest"), [("dense", 80), ("dense_moe", 4 * 52)])
def test_the_command_writes_what_a_configuration_takes(
    source: str, widest: int, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense: SourceModel = request.getfixturevalue(source)
    (tmp_path / "text.txt").write_text("def read(path):\n    return open(path)\n" * 40)
    text, output = f"--text={tmp_path / 'text.txt'}", tmp_path / "ranks.yaml"
    words = ["ranks", str(dense.path), text, "--like-rank", "6", f"--output={output}"]
    assert main(words) == 0
    found = capsys.readouterr().out
    assert "with rank 6 everywhere" in found
    assert "the budget allows more" not in found
    values = yaml.safe_load(output.read_text())
    model = {**resolved(dense.config)["model"], **values["model"]}
    config = load_config({"model": model, "training": {"seq_length": 16}})
    uniform = replace(config.model, rank=6)
    assert total_parameters(config.model) <= total_parameters(uniform) < total_parameters(config.model) + widest
    page = output.with_suffix(".html").read_text()
    assert "Ranks by layer" in page
    assert "Singular values and chosen ranks" in page
    folder = tmp_path / "run" / "checkpoints"
    assert main(["init", str(dense.path), str(folder), f"--config={output}", text]) == 0
    assert main(words) == 2
    assert f"{output.with_suffix('.html')} exists already" in capsys.readouterr().err


REFUSED: dict[str, tuple[list[str], str]] = {
    "small budget": (
        ["--parameters", "30000"],
        "the budget is 30,000 parameters, but with the smallest ranks, of 1 at most, the model has ",
    ),
    "few operations": (
        ["--operations", "1000"],
        "the budget is 1,000 operations, but with the smallest ranks, of 1 at most, the model has ",
    ),
    "wide steps": (
        ["--like-rank", "4", "--multiple", "9"],
        "but with the smallest ranks, of 9 at most, the model has ",
    ),
    "no budget": ([], "one of the arguments --like-rank --parameters --operations is required"),
    "full": (["--like-rank", "4", "--full-rank-layers", "0", "1", "2", "3"], "every layer is a full-rank one"),
    "layers": (["--like-rank", "4", "--full-rank-layers", "9"], "model.full_rank_layers holds 9"),
    "endless": (["--parameters", "inf"], "ranks.parameters is inf, but must be above 0 and finite"),
    "rank above a side": (["--like-rank", "17"], "model.rank is 17 for k of layer 1, but that linear map has"),
    "no rank": (["--like-rank", "0"], "ranks.like_rank is 0, but must be above 0"),
    "no text": (["--like-rank", "4", "--text", "absent"], "absent is neither a file nor a folder"),
    "name": (["--like-rank", "4", "--output", "ranks.json"], "must end in .yaml"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_chosen_is_one_line_and_writes_nothing(
    name: str, dense: SourceModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("def read(path):\n    return open(path)\n" * 40)
    options, message = REFUSED[name]
    assert main(["ranks", str(dense.path), "--text", "text.txt", "--output", "ranks.yaml", *options]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert message in errors
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
