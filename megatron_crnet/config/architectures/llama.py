"""LLaMA-2: q, k, v, o of attention with RoPE, gate, up, down of SwiGLU, RMSNorm before each (arXiv 2307.09288)."""

from megatron_crnet.config.architectures.base import ATTENTION, GATED, Architecture

LLAMA = Architecture(
    groups=(*ATTENTION, *GATED),
    # two norms' inputs and outputs; attention's output; silu(gate) up
    other_activations={"hidden": 4, "q": 1, "up": 1},
    rotated=("q", "k"),
    paddable=frozenset({"ffn"}),  # silu(0) 0 = 0
)
