"""Command lines of the trainer in which something is made to fail."""

from __future__ import annotations

from dataclasses import dataclass

from tests.integration.conftest import start


@dataclass(frozen=True)
class Command:
    """One call of `pretrain_crnet.py`.

    Attributes:
        before: Python that is run first, with `patch`, a pytest.MonkeyPatch.
    """

    options: list[str]
    before: str = ""


@dataclass(frozen=True)
class Printed:
    """What a call gave: its exit status, and what it printed on both streams."""

    status: int
    text: str

    @property
    def error(self) -> str:
        """Its one error line."""
        (line,) = [line for line in self.text.splitlines() if line.startswith("error")]
        return line


def run_commands(commands: list[Command]) -> list[Printed]:
    """Run them one after the other, without a launcher."""
    found = [start(command.options, before=command.before) for command in commands]
    return [Printed(done.returncode, done.stdout + done.stderr) for done in found]
