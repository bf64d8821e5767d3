"""The run itself: what is examined before it starts, and the loop.

In: A `Config`.
Out: Metrics, checkpoints, an exit status.
May import: checkpoint and the rooms below it.
Start with trainer.py.
"""
