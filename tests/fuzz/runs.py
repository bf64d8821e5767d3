"""Whole runs of small models drawn from a seed: `draw(seed, ranks)`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from random import Random

from megatron_crnet import Config, load_config
from megatron_crnet.config.batch import plan_batches
from megatron_crnet.utils.errors import ConfigError
from tests.fuzz.layouts import Section, data_of, layout_of, model_of, optimizer_of, recompute_of

Sections = dict[str, Section]


@dataclass(frozen=True)
class Run:
    """Sections of a configuration, without what names files.

    Attributes:
        other: sections of another layout for the same model and batch.
        stops: steps after which it is stopped, by the rank `stopper`.
        moved_at: step after which the other layout goes on, or the last one before it that is saved.
    """

    sections: Sections
    other: Sections
    stops: list[int]
    stopper: int
    moved_at: int

    def config(self, output: Path, **changes: Section) -> Config:
        """The configuration; of `changes` the given values instead."""
        names = {*self.sections, *changes}
        values = {name: {**self.sections.get(name, {}), **changes.get(name, {})} for name in names}
        return load_config({**values, "logging": {**values["logging"], "output_dir": output}})

    def elsewhere(self) -> Run:
        """The same run in the other layout, without recomputation."""
        return dataclasses.replace(self, sections={**self.sections, **self.other, "recompute": {}})

    def dense(self) -> Run:
        """A step of the full-rank model of the same shape."""
        of_variant = ("rank", "full_rank_layers", "full_rank_experts")
        model = {name: value for name, value in self.sections["model"].items() if name not in of_variant}
        kept = {name: self.sections[name] for name in ("data", "parallel", "deepspeed", "checkpoint", "logging")}
        training = {**self.sections["training"], "train_steps": 1, "eval_steps": 0, "rampup_batch_size": None}
        optimizer = {"lr_warmup_steps": 0, "lr_decay_style": "constant"}
        model["variant"] = "full_rank"
        return dataclasses.replace(
            self, sections={**kept, "model": model, "training": training, "optimizer": optimizer}
        )


def draw(seed: str, ranks: int) -> Run:
    """A run that `ranks` ranks can do: the first of the seed's that no rule refuses."""
    rng = Random(seed)
    while True:
        model, steps = model_of(rng) | {"vocab_size": rng.choice([512, 517])}, rng.randint(3, 8)
        if rng.random() < 0.3:
            model |= {"hidden_dropout": 0.1, "attention_dropout": 0.1}
        layout, other = (_layout(rng, model, ranks) for _ in range(2))
        sections = {
            "model": model,
            "training": _training(rng, steps, ranks),
            "optimizer": _optimizer(rng, model),
            "data": {"sample_format": "padded"} if rng.random() < 0.2 else data_of(rng),
            "recompute": recompute_of(rng),
            "checkpoint": {"save_interval": rng.choice([1, 1, 2, 3])},
            "logging": {"log_interval": rng.choice([1, 1, 2, 3])},
            "faults": _faults(rng),
            **_method(rng, model, steps),
            **layout,
        }
        stops = sorted(rng.sample(range(1, steps), 2))
        run = Run(sections, other, stops, rng.randrange(ranks), rng.randint(1, steps - 1))
        try:
            for way in (run, run.elsewhere()):
                plan_batches(way.config(Path("unused")), ranks)
        except ConfigError:
            continue
        return run


def _layout(rng: Random, model: Section, ranks: int) -> Sections:
    """Under the names of a configuration file."""
    found = layout_of(rng, model, ranks)
    return {"deepspeed": found.pop("deepspeed_section"), **found}


def _training(rng: Random, steps: int, ranks: int) -> Section:
    micro = rng.choice([1, 2])
    whole = micro * ranks * rng.choice([1, 2, 3])
    found: Section = {"train_steps": steps, "micro_batch_size": micro, "global_batch_size": whole, "seq_length": 12}
    found |= {"dtype": rng.choice(["fp32", "fp32", "bf16"]), "seed": rng.randrange(2**32)}
    found |= {"eval_interval": rng.choice([0, 1, 2, 3]), "eval_steps": rng.choice([0, 1, 2])}
    if rng.random() < 0.25:
        found["rampup_batch_size"] = [micro * ranks, micro * ranks, rng.randint(1, 4) * whole]
    return found


def _optimizer(rng: Random, model: Section) -> Section:
    found = optimizer_of(rng, model)
    found |= {"lr": rng.choice([1e-3, 5e-3]), "lr_warmup_steps": rng.randint(0, 2)}
    found["weight_decay"] = rng.choice([0.0, 0.1])
    found["lr_decay_style"] = style = rng.choice(["cosine", "wsd", "constant", "cosine_restarts"])
    if style == "wsd":
        found["lr_wsd_decay_steps"] = rng.choice([None, 1, 2])
    if style == "cosine_restarts":
        found |= {"lr_restart_warmup_steps": 1, "lr_restart_interval": rng.randint(2, 4)}
    if "name" in found:  # GaLore
        found["rotate_moments"] = rng.random() < 0.3
    elif rng.random() < 0.3:
        found["name"] = "adamw8bit"
    return found


def _faults(rng: Random) -> Section:
    """Often none; else losses above the last two are spikes, so that steps are skipped."""
    if rng.random() < 0.7:
        return {}
    return {"on_bad_step": "skip", "spike_deviations": rng.choice([0.1, 1.0]), "spike_window": 2}


def _method(rng: Random, model: Section, steps: int) -> Sections:
    if model["variant"] == "relora":
        interval, prune = rng.choice([None, 1, 2, 3]), rng.choice(["magnitude", "random", "reset"])
        restarts = {"restart_interval": interval, "prune": prune} if interval else {}
        return {"relora": {**restarts, "warm_start_steps": rng.choice([0, 0, 1, 2, 3])}}
    if model["variant"] != "full_rank" and rng.random() < 0.35:
        return {"rank_schedule": _rank_schedule(rng, model["num_layers"], steps)}
    taught = {"teacher": "of the test", "kd_alpha": rng.choice([0.0, 1.0]), "kd_beta": 0.5}
    return {"distillation": taught} if rng.random() < 0.2 else {}


def _rank_schedule(rng: Random, layers: int, steps: int) -> Section:
    count = rng.choice([1, 2])
    found: Section = {"ranks": [_ranks(rng, layers) for _ in range(count)]}
    if rng.random() < 0.5:
        return found | {"steps": sorted(rng.sample(range(1, steps), count))}
    return found | {"energy": rng.choice([0.5, 0.8, 0.95]), "check_interval": rng.choice([1, 2])}


def _ranks(rng: Random, layers: int) -> int | list[int]:
    drawn = [rng.randint(3, 11) for _ in range(layers)]
    return rng.choice([drawn[0], drawn])
