"""Checkpoints as models of Hugging Face's kinds: ReLoRA's factors are merged into its frozen weights, W + s A B."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from megatron_crnet.checkpoint.weight_files import CheckpointWeights, WeightSource, canonical_shapes
from megatron_crnet.config.phases import dense_model, phase_at
from megatron_crnet.config.positions import METHODS
from megatron_crnet.config.rank_section import RankScheduleConfig
from megatron_crnet.config.schema import Config, OptimizerConfig, ReloraConfig
from megatron_crnet.utils.files import read_json_object


class MergedWeights(WeightSource):
    """The full-rank weights of a model with frozen ones.

    Args:
        source: its weights.
        scale: s.
    """

    def __init__(self, source: WeightSource, scale: float) -> None:
        self.where, self.checkpoint, self._source, self._scale = source.where, source.checkpoint, source, scale
        names = [name for name in source.shapes if not name.endswith((".a.weight", ".b.weight"))]
        self.shapes = {name: source.shapes[name] for name in names}
        self.dtypes = {name: source.dtypes[name] for name in names}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """See WeightSource."""
        found = {}
        for name in names:
            a, b = (f"{name.removesuffix('weight')}{factor}.weight" for factor in ("a", "b"))
            values = self._source.read([n for n in (name, a, b) if n in self._source.shapes])
            found[name] = values[name] + self._scale * values[b] @ values[a] if a in values else values[name]
        return found


def weights_of(checkpoint: Path, config: Config) -> tuple[Config, WeightSource]:
    """The weights of a checkpoint, and the configuration of the model that they make.

    Args:
        config: which the checkpoint was written with.

    Raises:
        DataError: the weights are not those of the model.
    """
    state, source = read_json_object(checkpoint / "state.json"), CheckpointWeights(checkpoint)
    model = phase_at(config, state.get("step", 0), state.get("rank_changes", ())).config.model
    source.check(canonical_shapes(model))
    if not METHODS[config.model.variant].has_frozen:
        return replace(config, model=model, rank_schedule=RankScheduleConfig()), source
    merged = replace(
        config, model=dense_model(model), relora=ReloraConfig(), optimizer=OptimizerConfig(lr_warmup_steps=0)
    )
    return merged, MergedWeights(source, model.relora_scale) if METHODS[model.variant].has_frozen else source
