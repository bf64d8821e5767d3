"""GaLore at every ZeRO stage, under TP and PP: layouts train like the plain page, resume to the bit, reshape."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from megatron_crnet.checkpoint.compatibility import check_resumable
from megatron_crnet.checkpoint.manager import Checkpointer
from megatron_crnet.config.model_size import total_parameters
from megatron_crnet.config.positions import position_table
from megatron_crnet.config.schema import Config
from megatron_crnet.distributed.watchdog import Heartbeat
from megatron_crnet.engine.sharded_galore import ShardedGaLore
from megatron_crnet.utils.errors import ConfigError
from tests.distributed.engines import build_engine, close_engine, run_step
from tests.distributed.spawn import fresh_world, run_distributed
from tests.distributed.test_checkpoint import row_config, train
from tests.helpers import ARCHITECTURES, PADDED, Errors, compare_with_reference

GALORE = {"name": "galore", "galore_rank": 4, "update_proj_gap": 2, "galore_scale": 8.0}
"""Three steps have two projections, and change the weights by about as much as they are large."""
TP, PP = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
GPT2, QWEN3 = ARCHITECTURES["gpt2"], ARCHITECTURES["qwen3"]
# every token is given to every expert: weights that change by half could send some elsewhere by rounding
MOE = {**ARCHITECTURES["qwen3_moe"], "moe_router_topk": 4}
PADDED_FFN = {"ffn_hidden_size": PADDED["ffn_hidden_size"]}
ROWS: dict[str, dict[str, Any]] = {
    **{
        f"zero{stage}-{dtype}": {"stage": stage, "dtype": dtype} for stage, dtype in product(range(4), ("fp32", "bf16"))
    },
    **{f"tp2-zero{stage}": {"stage": stage, "parallel": TP} for stage in range(4)},
    "tp2-zero1-bf16": {"stage": 1, "dtype": "bf16", "parallel": TP},
    **{f"pp2-zero{stage}": {"stage": stage, "parallel": PP} for stage in range(2)},
    "pp2x2-zero1-bf16": {
        "stage": 1,
        "dtype": "bf16",
        "parallel": {**PP, "virtual_pipeline_model_parallel_size": 2},
    },
    **{
        f"{proj_type}-zero2": {"stage": 2, "optimizer": {"proj_type": proj_type, "galore_scale": 4.0}}
        for proj_type in ("reverse_std", "left", "right", "full")
    },
    "rotated-zero1": {"stage": 1, "optimizer": {"rotate_moments": True, "update_proj_gap": 1}},
    "padded-zero3": {"stage": 3, "model": PADDED_FFN},
    "padded-tp2-zero1": {"stage": 1, "model": PADDED_FFN, "parallel": TP},
    "grouped-queries-tp2-zero0": {"stage": 0, "model": {"num_query_groups": 2}, "parallel": TP},
    "odd-layers-zero2": {"stage": 2, "model": {"num_layers": 3}},
    "sub-groups-zero3": {"stage": 3, "sub_group_size": 3000, "stage3_param_persistence_threshold": 0},
    "parameters-on-host-zero3": {"stage": 3, "offload_param": {"device": "cpu"}},
    "multipliers-zero1": {"stage": 1, "lr_multipliers": {"first_layer": 0.25, "embedding": 3.0}},
    "gpt2-tp2-zero1": {"stage": 1, "model": GPT2, "parallel": TP},
    "gpt2-pp2-zero1": {"stage": 1, "model": GPT2, "parallel": PP},
    "gpt2-zero3": {"stage": 3, "model": GPT2},
    # norms of heads multiply the rounding of weights that change by half
    "qwen3-tp2-zero2": {"stage": 2, "model": QWEN3, "parallel": TP, "optimizer": {"galore_scale": 4.0}},
    "qwen3-pp2-zero0": {"stage": 0, "model": QWEN3, "parallel": PP, "optimizer": {"galore_scale": 4.0}},
    **{f"moe-zero{stage}": {"stage": stage, "model": MOE, "optimizer": {"galore_scale": 2.0}} for stage in range(4)},
    "moe-pp2-zero1": {"stage": 1, "model": MOE, "parallel": PP, "optimizer": {"galore_scale": 2.0}},
    "multipliers-pp2-zero1": {"stage": 1, "lr_multipliers": {"first_layer": 0.25}, "parallel": PP},
}
SOON = (
    "zero0-fp32",
    "zero1-bf16",
    "zero3-fp32",
    "tp2-zero3",
    "padded-tp2-zero1",
    "odd-layers-zero2",
    "multipliers-pp2-zero1",
    "gpt2-pp2-zero1",
    "moe-zero1",
)
"""The others are marked long."""
RARE = [name for name in ROWS if name not in SOON]
ON_FOUR: dict[str, dict[str, Any]] = {
    name: {**row, "sequences": 8}
    for name, row in {
        **{f"zero{stage}": {"stage": stage} for stage in range(4)},
        **{f"tp2-zero{stage}": {"stage": stage, "parallel": TP} for stage in range(4)},
        **{f"pp2-zero{stage}": {"stage": stage, "parallel": PP} for stage in range(2)},
        **{f"tp2-pp2-zero{stage}": {"stage": stage, "parallel": {**TP, **PP}} for stage in range(2)},
        "padded-tp2-zero3": {"stage": 3, "model": PADDED_FFN, "parallel": TP},
        "tp4-zero1": {"stage": 1, "parallel": {"tensor_model_parallel_size": 4}},
    }.items()
}
BF16 = Errors(loss=1e-2, grad_norm=5e-2, gradients=0.4, parameters=0.1)
"""See test_zero.py; here weights move by much more."""


def config_of(row: dict[str, Any], folder: str = "unused") -> Config:
    model = {"variant": "full_rank", **row.get("model", {})}
    return row_config(folder, **{**row, "optimizer": {**GALORE, **row.get("optimizer", {})}, "model": model})


def compare_rows(rows: dict[str, dict[str, Any]]) -> dict[str, Errors]:
    found = {}
    for name, row in rows.items():
        found[name] = compare_with_reference(config_of(row))
        fresh_world()
    return found


def check(name: str, errors: Errors) -> None:
    if "bf16" not in name:
        assert errors.worst() < 1e-5, errors
    for part in ("loss", "grad_norm", "gradients", "parameters"):
        assert getattr(errors, part) < getattr(BF16, part), errors


@pytest.fixture(scope="module")
def errors() -> dict[str, Errors]:
    return run_distributed(compare_rows, 2, {name: ROWS[name] for name in SOON})[0]


@pytest.mark.parametrize("name", SOON)
def test_every_layout_trains_like_the_plain_page(name: str, errors: dict[str, Errors]) -> None:
    check(name, errors[name])


@pytest.mark.long
def test_rarer_layouts_do_as_well() -> None:
    for name, errors in run_distributed(compare_rows, 2, {name: ROWS[name] for name in RARE})[0].items():
        check(name, errors)


@pytest.mark.long
def test_layouts_of_four_ranks_do_as_well() -> None:
    for name, errors in run_distributed(compare_rows, 4, ON_FOUR)[0].items():
        check(name, errors)


def with_engine(config: Config, checkpoint: Path) -> tuple[Any, ...]:
    """Memory and contents of this rank's state after loading: bytes of the state, and the state by name and kind."""
    engine = build_engine(config)
    Checkpointer(config, engine).load(checkpoint)
    optimizer = engine.zero.adam
    assert isinstance(optimizer, ShardedGaLore)
    states = optimizer.states()
    moments = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    close_engine(engine)
    return sum(t.numel() for t in moments), {f"{kind}.{n}": t for n, s in states.items() for kind, t in s.items()}


