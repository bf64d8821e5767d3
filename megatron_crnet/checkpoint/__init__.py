"""The whole state of a run by canonical weight, readable in any layout, and the folder of a run.

In: The engine's state, or a folder.
Out: Sealed checkpoints, saved in the background; the newest good one, or why there is none.
May import: engine and the sub-packages below it.
Start with directory.py, then manager.py.
"""
