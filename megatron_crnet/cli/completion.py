"""Print a script that completes the commands of crnet and their options in a shell.

    eval "$(%(prog)s bash)"
    %(prog)s zsh > "${fpath[1]}/_crnet"

Needs shtab (pip install shtab).
"""

from __future__ import annotations

import argparse
from importlib import import_module

from megatron_crnet.cli.main import COMMANDS, Call
from megatron_crnet.config.loading import ConfigParser
from megatron_crnet.config.options import ToolParser
from megatron_crnet.config.reference import sections
from megatron_crnet.utils.errors import ConfigError

SHELLS = ("bash", "zsh", "tcsh")


def build_parser(prog: str) -> ToolParser:
    """The options."""
    parser = ToolParser(prog=prog, description=__doc__)
    parser.add_argument("shell", choices=SHELLS)
    return parser


def every_command() -> argparse.ArgumentParser:
    """One parser with all commands below it."""
    whole = argparse.ArgumentParser(prog="crnet")
    commands = whole.add_subparsers(dest="command")
    for name, (module, summary) in COMMANDS.items():
        own = import_module(f"megatron_crnet.cli.{module}").build_parser(f"crnet {name}")
        command = commands.add_parser(name, help=summary, parents=[own], add_help=False)
        if isinstance(own, ConfigParser):
            for field in (field for _, _, fields in sections() for field in fields):
                command.add_argument(f"--{field.name}", help=field.meaning.replace("%", "%%"))
    return whole


def run(call: Call) -> int:
    """Print the script."""
    shell = build_parser(call.prog).parse_args(call.argv).shell
    try:
        import shtab
    except ImportError as error:
        raise ConfigError("completion scripts are made by shtab, which is not installed: pip install shtab") from error
    print(shtab.complete(every_command(), shell))
    return 0
