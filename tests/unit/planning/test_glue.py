"""What a layer's glue moves, in passes over its outputs; the figures of docs/reporting.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_crnet.cli.main import main

ROOT = Path(__file__).parents[3]
H, F = 4096, 11008
BYTES, LAUNCHES = 2, "launches_per_layer"

# Elements per token and layer. Forward: two norms (2 h each), RoPE (4 h), SwiGLU (3 f), two sums of the stream (3 h
# each). Backward: norms with the stream's gradient (4 h each), RoPE (4 h), SwiGLU (5 f). Cosines, sines and sums.
LOW_RANK = 26 * H + 8 * F + 1128
# in backward the next layer's gradient of SwiGLU's two, that and the output for q and k, and both, the own gradient and
# the sum for v, o and down
CRNET = LOW_RANK + 2 * F + 2 * 2 * H + 3 * 4 * H
# s(beta) Y of five h and two f outputs, where the products with B do not take it along
SCALED = 2 * (5 * H + 2 * F)
# silu of z, and its gradient
COLA = LOW_RANK + 5 * 7 * 1024
# copies of X W, to which products are added; s z and its gradient; gradients of q, k, v and of gate, up side by side,
# and the sum of both paths' gradients of each group's input
RELORA = LOW_RANK + 2 * (5 * H + 2 * F) + 2 * 2 * 7 * 1024 + 2 * (3 * H + 2 * F) + 3 * (3 * H + F)
# gradients of q, k, v and of gate, up side by side
FULL_RANK = LOW_RANK + 2 * (3 * H + 2 * F)


# In h of 1024, f = 4h: two norms, five sums with biases, two of the stream, GELU; in backward five sums with the next
# layer's gradient (4 h each, as they read Y for beta's), GELU (4 f), norms with the stream's gradient (4 h each).
GPT2 = (4 + 10 + 6 + 8 + 20 + 16 + 8) * 1024
# In h of 2048, k and v of h/2, f = 3h: as LLaMA-2's, RoPE of q and k with their norms in the same passes (2 and 4 over
# 1.5 h). Cosines, sines, and 1 / rms of 24 heads.
QWEN3 = (4 + 3 + 6 + 9 + 21 + 8 + 6 + 10) * 2048 + 1024 + 96


def counted(capsys: pytest.CaptureFixture[str], *words: str, example: str = "llama2_7b") -> dict[str, dict[str, float]]:
    assert main(["measure-glue", "--config", str(ROOT / f"examples/{example}.yaml"), "--json", *words]) == 0
    return {row["variant"]: row for row in json.loads(capsys.readouterr().out)["rows"]}


def test_bytes_and_launches_do_not_grow(capsys: pytest.CaptureFixture[str]) -> None:
    rows = counted(capsys, "--training.dtype", "bf16", "--training.micro_batch_size", "1")
    found = {variant: row["bytes_per_token_layer"] / BYTES for variant, row in rows.items()}
    assert found == pytest.approx(
        {"crnet": CRNET, "low_rank": LOW_RANK, "cola": COLA, "full_rank": FULL_RANK, "relora": RELORA}, rel=2e-3
    )
    assert {variant: row[LAUNCHES] for variant, row in rows.items()} == {
        "crnet": 53,
        "low_rank": 47,
        "cola": 55,
        "full_rank": 28,
        "relora": 76,
    }


@pytest.mark.parametrize(("example", "elements", "launches"), [("gpt2_355m", GPT2, 57), ("qwen3_1_7b", QWEN3, 53)])
def test_of_other_architectures_neither(
    example: str, elements: float, launches: int, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--training.micro_batch_size", "1", "--variants", "crnet"
    row = counted(capsys, *words, example=example)["crnet"]
    assert row["bytes_per_token_layer"] / BYTES == pytest.approx(elements, rel=1e-3)
    assert row[LAUNCHES] == launches


@pytest.mark.parametrize(
    ("example", "options"),
    [
        ("methods/galore_60m", ()),
        ("methods/relora_60m", ()),
        ("quickstart", ("--rank_schedule.steps", "[3]", "--rank_schedule.ranks", "[[64, 64, 64, 64, 64, 64]]")),
    ],
)
def test_sections_of_one_variant_are_no_hindrance_to_another(
    example: str, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(counted(capsys, *options, example=example)) == 5


def test_experts_are_a_few_products_whatever_their_number(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--training.micro_batch_size", "1", "--variants", "crnet", "low_rank", "relora"
    rows = {n: counted(capsys, *words, "--model.num_experts", str(n), example="qwen3_30b_a3b") for n in (16, 128)}
    for variant, limit in (("crnet", 125), ("low_rank", 119), ("relora", 157)):
        few, many = (rows[n][variant] for n in (16, 128))
        assert few[LAUNCHES] == many[LAUNCHES] <= limit
        assert few["forward"]["products"] == many["forward"]["products"]
    # a loop over experts moved 1.37 MB
    assert rows[128]["crnet"]["bytes_per_token_layer"] <= 924_400


def test_regions_are_counted_in_the_pass_that_runs_them(capsys: pytest.CaptureFixture[str]) -> None:
    row = counted(capsys, "--variants", "crnet")["crnet"]
    forward, backward = row["forward"], row["backward"]
    assert {name: forward[name]["launches"] for name in ("norm", "rotate", "swiglu", "attention")} == {
        "norm": 2,
        "rotate": 2,
        "swiglu": 1,
        "attention": 1,
    }
    assert forward["products"] == {"bytes": 0, "launches": 11}
    assert "scaled" not in forward
    assert not {name for name in forward if name.endswith("backward")}
    assert {name for name in backward if name.endswith("backward")} == {
        "norm_backward",
        "rotate_backward",
        "swiglu_backward",
    }


def test_products_that_do_not_take_the_residual_along_have_a_pass_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    row = counted(capsys, "--variants", "crnet", "--training.dtype", "fp32")["crnet"]
    assert row["forward"]["scaled"]["launches"] == 4
    assert row["forward"]["scaled"]["bytes"] / 4 == pytest.approx(SCALED, rel=1e-3)
    assert row["forward"]["products"]["launches"] == 11
