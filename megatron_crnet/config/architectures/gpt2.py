"""GPT-2: six linear maps with biases, LayerNorm, GELU in its tanh form, learned positions, a tied output layer.

Source: Radford et al., Language Models are Unsupervised Multitask Learners, 2019, and its code. A bias is added outside
of the chain, Y + bias, because summed up over the layers of a chain it would be another parameter of the same effect.
"""

from megatron_crnet.config.architectures.base import ATTENTION, PLAIN, Architecture

GPT2 = Architecture(
    groups=(*ATTENTION, *PLAIN),
    norm="layer",
    activation="gelu",
    token_positions="learned",
    has_biases=True,
    ties_head=True,
    paddable=frozenset({"ffn"}),  # gelu(0) = 0
)
