"""Continues a prompt with the model in training, in whatever parallel layout it is spread."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_crnet.engine.engine import TrainEngine


def continue_tokens(
    engine: TrainEngine, prompt: list[int], count: int, *, temperature: float, seed: int, stop: int | None = None
) -> list[int]:
    """`count` sampled tokens after `prompt`, the same on every rank; a collective call.

    The whole sequence is computed again for each token: enough for a look at a run, with no cache to keep.

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        stop: token that ends the continuation.
    """
    length = engine.config.training.seq_length
    generator = torch.Generator(device=engine.context.device).manual_seed(seed)
    tokens = list(prompt)
    for _ in range(count):
        logits = engine.next_token_logits(tokens[-length:])
        token = _choose(logits, temperature, generator, engine.context.device)
        tokens.append(token)
        if token == stop:
            break
    return tokens[len(prompt) :]


def _choose(logits: Tensor | None, temperature: float, generator: torch.Generator, device: torch.device) -> int:
    """Sample where the logits are, then tell the other pipeline stages."""
    choice = torch.zeros(1, dtype=torch.int64, device=device)
    if logits is not None and temperature == 0:
        choice[0] = logits.argmax()
    elif logits is not None:
        probabilities = torch.softmax(logits.float() / temperature, dim=-1)
        choice[0] = torch.multinomial(probabilities, 1, generator=generator)
    # pipeline stages are the outermost dimension of Megatron-Core's rank order: the last rank is on the last stage
    dist.broadcast(choice, src=dist.get_world_size() - 1)
    return int(choice)


def continue_text(engine: TrainEngine, tokenizer: Any, prompt: str, count: int, *, seed: int) -> str:
    """`continue_tokens` for text, at temperature 0.7. An empty prompt begins a document."""
    tokens = [int(token) for token in tokenizer.tokenize(prompt)] or [tokenizer.eod]
    return tokenizer.detokenize(continue_tokens(engine, tokens, count, temperature=0.7, seed=seed, stop=tokenizer.eod))
