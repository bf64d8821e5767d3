"""LLaMA-2: q, k, v, o of attention with RoPE, gate, up, down of SwiGLU, RMSNorm before each (arXiv 2307.09288)."""

from megatron_crnet.config.architectures.base import ATTENTION, GATED, Architecture

LLAMA = Architecture(
    groups=(*ATTENTION, *GATED),
    paddable=frozenset({"ffn"}),  # silu(0) 0 = 0
)
