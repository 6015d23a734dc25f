"""How a command ends by an error that a user can cause: one line on stderr, and an exit code.

Invariant: every such error has its exit code here or in `errors.py`, and nowhere else.
"""

from __future__ import annotations

import click

from jobs.output import message
from sae_runtime.errors import CorpuscopeError, InputError, Interrupted, one_line

# Errors of a disk or a filesystem that mean a wrong path, not a failure.
_WRONG_PATH = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


def explain(error: BaseException) -> int:
    """Say in one line how a command ended by an error that a user can cause; the exit code of that."""
    if isinstance(error, CorpuscopeError):
        message(f"error: {error}")
        return error.exit_code
    if isinstance(error, click.ClickException):
        context = error.ctx if isinstance(error, click.UsageError) else None
        hint = f" (see {context.command_path} --help)" if context else ""
        message(f"error: {error.format_message()}{hint}")
        return InputError.exit_code
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        message(f"error: {where}{error.strerror or one_line(error)}")
        return InputError.exit_code if isinstance(error, _WRONG_PATH) else CorpuscopeError.exit_code
    message("stopped; run the same command again to go on")
    return Interrupted.exit_code
