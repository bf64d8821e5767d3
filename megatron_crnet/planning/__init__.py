"""What a run will need: by formula, and by running the real code on fake tensors.

In: A `Config` and a number of GPUs.
Out: Memory, operations, bytes and time of a rank's step; the fastest layout that fits.
May import: engine and the sub-packages below it.
Start with estimate.py (formulas: shards.py, memory.py, volume.py, roofline.py), then simulation.py.
"""
