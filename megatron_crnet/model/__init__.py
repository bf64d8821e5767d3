"""CR-Net in plain PyTorch (reference.py) and in Megatron-Core's transformer blocks, with the same weights.

In: The configuration and process groups.
Out: A pipeline stage of a `CRNetGPTModel`, and where each canonical weight lies in it.
May import: recompute, data, distributed, config, utils.
Start with reference.py, then linear.py, layer.py and block.py.
"""
