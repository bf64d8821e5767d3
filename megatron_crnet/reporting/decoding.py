"""Tokens per second of decoding, with and without the key-value cache, for CR-Net and LLaMAs of the same shape."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from megatron_crnet.config.schema import Config, Variant
from megatron_crnet.hf.export import DTYPES, Dtype
from megatron_crnet.hf.export_config import hugging_face_fields
from megatron_crnet.hf.generate import default_device
from megatron_crnet.hf.modeling_crnet import CRNetConfig, CRNetForCausalLM
from megatron_crnet.utils.errors import require_positive


@dataclass(frozen=True)
class Row:
    """One variant with or without the cache.

    Attributes:
        seconds: of each repeat, by the clock.
        cpu_seconds: of each repeat, over all threads of this process.
        tokens_per_s: median over the repeats, all sequences of the batch together.
        tokens_per_cpu_s: the same by CPU time.
        spread: (slowest - fastest repeat) / median, by the clock.
        cpu_spread: the same by CPU time.
    """

    variant: str
    cache: bool
    parameters: int
    seconds: list[float]
    cpu_seconds: list[float]
    tokens_per_s: float
    tokens_per_cpu_s: float
    spread: float
    cpu_spread: float


def measure_decoding(
    config: Config,
    variants: Sequence[Variant],
    *,
    batch_size: int,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    dtype: Dtype,
) -> list[Row]:
    """A row for each variant with and without the cache, in turn in each repeat, after one to warm up."""
    require_positive(
        "benchmark", batch_size=batch_size, prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats
    )
    models = {variant: random_model(config, variant, dtype) for variant in variants}
    prompt = torch.randint(config.model.vocab_size, (batch_size, prompt_tokens), device=default_device())
    rows = [(variant, cache) for variant in variants for cache in (True, False)]
    times: dict[tuple[str, bool], list[tuple[float, float]]] = {row: [] for row in rows}
    for repeat in range(repeats + 1):
        for row in rows:
            elapsed = decode(models[row[0]], prompt, new_tokens, row[1])
            if repeat:  # the first one warms up
                times[row].append(elapsed)
    return [finished(row, models[row[0]], times[row], batch_size * new_tokens) for row in rows]


def random_model(config: Config, variant: Variant, dtype: Dtype) -> CRNetForCausalLM:
    """A model of this shape with the trainer's initial distributions."""
    # ranks stay, chains are the variant's own
    shape = replace(config, model=replace(config.model, variant=variant, full_rank_layers=None))
    torch.manual_seed(0)
    model = CRNetForCausalLM(CRNetConfig(**hugging_face_fields(shape)))
    return model.to(default_device(), DTYPES[dtype]).eval()


def decode(model: CRNetForCausalLM, prompt: torch.Tensor, new_tokens: int, cache: bool) -> tuple[float, float]:
    """Seconds of one batch, by the clock and of the CPU."""
    started, cpu_started = time.perf_counter(), time.process_time()
    found = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        use_cache=cache,
        pad_token_id=0,
    )
    if prompt.is_cuda:
        torch.cuda.synchronize()
    assert found.shape[1] == prompt.shape[1] + new_tokens
    return time.perf_counter() - started, time.process_time() - cpu_started


def finished(row: tuple[str, bool], model: CRNetForCausalLM, times: list[tuple[float, float]], tokens: int) -> Row:
    """The figures of one row."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    clock, cpu = ([pair[i] for pair in times] for i in (0, 1))
    medians = statistics.median(clock), statistics.median(cpu)
    spreads = [(max(values) - min(values)) / middle for values, middle in zip((clock, cpu), medians, strict=True)]
    return Row(*row, parameters, clock, cpu, tokens / medians[0], tokens / medians[1], *spreads)


def of_full_rank(row: Row, rows: list[Row]) -> str:
    """How many times as fast as full rank, by CPU time where that is what computes."""
    kind = "seconds" if torch.cuda.is_available() else "cpu_seconds"
    for other in rows:
        if (other.variant, other.cache) == ("full_rank", row.cache):
            pairs = zip(getattr(other, kind), getattr(row, kind), strict=True)
            return f"{statistics.median(theirs / ours for theirs, ours in pairs):.2f}"
    return "-"
