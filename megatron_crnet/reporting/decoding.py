"""Tokens per second of decoding, with and without the key-value cache, for CR-Net and LLaMAs of the same shape."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from megatron_crnet.config.schema import Config, Variant
from megatron_crnet.config.variants import as_variant
from megatron_crnet.hf.export import Dtype, torch_dtype
from megatron_crnet.hf.export_config import hugging_face_fields
from megatron_crnet.hf.generate import default_device
from megatron_crnet.hf.modeling_crnet import CRNetConfig, CRNetForCausalLM
from megatron_crnet.utils.errors import require, require_positive


def measure_decoding(
    config: Config,
    variants: Sequence[Variant],
    *,
    batch_size: int,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    dtype: Dtype,
) -> list[dict[str, Any]]:
    """A row for each variant with and without the cache, in turn in each repeat, after one to warm up.

    Returns:
        Of each row: `seconds` and `cpu_seconds` (over all threads) of each repeat; tokens per second of the clock and
        of the CPU, medians over the repeats, all sequences together; and their spread, (slowest - fastest) / median.
    """
    require_positive(
        "benchmark", batch_size=batch_size, prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats
    )
    longest = config.model.max_position_embeddings or config.training.seq_length
    require(
        prompt_tokens + new_tokens <= longest,
        f"--prompt-tokens {prompt_tokens} and --new-tokens {new_tokens} exceed the {longest} positions of the model: "
        "lower one, or raise model.max_position_embeddings",
    )
    models = {variant: random_model(config, variant, dtype) for variant in variants}
    prompt = torch.randint(config.model.vocab_size, (batch_size, prompt_tokens), device=default_device())
    rows: list[dict[str, Any]] = [
        {"variant": variant, "cache": cache, "parameters": models[variant].num_parameters()}
        for variant in variants
        for cache in (True, False)
    ]
    times = [
        [decode(models[row["variant"]], prompt, new_tokens, row["cache"]) for row in rows] for _ in range(repeats + 1)
    ]
    tokens = batch_size * new_tokens
    for row, found in zip(rows, zip(*times[1:], strict=True), strict=True):
        clock, cpu = ([*seconds] for seconds in zip(*found, strict=True))
        row |= {"seconds": clock, "tokens_per_s": tokens / statistics.median(clock), "spread": _spread(clock)}
        row |= {"cpu_seconds": cpu, "tokens_per_cpu_s": tokens / statistics.median(cpu), "cpu_spread": _spread(cpu)}
    return rows


def _spread(seconds: list[float]) -> float:
    return (max(seconds) - min(seconds)) / statistics.median(seconds)


def random_model(config: Config, variant: Variant, dtype: Dtype) -> CRNetForCausalLM:
    """A model of this shape with the trainer's initial distributions."""
    shape = as_variant(config, variant)  # ranks stay, chains are the variant's own
    torch.manual_seed(0)
    model = CRNetForCausalLM(CRNetConfig(**hugging_face_fields(shape)))
    return model.to(default_device(), torch_dtype(dtype)).eval()


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


def of_full_rank(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """How many times as fast as full rank, by CPU time where that is what computes."""
    kind = "seconds" if torch.cuda.is_available() else "cpu_seconds"
    for other in rows:
        if (other["variant"], other["cache"]) == ("full_rank", row["cache"]):
            pairs = zip(other[kind], row[kind], strict=True)
            return f"{statistics.median(theirs / ours for theirs, ours in pairs):.2f}"
    return "-"
