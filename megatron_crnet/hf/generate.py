"""Opens a checkpoint or an export in one process and continues prompts with transformers' `generate`.

No code of an export runs: the model is this package's modeling_crnet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from megatron_crnet.checkpoint.contents import find_checkpoint
from megatron_crnet.checkpoint.weight_files import WeightSource, canonical_shapes
from megatron_crnet.config.schema import Config
from megatron_crnet.data.tokenizer import Tokenizer
from megatron_crnet.hf.export import (
    Dtype,
    cast,
    named_tokenizer,
    open_export,
    saved_config,
    torch_dtype,
    with_tokenizer,
)
from megatron_crnet.hf.export_config import hugging_face_fields
from megatron_crnet.hf.export_tokenizer import note_on_added_tokens, tokenizer_of
from megatron_crnet.hf.merged import weights_of
from megatron_crnet.hf.modeling_crnet import CRNetConfig, CRNetForCausalLM
from megatron_crnet.utils.errors import DataError, require
from megatron_crnet.utils.progress import CountPrinter

TEMPERATURES = 1e-4, 1e4
"""Range of temperatures by which logits stay within fp32."""


@dataclass(frozen=True)
class OpenModel:
    """An opened model.

    Attributes:
        config: its model section, and for a checkpoint all others.
        notes: lines on newer checkpoints that were skipped.
    """

    model: CRNetForCausalLM
    tokenizer: Tokenizer
    config: Config
    notes: list[str]

    @property
    def longest(self) -> int:
        """Most tokens of a sequence."""
        return int(self.model.config.max_position_embeddings)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token (greedy).
        top_k: only the k likeliest tokens; 0 for all.
        top_p: only the likeliest tokens that have this probability together.
        seed: of the random numbers.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = TEMPERATURES
        require(
            self.temperature == 0 or low <= self.temperature <= high,
            f"--temperature is {self.temperature}, but must be 0 or from {low} to {high:.0f}: use 0 for the likeliest "
            "token",
        )
        require(self.top_k >= 0, f"--top-k is {self.top_k}, but must not be negative: use 0 for all tokens")
        require(0 < self.top_p <= 1, f"--top-p is {self.top_p}, but must lie in (0, 1]: use 1 for all tokens")
        require(-(2**63) <= self.seed < 2**64, f"--seed is {self.seed}, but must fit 64 bits: use a smaller one")


def default_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def open_files(path: Path, tokenizer: str | None = None) -> tuple[Config, WeightSource, list[str]]:
    """The configuration and the checked weights of what `open_model` opens, and its notes.

    Raises:
        DataError: there is no model, or it lacks weights.
        ConfigError: its sizes contradict each other.
    """
    notes: list[str] = []
    if (path / "config.json").is_file():
        config, source = open_export(path)
        config = with_tokenizer(config, tokenizer or tokenizer_of(path)[1])
        if tokenizer is None and (note := note_on_added_tokens(path)):
            notes.append(note)
    else:
        checkpoint, notes = find_checkpoint(path)
        config, source = weights_of(checkpoint, saved_config(checkpoint))
        config = with_tokenizer(config, tokenizer) if tokenizer else config
    source.check(canonical_shapes(config.model))
    return config, source, notes


def open_model(
    path: Path, *, dtype: Dtype = "fp32", device: torch.device | None = None, tokenizer: str | None = None
) -> OpenModel:
    """Open an export, a model of Transformers' own classes, a checkpoint, a folder of checkpoints or a run's folder.

    Args:
        tokenizer: path of the tokenizer; None takes the model's own.

    Raises:
        DataError: there is no model, or its weights are not whole.
        ConfigError: its sizes contradict each other.
    """
    config, source, notes = open_files(path, tokenizer)
    own = named_tokenizer(config)
    with torch.device("meta"):
        model = CRNetForCausalLM(CRNetConfig(**hugging_face_fields(config), dtype=torch_dtype(dtype)))
    for weights in source.portions(partial(cast, dtype)):
        model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    model.eval().requires_grad_(False).to(device or default_device())
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = own.eod, own.pad
    return OpenModel(model, own, config, notes)


class _Progress(StoppingCriteria):
    """Never stops: prints the number of new tokens, which transformers' streamers do not see of a batch."""

    def __init__(self, width: int, new: int) -> None:
        self._width, self._show = width, CountPrinter("new tokens", new)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self._show(input_ids.shape[1] - self._width)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@dataclass(frozen=True)
class Continuation:
    """A prompt and what follows it: the text, and its token ids without the end of the document."""

    prompt: str
    text: str
    tokens: list[int]


def generate(
    model: OpenModel,
    prompts: Sequence[str],
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    *,
    use_cache: bool = True,
) -> list[Continuation]:
    """Continue prompts up to the end of the document, as one batch, padded on the left.

    Args:
        model: from `load_pretrained`.
        prompts: texts; an empty one begins a document.
        max_new_tokens: most tokens after each prompt.
        sampling: how tokens are chosen; None takes the likeliest ones.
        use_cache: keep keys and values; else all tokens are computed again for each new one.

    Raises:
        ConfigError: a prompt and its continuation exceed the model's max_position_embeddings.
        DataError: a prompt is not text.
    """
    sampling, tokenizer = sampling or Sampling(), model.tokenizer
    require(not isinstance(prompts, str), "prompts is one text, but must be a list of them: write [text]")
    require(len(prompts) > 0, "prompts is empty: give at least one")
    for number, prompt in enumerate(prompts, start=1):
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise DataError(f"prompt {number} is not valid UTF-8: give text")
    rows = [tokenizer.tokenize(prompt) or [tokenizer.eod] for prompt in prompts]
    width = max(map(len, rows))
    require(max_new_tokens > 0, f"--max-new-tokens is {max_new_tokens}, but must be positive: use 1 or more")
    require(
        width + max_new_tokens <= model.longest,
        f"a prompt of {width} tokens and {max_new_tokens} new ones exceed the model's max_position_embeddings "
        f"{model.longest}: shorten the prompt or lower --max-new-tokens",
    )
    ids = torch.tensor([[tokenizer.pad] * (width - len(row)) + row for row in rows], device=model.model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=ids.device)
    how: dict[str, Any] = {"do_sample": sampling.temperature > 0}
    if how["do_sample"]:
        how |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    torch.manual_seed(sampling.seed)
    found = model.model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        use_cache=use_cache,
        stopping_criteria=StoppingCriteriaList([_Progress(width, max_new_tokens)]),
        **how,
    )
    new = [list(takewhile(lambda token: token != tokenizer.eod, row)) for row in found[:, width:].tolist()]
    return [Continuation(prompt, tokenizer.detokenize(row), row) for prompt, row in zip(prompts, new, strict=True)]
