# SPDX-License-Identifier: Apache-2.0
"""What a command shows while it runs: one line; the log goes to a file."""

from vsraq.console.run_console import RunConsole, run_console

__all__ = ["RunConsole", "run_console"]
