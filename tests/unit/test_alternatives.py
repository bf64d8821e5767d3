"""The alternatives that examples/studies/alternatives.py trains beside what the package offers."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import ARCHITECTURES, tiny_config

SCRIPT = Path(__file__).parents[2] / "examples" / "studies" / "alternatives.py"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.mark.parametrize("way", ["experts combined", "experts each"])
def test_a_chain_of_experts_with_beta_0_is_none_and_each_beta_gets_a_gradient(script: Any, way: str) -> None:
    config = tiny_config(ARCHITECTURES["qwen3_moe"])
    plain, chained = (script["build"](config, script["WAYS"][name][1]) for name in ("experts unchained", way))
    betas = {name: weight for name, weight in chained.named_parameters() if "mlp" in name and name.endswith("beta")}
    of_layer = 1 if way == "experts combined" else 3 * config.model.num_experts
    assert len(betas) == of_layer * (config.model.num_layers - 1)
    tokens = torch.randint(config.model.vocab_size, (2, 8), generator=torch.Generator().manual_seed(1))
    assert (chained(tokens) - plain(tokens)).abs().max() > 1e-3
    chained.loss(tokens, tokens).backward()
    # an expert without tokens in one of two layers has no chain between them
    assert any(float(beta.grad) for beta in betas.values())
    with torch.no_grad():
        for beta in betas.values():
            beta.zero_()
    torch.testing.assert_close(chained(tokens), plain(tokens), atol=1e-5, rtol=1e-5)


def test_shared_betas_are_one_parameter_per_layer(script: Any) -> None:
    config = tiny_config()
    model = script["build"](config, script["WAYS"]["beta per_layer"][1])
    betas = [name for name, _ in model.named_parameters() if name.endswith("beta")]
    assert len(betas) == config.model.num_layers - 1
    tokens = torch.zeros(1, 4, dtype=torch.long)
    own = script["build"](config, None)
    torch.testing.assert_close(model(tokens), own(tokens))
