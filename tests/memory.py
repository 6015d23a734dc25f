"""The most memory that a process has held, for tests that measure one of their own.

`ru_maxrss` does not serve where Linux tells better: a new process begins with the peak of its parent, here of
whatever tests ran before.
"""

import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")
IMPORT = f"import sys; sys.path.append({str(Path(__file__).parent)!r}); from memory import peak\n"
"""The first line of a script for `python -c`."""


def peak() -> int:
    """Bytes, of this process alone where /proc tells."""
    if STATUS.exists():
        lines = STATUS.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
