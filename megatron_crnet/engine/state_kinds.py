"""The tensors that are kept per canonical weight, as checkpoints name them: `master.NAME`, `exp_avg.NAME`, ..."""

from __future__ import annotations

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of Adam's moments in PyTorch's and Apex's optimizers."""
KINDS = (MASTER, *MOMENTS)
"""What a checkpoint holds of each weight, as KIND.NAME."""
