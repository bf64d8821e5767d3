"""Statistics of a model's linear maps on calibration text, and what follows from them.

In: A model in files (`source.py`), rows of tokens.
Out: Sums over all tokens, layer by layer (`stream.py`), and from these a CR-Net of a dense model, ranks, errors.
May import: hf and the sub-packages below it.
Start with difference.py, then stream.py.
"""
