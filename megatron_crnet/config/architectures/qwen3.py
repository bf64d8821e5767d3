"""Qwen3, dense: LLaMA's layer with an RMSNorm over each head of q and k, and a head width of its own (2505.09388)."""

from megatron_crnet.config.architectures.base import ATTENTION, GATED, Architecture

QWEN3 = Architecture(
    groups=(*ATTENTION, *GATED),
    has_qk_norm=True,
    paddable=frozenset({"ffn"}),
)
