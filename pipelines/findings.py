"""What `verify` finds: a list of faults, and how much was looked at.

Invariant: every check that was made is counted by its name, whether it found something or not; of a fault
that many rows share only the first rows are told.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is not as it must be."""

    file: str  # in the index; a table, where tables were compared
    check: str
    detail: str


@dataclass
class Findings:
    """Collects faults."""

    faults: list[Fault] = field(default_factory=list)
    files: int = 0
    bytes: int = 0
    rows: int = 0  # of data files
    names: set[str] = field(default_factory=set)  # of checks that were made
    units: int = 0  # live ones
    committed: int = 0  # of them
    whole: bool = True  # nothing was found that keeps the tables from being read

    @property
    def checks(self) -> int:
        """How many kinds of checks were made."""
        return len(self.names)

    def expect(self, ok: bool, file: str, check: str, detail: str) -> bool:
        """Note a check, and a fault if it is not `ok`; returns `ok`."""
        self.names.add(check)
        if not ok:
            self.faults.append(Fault(file, check, detail))
        return ok

    def broken(self, file: str, check: str, detail: str) -> None:
        """A fault after which tables cannot be relied on to be readable."""
        self.whole = self.expect(False, file, check, detail)
