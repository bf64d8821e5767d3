"""One small file per architecture: what `model.architecture` chooses from.

Comes in: nothing. Goes out: `ARCHITECTURES`, frozen tables that the layer, layouts, recomputation, checkpoints,
estimates and exports read. May import: nothing of the package. Start at `base.py`, then `llama.py`;
docs/architectures.md says how to add one.
"""

from megatron_crnet.config.architectures.base import Architecture, Experts, Group, Position
from megatron_crnet.config.architectures.gpt2 import GPT2
from megatron_crnet.config.architectures.llama import LLAMA
from megatron_crnet.config.architectures.qwen3 import QWEN3
from megatron_crnet.config.architectures.qwen3_moe import QWEN3_MOE

ARCHITECTURES = {"llama": LLAMA, "gpt2": GPT2, "qwen3": QWEN3, "qwen3_moe": QWEN3_MOE}
"""By `model.architecture`."""

__all__ = ["ARCHITECTURES", "GPT2", "LLAMA", "QWEN3", "QWEN3_MOE", "Architecture", "Experts", "Group", "Position"]
