"""Turns a dense model into `low_rank`, `crnet` or `relora`, layer by layer.

`low_rank` without calibration text: the truncated SVD of each weight (PELA, CVPR 2024). With text: each map is fitted
to its outputs (`fit.py`). `crnet`: the same with the outputs of the previous layer.

What the fit of layer l sees. The rows run through the layers that are converted already: X_l comes from the dense layer
l on their residual stream, Y_l is what that dense layer gives, and Y_{l-1} is what the converted layer l-1 gives. Then
the rows advance through the converted layer l. So each layer is fitted to the inputs that it will meet, and since
s Y_{l-1} + X_l A B is fitted as a whole, an error of Y_{l-1} that X_l can undo is undone: errors do not add up along
the chain. What earlier layers have lost of the residual stream is not made up for: the target is the dense layer on
the same input, not the dense model's own stream.

`relora`: the dense weights themselves, frozen, and beside them factors as a new model has them, of product zero. The
dense model is the warm start (arXiv 2307.05695).

Experts are not chained. With text each is fitted to its outputs on the tokens that the router of the dense layer gives
it, all alike; one that is given fewer tokens than a map has inputs would be fitted to these few, and so keeps the
truncated SVD of that map's weight. Routers are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_crnet.analysis.difference import SMALLEST
from megatron_crnet.analysis.fit import DAMPING, damped, fit_map, truncated_svd
from megatron_crnet.analysis.maps import LayerMap, maps_by_input
from megatron_crnet.analysis.source import LAYER, SourceModel, layer_of
from megatron_crnet.analysis.stream import Activations, Map, Sums
from megatron_crnet.config.loading import resolved
from megatron_crnet.config.megatron import build_transformer_config
from megatron_crnet.config.model_fields import computing_fields
from megatron_crnet.config.positions import NEEDS_TEXT, PositionTable, position_table
from megatron_crnet.config.schema import Config, ModelConfig
from megatron_crnet.model.reference import EMBEDDING
from megatron_crnet.model.weights import initial_value
from megatron_crnet.utils.errors import DataError, require

Weights = dict[str, Tensor]


class FittedMap(NamedTuple):
    """A line of the report: a map, or the same map of as many experts as were `fitted`.

    `scale` is None where there is no previous output. Errors are relative, over the tokens of all these maps.
    """

    layer: int
    position: str
    rank: int
    scale: float | None
    error: float
    plain_error: float
    fitted: int = 1


Fits = dict[str, list[tuple[FittedMap, float]]]
"""By position: the fitted maps of a layer, each with its ||Y||^2."""


@dataclass
class Conversion:
    """A dense model, and what becomes of it.

    Attributes:
        target: its model section is that of the model to come.
        rows: tokens of the calibration text, [rows, s]; None where there is none.
        batch_size: rows at once.
        fits: filled by `weights`.
        unfitted: maps of experts that were given too few tokens; counted by `weights`.
    """

    dense: SourceModel
    target: Config
    rows: Tensor | None
    devices: Sequence[torch.device]
    batch_size: int = 4
    damping: float = DAMPING
    progress: Callable[[int], None] = lambda done: None
    fits: list[FittedMap] = field(default_factory=list)
    unfitted: int = 0

    def __post_init__(self) -> None:
        check_target(self.dense.config, self.target, has_text=self.rows is not None)

    @property
    def table(self) -> PositionTable:
        """The linear maps of the model to come."""
        return position_table(self.target.model)

    def weights(self) -> Iterator[Weights]:
        """All canonical weights of the model to come, a layer at a time.

        Raises:
            DataError: a weight of the dense model, or what a map is given, is not finite, or zero all over.
        """
        layers, rows = self.target.model.num_layers, self.rows
        stream = None if rows is None else Activations(self.dense.embed(rows), self.batch_size, self.devices)
        yield {EMBEDDING: self.dense.read(EMBEDDING)[""]}
        for index in range(layers):
            weights = self._convert(index, stream)
            if stream is not None and index + 1 < layers:
                stream.advance(layer_of(self.target, index, weights))
            yield {f"{LAYER.format(index)}{name}": value.cpu() for name, value in weights.items()}
            self.progress(index + 1)
        kept = [n for n in self.dense.weights.shapes if n != EMBEDDING and not n.startswith(LAYER.partition("{")[0])]
        for name in kept:
            yield {name: self.dense.read(name)[""]}

    def _convert(self, index: int, stream: Activations | None) -> Weights:
        """The weights of one layer, by their names within it."""
        layer = self.dense.layer(index)
        weights = dict(layer.state_dict())
        if self.table.is_full_rank(index):
            return weights
        factored, maps = self.table.factored(index), maps_by_input(self.table.architecture, self.table.num_experts)
        groups = [group for group in maps if group[0].position in factored]
        if self.table.method.has_frozen:
            return weights | self._drawn_factors(index, [one for group in groups for one in group])
        collect = partial(_collect, groups, self.table.has_previous(index))
        sums = Sums() if stream is None else stream.measure(layer, collect)
        fits: Fits = {}
        for group in groups:
            covariance = self._covariance(index, group, sums)
            for one in group:
                weight = weights.pop(f"{one.module}.weight")
                factors = self._factorize(index, one, weight, covariance, sums, fits)
                weights |= {f"{one.module}.{name}": value for name, value in factors.items()}
        self.fits += [_together(found) for found in fits.values()]
        return weights

    def _drawn_factors(self, index: int, maps: Sequence[LayerMap]) -> Weights:
        config, seed, found = build_transformer_config(self.target), self.target.training.seed, {}
        for one in maps:
            (h_in, h_out), rank = self.table.shapes[one.position], self.table.ranks[index][one.position]
            for factor, shape in (("a", (rank, h_in)), ("b", (h_out, rank))):
                name = f"{one.module}.{factor}.weight"
                found[name] = initial_value(f"{LAYER.format(index)}{name}", shape, config, seed)
        return found

    def _covariance(self, index: int, group: tuple[LayerMap, ...], sums: Sums) -> Tensor | None:
        """C of what the maps are given; None without text, and of an expert that is given too few tokens."""
        first = group[0]
        products = sums.pop(("xx", first.name), None)
        if products is None:
            return None
        is_idle = products.trace() == 0 or int(sums["tokens", first.name]) < len(products)
        if first.is_experts and is_idle:
            self.unfitted += len(group)
            return None
        if not (products.isfinite().all() and products.trace() > 0):
            raise DataError(
                f"{self.dense.path}: on the calibration text the inputs of {first.name} in layer {index} are not "
                "finite, or all zero: check the model's weights"
            )
        return damped(products, self.damping)

    def _factorize(
        self, index: int, one: LayerMap, weight: Tensor, covariance: Tensor | None, sums: Sums, fits: Fits
    ) -> Weights:
        rank = self.table.ranks[index][one.position]
        if covariance is None:
            a, b = truncated_svd(weight.to(self.devices[0]), rank)
            return {"a.weight": a, "b.weight": b}
        cross = sums.pop(("xp", one.name), None)
        previous_norm = 0.0 if cross is None else float(sums["pp", one.name])
        least = self.target.model.cross_layer_epsilon
        fit = fit_map(weight.to(covariance.device), covariance, rank, cross, previous_norm, least)
        scale = None if cross is None else fit.scale
        fitted = FittedMap(index, one.position, rank, scale, fit.error, fit.plain_error)
        fits.setdefault(one.position, []).append((fitted, fit.norm))
        factors = {"a.weight": fit.a, "b.weight": fit.b}
        return factors if cross is None else {**factors, "beta": beta_of(fit.scale, self.target.model)}


def _together(fits: Sequence[tuple[FittedMap, float]]) -> FittedMap:
    """One line for the maps of a position, given each and its ||Y||^2."""
    first, whole = fits[0][0], max(sum(norm for _, norm in fits), SMALLEST)
    error, plain_error = (
        (sum(norm * getattr(fitted, name) ** 2 for fitted, norm in fits) / whole) ** 0.5
        for name in ("error", "plain_error")
    )
    return first._replace(error=error, plain_error=plain_error, fitted=len(fits))


def beta_of(scale: float, model: ModelConfig) -> Tensor:
    """The beta whose s(beta) is `scale`, which is not below eps."""
    return torch.tensor(math.copysign(max(abs(scale) - model.cross_layer_epsilon, 0.0), scale))


def _collect(groups: Sequence[tuple[LayerMap, ...]], has_previous: bool, sums: Sums, maps: dict[str, Map]) -> None:
    for group in groups:
        x = maps[group[0].name].x
        sums.add_product(("xx", group[0].name), x, x)
        sums.add(("tokens", group[0].name), torch.tensor(len(x), device=x.device))
        for one in group if has_previous and not group[0].is_experts else ():
            previous = maps[one.name].previous
            assert previous is not None
            sums.add_product(("xp", one.name), x, previous)
            sums.add(("pp", one.name), previous.double().square().sum())


def compressed_ranks(table: PositionTable, factor: float) -> dict[str, int]:
    """PELA's rule: the ranks by which each map has 1 / `factor` of its parameters.

    Raises:
        ConfigError: `factor` leaves a map without a rank.
    """
    ranks = {p: int(h_in * h_out / (factor * (h_in + h_out))) for p, (h_in, h_out) in table.shapes.items()}
    for position, rank in ranks.items():
        require(
            rank > 0,
            f"--compression is {factor:g}, which leaves no rank to {position}, of {table.shapes[position]}: lower it",
        )
        require(
            rank <= min(table.shapes[position]),
            f"--compression is {factor:g}, which gives {position}, of {table.shapes[position]}, rank {rank}, above its "
            "smaller side: raise it",
        )
    return ranks


def check_target(dense: Config, target: Config, has_text: bool) -> None:
    """Refuse what a dense model cannot be turned into.

    Raises:
        ConfigError: the variants, a shape that is not the dense model's, no layer of low rank, a warm start, or
            calibration text where it is missing or of no use.
    """
    before, variant = resolved(dense)["model"], target.model.variant
    require(
        before["variant"] == "full_rank",
        f"the model to convert is {before['variant']}, but only full_rank ones are converted, Transformers' own "
        "among them: give one",
    )
    require(
        variant in NEEDS_TEXT,
        f"model.variant is {variant}, but a dense model becomes one of {', '.join(NEEDS_TEXT)}: choose one of them",
    )
    asked = resolved(target)["model"]
    for name, value in computing_fields(before).items():
        require(
            name == "variant" or asked[name] == value,
            f"model.{name} is {asked[name]}, but {value} in the dense model, whose weights are kept: leave it out",
        )
    table, layers = position_table(target.model), target.model.num_layers
    require(
        table.has_low_rank,
        f"model.full_rank_layers names all {layers} layers, so that nothing would be converted: leave some of low rank",
    )
    require(
        not (has_text and table.method.has_frozen),
        f"calibration text is given, but {variant} keeps the dense weights and fits nothing: leave it out",
    )
    require(
        target.relora.warm_start_steps == 0,
        f"relora.warm_start_steps is {target.relora.warm_start_steps}, but the dense model is the warm start: leave it "
        "out",
    )
    require(
        has_text or not NEEDS_TEXT[variant],
        f"variant {variant} is fitted to outputs on calibration text, and none is given: add --text or --prefix",
    )
