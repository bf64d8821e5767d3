"""The tensors that are kept per canonical weight, as checkpoints name them: `master.NAME`, `exp_avg.NAME`, ..."""

from __future__ import annotations

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of Adam's moments in PyTorch's and Apex's optimizers."""
KINDS = (MASTER, *MOMENTS)
"""What a checkpoint holds of each weight, as KIND.NAME; of a weight that GaLore projects, `engine/galore.py` says."""
LEFT, RIGHT = "left_projection", "right_projection"
"""GaLore's projections of a weight [m, n], [m, r] and [r, n]."""
