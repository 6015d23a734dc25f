"""The scan's specification as frozen data: what a spec file may say, with defaults and checks.

Invariant: an instance is complete and valid in itself; whether files exist is found out later.
Unknown keys and wrong types are errors that name the key (`jobs/specfile.py` words them).
`planning.identity` is what must not change between scans of one index.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StringConstraints,
    field_validator,
    model_validator,
)

from pipelines.schedules import check_cron, check_zone
from sae_runtime.sites import KINDS


def _storable(value: str) -> str:
    """Text that paths, SQL and Parquet can hold."""
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("text without the character NUL and without halves of characters is wanted")
    return value


Text = Annotated[str, StringConstraints(min_length=1), AfterValidator(_storable)]
Count = Annotated[int, Field(strict=True, gt=0, lt=1 << 63)]
Fraction = Annotated[float, Field(strict=True, gt=0, le=1)]
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "PB": 10**15}


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _listed(value: Any) -> Any:
    """One value or a list of them, as a tuple."""
    if value is None:
        return value
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _bytes(value: Any) -> Any:
    """`1TB`, `500 MB` or a plain number of bytes."""
    if not isinstance(value, str):
        return value
    number = value.strip().rstrip("BKMGTPbkmgtp").strip()
    unit = value.strip()[len(number) :].strip().upper() or "B"
    try:
        return int(float(number) * UNITS[unit])
    except (ValueError, KeyError):
        raise ValueError("a size such as 500MB or 1TB is wanted") from None


def _cron_line(value: Any) -> Any:
    """A bare cron line, which is in UTC, as the mapping that it stands for."""
    if isinstance(value, str):
        return {"cron": check_cron(value)}
    if value is None or isinstance(value, (Mapping, Schedule)):
        return value
    raise ValueError('a cron line such as "0 3 * * *", or a mapping with the keys cron, timezone, is wanted')


class CorpusSource(_Frozen):
    """One source of documents: files of one format with the same columns.

    A document is the text of column `text` or, where `messages` is given, a conversation.
    """

    uri: Annotated[tuple[Text, ...], BeforeValidator(_listed)] = Field(min_length=1)
    name: Text | None = None
    format: Literal["auto", "jsonl", "parquet", "arrow", "text"] = "auto"
    text: Text = "text"
    messages: Text | None = None
    template: Text = "auto"  # or the path of a Jinja file
    id: Text | None = None
    metadata: tuple[Text, ...] = ()
    limit: Count | None = None
    sample: Fraction | None = None

    @field_validator("metadata")
    @classmethod
    def _each_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name!r} is listed twice")
        return names

    @model_validator(mode="after")
    def _text_or_messages(self) -> CorpusSource:
        if self.messages is not None and "text" in self.model_fields_set:
            raise ValueError("`text` and `messages` are both given; a document is one or the other")
        if self.messages is None and self.template != "auto":
            raise ValueError("`template` is for conversations; give their column as `messages`")
        return self

    @property
    def column(self) -> tuple[str, str]:
        """(key of the spec, column) of what a document is made of."""
        return ("text", self.text) if self.messages is None else ("messages", self.messages)


class ModelSettings(_Frozen):
    """The language model. `threads` are CPU threads per worker; on a CPU they fix the values too.

    `attention` says how contexts share a run: like lengths padded side by side (`sdpa`), or packed into rows.
    `mixed_devices` lets GPUs or CPUs of several models scan one index, which gives up bit-equal values; it
    may change between scans.
    """

    uri: Text
    revision: Text | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Count = 2
    attention: Literal["sdpa", "flex_attention", "flash_attention_2"] = "sdpa"
    mixed_devices: StrictBool = False


class Sample(_Frozen):
    """Keep token rows of this fraction of the documents, by hash."""

    sample: Fraction


class SaeEntry(_Frozen):
    """A suite of SAEs, or some of one."""

    uri: Text
    name: Text | None = None
    select: Annotated[tuple[Text, ...], BeforeValidator(_listed)] | None = None
    site: Literal[KINDS] | None = None  # type: ignore[valid-type]
    keep: Literal["tokens", "documents", "none"] | Sample = "tokens"


class Exclusion(_Frozen):
    """Tokens to leave out: those whose norm at an SAE's site is over `norm_above` times the context's
    median, those of messages of some roles."""

    norm_above: Annotated[float, Field(gt=1)] | None = None
    roles: Annotated[tuple[Text, ...], BeforeValidator(_listed), Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _something(self) -> Exclusion:
        if self.norm_above is None and self.roles is None:
            raise ValueError("norm_above or roles is wanted")
        return self


class ContextSettings(_Frozen):
    """How documents become contexts and which of their tokens are counted."""

    length: Annotated[int, Field(strict=True, ge=2, le=1 << 17)] = 1024
    overlap: Annotated[int, Field(strict=True, ge=0)] = 0
    bos: Literal["auto"] | StrictBool = "auto"
    exclude: tuple[Literal["special", "template", "first"] | Exclusion, ...] = ("special", "first")

    @model_validator(mode="after")
    def _room(self) -> ContextSettings:
        if self.overlap > self.length - 2:
            raise ValueError("overlap must leave room for a BOS and one token of its own")
        if sum(isinstance(item, Exclusion) and item.norm_above is not None for item in self.exclude) > 1:
            raise ValueError("exclude can hold one norm_above only")
        return self

    @property
    def excluded(self) -> tuple[str, ...]:
        """`exclude` in words, sorted, each once: the same whatever way it was written."""
        words: set[str] = {item for item in self.exclude if isinstance(item, str)}
        words |= {f"role {role}" for role in self.roles}
        if self.norm_above is not None:
            # Every digit: an index is told by it, and a passage is read by it.
            words.add(f"norm_above {repr(self.norm_above).removesuffix('.0')}")
        return tuple(sorted(words))

    @property
    def roles(self) -> frozenset[str]:
        """Roles whose tokens are not counted."""
        return frozenset(
            role for item in self.exclude if isinstance(item, Exclusion) for role in item.roles or ()
        )

    @property
    def norm_above(self) -> float | None:
        """The multiple of the median norm above which a token is left out, or None."""
        limits = (item.norm_above for item in self.exclude if isinstance(item, Exclusion))
        return next((limit for limit in limits if limit is not None), None)


class Schedule(_Frozen):
    """When `corpuscope schedule run` is to scan: a cron line of five fields, by the clocks of a zone."""

    cron: Annotated[Text, AfterValidator(check_cron)]
    timezone: Annotated[Text, AfterValidator(check_zone)] = "UTC"  # a name of the IANA's


class ScanSpec(_Frozen):
    """A whole spec file."""

    corpus: Annotated[tuple[CorpusSource, ...], BeforeValidator(_listed)] = Field(min_length=1)
    model: ModelSettings
    saes: Annotated[tuple[SaeEntry, ...], BeforeValidator(_listed)] = Field(min_length=1)
    context: ContextSettings = ContextSettings()
    top_k: Count = 20
    sample_k: Count = 10
    max_index_bytes: Annotated[Count, BeforeValidator(_bytes)] = 10**12
    index: Text
    schedule: Annotated[Schedule | None, BeforeValidator(_cron_line)] = None

    @model_validator(mode="after")
    def _one_spelling(self) -> ScanSpec:
        spelt = {name.lower(): name for name in self.metadata}
        for name in self.metadata:
            if spelt[name.lower()] != name:
                raise ValueError(
                    f"metadata: {name!r} and {spelt[name.lower()]!r} are one name to SQL; rename one"
                )
        return self

    @property
    def metadata(self) -> tuple[str, ...]:
        """Metadata columns of all sources, each once; a source without one has nulls there."""
        return tuple(dict.fromkeys(column for source in self.corpus for column in source.metadata))

    def share(self, source: int) -> float:
        """The fraction of a source's rows that its `sample` takes."""
        return self.corpus[source].sample or 1.0
