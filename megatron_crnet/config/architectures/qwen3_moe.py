"""Qwen3, mixture of experts: Qwen3's attention, and in every layer a router and experts (2505.09388).

q, k, v, o are chained, experts are not: what an expert gave in the previous layer is known only for tokens that it was
given there (docs/decisions/experts.md).
"""

from megatron_crnet.config.architectures.base import ATTENTION, EXPERTS, Architecture

QWEN3_MOE = Architecture(
    groups=ATTENTION,
    # as Qwen3's, up to the experts
    other_activations={"hidden": 4, "q": 2, "k": 1},
    experts=EXPERTS,
    has_qk_norm=True,
)
