"""The errors a user can cause. Each is one line: what is wrong, where, and the remedy.

The command line prints the message and exits with `exit_code`; nothing else in the project is
allowed to turn an exception into an exit code.
"""

from __future__ import annotations


class CorpuscopeError(Exception):
    """Something failed that a person must know about; the message is a single line."""

    exit_code = 1


class InputError(CorpuscopeError):
    """The spec, the arguments or the inputs are wrong (names the file, key or tensor)."""

    exit_code = 2


class DataError(CorpuscopeError):
    """The data of a scan cannot be processed as it is (names the source and row, or the site)."""


class Interrupted(CorpuscopeError):
    """The work is not finished here; running the same command again goes on with it."""

    exit_code = 75


def is_infrastructure(error: BaseException) -> bool:
    """Whether the machine, its memory, the network or storage failed, so that no document is to blame.

    Out of memory, a GPU that fails, and every OSError that is not ours.
    """
    if isinstance(error, (OSError, MemoryError)) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = ("out of memory", "can't allocate memory", "CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def one_line(error: BaseException, limit: int = 300) -> str:
    """The first non-empty line of an exception's text, cut to `limit` characters."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = text or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
