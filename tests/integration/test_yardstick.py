"""The trainer beside Transformers' LLaMA and PyTorch's AdamW: equal weights, samples and schedule, equal losses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_crnet.checkpoint.contents import find_checkpoint
from megatron_crnet.config.loading import read_config
from megatron_crnet.config.schema import Config
from megatron_crnet.hf.export import to_hf
from megatron_crnet.training.callbacks.base import Callback
from megatron_crnet.training.trainer import Trainer, run_training
from tests.integration.conftest import Corpus, lines_of

STEPS = 20
OPTIONS: dict[str, Any] = {
    "model__variant": "full_rank",
    "training__train_steps": STEPS,
    "training__eval_steps": 0,
    "optimizer__lr": 6e-3,
    "optimizer__lr_warmup_steps": 4,
    "optimizer__clip_grad": 0.5,
    "checkpoint__save_interval": STEPS,
}


class Samples(Callback):
    """Keeps the samples of the run in their order: each tokens and labels, [s]."""

    def __init__(self) -> None:
        self.taken: list[dict[str, Tensor]] = []

    def on_start(self, trainer: Trainer) -> None:
        dataset = trainer.preflight.datasets.train
        self.taken = [dataset[i] for i in range(STEPS * trainer.config.training.global_batch_size)]


def initial_llama(corpus: Corpus, folder: Path) -> tuple[Path, LlamaForCausalLM]:
    """A run whose weights are still the initial ones, and Transformers' LLaMA with these."""
    still = {**OPTIONS, "training__train_steps": 1, "optimizer__lr": 1e-30, "checkpoint__save_interval": 1}
    still |= {"optimizer__lr_warmup_steps": 0}
    config = read_config(corpus.options(folder / "still", **still))
    run_training(config)
    to_hf(find_checkpoint(folder / "still")[0], folder / "export")
    model = LlamaForCausalLM.from_pretrained(folder / "export", config=_llama_config(config))
    return folder / "still", model


def _llama_config(config: Config) -> LlamaConfig:
    model = config.model
    return LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        rms_norm_eps=model.layernorm_epsilon,
        rope_theta=model.rotary_base,
        tie_word_embeddings=False,
    )


def losses_of_llama(model: LlamaForCausalLM, samples: list[dict[str, Tensor]], config: Config) -> list[float]:
    """Mean loss of each step of plain training."""
    about, batch = config.optimizer, config.training.global_batch_size
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, lr=about.lr, betas=(about.adam_beta1, about.adam_beta2), eps=about.adam_eps, weight_decay=0.1
    )

    def rate(step: int) -> float:
        step += 1
        if step <= about.lr_warmup_steps:
            return step / about.lr_warmup_steps
        part = (step - about.lr_warmup_steps) / (STEPS - about.lr_warmup_steps)
        return about.min_lr_ratio + (1 - about.min_lr_ratio) * (1 + math.cos(math.pi * part)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses = []
    for start in range(0, len(samples), batch):
        tokens, labels = (torch.stack([s[key] for s in samples[start : start + batch]]) for key in ("tokens", "labels"))
        logits = model(input_ids=tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), about.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses


def test_twenty_steps_of_full_rank_are_those_of_transformers_llama(corpus: Corpus, tmp_path: Path) -> None:
    still, llama = initial_llama(corpus, tmp_path)
    config = read_config(corpus.options(tmp_path / "run", **OPTIONS, checkpoint__load=still))
    samples = Samples()
    run_training(config, callbacks=[samples])
    found = lines_of(tmp_path / "run", "loss")
    wanted = dict(enumerate(losses_of_llama(llama, samples.taken, config), start=1))
    assert wanted[1] - wanted[STEPS] > 0.5, "twenty steps must have trained it"
    assert found.keys() == wanted.keys()
    assert max(abs(found[step] - wanted[step]) for step in wanted) < 1e-4
