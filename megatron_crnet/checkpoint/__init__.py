"""A run's whole state by canonical weight, which any layout reads; what a run's folder holds.

In: The engine's state, or a folder.
Out: Sealed checkpoints, saved in the background; the newest good one, or why there is none.
May import: engine and the rooms below it.
Start with directory.py, then manager.py.
"""
