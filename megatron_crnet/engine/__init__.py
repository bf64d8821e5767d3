"""One optimizer step: Megatron-Core's schedules, DeepSpeed's ZeRO, whose buffers only this sub-package knows.

In: A model and micro-batches.
Out: Losses, norms, updated weights; fp32 weights and moments by parameter, at any ZeRO stage.
May import: model, recompute, distributed, data, config, utils.
Start with engine.py, then zero_state.py and zero.py.
"""
