"""The errors a user can cause. Each is one line: what is wrong, where, and the remedy.

The command line prints the message and exits with `exit_code`; nothing else in the project is
allowed to turn an exception into an exit code.
"""

from __future__ import annotations

import re

# Modules whose errors are of the network or of a store; errors of theirs are not all OSErrors.
_REMOTE = {"aiobotocore", "aiohttp", "asyncio", "azure", "botocore", "fsspec", "gcsfs", "google", "requests",
           "s3fs", "urllib3"}  # fmt: skip
_DEVICE = {"OutOfMemoryError", "AcceleratorError", "OutOfResources"}  # classes of torch and triton
_SIGNS = ("out of memory", "can't allocate memory", "cuda error", "hip error", "cublas", "cudnn", "cusolver",
          "nccl", "device-side assert", "cuda driver")  # fmt: skip
# Errors of a disk or a filesystem that mean a wrong path, not a failure.
_WRONG_PATH = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
_ERRNO = re.compile(r"^\[Errno -?\d+\] ")
QUARANTINED = 3  # exit code: done, and some documents could not be scanned


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


def exit_code(error: BaseException) -> int:
    """What a command ends with that was ended by an error, or by a signal (KeyboardInterrupt)."""
    if isinstance(error, CorpuscopeError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return Interrupted.exit_code
    return InputError.exit_code if isinstance(error, _WRONG_PATH) else CorpuscopeError.exit_code


def one_line(error: BaseException, limit: int = 300) -> str:
    """The first non-empty line of an exception's text, cut to `limit` characters.

    Of a text that is a traceback (DuckDB has one for errors in our files) its last line; the number of an
    operating system's error tells people nothing.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = lines[0]
    if text.startswith("Traceback (most recent call last)"):
        text = lines[-1].split(": ", 1)[-1]
    text = _ERRNO.sub("", text) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def is_infrastructure(error: BaseException) -> bool:
    """Whether memory, a device, storage or the network is at fault, and so never a document.

    Told by names and texts: this file is imported where torch is not.
    """
    if isinstance(error, (MemoryError, OSError)):
        return True
    if is_remote(error) or any(kind.__name__ in _DEVICE for kind in type(error).__mro__):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)


def is_remote(error: BaseException) -> bool:
    """Whether it comes from a library that talks to a store or the network, whatever its class."""
    return any(kind.__module__.split(".")[0] in _REMOTE for kind in type(error).__mro__)
