"""How a command ends by an error that a user can cause: one line on stderr, and an exit code.

Invariant: every such error has its exit code in `errors.py`; click's own are wrong input.
"""

from __future__ import annotations

import re

import click

from jobs.output import message
from sae_runtime.errors import CorpuscopeError, InputError, exit_code, one_line


def explain(error: BaseException) -> int:
    """Say in one line how a command ended by an error that a user can cause; the exit code of that."""
    if isinstance(error, CorpuscopeError):
        message(f"error: {error}")
        return exit_code(error)
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message(), err=True)  # what there is to choose from, in its own lines
        return InputError.exit_code
    if isinstance(error, click.ClickException):
        context = error.ctx if isinstance(error, click.UsageError) else None
        hint = f" (see {context.command_path} --help)" if context else ""
        text = re.sub(r"\s*\n\s*", " ", error.format_message())  # lists of choices have a line each
        message(f"error: {text}{hint}")
        return InputError.exit_code
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        message(f"error: {where}{error.strerror or one_line(error)}")
        return exit_code(error)
    message("stopped; run the same command again to go on")
    return exit_code(KeyboardInterrupt())
