"""Qwen3, mixture of experts: Qwen3's attention, and in every layer a router and experts (2505.09388).

q, k, v, o are chained, experts are not: what an expert gave in the previous layer is known only for tokens that it was
given there (docs/decisions/experts.md).
"""

from megatron_crnet.config.architectures.base import ATTENTION, EXPERTS, Architecture

QWEN3_MOE = Architecture(
    groups=ATTENTION,
    experts=EXPERTS,
    has_qk_norm=True,
)
