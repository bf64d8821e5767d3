"""The run itself: what is examined before it starts, the loop, and what is done beside its steps.

In: A `Config`, and callbacks of the caller.
Out: Metrics, checkpoints, a `TrainResult`.
May import: checkpoint and the sub-packages below it.
Start with trainer.py (the loop), then preflight.py and callbacks/base.py (the hooks).
"""
