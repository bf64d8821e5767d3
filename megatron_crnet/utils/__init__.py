"""Files, signals, errors, messages: what every sub-package needs and that knows nothing of models.

In: Paths, bytes, signals.
Out: Whole files, locks, one-line errors, progress lines, facts of the machine.
May import: nothing of this package.
Start with errors.py, then files.py.
"""
