"""Formulas against sums worked out by hand; against counted runs: tests/distributed/test_estimate.py."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megatron_crnet.config.loading import load_config
from megatron_crnet.config.model_size import total_parameters
from megatron_crnet.config.phases import dense_model
from megatron_crnet.config.rank_section import RankScheduleConfig
from megatron_crnet.planning.estimate import Estimate, estimate, node_crossings
from megatron_crnet.planning.galore import galore_share
from megatron_crnet.planning.machines import MACHINES, SIMULATED, Machine, find_machine
from megatron_crnet.planning.profile import CommVolume, Memory, Peers
from megatron_crnet.planning.shards import SPREAD, build_local_models
from megatron_crnet.planning.simulation import simulate
from megatron_crnet.planning.tables import as_values, dry_run_report, estimate_tables
from megatron_crnet.planning.volume import persistent, zero3_gathers
from megatron_crnet.utils.errors import ConfigError
from tests.helpers import ARCHITECTURES, PADDED, tiny_config

H, F, V, R, LAYERS, TOKENS = 32, 48, 64, 8, 4, 2 * 16
BANDWIDTHS = ("memory_bytes", "memory_bandwidth", "node_bandwidth", "network_bandwidth", "host_bandwidth")
ZERO_1 = {"zero_optimization": {"stage": 1}}
FULL_LAYER = 4 * H * H + 3 * H * F
LOW_LAYER = R * (4 * 2 * H + 3 * (H + F))


def found(world_size: int = 1, **sections: Any) -> Estimate:
    return estimate(tiny_config(**sections), world_size)


def volume(estimated: Estimate, kind: str, group: str, stage: int = 0) -> int:
    return sum(flow.bytes for flow in estimated.stages[stage].flows if (flow.kind, flow.group) == (kind, group))


def test_padding_is_part_of_what_ranks_hold_and_compute_and_not_of_the_model() -> None:
    tp2 = {"tensor_model_parallel_size": 2}
    padded, even = (tiny_config({**PADDED, "ffn_hidden_size": 124}, {**tp2, "pad_widths_to": to}) for to in (64, 1))
    with_padding, without = estimate(padded, 2), estimate(even, 2)
    assert with_padding.stages[0].memory.weights > without.stages[0].memory.weights
    assert with_padding.stages[0].operations.total > without.stages[0].operations.total
    assert with_padding.model_flops() == without.model_flops()
    report = dry_run_report(padded, 2)
    lines = [" ".join(line.split()) for line in report.splitlines()]
    at = lines.index("padded by zeros to multiples of 64 or less (parallel.pad_widths_to)")
    assert lines[at + 1 : at + 3] == ["ffn 124 -> 2 x 64 = 128", "rank 31 -> 32"]
    assert "padded by" not in dry_run_report(even, 2)
    totals = [line for text in (report, dry_run_report(even, 2)) for line in text.splitlines() if " total " in line]
    assert len(totals) == 2
    assert totals[0] == totals[1]


def test_a_dry_run_names_what_the_host_holds_between_phases() -> None:
    schedule = load_config({"rank_schedule": {"steps": [5], "ranks": [16]}})
    warm = load_config({"model": {"variant": "relora"}, "relora": {"warm_start_steps": 5}})
    for config, held in (
        (schedule, 12 * total_parameters(schedule.model)),
        (warm, 4 * total_parameters(dense_model(warm.model))),
    ):
        assert f"a rank holds {held / 2**30:.3f} GiB in the host's memory" in dry_run_report(config, 1)
    assert "in the host's memory" not in dry_run_report(load_config({}), 1)


def test_an_estimate_assigns_galores_matrices_once() -> None:
    config = tiny_config({"variant": "full_rank"}, optimizer={"name": "galore", "galore_rank": 4})
    before = galore_share.cache_info()
    estimate(config, 2)
    after = galore_share.cache_info()
    assert after.misses == before.misses + 1
    assert after.hits > before.hits


def test_a_rank_holds_what_the_whole_model_has_in_parts() -> None:
    config = tiny_config(parallel={"pipeline_model_parallel_size": 2})
    first, last = build_local_models(config)
    norms = 2 * H
    assert sum(p.numel for p in first.parameters) == V * H + FULL_LAYER + LOW_LAYER + 7 + 2 * norms
    assert sum(p.numel for p in last.parameters) == 2 * (LOW_LAYER + 7 + norms) + H + V * H


def test_zero_1_in_bf16_holds_flat_buffers_padded_to_even_shares() -> None:
    memory = estimate(tiny_config(training={"dtype": "bf16"}, deepspeed_section=ZERO_1), 4, SIMULATED).stages[0].memory
    matrices, norms, betas = 2 * V * H + FULL_LAYER + 3 * LOW_LAYER, 9 * H, 3 * 7
    padded = [-(-numel // 8) * 8 for numel in (matrices, norms, betas)]
    # the two bytes more of betas, which stay fp32, are left out
    assert memory.weights == pytest.approx(2 * padded[0] + 2 * padded[1] + 4 * padded[2], rel=0.01)
    assert (memory.gradients, memory.reduction) == (4 * sum(padded), 0)  # which is done in place
    assert memory.optimizer == 12 * sum(padded) // 4


@pytest.mark.parametrize("replicas", [1, 4])
def test_on_a_gpu_a_graph_keeps_the_passes_memory_and_adam_takes_none(replicas: int) -> None:
    def memory(machine: Machine, **training: Any) -> Memory:
        config = tiny_config(training={"dtype": "bf16", **training}, deepspeed_section=ZERO_1)
        return estimate(config, replicas, machine).stages[0].memory

    gpu, eager, cpu = memory(MACHINES["h100"]), memory(MACHINES["h100"], cuda_graphs=False), memory(SIMULATED)
    passes = gpu.kept + gpu.transient
    assert (gpu.update, gpu.reduction) == (passes, passes)
    assert (eager.update, eager.reduction) == (0, 0)
    assert cpu.reduction == 0  # whatever the number of replicas
    assert cpu.update > 0
    assert gpu.total == gpu.state + passes


def test_operations_are_three_times_the_forward_products_and_attention() -> None:
    operations = found().stages[0].operations
    products = 2 * TOKENS * (FULL_LAYER + 3 * LOW_LAYER + V * H)
    attention = 4 * TOKENS * 16 * H * LAYERS
    assert operations.passes == 4 * (3 * products + attention * 7 // 2)  # 4 micro-batches
    assert operations.recomputation == 0


def test_low_rank_layers_send_19r_a_token_and_full_rank_ones_10h() -> None:
    estimated = found(2, parallel={"tensor_model_parallel_size": 2})
    sent = volume(estimated, "all_gather", Peers.TENSOR) + volume(estimated, "reduce_scatter", Peers.TENSOR)
    embedding_and_output = 2 * H + 3 * H
    assert sent == 4 * 4 * TOKENS * (3 * 19 * R + 10 * H + embedding_and_output)


def test_a_boundary_carries_6h_and_2f_and_its_gradient() -> None:
    estimated = found(2, parallel={"pipeline_model_parallel_size": 2})
    for stage in (0, 1):
        assert volume(estimated, "send", Peers.PIPELINE, stage) == 4 * 4 * TOKENS * (6 * H + 2 * F)


def test_replicas_sum_every_gradient_once_a_step_or_once_a_micro_batch() -> None:
    numel = sum(p.numel for p in build_local_models(tiny_config())[0].parameters)
    once = volume(found(2, deepspeed_section=ZERO_1), "all_reduce", Peers.DATA)
    each = volume(found(2, deepspeed_section={"zero_optimization": {"stage": 2}}), "all_reduce", Peers.DATA)
    assert each - once == 2 * 4 * numel  # two micro-batches a rank
    assert once == 2 * 4 * numel


HUGE = 10**9


@pytest.mark.parametrize(
    ("prefetch", "live", "reuse", "threshold", "times"),
    [
        (0, HUGE, HUGE, HUGE, 0),  # all persistent: gathered once per step
        (0, HUGE, HUGE, 0, 1),  # what is soon used again stays
        (1, HUGE, 0, 0, 1),  # as does what is gathered ahead
        (0, HUGE, 0, 0, 2),  # nothing stays
        (1, 0, 0, 0, 2),  # nothing may be whole beyond what the module at hand needs
    ],
)
def test_zero_3_gathers_a_weight_for_every_pass_that_does_not_find_it_whole(
    prefetch: int, live: int, reuse: int, threshold: int, times: int
) -> None:
    zero = {
        "stage": 3,
        "stage3_prefetch_bucket_size": prefetch,
        "stage3_max_live_parameters": live,
        "stage3_max_reuse_distance": reuse,
        "stage3_param_persistence_threshold": threshold,
    }
    (model,) = build_local_models(tiny_config(deepspeed_section={"zero_optimization": zero}))
    gathered, whole = zero3_gathers(model)
    assert gathered == times * model.numel
    assert persistent(model) == (model.numel if times == 0 else 0)
    largest = max(p.numel for p in model.parameters)
    assert whole == {0: 0, 1: model.numel, 2: largest}[times]
    micro_batches = 2
    expected = 4 * (micro_batches * gathered + persistent(model))
    assert volume(found(2, deepspeed_section={"zero_optimization": zero}), "all_gather", Peers.DATA) == expected


@pytest.mark.parametrize(
    ("sizes", "gpus_per_node", "shares"),
    [
        # TP 2, PP 2, DP 2 of eight ranks: 0 and 1, 0 and 4, 0 and 2 are groups
        ((2, 2, 2), 8, (0, 0, 0)),
        ((2, 2, 2), 4, (0, 1, 0)),
        ((2, 2, 2), 2, (0, 1, 1)),
        # rings of four ranks over nodes of three: 0 1 2 | 3 4 5 | 6 7
        ((4, 1, 2), 3, (4 / 8, 0, 1)),
        # a ring over two nodes leaves each once
        ((1, 1, 16), 8, (0, 0, 2 / 16)),
    ],
)
def test_of_a_ring_only_the_edges_between_nodes_leave_them(
    sizes: tuple[int, int, int], gpus_per_node: int, shares: tuple[float, float, float]
) -> None:
    crossings = node_crossings(*sizes, gpus_per_node)
    assert tuple(crossings[group].ring for group in (Peers.TENSOR, Peers.PIPELINE, Peers.DATA)) == shares


def test_of_an_exchange_what_goes_to_ranks_of_other_nodes_leaves_them() -> None:
    exchanged = {ep: node_crossings(1, 1, 32, 8, ep)[Peers.EXPERT].exchange for ep in (8, 16, 32)}
    assert exchanged == {8: 0, 16: pytest.approx(8 / 15), 32: pytest.approx(24 / 31)}
    tokens = tiny_config(
        ARCHITECTURES["qwen3_moe"],
        {"expert_model_parallel_size": 4, "moe_token_dispatcher_type": "alltoall"},
        deepspeed_section={"zero_optimization": {"stage": 1}},
    )
    (flow,) = (
        flow
        for flow in as_values(estimate(tokens, 4, gpus_per_node=2))["stages"][0]["flows"]
        if flow["kind"] == "all_to_all"
    )
    # to one rank of the node, and to two of the other
    assert flow["wire_bytes_between_nodes"] == pytest.approx(flow["bytes"] * 2 / 3)
    # 0 1 2 | 3: of four ranks one is alone, and sends all of its own away
    assert node_crossings(4, 1, 1, 3)[Peers.TENSOR].exchange == pytest.approx((3 / 3 + 3 * 1 / 3) / 4)


def test_the_network_slows_a_ring_down_by_what_each_port_must_carry() -> None:
    machine = MACHINES["h100"]
    times = {}
    for gpus_per_node in (16, 8, 1):
        config = tiny_config(deepspeed_section=ZERO_1, training={"global_batch_size": 32})
        time = estimate(config, 16, machine, gpus_per_node).time
        times[gpus_per_node] = time.data_parallel
    # two of sixteen edges cross: an eighth of the bytes for each port, which has a ninth of a node's bandwidth
    assert times[8] == pytest.approx(times[16] * 450 / 50 / 8)
    assert times[1] == pytest.approx(times[16] * 450 / 50)


def test_the_peak_is_the_fullest_moment() -> None:
    memory = Memory(1, 2, 3, 4, kept=5, transient=6, reduction=7, update=8)
    assert memory.total == 1 + 2 + 3 + 4 + 5 + 6
    assert dataclasses.replace(memory, reduction=20).total == 10 + 20
    assert dataclasses.replace(memory, update=30).total == 10 + 30


def test_a_ring_puts_all_but_one_share_of_a_volume_on_the_wire() -> None:
    assert CommVolume("all_reduce", Peers.DATA, 4, 80).wire_bytes == 60
    assert CommVolume("send", Peers.PIPELINE, 4, 80).wire_bytes == 80


def test_time_shrinks_with_a_faster_machine_and_the_bubble_with_more_micro_batches() -> None:
    config = load_config("examples/llama2_7b.yaml", ["--parallel.pipeline_model_parallel_size", "4"])
    slow, fast = (estimate(config, 8, MACHINES[name]) for name in ("a100-80g", "h100"))
    assert slow.time.total > fast.time.total
    fewer = dataclasses.replace(config, training=dataclasses.replace(config.training, micro_batch_size=32))
    shorter = estimate(fewer, 8, MACHINES["h100"]).time
    busy = ("matmul", "elementwise", "launches", "tensor_parallel", "pipeline")
    for time, count in ((fast.time, 512 // 8 // 2), (shorter, 512 // 32 // 2)):
        assert time.bubble == pytest.approx(sum(getattr(time, name) for name in busy) * 3 / count)
    assert fast.utilization() < 1


def test_a_machine_comes_from_a_file_or_is_refused_in_one_line(tmp_path: Path) -> None:
    values = dataclasses.asdict(MACHINES["h100"])
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**values, "name": "mine", "peak_flops": 1e15}))
    assert find_machine(str(path)) == dataclasses.replace(MACHINES["h100"], name="mine", peak_flops=1e15)
    for change, message in (
        ({"peak_flop": 1}, "did you mean peak_flops?"),
        ({"memory_bytes": None}, "machine.memory_bytes is null, but must be a finite number above 0"),
        ({"link_efficiency": 0}, "link_efficiency is 0, but must be a finite number above 0 and up to 1"),
        ({"link_efficiency": 80}, "link_efficiency is 80, but must be a finite number above 0 and up to 1"),
        ({"host_bandwidth": "inf"}, 'host_bandwidth is "inf", but must be a finite number above 0'),
        ({"host_bandwidth": True}, "host_bandwidth is true, but must be a finite number above 0"),
        ({"host_bandwidth": math.inf}, r"host_bandwidth is \.inf, but must be a finite number above 0"),
        ({"peak_flops": math.nan}, r"peak_flops is \.nan, but must be a finite number above 0"),
    ):
        path.write_text(yaml.safe_dump({**values, **change}))
        with pytest.raises(ConfigError, match=message):
            find_machine(str(path))
    path.write_text("name: mine\npeak_flops: 1e12\npeak_flops: 2e12\n")
    with pytest.raises(ConfigError, match="has the key peak_flops twice, in lines 2 and 3"):
        find_machine(str(path))
    path.write_text("peak_flops: 1e12\n" + yaml.safe_dump({k: v for k, v in values.items() if k in BANDWIDTHS}))
    assert find_machine(str(path)).peak("fp32") == 1e12
    with pytest.raises(ConfigError, match=r"a100-80g, h100, h200 or a YAML file"):
        find_machine("tpu")


def test_products_in_fp32_take_the_peak_of_fp32() -> None:
    machine = MACHINES["h100"]
    bf16, fp32 = (estimate(tiny_config(training={"dtype": dtype}), 1, machine) for dtype in ("bf16", "fp32"))
    assert fp32.time.matmul == pytest.approx(bf16.time.matmul * 989 / 67)
    assert fp32.utilization() == pytest.approx(fp32.model_flops() / fp32.time.total / 67e12)
    assert "fp32 matmul at 60% of 67 TFLOP/s" in "\n".join(estimate_tables(fp32))


def test_the_report_names_every_part_and_json_holds_the_same_figures() -> None:
    machine = MACHINES["h200"]
    estimated = estimate(tiny_config(deepspeed_section=ZERO_1), 2, machine)
    text = "\n".join(estimate_tables(estimated))
    for part in ("weights", "gradients", "optimizer", "buffers", "kept", "transient", "reduction", "update", "peak"):
        assert part in text
    values = json.loads(json.dumps(as_values(estimated)))
    assert values["stages"][0]["memory"]["peak"] == estimated.stages[0].memory.total
    assert values["fits"] is True


def test_a_warm_start_needs_the_memory_of_full_rank() -> None:
    relora = {"model": {"variant": "relora"}, "training": {"train_steps": 20}}
    warm = estimate(tiny_config(**relora, relora={"warm_start_steps": 5}), 1)
    dense = estimate(tiny_config(model={"variant": "full_rank"}, training={"train_steps": 20}), 1)
    plain = estimate(tiny_config(**relora), 1)
    assert plain.peak < warm.peak == dense.peak
    assert warm.run_seconds == pytest.approx(5 * dense.time.total + 15 * plain.time.total)
    (line,) = [line for line in estimate_tables(warm) if line.startswith("steps 1 to 5 ")]
    assert "full_rank" in line


def test_experts_are_simulated_with_an_even_spread_whatever_their_values() -> None:
    before = MoEAuxLossAutoScaler.main_loss_backward_scale
    sparse, dense = (tiny_config({**ARCHITECTURES["qwen3_moe"], "moe_router_topk": topk}) for topk in (2, 4))
    for config in (sparse, dense):
        assert simulate(config, 1, 0).flops == estimate(config, 1).stages[0].operations.total
    # Megatron-Core's scale of router losses is a tensor that it keeps between passes: not one without values
    assert MoEAuxLossAutoScaler.main_loss_backward_scale is before


def test_experts_over_replicas_leave_each_a_share_with_its_optimizer_state() -> None:
    section, training = {"zero_optimization": {"stage": 1}}, {"dtype": "bf16", "global_batch_size": 8}
    moe = ARCHITECTURES["qwen3_moe"]
    for size in (1, 2, 4):
        config = tiny_config(moe, {"expert_model_parallel_size": size}, training, deepspeed_section=section)
        model = build_local_models(config)[0]
        experts = sum(p.numel for p in model.parameters if p.is_expert and p.kind == (SPREAD if size > 1 else "matrix"))
        assert model.partition(4) == pytest.approx((model.numel - experts) / 4 + experts * size / 4, rel=1e-3)
        groups = {flow.group for flow in estimate(config, 4).stages[0].flows}
        # one group of four ranks takes the name of the replicas'
        assert groups == {1: {"DP"}, 2: {"DP", "EP", "EP's DP"}, 4: {"DP"}}[size]


def test_spread_experts_weigh_as_much_less_on_each_rank() -> None:
    tp2 = {"tensor_model_parallel_size": 2}
    whole, spread = (
        tiny_config(ARCHITECTURES["qwen3_moe"], {**tp2, "expert_model_parallel_size": size}) for size in (1, 2)
    )
    h, f, r, full, low = 32, 20, 8, 1, 3
    experts = 4 * (full * 3 * h * f + low * 3 * r * (h + f))
    numels = [build_local_models(config)[0].numel for config in (whole, spread)]
    assert numels[0] - numels[1] == experts // 2


@pytest.mark.parametrize("schedule", [([5], [8, 24]), ([5, 9], [8, 24, 12]), ([5], [24, 8])], ids=str)
def test_ranks_that_change_are_estimated_at_their_largest(schedule: tuple[list[int], list[int]]) -> None:
    steps, (first, *ranks) = schedule
    training = {"train_steps": 20}
    changing = tiny_config({"rank": first}, training=training)
    changing = dataclasses.replace(changing, rank_schedule=RankScheduleConfig(steps, list(ranks)))
    fixed = {rank: estimate(tiny_config({"rank": rank}, training=training), 1) for rank in (first, *ranks)}
    found = estimate(changing, 1)
    assert found.peak == fixed[24].peak == max(one.peak for one in fixed.values())
    assert found.stages == fixed[24].stages
    parts = zip([0, *steps], [*steps, 20], (first, *ranks), strict=True)
    assert found.run_seconds == pytest.approx(sum((end - start) * fixed[rank].time.total for start, end, rank in parts))
    assert len([line for line in estimate_tables(found) if line.startswith("steps ")]) == len(steps)
    assert f"{total_parameters(fixed[24].config.model):,}" in dry_run_report(changing, 1)


def test_ranks_that_change_by_energy_are_estimated_at_their_largest_in_all_steps() -> None:
    training = {"train_steps": 20}
    changing = tiny_config({"rank": 8}, training=training)
    schedule = RankScheduleConfig(ranks=[24, 12], energy=0.9, check_interval=5)
    found = estimate(dataclasses.replace(changing, rank_schedule=schedule), 1)
    assert found == estimate(tiny_config({"rank": 24}, training=training), 1)
