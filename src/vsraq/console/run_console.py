# SPDX-License-Identifier: Apache-2.0
"""The screen of a command that runs AutoRound."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vsraq.callbacks import Callback
from vsraq.console.live_line import Line, open_line
from vsraq.console.log_file import logged_to


class RunConsole:
    """What a command says, and the line of its runs.

    Args:
        line: The line; None where all is shown (`--verbose`).
    """

    def __init__(self, line: Line | None = None) -> None:
        self._line = line
        self._stdout = sys.stdout  # a log stands in its place later

    @property
    def callbacks(self) -> Sequence[Callback]:
        """What a run needs to be shown."""
        return [] if self._line is None else [self._line]

    def phase(self, text: str) -> None:
        """Say what is going on now."""
        if self._line is not None:
            self._line.phase(text)

    def say(self, text: str) -> None:
        """Print a result."""
        if self._line is None:
            print(text, flush=True)
        else:
            self._line.say(text, self._stdout)


@contextmanager
def run_console(log: Path, *, verbose: bool = False) -> Iterator[RunConsole]:
    """Show one line of what runs inside, and write its log to a file.

    Args:
        log: The file; its path is printed.
        verbose: Show everything instead, and write no file.

    Raises:
        OSError: The log cannot be written.
    """
    if verbose:
        yield RunConsole()
        return
    print(f"log: {log}", flush=True)
    line = open_line(sys.stderr)
    console = RunConsole(line)
    try:
        with logged_to(log, line.bar):
            yield console
    finally:
        line.close()
