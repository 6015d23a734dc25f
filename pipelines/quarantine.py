"""Documents that cannot be scanned: what is said of each, how culprits are told, when there are too many.

Invariant: documents read = documents indexed + documents quarantined, in every unit and so in the index.
A document is put here only for what it does by itself, alone in a batch of the same shape; memory, devices,
storage and the network are never its fault. Nothing here changes what its neighbours give.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pipelines.ledger import Commit
from sae_runtime.errors import CorpuscopeError, DataError, is_infrastructure

SHOWN = 300  # characters of an error that are kept
MANY = 100  # documents, and more than a tenth of those read: not the fault of single documents
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Refused:
    """A row that cannot be a document, or whose document cannot be scanned."""

    row: int
    error: str  # one line, SHOWN characters at most
    id: str | None = None


class Poisoned(Exception):
    """The model cannot run some documents of a unit: file row -> what is wrong. Never leaves the scanner."""

    def __init__(self, errors: dict[int, str]) -> None:
        super().__init__(f"{len(errors)} documents")
        self.errors = errors


def line(error: BaseException | str) -> str:
    """An error as the quarantine has it: one line of Unicode text, cut short, no row and no file in it."""
    if isinstance(error, BaseException) and not isinstance(error, CorpuscopeError):
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    else:
        text = str(error)
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def culprits_apart(
    work: Callable[[list[Item]], Sequence[Result]], items: list[Item]
) -> list[Result | BaseException]:
    """`work` of all items; where it raises, of each alone, with an error in place of a culprit's result.

    What is not a document's fault is raised. Rust libraries panic with a BaseException of their own.
    """
    try:
        return list(work(items))
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"
        if not (isinstance(error, Exception) or panic) or is_infrastructure(error):
            raise
        if len(items) == 1:
            return [error]
    return [culprits_apart(work, [item])[0] for item in items]


def systematic(read: int, quarantined: int) -> bool:
    """Whether so many quarantined documents, of those read, are a fault of something else."""
    return quarantined >= MANY and quarantined * 10 > read


def check_unit(place: str, read: int, errors: Collection[str]) -> None:
    """DataError if a unit's quarantined documents, of `read`, are too many to be single ones' fault."""
    if systematic(read, len(errors)):
        (common, times), *_ = Counter(errors).most_common(1)
        raise DataError(
            f"{place}: {len(errors):,} of {read:,} documents cannot be scanned, too many to be the fault of "
            f"single ones; {times:,} times: {common}"
        )


def check_groups(place: str, one: Sequence[int], other: Sequence[int]) -> None:
    """DataError if two SAE groups of a unit do not refuse the same documents (rows of the file)."""
    rows = sorted({*one} ^ {*other})
    if rows:
        raise DataError(
            f"{place}: row {rows[0]}: the model can run this document for some of the SAEs, not for those at "
            "other sites; scan these into an index of their own"
        )


class Tally:
    """Documents read and quarantined over the commits of an index's live units."""

    def __init__(self, index: str, groups: int, commits: Iterable[Commit]) -> None:
        self.index, self.groups = index, groups
        self.read = self.quarantined = 0
        self._poison: dict[int, tuple[int, ...]] = {}  # by unit, of the first group that was seen
        for commit in commits:
            self.add(commit)

    def add(self, commit: Commit) -> None:
        """Take in a commit, each once. DataError if another group's commit of the unit does not agree."""
        if self.groups > 1:
            other = self._poison.setdefault(commit.ordinal, commit.poison)
            check_groups(f"unit {commit.unit}", other, commit.poison)
        if commit.group == 0:
            self.read += commit.documents + commit.quarantined
            self.quarantined += commit.quarantined

    def check(self) -> None:
        """CorpuscopeError if so many documents are quarantined that a scan must not go on."""
        if systematic(self.read, self.quarantined):
            raise CorpuscopeError(
                f"index {self.index}: {self.quarantined:,} of {self.read:,} documents cannot be scanned, too "
                "many to be the fault of single ones; `SELECT * FROM quarantine` says why; mend the corpus "
                "or scan it into another index with other settings"
            )