def resume_rows(folder: str, names: list[str]) -> dict[str, Any]:
    found = {}
    for name in names:
        config, checkpoint = config_of(ROWS[name], f"{folder}/{name}"), Path(folder, name, "step_00000003")
        whole, _ = train(config, save_at=3, steps=6)
        again, _ = train(config, checkpoint, save_at=5, steps=5)
        again += train(config, checkpoint.with_name("step_00000005"), steps=6)[0]
        found[name] = whole, again, with_engine(config, checkpoint)
    return found


RESUMED = ("zero0-fp32", "zero1-bf16", "tp2-zero3")
RESHAPES = {
    "zero1-bf16": "zero3-fp32",
    "tp2-zero3": "zero0-fp32",
    "zero0-fp32": "tp2-zero1",
}
RESHAPES_OF_RARE = {"zero2-fp32": "pp2-zero1", "pp2x2-zero1-bf16": "tp2-zero1-bf16", "tp2-zero0": "zero3-bf16"}


def check_resumed(name: str, found: list[dict[str, Any]]) -> None:
    """Saved between two projections (step 4 still uses those of step 3), and saved again by the resumed run."""
    whole, again, _ = found[0][name]
    assert len(again) == 3
    assert again == whole[3:]
    check_state(ROWS[name], [rank[name][2] for rank in found])


def check_state(row: dict[str, Any], by_rank: list[tuple[int, dict[str, Tensor]]]) -> None:
    """2 r max(m, n) + r min(m, n) of each map, evenly shared; full rank for embedding, head and norms alone."""
    model, shards_nothing = config_of(row).model, row["stage"] == 0 and "parallel" not in row
    if row.get("optimizer", {}).get("proj_type", "std") != "std":
        return
    h, table = model.hidden_size, position_table(model)
    of_experts = {position.name for position in table.architecture.experts.positions} if table.num_experts else set()
    copies_of = {name: table.num_experts if name in of_experts else 1 for name in table.shapes}
    maps = [table.shapes[name] for name in table.shapes for _ in range(copies_of[name])] * model.num_layers
    expected = sum(2 * 4 * max(shape) + 4 * min(shape) for shape in maps)
    owned = [sum(tensor.numel() for tensor in state.values()) for _, state in by_rank]
    assert sum(owned) == expected * (2 if shards_nothing else 1)
    assert max(owned) <= 1.15 * sum(owned) / len(owned)
    plain = total_parameters(model) - sum(m * n for m, n in maps)
    embeddings = (1 if table.ties_head else 2) * model.vocab_size * h
    if row.get("parallel") == TP:
        plain += plain - embeddings  # norms, most biases and positions are on both ranks
    elif table.ties_head and row.get("parallel") == PP:
        plain += embeddings  # on both ends
    copies = 2 if row["stage"] == 0 else 1
    assert sum(numel for numel, _ in by_rank) <= 2 * copies * plain + 4 * model.num_layers * h + 1000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("galore"))


