"""The subcommands of `crnet`, and what all of them share: lazy imports, one line for an error, the exit status.

A subcommand is a module with `build_parser(prog)` and `run(call)`. It is imported when it is asked for and imports
torch when it needs it, so `--help` does not wait for either.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import FrameType
from typing import NoReturn

from megatron_crnet.utils.errors import ConfigError, CrnetError

COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("train", "pre-train CR-Net, or resume a run"),
    "launch": ("launch", "start the ranks of a run on this node"),
    "corpus": ("corpus", "write the text that Python ships as a corpus"),
    "tokenizer": ("tokenizer", "train a SentencePiece tokenizer"),
    "preprocess": ("preprocess", "turn text into .bin/.idx files"),
    "generate": ("generate", "continue prompts with a trained model"),
    "evaluate": ("evaluate", "loss and perplexity over text or token files"),
    "convert": ("convert", "checkpoints to Hugging Face transformers and back"),
    "init": ("init", "turn a dense model into crnet, low_rank or relora"),
    "ranks": ("ranks", "choose ranks by spectra, under a budget"),
    "estimate": ("estimate", "memory, traffic and time of a run by formula"),
    "plan": ("plan", "search the fastest layout that fits"),
    "simulate": ("simulate", "count a step of one rank on fake tensors"),
    "benchmark": ("benchmark", "measure training steps of several configurations"),
    "study": ("study", "train a grid of configurations and compare their losses"),
    "report": ("report", "one page of runs, benchmarks, estimates and simulations"),
    "compare": ("compare", "final losses of runs side by side"),
    "observe": ("observe", "how much a layer's outputs share with the previous layer's"),
    "measure-communication": ("measure_communication", "count what a configuration sends"),
    "measure-glue": ("measure_glue", "count what lies between a layer's products"),
    "measure-recompute": ("measure_recompute", "count what recomputation keeps and computes"),
    "measure-scale": ("measure_scale", "count what grows with the number of ranks"),
    "benchmark-decoding": ("benchmark_decoding", "tokens per second of decoding"),
    "benchmark-preprocess": ("benchmark_preprocess", "preprocessing against a simple loop"),
    "check-imports": ("check_imports", "import what a run needs and print the versions"),
    "completion": ("completion", "print a shell's completion script"),
}
"""Module and summary of each subcommand."""
ENDS_AT_ONCE = ("train",)
"""Subcommands that exit without waiting for threads, helper processes or other ranks."""
USAGE = """usage: crnet COMMAND [OPTIONS]

Pre-training of CR-Net on Megatron-Core and DeepSpeed.

commands:
{commands}

examples:
  crnet corpus data/corpus
  crnet train --config examples/quickstart.yaml --training.train_steps 100
  crnet launch --nproc_per_node=8 train --config examples/llama2_7b.yaml
  crnet estimate --config examples/llama2_7b.yaml --world-size 8 --gpu h100

`crnet COMMAND --help` shows a command's options, `crnet --version` the versions."""


@dataclass(frozen=True)
class Call:
    """How a subcommand was called.

    Attributes:
        program: `crnet NAME`, or the path of the file that stands for it.
        argv: the words that follow.
    """

    program: tuple[str, ...]
    argv: list[str]

    @property
    def words(self) -> list[str]:
        """The whole command line, as records of figures hold it."""
        return [*self.program, *self.argv]

    @property
    def prog(self) -> str:
        """The program as it is typed, for usage lines and examples."""
        from megatron_crnet.utils.environment import command_line

        return command_line([*self.program])


class Door:
    """A file that stands for a subcommand: `main(argv)` returns the status, `main.start()` ends the process.

    Args:
        file: path of the file.
    """

    def __init__(self, name: str, file: str) -> None:
        self._name, self._file = name, file

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        """Run in this process, on `sys.argv` by default."""
        return run(self._name, Call((self._file,), list(sys.argv[1:] if argv is None else argv)))

    def start(self) -> NoReturn:
        """Run as a program."""
        _end(self._name, self)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `crnet ARGV` in this process, on `sys.argv` by default. Returns the exit status."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in COMMANDS:
        return run(name, Call(("crnet", name), rest))
    return run_cli(lambda: _without_command(name))


def start() -> NoReturn:
    """The console script `crnet`."""
    _end(sys.argv[1] if len(sys.argv) > 1 else "", main)


def run(name: str, call: Call) -> int:
    """Import a subcommand and run it. Returns the exit status."""
    module = import_module(f"megatron_crnet.cli.{COMMANDS[name][0]}")
    return run_cli(lambda: module.run(call))


def _end(name: str, program: Callable[[], int]) -> NoReturn:
    ctrl_c_is_one_line()
    if name not in ENDS_AT_ONCE:
        sys.exit(program())
    try:
        status = program()
    except SystemExit:  # --help, --version
        raise
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _without_command(word: str) -> int:
    usage = USAGE.format(commands="\n".join(f"  {name:<23}{summary}" for name, (_, summary) in COMMANDS.items()))
    if word in ("-h", "--help"):
        print(usage)
    elif word == "--version":
        from megatron_crnet.utils.versions import version_line

        print(version_line())
    elif word:
        from megatron_crnet.config.field_types import nearest

        raise ConfigError(f"unknown command {word!r}: {nearest(word, COMMANDS, otherwise='see crnet --help')}")
    else:
        print(usage, file=sys.stderr)
        raise ConfigError("no command is given: name one of them")
    return 0


def run_cli(program: Callable[[], int]) -> int:
    """Run a program; print a CrnetError as one line to standard error and return its exit status.

    Ctrl-C and a closed pipe (`| head`) end it with 128 plus the signal's number, as in a shell.
    """
    if signal.getsignal(signal.SIGINT) is _end_interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # unwinds, so that partial files are removed
    try:
        status = program()
        sys.stdout.flush()
    except CrnetError as error:
        rank = os.environ.get("RANK", "0")
        print(f"error{'' if rank == '0' else f' (rank {rank})'}: {error}", file=sys.stderr, flush=True)
        return error.exit_status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        if not _has_no_reader(sys.stdout.fileno()):
            raise  # of another pipe
        # Python flushes again at exit, which would fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return status


def ctrl_c_is_one_line() -> None:
    """Let Ctrl-C end the process at once, with one line, while it imports its libraries; `run_cli` undoes it.

    An exception inside an import may become another one. To be called before the imports.
    """
    signal.signal(signal.SIGINT, _end_interrupted)


def _end_interrupted(_number: int, _frame: FrameType | None) -> None:
    os.write(sys.stderr.fileno(), b"interrupted\n")
    os._exit(128 + signal.SIGINT)


def _has_no_reader(pipe: int) -> bool:
    poll = select.poll()
    poll.register(pipe, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
