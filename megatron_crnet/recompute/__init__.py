"""What the backward pass needs, and how it gets back what was not kept (docs/recomputation.md).

In: Runs of layers, as `segment.Layer`.
Out: Segments that forward without a graph and rebuild it layer by layer in backward.
May import: config, utils.
Start with planner.py, then segment.py.
"""
