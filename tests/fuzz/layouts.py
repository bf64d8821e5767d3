"""Layouts of small models drawn from a seed: `draw(seed, ranks)`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from random import Random
from typing import Any

from megatron_crnet.config.batch import plan_batches
from megatron_crnet.config.schema import Config, RecomputeConfig
from megatron_crnet.utils.errors import ConfigError
from tests.helpers import tiny_config

Section = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Sections of a configuration, and the sections of another layout for the same model and batch."""

    sections: dict[str, Section]
    recompute: Section
    other: dict[str, Section]

    def config(self, recompute: Section | None = None, steps: int = 4, **sections: Section) -> Config:
        """The configuration; of `sections` the given values instead."""
        names = {*self.sections, *sections}
        whole = {name: {**self.sections.get(name, {}), **sections.get(name, {})} for name in names}
        whole["training"]["train_steps"] = steps
        recompute = self.recompute if recompute is None else recompute
        return dataclasses.replace(tiny_config(**whole), recompute=RecomputeConfig(**recompute))

    def elsewhere(self) -> Config:
        """The same model in the other layout, without recomputation."""
        sections = {name: section for name, section in self.sections.items() if name not in self.other}
        return Case({**sections, **self.other}, {"strategy": "none"}, {}).config()


def draw(seed: str, ranks: int) -> Case:
    """A case that `ranks` ranks can run: the first of the seed's that no rule refuses."""
    rng = Random(seed)
    while True:
        model = model_of(rng)
        sections = {
            "model": model,
            "optimizer": optimizer_of(rng, model),
            "data": data_of(rng),
            **method_of(rng, model),
        }
        layout, other = layout_of(rng, model, ranks), layout_of(rng, model, ranks)
        training = {
            "micro_batch_size": 2,
            "global_batch_size": max(4, 2 * ranks * rng.choice([1, 2])),
            "seq_length": 12,
        }
        exact = model.get("num_experts", 0) == model.get("moe_router_topk", 0)  # else tokens may go elsewhere in bf16
        training["dtype"] = rng.choice(["fp32", "fp32", "bf16"] if exact else ["fp32"])
        case = Case({**sections, "training": training, **layout}, recompute_of(rng), other)
        try:
            plan_batches(case.config(steps=3), ranks)
            plan_batches(case.elsewhere(), ranks)
        except ConfigError:
            continue
        return case


def model_of(rng: Random) -> Section:
    architecture = rng.choice(["llama", "gpt2", "qwen3", "qwen3_moe"])
    heads, width, layers = rng.choice([2, 3, 4, 6]), rng.choice([6, 8]), rng.choice([2, 3, 4, 6, 8])
    model: Section = {"architecture": architecture, "num_layers": layers, "num_attention_heads": heads}
    model |= {"variant": rng.choice(["crnet", "crnet", "full_rank", "low_rank", "cola", "relora"])}
    model |= {
        "hidden_size": heads * width,
        "ffn_hidden_size": rng.choice([20, 45, 61]),
        "vocab_size": rng.choice([61, 64]),
    }
    if architecture == "gpt2":
        model["max_position_embeddings"] = rng.choice([12, 20])
    else:
        model["num_query_groups"] = rng.choice([n for n in range(1, heads + 1) if heads % n == 0])
    if architecture != "gpt2" and rng.random() < 0.3:
        model |= {"kv_channels": width, "hidden_size": 40}
    least = width * model.get("num_query_groups", heads)
    ranks = [rng.randint(4, max(4, min(least, 20) - 1)) for _ in range(layers)]
    model["rank"] = rng.choice([ranks[0], ranks, {"q": ranks, "k": 4, "v": ranks[0], "o": 5, "up": 7, "down": ranks}])
    if isinstance(model["rank"], dict) and architecture != "gpt2":
        model["rank"]["gate"] = ranks[-1]
    model |= {"init_method_std": 0.05, "scale_residual_init": rng.random() < 0.3}
    if rng.random() < 0.5:
        model["tie_word_embeddings"] = rng.random() < 0.5
    if model["variant"] != "full_rank" and rng.random() < 0.3:
        model["full_rank_layers"] = sorted({0, rng.randrange(1, layers)})
    if architecture == "qwen3_moe":
        experts = rng.choice([4, 6])
        model |= {"num_experts": experts, "moe_router_topk": rng.choice([2, experts]), "moe_aux_loss_coeff": 0.05}
        model |= {"full_rank_experts": rng.random() < 0.3, "moe_router_pre_softmax": rng.random() < 0.3}
    return model


def method_of(rng: Random, model: Section) -> dict[str, Section]:
    if model["variant"] == "relora":
        return {"relora": {"restart_interval": 2, "prune": rng.choice(["magnitude", "random", "reset"])}}
    return {"distillation": {"teacher": "of the test", "kd_beta": 0.5}} if rng.random() < 0.1 else {}


def optimizer_of(rng: Random, model: Section) -> Section:
    parts = ("embedding", "first_layer", "a", "b", "beta")
    factors = {part: rng.choice([0.0, 0.25, 3.0]) for part in parts if rng.random() < 0.2}
    found: Section = {"lr_multipliers": factors, "clip_grad": rng.choice([0.0, 0.5])}
    if model["variant"] == "full_rank" and rng.random() < 0.5:
        sides = rng.choice(["std", "reverse_std", "left", "right", "full"])
        found |= {"name": "galore", "galore_rank": 3, "update_proj_gap": 2, "galore_scale": 1.0, "proj_type": sides}
    return found


def data_of(rng: Random) -> Section:
    within = rng.random() < 0.3
    return {
        "reset_attention_mask": within,
        "reset_position_ids": within and rng.random() < 0.5,
        "eod_mask_loss": rng.random() < 0.2,
    }


def layout_of(rng: Random, model: Section, ranks: int) -> dict[str, Section]:
    tp = rng.choice([n for n in (1, 2, 3) if ranks % n == 0])
    pp = rng.choice([n for n in (1, 2, 4) if ranks // tp % n == 0])
    parallel: Section = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    if pp > 1:
        parallel["virtual_pipeline_model_parallel_size"] = rng.choice([1, 2])
    if tp > 1 and rng.random() < 0.3:
        parallel["sequence_parallel"] = False
    if model["architecture"] == "qwen3_moe":
        parallel["expert_model_parallel_size"] = rng.choice([1, 2, 4])
        parallel["moe_token_dispatcher_type"] = rng.choice(["allgather", "alltoall"])
    parallel["pad_widths_to"] = rng.choice([1, 8, 64])
    zero: Section = {"stage": rng.choice([0, 1, 2, 3])}
    if rng.random() < 0.3:
        zero["reduce_bucket_size"] = 600
    zero |= {key: False for key in ("contiguous_gradients", "reduce_scatter") if rng.random() < 0.2}
    if zero["stage"] == 3:
        zero["stage3_param_persistence_threshold"] = rng.choice([0, 100, 100_000])
    if zero["stage"] and rng.random() < 0.15:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {"parallel": parallel, "deepspeed_section": {"zero_optimization": zero}}


def recompute_of(rng: Random) -> Section:
    strategy = rng.choice(["none", "replay", "full"])
    if strategy == "none":
        return {"strategy": strategy}
    keeps = {"keep_attention_output": True} if strategy == "replay" and rng.random() < 0.5 else {}
    return {"strategy": strategy, "segment_length": rng.choice(["auto", 1, 2, 3]), **keeps}
