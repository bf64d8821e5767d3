"""Who the ranks are, how they meet, whether they mean the same run and are still alive.

In: Variables of launchers; the configuration.
Out: Process groups, a watchdog, agreement; Megatron-Core and DeepSpeed without CUDA.
May import: config, utils.
Start with launcher.py, then process_groups.py.
"""
