"""Qwen3, dense: LLaMA's layer with an RMSNorm over each head of q and k, and a head width of its own (2505.09388)."""

from megatron_crnet.config.architectures.base import ATTENTION, GATED, Architecture

QWEN3 = Architecture(
    groups=(*ATTENTION, *GATED),
    # as LLaMA's; and of q and k, whose norms need them, what attention sees
    other_activations={"hidden": 4, "q": 2, "k": 1, "up": 1},
    has_qk_norm=True,
    paddable=frozenset({"ffn"}),
)
