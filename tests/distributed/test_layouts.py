"""Every parallel layout against plain single-process training: loss, gradient norm, every gradient, the weights.

Rows share a spawn of ranks, because starting one costs seconds. The whole matrix runs with `make test-long`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import pytest

from megatron_crnet.config.schema import Config
from megatron_crnet.utils.errors import ConfigError
from tests.distributed.layouts import Sizes, check, measure, shortened
from tests.distributed.spawn import run_distributed
from tests.helpers import (
    ARCHITECTURES,
    FULL_RANK_EXPERTS,
    PADDED,
    PADDED_GPT2,
    PADDED_MOE,
    PADDED_QWEN3,
    Errors,
    tiny_config,
)


@dataclass(frozen=True)
class Layout(Sizes):
    """One row."""

    length: int = 16
    micro_batch: int = 2
    parallel: dict[str, Any] = field(default_factory=dict, hash=False)
    offload: str = ""
    lr_multipliers: dict[str, float] = field(default_factory=dict, hash=False)

    def config(self) -> Config:
        section = self.deepspeed_section
        if self.offload:
            section["zero_optimization"][self.offload] = {"device": "cpu"}
        return tiny_config(
            self.model,
            {**self.parallel_section, **self.parallel},
            {
                "dtype": self.dtype,
                "global_batch_size": self.sequences,
                "seq_length": self.length,
                "micro_batch_size": self.micro_batch,
            },
            {"lr_multipliers": self.lr_multipliers},
            deepspeed_section=section,
            data=self.data,
        )

    def _extras(self) -> dict[str, Any]:
        return {**self.model, **self.parallel, **self.keys, **self.data, **self.lr_multipliers}

    def __str__(self) -> str:
        sp = "" if self.sp is None else f"-sp{int(self.sp)}"
        extra = "".join(f"-{key}={value}" for key, value in self._extras().items())
        extra += f"-{self.length}" if self.length != 16 else ""
        return f"tp{self.tp}{sp}-pp{self.pp}x{self.vpp}-zero{self.zero}-{self.dtype}{extra}{self.offload}".replace(
            " ", ""
        )


UNEVEN = {"num_layers_in_first_pipeline_stage": 3}
ONE_FULL_RANK_STAGE = {"num_layers_in_first_pipeline_stage": 1}
UNBUFFERED = {"contiguous_gradients": False, "reduce_scatter": False}
# smaller than most parameters
SMALL_BUCKETS = {"reduce_bucket_size": 600}
PARTITION_EVERYTHING = {"stage3_param_persistence_threshold": 0}
RANKS = {"q": [8, 7, 6, 5], "k": 6, "v": 6, "o": 4, "gate": [3, 4, 5, 6], "up": 8, "down": 2}

# attention and positions within documents, whose ends are not trained
DOCUMENTS = {"reset_attention_mask": True, "reset_position_ids": True, "eod_mask_loss": True}

LR_MULTIPLIERS = {"embedding": 3.0, "first_layer": 0.25, "a": 2.0, "b": 0.5, "beta": 4.0}

VARIANTS = ("crnet", "full_rank", "low_rank", "cola")
GPT2, QWEN3, MOE = ARCHITECTURES["gpt2"], ARCHITECTURES["qwen3"], ARCHITECTURES["qwen3_moe"]
# of heads of 8, one frequency is kept, one divided, and one between
SCALED_ROPE = {"rope_scaling_factor": 8.0, "rotary_base": 3 * 10**5}
EP, EP_4 = ({"expert_model_parallel_size": size} for size in (2, 4))
ALL_TO_ALL = {**EP, "moe_token_dispatcher_type": "alltoall"}
# in bf16 tokens would go to other experts than in fp64, unless they go to all
TO_ALL = {**MOE, "moe_router_topk": 4}


def variants_of(architecture: dict[str, Any]) -> list[dict[str, Any]]:
    """Models of every variant; of low_rank with smaller initial values, as in fp32 plain autograd is off by more."""
    smaller = {"low_rank": {"init_method_std": 0.05}}
    return [{**architecture, "variant": variant, **smaller.get(variant, {})} for variant in VARIANTS]


ON_TWO = [
    Layout(tp=2),
    Layout(pp=2, vpp=2, zero=1),
    Layout(tp=2, model={"variant": "cola", "only_lr_act": True}),
    Layout(pp=2, parallel=UNEVEN),
    Layout(tp=2, model={"scale_residual_init": True, **PADDED}),
    Layout(zero=3, offload="offload_param"),
    Layout(zero=1, dtype="bf16", offload="offload_optimizer"),
    Layout(tp=2, model={"num_query_groups": 2}, data=DOCUMENTS),
    Layout(tp=2, zero=3, model=PADDED, keys=PARTITION_EVERYTHING),
    Layout(zero=0, lr_multipliers=LR_MULTIPLIERS),
    Layout(tp=2, sp=False, zero=3, model={**PADDED_GPT2, "variant": "cola"}),
    Layout(pp=2, zero=1, dtype="bf16", model=GPT2),
    Layout(tp=2, sp=False, model=QWEN3, data=DOCUMENTS),
    Layout(tp=2, zero=3, model={**MOE, "variant": "cola", "moe_router_pre_softmax": True}, parallel=EP),
    Layout(pp=2, vpp=2, zero=1, model=FULL_RANK_EXPERTS),
    Layout(zero=1, dtype="bf16", model=TO_ALL, parallel=EP),
    Layout(tp=2, zero=2, model=MOE, parallel=ALL_TO_ALL),
]
# one token of each replica: in some micro-batches the experts of a rank are given none
ONE_TOKEN: dict[str, Any] = {"length": 1, "micro_batch": 1, "sequences": 16, "zero": 1}
TO_ONE = {**MOE, "moe_router_topk": 1, "moe_router_pre_softmax": True}
ON_TWO = shortened(ON_TWO)
ON_TWO += [Layout(model=TO_ONE, parallel=parallel, **ONE_TOKEN) for parallel in (EP, ALL_TO_ALL)]
MORE_ON_TWO = [
    *(
        Layout(model={**model, "variant": variant}, parallel=parallel, **ONE_TOKEN)
        for parallel in (EP, ALL_TO_ALL)
        for model in (TO_ONE, {**TO_ONE, "full_rank_experts": True}, {**TO_ONE, "ffn_hidden_size": 21})
        for variant in VARIANTS
    ),
    Layout(tp=2, zero=3),
    Layout(tp=2, sp=False),
    Layout(tp=2, zero=1, dtype="bf16"),
    Layout(zero=3, data={"reset_attention_mask": True}),
    Layout(pp=2),
    *(Layout(tp=2, model=model, data=DOCUMENTS) for model in (GPT2, MOE)),
    Layout(pp=2, model={"rank": RANKS}),
    Layout(pp=2, zero=1, dtype="bf16", data=DOCUMENTS),
    Layout(zero=0, data={"eod_mask_loss": True}),
    Layout(pp=2, zero=1, dtype="bf16", lr_multipliers=LR_MULTIPLIERS),
    *(Layout(zero=zero, model=MOE, parallel=EP) for zero in (0, 1)),
    Layout(tp=2, zero=3, keys={"sub_group_size": 600}),
    Layout(zero=2, dtype="bf16", model=PADDED),
    Layout(tp=2, zero=3, lr_multipliers=LR_MULTIPLIERS),
    Layout(pp=2, vpp=2, zero=1, lr_multipliers={"beta": 0.0, "first_layer": 0.5}),
    Layout(tp=2, zero=2, model=variants_of(QWEN3)[2]),
    Layout(pp=2, vpp=2, zero=1, model=PADDED),
    Layout(pp=2, vpp=2, zero=1, model=GPT2, lr_multipliers=LR_MULTIPLIERS),
    Layout(pp=2, model={**GPT2, "variant": "full_rank", "tie_word_embeddings": False}),
    Layout(pp=2, model={**QWEN3, "variant": "full_rank"}),
    Layout(zero=3, dtype="bf16", model=QWEN3),
    Layout(zero=2, model={**MOE, "variant": "full_rank", "scale_residual_init": True}),
    Layout(tp=2, model={"variant": "full_rank"}),
    Layout(tp=2, model={"num_query_groups": 2}),
    Layout(pp=2, model={"scale_residual_init": True}),
    Layout(zero=2, data=DOCUMENTS),
    *(Layout(tp=2, zero=0, model={**PADDED, "variant": variant}) for variant in VARIANTS),
    Layout(tp=2, sp=False, model=PADDED),
    Layout(zero=1, lr_multipliers=LR_MULTIPLIERS),
    Layout(tp=2, zero=2, lr_multipliers=LR_MULTIPLIERS),
    Layout(pp=2, zero=1, lr_multipliers=LR_MULTIPLIERS),
    *(Layout(tp=2, model={"variant": variant}, data=DOCUMENTS) for variant in ("full_rank", "low_rank", "cola")),
    *(Layout(tp=2, sp=sp, zero=zero, data=DOCUMENTS) for sp in (False, True) for zero in (0, 1, 2, 3)),
    *(Layout(pp=2, vpp=vpp, zero=zero, data=DOCUMENTS) for vpp in (1, 2) for zero in (0, 1)),
    *(Layout(zero=zero, dtype="bf16", data=DOCUMENTS) for zero in (1, 2, 3)),
    *(Layout(tp=2, zero=zero) for zero in (1, 2)),
    Layout(tp=2, sp=False, zero=3),
    Layout(pp=2, zero=1),
    Layout(pp=2, vpp=2, zero=0),
    Layout(tp=2, model={"variant": "low_rank"}),
    *(Layout(pp=2, model={"variant": variant}) for variant in ("full_rank", "low_rank", "cola")),
    Layout(tp=2, model={"rank": RANKS}),
    Layout(pp=2, model={"full_rank_layers": [0, 2]}),
    Layout(pp=2, vpp=2, model={"full_rank_layers": [0, 2]}),
    Layout(pp=2, zero=1, model={"num_layers": 2}),
    Layout(pp=2, zero=1, keys={"contiguous_gradients": False}),
    Layout(pp=2, zero=1, keys=SMALL_BUCKETS),
    *(Layout(zero=zero, keys=UNBUFFERED) for zero in (1, 2, 3)),
    *(Layout(zero=zero, keys=SMALL_BUCKETS) for zero in (1, 2, 3)),
    Layout(zero=3, keys=PARTITION_EVERYTHING),
    *(Layout(zero=zero, offload="offload_optimizer") for zero in (1, 2, 3)),
    Layout(pp=2, vpp=2, zero=1, dtype="bf16"),
    *(Layout(tp=2, zero=zero, model={**PADDED, "variant": v}) for v in VARIANTS for zero in (1, 2, 3)),
    *(Layout(tp=2, sp=False, zero=3, model={**PADDED, "variant": v}) for v in VARIANTS),
    *(Layout(pp=2, zero=zero, model={**PADDED, "variant": v}) for v in VARIANTS for zero in (0, 1)),
    *(Layout(zero=zero, model={**PADDED, "variant": v}) for v in VARIANTS for zero in (0, 1, 2, 3)),
    *(Layout(tp=2, zero=zero, dtype="bf16", model=PADDED) for zero in (1, 2, 3)),
    *(Layout(zero=zero, model=PADDED_GPT2) for zero in (0, 1, 2, 3)),
    *(Layout(tp=2, model=model) for a in (GPT2, QWEN3) for model in variants_of(a)),
    *(Layout(pp=2, zero=1, model=model) for a in (GPT2, QWEN3) for model in variants_of(a)),
    *(Layout(pp=2, model={**a, "tie_word_embeddings": tied}) for a in (GPT2, QWEN3) for tied in (False, True)),
    *(Layout(tp=2, data={"reset_attention_mask": True}, model=a) for a in (GPT2, QWEN3)),
    *(Layout(tp=2, model=model) for model in variants_of(MOE)),
    *(Layout(tp=2, zero=zero, model=MOE, parallel=EP) for zero in (0, 1, 2, 3)),
    *(Layout(tp=2, zero=1, model=model, parallel=EP) for model in variants_of(MOE)),
    *(Layout(pp=2, zero=1, model=model) for model in variants_of(MOE)),
    Layout(pp=2, vpp=2, zero=1, model=MOE),
    Layout(tp=2, zero=3, model={**PADDED_MOE, "full_rank_experts": True}, parallel=EP, keys=PARTITION_EVERYTHING),
    *(Layout(zero=1, model=model, parallel=EP) for model in variants_of(FULL_RANK_EXPERTS)[2:]),
    *(Layout(zero=0, model=model, parallel=ALL_TO_ALL) for model in (*variants_of(MOE), FULL_RANK_EXPERTS)),
    *(Layout(tp=2, zero=zero, model=PADDED_MOE, parallel=ALL_TO_ALL) for zero in (0, 1, 3)),
    Layout(tp=2, zero=3, dtype="bf16", model=TO_ALL, parallel=ALL_TO_ALL),
    Layout(tp=2, model=MOE, parallel={**ALL_TO_ALL, "expert_model_parallel_size": 1}, data=DOCUMENTS),
    Layout(tp=2, zero=3, model={**MOE, "rank": RANKS}, parallel=EP, keys=PARTITION_EVERYTHING),
    Layout(zero=3, model={**MOE, "tie_word_embeddings": True}, offload="offload_param"),
    Layout(tp=2, zero=1, model=MOE, parallel=EP, lr_multipliers=LR_MULTIPLIERS),
    Layout(tp=2, zero=1, model=PADDED_MOE, parallel=EP),
    *(Layout(tp=2, zero=z, dtype="bf16", model=TO_ALL, parallel=p) for z, p in ((1, EP), (3, {}))),
    *(Layout(tp=2, zero=zero, model=model) for model in (PADDED_GPT2, PADDED_QWEN3) for zero in (1, 3)),
    *(Layout(pp=2, vpp=2, zero=1, model=model) for model in (PADDED_GPT2, PADDED_QWEN3, PADDED_MOE)),
    Layout(tp=2, sp=False, zero=2, model=PADDED_QWEN3),
    Layout(zero=3, model=QWEN3, keys=PARTITION_EVERYTHING),
    # tied output layers, whose copies are on stages of other sizes
    *(Layout(pp=2, zero=1, model={"tie_word_embeddings": True, **a}, parallel=UNEVEN) for a in ({}, QWEN3, MOE)),
    Layout(pp=2, model=PADDED_GPT2, parallel=UNEVEN),
    Layout(tp=2, zero=1, model={**MOE, "tie_word_embeddings": True}, parallel=EP),
    *(Layout(tp=2, zero=zero, model={**a, "tie_word_embeddings": not a}) for a in ({}, GPT2, QWEN3) for zero in (0, 2)),
    Layout(tp=2, zero=1, model=SCALED_ROPE, data=DOCUMENTS),
    Layout(pp=2, vpp=2, zero=1, model=SCALED_ROPE),
]
ON_FOUR = [
    Layout(tp=2, pp=2, vpp=2, zero=1, data=DOCUMENTS),
    # the first stage has neither betas nor partial matrices
    Layout(tp=2, pp=2, zero=1, dtype="bf16", parallel=ONE_FULL_RANK_STAGE),
    Layout(tp=2, zero=3, keys={**SMALL_BUCKETS, **PARTITION_EVERYTHING}),
    Layout(tp=2, pp=2, model={"full_rank_layers": [0, 2], "rank": RANKS}),
    Layout(tp=2, pp=2, vpp=2, zero=1, model=GPT2),
    Layout(tp=2, pp=2, vpp=2, zero=1, model=MOE, parallel=EP),
    # experts over replicas, of which there are one or two groups
    Layout(tp=2, zero=1, dtype="bf16", model=TO_ALL, parallel=EP_4),
    Layout(pp=2, vpp=2, zero=1, model=MOE, parallel=EP, lr_multipliers=LR_MULTIPLIERS),
    Layout(zero=1, model=MOE, parallel=ALL_TO_ALL),
]
MORE_ON_FOUR = [
    Layout(tp=2, pp=2, zero=1, model=PADDED),
    Layout(pp=4, zero=1, lr_multipliers=LR_MULTIPLIERS),
    Layout(tp=2, zero=2, dtype="bf16"),
    Layout(pp=2, zero=1, model=GPT2),
    *(Layout(zero=zero, model=MOE, parallel=EP) for zero in (0, 1)),
    Layout(zero=1, dtype="bf16", model=TO_ALL, parallel=EP),
    Layout(tp=2, zero=1, model=MOE, parallel=EP_4),
    Layout(tp=2, zero=1, model=MOE, parallel={**ALL_TO_ALL, **EP_4}),
    Layout(pp=2, vpp=2, zero=1, dtype="bf16", model=TO_ALL, parallel=ALL_TO_ALL, lr_multipliers=LR_MULTIPLIERS),
    Layout(pp=2, zero=1, dtype="bf16", model=TO_ALL, parallel=EP),
    Layout(tp=2, pp=2, zero=1, dtype="bf16", model=QWEN3),
    Layout(tp=2, zero=2, model=MOE, parallel=EP),
    Layout(tp=2, pp=2, vpp=2, zero=1),
    Layout(pp=4),
    *(Layout(tp=2, zero=zero) for zero in (1, 2, 3)),
    *(Layout(tp=2, pp=2, zero=zero) for zero in (0, 1)),
    Layout(tp=2, pp=2, zero=1, parallel=ONE_FULL_RANK_STAGE),
    Layout(tp=2, sp=False, pp=2, vpp=2),
    Layout(pp=2, zero=1),
    Layout(zero=3, keys={"zero_hpz_partition_size": 2}),
    Layout(tp=4, model={"num_query_groups": 4}),
    Layout(tp=4, zero=1, model=PADDED),
    Layout(tp=2, zero=3, model=PADDED),
    Layout(tp=2, pp=2, zero=1, dtype="bf16"),
]
MATRIX = [
    Layout(tp, sp if tp > 1 else None, pp, vpp if pp > 1 else 1, zero, dtype, model={"variant": variant})
    for tp, sp, pp, vpp, zero, dtype, variant in product(
        (1, 2),
        (False, True),
        (1, 2),
        (1, 2),
        (0, 1, 2, 3),
        ("fp32", "bf16"),
        VARIANTS,
    )
    if (tp > 1 or sp) and (pp > 1 or vpp == 1) and (pp == 1 or zero <= 1)
    if zero > 0 or dtype == "fp32" or tp * pp == 1
]


def with_model(row: Layout, model: dict[str, Any], **changes: Any) -> Layout:
    """The row of another architecture."""
    # with the other rows' large initial values, and norms of each head, gradients of low-rank factors are up to 2e-5
    # off in plain PyTorch in fp32 as well, 3e-6 with these
    smaller = {"init_method_std": 0.02} if row.model["variant"] == "low_rank" and model is not GPT2 else {}
    return dataclasses.replace(row, model={**row.model, **model, **smaller}, **changes)


MATRIX += [
    with_model(row, model)
    for row, model in product(MATRIX, (GPT2, QWEN3))
    if row.model["variant"] == "crnet" or row.dtype == "fp32"
]
MATRIX += [
    with_model(row, MOE, parallel=parallel)
    for row, parallel in product(MATRIX, ({}, EP, ALL_TO_ALL))
    # with tensor parallelism experts need sequence parallelism, and they are spread over its ranks, without it over
    # replicas; in bf16 tokens may go to other experts than in fp64
    if "architecture" not in row.model
    if row.dtype == "fp32" and row.sp is not False and (row.tp > 1 or row.zero <= 1 or not parallel)
    if row.model["variant"] == "crnet" or parallel is not ALL_TO_ALL
]
MATRIX += [
    Layout(tp=2, zero=zero, model={"variant": "crnet"}, keys=keys)
    for keys in (UNBUFFERED, SMALL_BUCKETS)
    for zero in (1, 2, 3)
]


@pytest.fixture(scope="module")
def two() -> dict[str, Errors]:
    return dict(zip(map(str, ON_TWO), run_distributed(measure, 2, ON_TWO, timeout_s=900)[0], strict=True))


@pytest.fixture(scope="module")
def four() -> dict[str, Errors]:
    return dict(zip(map(str, ON_FOUR), run_distributed(measure, 4, ON_FOUR, timeout_s=900)[0], strict=True))


@pytest.mark.parametrize("row", ON_TWO, ids=str)
def test_two_ranks(row: Layout, two: dict[str, Errors]) -> None:
    check(row.dtype, two[str(row)])


@pytest.mark.parametrize("row", ON_FOUR, ids=str)
def test_four_ranks(row: Layout, four: dict[str, Errors]) -> None:
    check(row.dtype, four[str(row)])


@pytest.mark.long
@pytest.mark.parametrize(("world_size", "rows"), [(2, MORE_ON_TWO), (4, MORE_ON_FOUR)], ids=["two", "four"])
def test_more_layouts(world_size: int, rows: list[Layout]) -> None:
    found = run_distributed(measure, world_size, rows, timeout_s=900)[0]
    for row, errors in zip(rows, found, strict=True):
        check(row.dtype, errors)


# eight replicas need sixteen sequences
ON_EIGHT = [
    dataclasses.replace(row, sequences=16)
    for row in MATRIX
    if row.dtype == "fp32" and row.model.get("variant") == "crnet" and "architecture" not in row.model
]
ROWS_IN_A_SPAWN = 12


@pytest.mark.long
@pytest.mark.parametrize(
    ("world_size", "start"),
    [(size, start) for size, rows in ((4, MATRIX), (8, ON_EIGHT)) for start in range(0, len(rows), ROWS_IN_A_SPAWN)],
)
def test_the_whole_matrix(world_size: int, start: int) -> None:
    rows = (MATRIX if world_size == 4 else ON_EIGHT)[start : start + ROWS_IN_A_SPAWN]
    found = run_distributed(measure, world_size, rows, timeout_s=1200)[0]
    for row, errors in zip(rows, found, strict=True):
        check(row.dtype, errors)


IMPOSSIBLE = {
    "ZeRO 2 with a pipeline": (Layout(pp=2, zero=2), "use stage 1"),
    "ZeRO 3 with a pipeline": (Layout(pp=2, vpp=2, zero=3), "use stage 1"),
    "bf16 without ZeRO under tensor parallelism": (Layout(tp=2, dtype="bf16"), "use stage 1"),
    "bf16 without ZeRO under a pipeline": (Layout(pp=2, dtype="bf16"), "use stage 1"),
    "virtual stages without a pipeline": (Layout(vpp=2), "pipeline_model_parallel_size above 1"),
    "sequence parallelism alone": (Layout(sp=True), "has no sequence to shard"),
    "fewer key-value groups than ranks": (Layout(tp=4, model={"num_query_groups": 2}), "model.num_query_groups 2"),
    "layers that do not divide": (Layout(pp=2, model={"num_layers": 5}), "model.num_layers 5 leaves 5 layers"),
    "layers over virtual stages": (Layout(pp=2, vpp=4), "model.num_layers 4"),
    "uneven stages that do not add up": (
        Layout(pp=2, parallel={**UNEVEN, "num_layers_in_last_pipeline_stage": 2}),
        "make them add up",
    ),
    "optimizer offload with tensor parallelism": (
        Layout(tp=2, zero=2, offload="offload_optimizer"),
        "tensor_model_parallel_size 1",
    ),
    "optimizer offload with a pipeline": (Layout(pp=2, zero=1, offload="offload_optimizer"), "offload_optimizer"),
    "parameter offload below stage 3": (Layout(zero=2, offload="offload_param"), "use stage 3"),
    "experts over replicas with ZeRO 2": (Layout(zero=2, model=MOE, parallel=EP), "use stage 0 or 1"),
    "experts over replicas with ZeRO 3": (Layout(zero=3, model=MOE, parallel=EP), "use stage 0 or 1"),
    "experts over replicas in bf16 without ZeRO": (Layout(dtype="bf16", model=MOE, parallel=EP), "use stage 1"),
    "experts over replicas with offload": (
        Layout(zero=1, model=MOE, parallel=EP, offload="offload_optimizer"),
        "leave zero_optimization.offload_optimizer out",
    ),
    **{
        f"experts over replicas without {key}": (
            Layout(zero=1, model=MOE, parallel=EP, keys={key: False}),
            f"with zero_optimization.{key} false DeepSpeed sums their gradients over all replicas: leave {key} out",
        )
        for key in UNBUFFERED
    },
    "experts over some of the ranks": (
        Layout(tp=4, model={**MOE, "num_query_groups": 4}, parallel=EP),
        "use 1 or a multiple of 4",
    ),
    "experts that do not divide": (
        Layout(tp=2, model={**MOE, "num_experts": 5}, parallel=EP),
        "model.num_experts 5 does not divide by .* use 4 or 6",
    ),
    "experts without sequence parallelism": (Layout(tp=2, sp=False, model=MOE), "leave sequence_parallel out"),
    "expert parallelism without experts": (Layout(tp=2, parallel=EP), "which has no experts"),
    "a dispatcher without experts": (
        Layout(parallel={"moe_token_dispatcher_type": "alltoall"}),
        "which has no experts",
    ),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_cannot_exist_is_refused(name: str) -> None:
    row, message = IMPOSSIBLE[name]
    with pytest.raises(ConfigError, match=message):
        row.config()