@pytest.fixture(scope="module")
def resumed(folder: str) -> list[dict[str, Any]]:
    return run_distributed(resume_rows, 2, folder, [*RESUMED])


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_repeats_the_whole_one_to_the_bit(name: str, resumed: list[dict[str, Any]]) -> None:
    check_resumed(name, resumed)


def reshape_rows(folder: str, reshapes: dict[str, str]) -> dict[str, Any]:
    found = {}
    for before, after in reshapes.items():
        checkpoint, config = Path(folder, before, "step_00000003"), config_of(ROWS[after])
        found[before] = train(config, checkpoint, steps=6)[0], with_engine(config, checkpoint)[1]
    return found


def check_reshaped(before: str, resumed: list[dict[str, Any]], reshaped: list[dict[str, Any]]) -> None:
    saved = {name: tensor for rank in resumed for name, tensor in rank[before][2][1].items()}
    loaded = {name: tensor for rank in reshaped for name, tensor in rank[before][1].items()}
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    tolerance = 2e-2 if "bf16" in before + RESHAPES_OF_RARE.get(before, "") else 1e-5
    whole, again = resumed[0][before][0], reshaped[0][before][0]
    torch.testing.assert_close(torch.tensor(again), torch.tensor(whole[3:]), rtol=tolerance, atol=0)


def test_another_layout_goes_on_from_the_same_state(resumed: list[dict[str, Any]], folder: str) -> None:
    reshaped = run_distributed(reshape_rows, 2, folder, RESHAPES)
    for before in RESHAPES:
        check_reshaped(before, resumed, reshaped)


@pytest.mark.long
def test_rarer_layouts_resume_and_reshape_as_well(tmp_path: Path) -> None:
    names = [name for name in ROWS if name not in RESUMED]
    resumed = run_distributed(resume_rows, 2, str(tmp_path), names)
    for name in names:
        check_resumed(name, resumed)
    reshaped = run_distributed(reshape_rows, 2, str(tmp_path), RESHAPES_OF_RARE)
    for before in RESHAPES_OF_RARE:
        check_reshaped(before, resumed, reshaped)


def count_progress(row: dict[str, Any]) -> int:
    """How often the watchdog hears from this rank in the course of an update."""
    with patch.object(Heartbeat, "progress", autospec=True) as progress:
        engine = build_engine(config_of(row))
        run_step(engine)
        before = progress.call_count
        engine.update()
        found = progress.call_count - before
    close_engine(engine)
    return found


def test_every_round_of_an_update_is_progress() -> None:
    """New projections of a large model take longer than a rank may be silent: no more than one of them may."""
    layers = config_of(ROWS["zero1-bf16"]).model.num_layers
    assert min(run_distributed(count_progress, 2, ROWS["zero1-bf16"])) > 7 * layers // 2


def convert(folder: str) -> list[str | None]:
    """What is said to runs that would go on with moments of another form; None where nothing is."""
    first = config_of(ROWS["zero1-bf16"], folder)
    train(first, save_at=2, steps=2)
    checkpoint = Path(folder, "step_00000002")
    found: list[str | None] = []
    for changes in ({}, {"name": "adamw"}, {"galore_rank": 5}, {"proj_type": "left"}, {"update_proj_gap": 3}):
        try:
            check_resumable(config_of({**ROWS["zero1-bf16"], "optimizer": changes}, folder), checkpoint)
            found.append(None)
        except ConfigError as error:
            found.append(str(error))
    # weights alone can be taken from it
    plain = config_of({**ROWS["zero1-bf16"], "optimizer": {"name": "adamw"}}, f"{folder}/plain")
    check_resumable(plain, checkpoint, with_moments=False)
    return found


def test_moments_of_another_form_are_refused(tmp_path: Path) -> None:
    same, other_name, other_rank, other_type, other_gap = run_distributed(convert, 2, str(tmp_path))[0]
    assert same is other_gap is None
    assert re.search(
        r"holds moments of optimizer.galore_rank 4, .* none of full rank follow: .*checkpoint.load$", other_name
    )
    assert "none of optimizer.galore_rank 5, optimizer.proj_type std follow" in other_rank
    assert "none of optimizer.galore_rank 4, optimizer.proj_type left follow" in other_type
