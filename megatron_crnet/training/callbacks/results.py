"""The end of a complete run: loss.png, a sampled continuation, and the last lines of the log."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_crnet.engine.engine import TrainEngine
from megatron_crnet.training.callbacks.base import Callback, as_warning
from megatron_crnet.training.metrics import plot_loss
from megatron_crnet.training.preflight import Preflight

if TYPE_CHECKING:
    from megatron_crnet.training.trainer import Trainer

TEMPERATURE = 0.7


class Results(Callback):
    """loss.png, the continuation of `logging.sample_prompt`, and the last lines of the log."""

    def on_end(self, trainer: Trainer) -> None:
        """See Callback."""
        if trainer.stopping:
            return
        section, line = trainer.config.logging, trainer.progress.line
        draw_loss(trainer.preflight)
        if section.sample_prompt is not None and section.sample_tokens:
            prompt, seed = section.sample_prompt, trainer.config.training.seed
            with as_warning(trainer.preflight, "the sampled continuation"):
                tokenizer = trainer.preflight.tokenizer
                text = continue_text(trainer.engine, tokenizer, prompt, section.sample_tokens, seed)
                line(f"--- a sampled continuation ---\n{prompt}{text}\n---")
        line(f"done: {section.output_dir} holds metrics.jsonl, config.yaml, loss.png and tensorboard/")
        line(f"checkpoint: {trainer.newest_checkpoint}")


def draw_loss(preflight: Preflight) -> None:
    """Draw loss.png from metrics.jsonl."""
    folder = Path(preflight.config.logging.output_dir)
    if preflight.context.is_main and (folder / "metrics.jsonl").exists():
        title = f"{preflight.config.model.variant}, {folder.name}"
        with as_warning(preflight, "loss.png"):
            plot_loss(folder / "metrics.jsonl", folder / "loss.png", title=title, unigram_entropy=preflight.entropy)


def continue_text(engine: TrainEngine, tokenizer: Any, prompt: str, count: int, seed: int) -> str:
    """Sample up to `count` tokens after `prompt`, the same on every rank; a collective call.

    An empty prompt begins a document, and a token that ends one ends the text. Without a cache the whole sequence is
    computed again for each token, which works in any parallel layout.
    """
    length, device = engine.config.training.seq_length, engine.context.device
    generator = torch.Generator(device=device).manual_seed(seed)
    prompt_tokens = [int(token) for token in tokenizer.tokenize(prompt)] or [tokenizer.eod]
    tokens = list(prompt_tokens)
    for _ in range(count):
        tokens.append(_sample(engine.next_token_logits(tokens[-length:]), generator, device))
        if tokens[-1] == tokenizer.eod:
            break
    return tokenizer.detokenize(tokens[len(prompt_tokens) :])


def _sample(logits: Tensor | None, generator: torch.Generator, device: torch.device) -> int:
    """Sample where the logits are, then tell the other pipeline stages."""
    choice = torch.zeros(1, dtype=torch.int64, device=device)
    if logits is not None:
        probabilities = torch.softmax(logits.float() / TEMPERATURE, dim=-1)
        choice[0] = torch.multinomial(probabilities, 1, generator=generator)
    # pipeline stages are the outermost dimension of Megatron-Core's rank order: the last rank is on the last stage
    dist.broadcast(choice, src=dist.get_world_size() - 1)
    return int(choice)
