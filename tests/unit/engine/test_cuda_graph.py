"""Micro-batches as graphs: which configurations, and the same numbers as without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_crnet.config.cuda_graphs import describe_launches, uses_cuda_graphs
from megatron_crnet.config.schema import Config, RecomputeConfig
from megatron_crnet.distributed.process_groups import initialize_parallel, shutdown_parallel
from megatron_crnet.engine.cuda_graph import MicroBatchGraph
from megatron_crnet.engine.determinism import deterministic_algorithms
from megatron_crnet.engine.engine import TrainEngine
from megatron_crnet.engine.rank_change import States
from megatron_crnet.engine.schedule import run_micro_batch
from megatron_crnet.engine.state_kinds import KINDS
from megatron_crnet.model.gpt import build_model_chunks
from megatron_crnet.planning.counters import OperationCounter
from megatron_crnet.utils.errors import ConfigError
from tests.helpers import micro_batches, tiny_config

STAGE1: dict[str, Any] = {"zero_optimization": {"stage": 1}}


def graph_config(strategy: str = "none", deepspeed: dict[str, Any] = STAGE1, **sections: dict[str, Any]) -> Config:
    graphs = sections.get("training", {}).pop("cuda_graphs", None)
    sections["training"] = {"dtype": "bf16", "global_batch_size": 6, **sections.get("training", {})}
    config = tiny_config(**sections, deepspeed_section={"zero_optimization": deepspeed["zero_optimization"]})
    recompute = RecomputeConfig(strategy=strategy)  # type: ignore[arg-type]
    return replace(
        config, recompute=recompute, deepspeed=deepspeed, training=replace(config.training, cuda_graphs=graphs)
    )


class _Rerun:
    """In place of a graph on CPUs: the same passes over the same tensors."""

    def __init__(self, graph: MicroBatchGraph) -> None:
        self._graph = graph

    def replay(self) -> None:
        for name, value in self._graph._passes(self._graph._inputs, self._graph._factors).items():
            self._graph._results.setdefault(name, torch.empty_like(value)).copy_(value)


Trained = tuple[list[tuple[float, float]], States]


@pytest.fixture
def steps_of() -> Callable[[Config], Trained]:
    """Trains five steps, the third dropped and followed by a validation, the fourth with fewer micro-batches.

    Gives losses, norms, and weights and moments.
    """

    def train(config: Config) -> Trained:
        context = initialize_parallel(config)
        engine = TrainEngine(config, build_model_chunks(config), context)
        found = []
        with deterministic_algorithms(config.training.deterministic):
            for step in range(5):
                batches = micro_batches(config, context.dp_rank, context.world_size, step)
                batches = [{name: x.to(context.device) for name, x in batch.items()} for batch in batches]
                batches = batches[: 2 if step == 3 else 3]
                tokens = sum(float(batch["loss_mask"].sum()) for batch in batches)
                loss = engine.forward_backward(batches, tokens)
                if step == 2:  # what happens between steps
                    engine.discard()
                    found.append((loss, engine.evaluate(batches)[0]))
                else:
                    found.append((loss, engine.update()[0]))
        if engine._graph is not None:
            assert engine._graph._graph is not None
        states = engine.states(KINDS)
        engine.close()
        context.heartbeat.close()
        shutdown_parallel()
        return found, states

    return train


def same(one: Trained, other: Trained) -> bool:
    (numbers, states), (others, rest) = one, other
    return numbers == others and all(
        torch.equal(value, rest[name][kind]) for name, kinds in states.items() for kind, value in kinds.items()
    )


@pytest.mark.parametrize("strategy", ["none", "replay"])
def test_what_is_copied_to_a_graph_trains_as_what_is_passed(
    strategy: str, steps_of: Callable[[Config], Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = graph_config(strategy)
    wanted = steps_of(config)
    build = TrainEngine.__init__

    def with_graph(self: TrainEngine, *args: Any) -> None:
        build(self, *args)
        self._graph = MicroBatchGraph(lambda *args: run_micro_batch(self.scheduled, *args), self.context.device)

    monkeypatch.setattr(TrainEngine, "__init__", with_graph)
    replays: list[int] = []
    monkeypatch.setattr(MicroBatchGraph, "_capture", lambda graph: replays.append(1) or _Rerun(graph))
    found = steps_of(config)
    assert same(found, wanted)
    assert len(replays) == 1


@pytest.mark.gpu
def test_graphs_and_recomputation_train_to_the_same_bits(steps_of: Callable[[Config], Trained]) -> None:
    def trained(strategy: str, graphs: bool) -> Trained:
        return steps_of(graph_config(strategy, training={"cuda_graphs": graphs, "deterministic": True}))

    plain = trained("none", False)
    for strategy in ("none", "replay", "full"):
        assert same(trained(strategy, True), plain), strategy


def test_a_graph_waits_for_a_step_of_the_same_shapes() -> None:
    graph = MicroBatchGraph(lambda batch, factors: {}, torch.device("cpu"))
    short, long = ([{"tokens": torch.zeros(1, n)}] for n in (2, 3))
    assert [graph.is_for(batches) for batches in (short, short, long, long, short)] == [False, True, False, True, False]
    with OperationCounter():
        assert not graph.is_for(short)


def test_the_default_is_a_graph_where_one_works() -> None:
    assert uses_cuda_graphs(graph_config())
    assert not uses_cuda_graphs(graph_config(training={"cuda_graphs": False}))
    assert not uses_cuda_graphs(tiny_config())
    assert describe_launches(graph_config()).endswith("as a CUDA graph")
    off = describe_launches(graph_config(training={"cuda_graphs": False}))
    assert off.endswith("not as a CUDA graph: training.cuda_graphs is false")
    assert describe_launches(tiny_config()).endswith("not with fp32 and stage 0")


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"training": {"dtype": "fp32"}}, "training.dtype bf16"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "not with bf16 and stage 2"),
        (
            {"deepspeed": {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}},
            "offload_optimizer",
        ),
        ({"deepspeed": {**STAGE1, "timers": {"throughput": {"synchronized": True}}}}, "timers"),
        ({"parallel": {"tensor_model_parallel_size": 2}}, "tensor_model_parallel_size is 2"),
        ({"strategy": "inverse"}, "recompute.strategy inverse"),
        ({"model": {"hidden_dropout": 0.1}}, "dropout"),
        ({"data": {"reset_attention_mask": True}}, "reset_attention_mask"),
        (
            {
                "deepspeed": {**STAGE1, "activation_checkpointing": {"cpu_checkpointing": True}},
                "strategy": "replay",
            },
            "activation_checkpointing",
        ),
    ],
)
def test_a_graph_is_refused_where_it_would_not_be_the_same(sections: dict[str, Any], why: str) -> None:
    assert not uses_cuda_graphs(graph_config(**sections))
    sections["training"] = {**sections.get("training", {}), "cuda_graphs": True}
    with pytest.raises(ConfigError, match=r"training\.cuda_graphs is true, but") as raised:
        graph_config(**sections)
    assert why in str(raised.value)
