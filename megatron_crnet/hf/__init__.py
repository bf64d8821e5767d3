"""Out to Hugging Face transformers and back; generation and evaluation in one process.

In: Checkpoints or exports.
Out: Exports that open without this package, checkpoints made from them, text, losses.
May import: checkpoint and the sub-packages below it.
Start with export.py, then modeling_crnet.py.
"""
