"""One command, `crnet`, with a file for each subcommand; what it prints and how it ends.

In: Command lines.
Out: Text on standard output, one line for each error, an exit status.
May import: every room.
Start with main.py, then train.py.
"""
