# SPDX-License-Identifier: Apache-2.0
"""Send all that a run logs and prints to a file."""

import contextlib
import io
import logging
import re
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

LAST_LINES = 12
_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class LogStream(io.TextIOBase):
    """A stream into a log file, without colours, and with the last state of each bar.

    When the file is closed, what still holds this stream writes to the one that it
    stood for.

    Args:
        file: The log.
        stands_for: The stream that it replaces.
        on_bar: Called with each state of a progress bar.

    Attributes:
        last_lines: Of the log.
    """

    def __init__(
        self, file: TextIO, stands_for: TextIO, on_bar: Callable[[str], None]
    ) -> None:
        super().__init__()
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self._file = file
        self._stands_for = stands_for
        self._on_bar = on_bar
        self._unfinished = ""
        self._in_bar = False
        self._lock = threading.RLock()

    def write(self, text: str) -> int:
        """Write text; a line with carriage returns is written when it ends."""
        if self._file.closed:
            return self._stands_for.write(text)
        with self._lock:
            plain = _COLOUR.sub("", text)
            if self._in_bar and not plain.startswith(("\r", "\n")):
                self._unfinished = ""  # a message in the middle of a bar
            *lines, rest = (self._unfinished + plain).split("\n")
            for line in lines:
                self._end_line(line.rpartition("\r")[2].rstrip())
            self._in_bar = "\r" in rest
            self._unfinished = rest.rpartition("\r")[1] + rest.rpartition("\r")[2]
        if self._in_bar:
            self._on_bar(self._unfinished.strip())
        return len(text)

    def _end_line(self, line: str) -> None:
        self._file.write(f"{line}\n")
        if line.strip():
            self.last_lines.append(line)

    def finish(self) -> None:
        """Write what no line end came after."""
        with self._lock:
            if self._unfinished.strip():
                self._end_line(self._unfinished.strip())
            self._unfinished, self._in_bar = "", False

    def flush(self) -> None:
        """Flush the log."""
        if not self._file.closed:
            self._file.flush()

    def fileno(self) -> int:
        """Return the log's file descriptor, for child processes."""
        return self._file.fileno()

    def isatty(self) -> bool:
        """Say that this is no terminal."""
        return False

    def writable(self) -> bool:
        """Say that one can write."""
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The log's encoding."""
        return "utf-8"


@contextmanager
def logged_to(path: Path, on_bar: Callable[[str], None]) -> Iterator[LogStream]:
    """Let everything inside log and print to a file; afterwards all is as before.

    Python's standard streams are replaced, and so are those of the handlers of all
    loggers that write to them. An exception gets a note with the last lines and the
    path of the log, which has its traceback.

    Args:
        path: The log; the lines are appended.
        on_bar: Called with each state of a progress bar.

    Raises:
        OSError: The log cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", errors="replace", buffering=1) as file:
        print(f"# {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC", file=file)
        stream = LogStream(file, sys.stderr, on_bar)
        with _handlers_to(stream), contextlib.ExitStack() as stack:
            stack.callback(stream.finish)
            stack.enter_context(contextlib.redirect_stdout(stream))
            stack.enter_context(contextlib.redirect_stderr(stream))
            try:
                yield stream
            except BaseException as error:
                stream.finish()
                note = _note(path, stream)  # its last lines, not those of the traceback
                traceback.print_exc(file=stream)
                error.add_note(note)
                raise


def _note(path: Path, stream: LogStream) -> str:
    last = "".join(f"\n  {line}" for line in stream.last_lines)
    return f"log: {path}" + (f", which ends with{last}" if last else "")


@contextmanager
def _handlers_to(stream: LogStream) -> Iterator[None]:
    """Let handlers of the standard streams write to this one, new ones only inside."""
    consoles = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    moved = []
    for handler in _stream_handlers():
        if any(handler.stream is console for console in consoles):
            moved.append((handler, handler.stream))
            handler.setStream(stream)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for handler, before in moved:
            handler.setStream(before)
        for handler in _stream_handlers():  # made inside
            if handler.stream is stream:  # type: ignore[comparison-overlap]
                handler.setStream(consoles[1])


def _stream_handlers() -> list["logging.StreamHandler[TextIO]"]:
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = [h for logger in loggers for h in getattr(logger, "handlers", ())]
    return [
        handler
        for handler in dict.fromkeys(handlers)
        if isinstance(handler, logging.StreamHandler)
        and "stream" in vars(handler)  # some follow sys.stderr by themselves
    ]
