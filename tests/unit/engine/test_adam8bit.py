"""8-bit moments: rounding that is exact the second time, updates close to AdamW's, zeros that stay zeros."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_crnet.engine import adam8bit
from megatron_crnet.engine.adam8bit import (
    BLOCK,
    AdamW8bit,
    BlockwiseMoment,
    code_values,
    compiled_update,
    update_blocks,
)
from megatron_crnet.engine.optimizer import build_optimizer, parameter_groups
from megatron_crnet.engine.state_kinds import MOMENTS
from megatron_crnet.utils.errors import ConfigError
from tests.helpers import tiny_config

OPTIONS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def moment(kind: str, like: Tensor, segments: list[tuple[int, int]] | None = None) -> BlockwiseMoment:
    optimizer = AdamW8bit([{"params": [nn.Parameter(like)], "is_matrix": True}], **OPTIONS)
    if segments:
        optimizer.segments[like] = segments
    found = optimizer.new_moment(like, kind, is_matrix=True)
    assert isinstance(found, BlockwiseMoment)
    return found


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_the_dynamic_data_type_with_both_ends(signed: bool) -> None:
    values = code_values(signed)
    assert len(values) == len(values.unique()) == 256
    assert {0.0, 1.0, -1.0 if signed else 0.0} <= set(values.tolist())
    assert values[values > 0].min() == pytest.approx(5.5e-7 if signed else 3.25e-7)
    # the share of codes per decade doubles
    assert int(((values > 0.1) & (values < 1)).sum()) == (64 if signed else 128)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", MOMENTS)
def test_rounding_what_was_rounded_changes_no_bit(kind: str, device: str) -> None:
    torch.manual_seed(0)
    numel = 1000 * BLOCK + 77
    # magnitudes over 9 decades within a block, and over 86 between blocks
    spread = torch.exp(-20 * torch.rand(numel) - 200 * torch.rand(1001).repeat_interleave(BLOCK)[:numel])
    values = (torch.randn(numel) * spread).to(device)
    once, twice = moment(kind, torch.zeros(numel, device=device)), moment(kind, torch.zeros(numel, device=device))
    once.write(0, values.square() if once.is_root else values)
    twice.write(0, once.read(0))
    assert torch.equal(once.read(0), twice.read(0))
    assert torch.equal(once.scales, twice.scales)
    assert 0 < int((once.scales == 0).sum()) < 1001


def test_scales_are_kept_whose_square_has_another_root_in_mkl() -> None:
    """One number in 100,000."""
    torch.manual_seed(0)
    numbers = 1 + torch.rand(2_000_000)
    others = numbers[numbers.square().sqrt() != numbers]
    scales = torch.cat([others[:8], numbers[:8]])
    once, twice = (moment(MOMENTS[1], torch.zeros(len(scales) * BLOCK)) for _ in range(2))
    once.codes.view(-1, BLOCK)[:, 5] = 255
    once.scales.copy_(scales)
    twice.write(0, once.read(0))
    assert torch.equal(twice.scales, scales)


def test_segments_have_blocks_of_their_own() -> None:
    torch.manual_seed(0)
    segments = [(0, 300), (300, 700), (1010, 256)]  # behind the second lies padding
    found = moment(MOMENTS[0], torch.zeros(1266), segments)
    values = {start: torch.randn(numel) * 10.0**i for i, (start, numel) in enumerate(segments)}
    for start in values:
        found.write(start, values[start])
    for start, numel in segments:
        alone = moment(MOMENTS[0], torch.zeros(numel))
        alone.write(0, values[start])
        assert torch.equal(found.read(start), alone.read(0))
    assert len(found.scales) == 2 + 3 + 1


def train(optimizer: torch.optim.Optimizer, weights: nn.Parameter, gradients: list[Tensor]) -> Tensor:
    before = weights.detach().clone()
    for gradient in gradients:
        weights.grad = gradient
        optimizer.step()
    return weights.detach() - before


@pytest.mark.parametrize(("decades", "bound"), [(0, 0.02), (2, 0.05), (4, 0.1)])
def test_twenty_updates_are_those_of_adamw_within_the_rounding(decades: int, bound: float) -> None:
    """Gradients may differ by `decades` within a block; with the second moment itself in 8 bits, 4 would diverge."""
    torch.manual_seed(0)
    scale = 10 ** (-decades * torch.rand(64, 1000))
    gradients = [(torch.randn(64, 1000) + 0.3) * scale for _ in range(20)]
    ours, theirs = (nn.Parameter(torch.full((64, 1000), 0.5)) for _ in range(2))
    found = train(AdamW8bit([{"params": [ours], "is_matrix": True}], **OPTIONS), ours, gradients)
    expected = train(torch.optim.AdamW([theirs], **OPTIONS), theirs, gradients)
    assert 1e-4 < float((found - expected).norm() / expected.norm()) < bound


def test_vectors_are_updated_by_pytorchs_adamw_to_the_bit() -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(1000) for _ in range(5)]
    ours, theirs = (nn.Parameter(torch.ones(1000)) for _ in range(2))
    found = train(AdamW8bit([{"params": [ours], "is_matrix": False}], **OPTIONS), ours, gradients)
    assert torch.equal(found, train(torch.optim.AdamW([theirs], **OPTIONS), theirs, gradients))


def test_padding_stays_zero() -> None:
    torch.manual_seed(0)
    weights = nn.Parameter(torch.randn(8, 100))
    weights.data[:, 90:] = 0
    gradients = [torch.randn(8, 100) * (torch.arange(100) < 90) for _ in range(5)]
    optimizer = AdamW8bit([{"params": [weights], "is_matrix": True}], **OPTIONS)
    train(optimizer, weights, gradients)
    for values in (weights, *(optimizer.state[weights][kind].read(0).view(8, 100) for kind in MOMENTS)):
        assert not values[:, 90:].any()
        assert values[:, :90].all()


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    gradients, found = [torch.randn(64, 100) for _ in range(3)], []
    for chunk in (2**20, 4 * BLOCK):
        monkeypatch.setattr(adam8bit, "CHUNK", chunk)
        weights = nn.Parameter(torch.ones(64, 100))
        found.append(train(AdamW8bit([{"params": [weights], "is_matrix": True}], **OPTIONS), weights, gradients))
    assert torch.equal(*found)


def test_the_name_chooses_it_and_groups_say_what_is_a_matrix() -> None:
    module = nn.Linear(4, 4)
    config = tiny_config(optimizer={"name": "adamw8bit"})
    found = build_optimizer(parameter_groups([module], 0.1), config.optimizer)
    assert isinstance(found, AdamW8bit)
    assert {(group["is_matrix"], group["params"][0].dim()) for group in found.param_groups} == {(True, 2), (False, 1)}


@pytest.mark.gpu
def test_the_compiled_update_is_the_plain_one_to_rounding() -> None:
    torch.manual_seed(0)
    device, shape = torch.device("cuda", 0), (512, BLOCK)
    weights, gradients = torch.randn(shape, device=device), torch.randn(shape, device=device)
    found = []
    for update in (update_blocks, compiled_update(device)):
        found.append(weights.clone())
        moments = [
            (
                torch.zeros(shape, dtype=torch.uint8, device=device),
                torch.zeros(512, device=device),
                code_values(x).cuda(),
            )
            for x in (True, False)
        ]
        for step in range(1, 4):
            factors = [torch.tensor(x) for x in (0.99, 1e-3 * step, 1.0 + 1 / step)]
            update(found[-1], gradients, *moments, factors, (0.9, 0.95), 1e-8)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_a_compiler_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(*_: object) -> None:
        raise RuntimeError("no\ncompiler")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: compiled)
    expected = r"torch.compile does not work here \(RuntimeError: no compiler\): mend it .*, or use adamw$"
    with pytest.raises(ConfigError, match=expected):
        compiled_update(torch.device("cpu"))
