"""GaLore in plain PyTorch against galore-torch, on the same gradients; its state, and moments that follow."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_crnet.engine import galore
from megatron_crnet.engine.galore import GaLore, Projection, Subspace, singular_vectors
from megatron_crnet.engine.state_kinds import LEFT, MOMENTS, RIGHT

SHAPES = {"tall": (48, 20), "wide": (20, 48), "square": (24, 24)}
OPTIONS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.1}
TYPES = ("std", "reverse_std", "left", "right", "full")


@pytest.fixture
def original(monkeypatch: pytest.MonkeyPatch) -> Any:
    """galore-torch's AdamW. Its package imports bitsandbytes for another class, so only this module is imported."""
    spec = find_spec("galore_torch")
    if spec is None or spec.origin is None:
        pytest.skip("galore-torch is not installed: make setup")
    package = ModuleType("galore_torch")
    package.__path__ = [str(Path(spec.origin).parent)]
    monkeypatch.setitem(sys.modules, "galore_torch", package)
    return importlib.import_module("galore_torch.adamw").AdamW


def gradients(shape: tuple[int, int], steps: int) -> list[Tensor]:
    """Gradients of one size whose singular values lie apart, so that rounding does not turn the vectors."""
    torch.manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    signal = u @ torch.diag(0.8 ** torch.arange(min(shape))) @ vt
    return [signal + 0.3 * torch.randn(shape) / max(shape) ** 0.5 for _ in range(steps)]


def train(optimizer: torch.optim.Optimizer, weights: nn.Parameter, given: list[Tensor]) -> list[Tensor]:
    """The updates."""
    updates = []
    for gradient in given:
        before, weights.grad = weights.detach().clone(), gradient.clone()
        optimizer.step()
        updates.append(weights.detach() - before)
    return updates


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("proj_type", TYPES)
def test_ten_updates_with_three_projections_are_those_of_the_original(original: Any, proj_type: str, kind: str) -> None:
    given = gradients(SHAPES[kind], 10)
    ours, theirs = (nn.Parameter(torch.zeros(SHAPES[kind])) for _ in range(2))
    projection = Projection(6, 4, 0.25, proj_type)
    # in the bases of its own singular vectors a gradient is diagonal: beside it stands rounding, which eps must cover
    options = {**OPTIONS, "eps": 1e-2} if proj_type == "full" else OPTIONS
    found = train(GaLore([{"params": [ours], "is_projected": True}], projection, **options), ours, given)
    group = {"params": [theirs], "rank": 6, "update_proj_gap": 4, "scale": 0.25, "proj_type": proj_type}
    expected = train(original([group], no_deprecation_warning=True, **options), theirs, given)
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-5


def test_what_is_not_projected_is_updated_by_pytorchs_adamw_to_the_bit() -> None:
    given = gradients((20, 12), 5)
    ours, theirs = (nn.Parameter(torch.ones(20, 12)) for _ in range(2))
    found = train(GaLore([{"params": [ours], "is_projected": False}], Projection(), **OPTIONS), ours, given)
    expected = train(torch.optim.AdamW([theirs], **OPTIONS), theirs, given)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("proj_type", TYPES)
def test_a_state_has_the_shapes_that_are_promised_and_no_more_memory(proj_type: str, kind: str) -> None:
    shape, projection = SHAPES[kind], Projection(6, 4, 0.25, proj_type)
    subspace = Subspace(projection)
    direction = subspace.direction(gradients(shape, 1)[0], 1, OPTIONS["betas"], OPTIONS["eps"])
    assert direction.shape == shape
    assert {kind: tensor.shape for kind, tensor in subspace.tensors.items()} == projection.state_shapes(shape)
    for tensor in subspace.tensors.values():  # no view of all singular vectors
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == 4 * tensor.numel()
    if proj_type == "std":
        elements = sum(tensor.numel() for tensor in subspace.tensors.values())
        assert elements == 2 * 6 * max(shape) + 6 * min(shape)


def test_projections_change_at_the_first_update_and_every_gap_of_updates() -> None:
    subspace, seen = Subspace(Projection(4, 3)), []
    for step, gradient in enumerate(gradients((20, 48), 7), 1):
        subspace.direction(gradient, step, OPTIONS["betas"], OPTIONS["eps"])
        seen.append(subspace.tensors[LEFT])
    changed = [seen[i] is not seen[i - 1] for i in range(1, 7)]
    assert changed == [False, False, True, False, False, True]


@pytest.mark.parametrize("proj_type", ["left", "right", "full"])
def test_rotated_moments_stay_the_same_matrix_where_the_subspace_does(proj_type: str) -> None:
    """Another basis of the same subspace: what M means does not change; without rotation it does."""
    r = 4
    torch.manual_seed(0)
    left, right = torch.linalg.qr(torch.randn(20, r))[0], torch.linalg.qr(torch.randn(16, r))[0].mT

    def gradient() -> Tensor:
        return left @ torch.randn(r, r) @ right

    meant = {}
    for rotates in (True, False):
        torch.manual_seed(1)
        subspace = Subspace(Projection(r, 2, 1.0, proj_type, rotates))
        for step in (1, 2):
            subspace.direction(gradient(), step, OPTIONS["betas"], OPTIONS["eps"])
        before = subspace._back(subspace.tensors[MOMENTS[0]])
        subspace._project_anew(gradient())
        after = subspace._back(subspace.tensors[MOMENTS[0]])
        assert bool((subspace.tensors[MOMENTS[1]] >= 0).all())
        meant[rotates] = float((after - before).norm() / before.norm())
    assert meant[True] < 1e-5
    assert meant[False] > 0.1


def test_an_svd_that_does_not_converge_is_repeated_in_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, svd = gradients((20, 12), 1)[0], torch.linalg.svd

    def fails_in_fp32(values: Tensor, **options: Any) -> Any:
        if values.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return svd(values, **options)

    expected = singular_vectors(matrix)
    monkeypatch.setattr(galore.torch.linalg, "svd", fails_in_fp32)
    u, vt = singular_vectors(matrix)
    assert u.dtype == vt.dtype == torch.float32
    for ours, theirs in ((u, expected[0]), (vt.mT, expected[1].mT)):
        assert float((ours * theirs).sum(0).abs().min()) > 1 - 1e-4


def test_a_gradient_of_zero_moves_nothing() -> None:
    subspace = Subspace(Projection(4, 2))
    for step in (1, 2, 3):
        assert not subspace.direction(torch.zeros(20, 12), step, OPTIONS["betas"], OPTIONS["eps"]).any()
    assert RIGHT in subspace.tensors
