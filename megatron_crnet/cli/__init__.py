"""The command `crnet`: a file per subcommand, its output and its exit status.

In: Command lines.
Out: Text on standard output, one line for each error, an exit status.
May import: every sub-package.
Start with main.py, then train.py.
"""
