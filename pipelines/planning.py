"""Before any model runs: resolve the spec, check everything that can be wrong, register the units.

Invariant: nothing is written to the index before every input has been checked. A unit's identity is
its file's path inside the source, content digest, source settings and row span, so adding files makes
new units only; the registry gives each a dense ordinal. A file whose size and stamp are known is not
read again, one that was merely touched is re-read but not re-scanned.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pipelines.columns import merge_types
from pipelines.contexts import ContextRule, context_rule
from pipelines.conversations import template_digest, template_text
from pipelines.corpus import FileIndex, index_file
from pipelines.files import SourceFile, list_files
from pipelines.ledger import Ledger
from pipelines.ordinals import pack
from pipelines.registry import (
    FileRecord,
    Plan,
    Unit,
    known_units,
    last_scan,
    live_units,
    next_ordinal,
    unit_id,
)
from pipelines.schema import FORMAT
from pipelines.selfcheck import other_model
from pipelines.spec import CorpusSource, Sample, ScanSpec
from pipelines.unit import device_name
from sae_runtime import suites
from sae_runtime.errors import InputError
from sae_runtime.fingerprints import fingerprint
from sae_runtime.model import ModelSource, load_tokenizer, locate, site_paths, text_config
from sae_runtime.packing import check_attention
from sae_runtime.sae import SaeInfo
from sae_runtime.sites import Site

UNIT_BYTES = {"cpu": 1 << 18, "cuda": 1 << 22}  # of text: some 64 thousand and 1 million tokens


class _Suited:
    """What of the spec suits none of the files of a source that have rows."""

    def __init__(self) -> None:
        self._files = 0
        self._unsuited: dict[tuple[str, str], str] = {}  # the first file's words

    def add(self, unsuited: dict[tuple[str, str], str] | None) -> None:
        if unsuited is None:
            return
        if not self._files:
            self._unsuited = unsuited
        self._files += 1
        self._unsuited = {wanted: why for wanted, why in self._unsuited.items() if wanted in unsuited}

    def check(self) -> None:
        for why in self._unsuited.values():
            more = f" (nor do the source's {self._files - 1:,} others suit)" if self._files > 1 else ""
            raise InputError(f"{why}{more}")


@dataclass(frozen=True)
class Prepared:
    """A spec whose model, SAEs and settings have been found and checked."""

    spec: ScanSpec
    source: ModelSource
    device: str
    rule: ContextRule
    saes: tuple[SaeInfo, ...]
    fingerprints: dict[str, str]  # SAE id -> digest of its tensors
    sites: dict[Site, str]  # public path of each site
    duplicates: dict[str, str]  # SAEs that are not scanned -> the one of the same tensors that is
    warnings: tuple[str, ...]  # one line each, for people
    templates: tuple[str | None, ...]  # each source's chat template; None for one of texts


@dataclass(frozen=True)
class Planned:
    """What a scan is about to do."""

    plan: Plan  # the newest of a scan, registered or about to be
    is_new: bool
    plans: tuple[Plan, ...]  # those registered before
    units: tuple[Unit, ...]  # live ones, in ordinal order
    files: dict[tuple[str, str], SourceFile]  # by (corpus, path)


def prepare(spec: ScanSpec, device: str) -> Prepared:
    """Find model and SAEs, check that they fit. Raises InputError naming the key."""
    source = locate(spec.model.uri, spec.model.revision)
    tokenizer = load_tokenizer(source)
    rule = context_rule(spec.context, tokenizer)
    templates = tuple(template_text(each, tokenizer, spec.model.uri) for each in spec.corpus)
    saes = find_saes(spec)
    sites = site_paths(source, sorted({at for sae in saes for at in (sae.site, sae.out) if at is not None}))
    for sae in saes:
        path, width = sites[sae.site]
        if sae.d_in != width:
            raise InputError(
                f"saes: {sae.id} has d_in {sae.d_in}, but its site {path} of {spec.model.uri} has {width}; "
                "wrong model or wrong `site`"
            )
    config, model = text_config(source), spec.model
    check_attention(config, model.attention, model.dtype, device, spec.context.length)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and spec.context.length > longest:
        raise InputError(
            f"context.length: {spec.context.length} tokens are more than the {longest} that {spec.model.uri} "
            "was made for"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # beyond this, all contexts of a batch get the longest's angles
        longest = rope["original_max_position_embeddings"]
        if spec.context.length > longest:
            raise InputError(
                f"context.length: {spec.context.length} tokens are more than the {longest} up to which "
                f"{spec.model.uri} (longrope) gives a context the same values whatever it is run with"
            )
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda sae: _fingerprint(sae, sites), saes)
        prints = {sae.id: digest for sae, digest in zip(saes, found, strict=True)}
    duplicates = _duplicates(saes, prints)
    return Prepared(
        spec,
        source,
        device,
        rule,
        tuple(sae for sae in saes if sae.id not in duplicates),
        prints,
        {site: path for site, (path, _) in sites.items()},
        duplicates,
        (
            *other_model(saes, spec.model.uri),
            *(
                f"note: {sae} has the same tensors as {other} at the same site: scanned once, as {other}"
                for sae, other in duplicates.items()
            ),
        ),
        templates,
    )


def _fingerprint(sae: SaeInfo, sites: dict[Site, tuple[str, int]]) -> str:
    """The digest of an SAE's tensors, checked against the model."""
    found = fingerprint(sae)
    if sae.out is not None and found.d_out is not None and found.d_out != sites[sae.out][1]:
        path, width = sites[sae.out]
        raise InputError(f"saes: {sae.id} decodes to {found.d_out} numbers, but {path} has {width}")
    return found.digest


def _duplicates(saes: Sequence[SaeInfo], prints: dict[str, str]) -> dict[str, str]:
    """SAEs whose tensors another one at the same site has: -> that one, the one of which most is kept."""
    kept = {"tokens": 2.0, "documents": 1.0, "none": 0.0}
    order = sorted(saes, key=lambda sae: -(kept[sae.keep] if isinstance(sae.keep, str) else 1.0 + sae.keep))
    first: dict[tuple[Any, ...], str] = {}
    found = {}
    for sae in order:
        other = first.setdefault((prints[sae.id], sae.site, sae.out), sae.id)
        if other != sae.id:
            found[sae.id] = other
    return found


def find_saes(spec: ScanSpec) -> list[SaeInfo]:
    """Every SAE that the spec names, by layer and id. InputError when two share an id."""
    found: dict[str, SaeInfo] = {}
    for entry in spec.saes:
        keep = entry.keep.sample if isinstance(entry.keep, Sample) else entry.keep
        for sae in suites.find(entry.uri, entry.name, entry.select, entry.site, keep):
            if sae.id in found:
                raise InputError(f"saes: two SAEs have the id {sae.id}; give one suite another `name`")
            found[sae.id] = sae
    return sorted(found.values(), key=lambda sae: (sae.site.layer, sae.id))


def identity(prepared: Prepared, metadata: dict[str, str], groups: Sequence[Sequence[str]]) -> dict[str, Any]:
    """What `index.json` records. Its `fixed` part must not change between scans of the index."""
    spec, rule = prepared.spec, prepared.rule
    return {
        "format": FORMAT,
        "fixed": {
            "model": prepared.source.fingerprint,
            "model.dtype": spec.model.dtype,
            "model.device": prepared.device,
            "model.threads": spec.model.threads if prepared.device == "cpu" else None,
            "model.attention": spec.model.attention,
            "context.length": rule.length,
            "context.overlap": rule.overlap,
            "context.bos": rule.bos,
            "context.exclude": list(spec.context.excluded),
            "top_k": spec.top_k,
            "sample_k": spec.sample_k,
            "metadata": metadata,
            "saes": {
                sae.id: f"{prepared.fingerprints[sae.id]} at {prepared.sites[sae.site]}, keep {sae.keep_text}"
                for sae in prepared.saes
            },
        },
        "model": spec.model.uri,
        "groups": [list(group) for group in groups],
        "duplicates": prepared.duplicates,
        "saes": [_sae_record(sae, prepared) for sae in prepared.saes],
    }


def check_identity(index: str, have: dict[str, Any], want: dict[str, Any]) -> None:
    """InputError naming each setting in which a scan differs from the index it is for."""
    old, new = have["fixed"], want["fixed"]
    differences = []
    for name in dict.fromkeys((*old, *new)):  # an index may be older than a setting
        if old.get(name) == new.get(name):
            continue
        if name == "saes":
            ids = sorted(k for k in {*old[name], *new[name]} if old[name].get(k) != new[name].get(k))
            differences.append(f"saes ({', '.join(ids[:3])}{', …' if len(ids) > 3 else ''})")
        else:
            differences.append(f"{name} ({old.get(name)} there, {new.get(name)} here)")
    if differences:
        raise InputError(
            f"index {index} was scanned with other settings: {'; '.join(differences)}; "
            "scan into another index"
        )


def plan_units(
    prepared: Prepared, ledger: Ledger, spec_text: str, allow_removal: bool
) -> tuple[Planned, dict[str, str]]:
    """List the corpus, index new or changed files and lay out the units; writes nothing.

    Returns the plan and the metadata types. Raises InputError for a corpus that is not as the spec
    says, or when more than a tenth of the documents would go and `allow_removal` is not given.
    """
    spec = prepared.spec
    files = _unique(list_files(spec.corpus))
    plans = ledger.plans()
    live = live_units(plans)
    layout = _Layout(prepared, plans, live, UNIT_BYTES[torch.device(prepared.device).type])
    for file in files:
        layout.add(file)
    layout.check_sources()
    current = {(r.corpus, r.path, r.digest, r.settings) for r in layout.records}
    gone = [unit for unit in live if _place(unit) not in current]
    _check_removal(gone, layout.units, live, allow_removal)
    metadata = _metadata(ledger, spec.metadata, layout.types)
    order = [(r.corpus, r.path) for r in layout.records]
    before = last_scan(plans)
    reordered = before is not None and order != [(r.corpus, r.path) for r in before.files]
    is_new = bool(layout.units or gone or before is None or reordered)
    plan = Plan(
        run=len(plans) + 1,
        started=time.time(),
        spec=spec_text,
        code=code_version(),
        device=device_name(prepared.device),
        environment=environment(),
        files=tuple(layout.records),
        units=tuple(layout.units),
        dropped=pack(unit.ordinal for unit in gone),
    )
    out = {unit.ordinal for unit in gone}
    left = [unit for unit in live if unit.ordinal not in out]
    units = sorted(left + layout.units, key=lambda unit: unit.ordinal)
    by_place = {(file.corpus, file.path): file for file in files}
    current_plan = plan if is_new or before is None else before
    return Planned(current_plan, is_new, tuple(plans), tuple(units), by_place), metadata


class _Layout:
    """Goes through the corpus's files in order and lays out units for the rows that have none yet."""

    def __init__(
        self, prepared: Prepared, plans: Sequence[Plan], live: Sequence[Unit], unit_bytes: int
    ) -> None:
        spec = prepared.spec
        self.spec, self.templates, self.unit_bytes = spec, prepared.templates, unit_bytes
        before = last_scan(plans)
        self.known = {(f.corpus, f.path): f for f in before.files} if before else {}
        self.covered: dict[tuple[str, str, str, str], int] = {}  # rows of a file that have units
        for unit in live:
            self.covered[_place(unit)] = max(self.covered.get(_place(unit), 0), unit.stop)
        # A file that comes back finds its old units, ordinals and commits again.
        self.former = known_units(plans)
        self.ordinal = next_ordinal(plans)
        self.left = {i: source.limit for i, source in enumerate(spec.corpus)}
        self.records: list[FileRecord] = []
        self.units: list[Unit] = []
        self.types: list[dict[str, str]] = []
        self.suited = [_Suited() for _ in spec.corpus]

    def add(self, file: SourceFile) -> None:
        """Record the next file, reading it unless its size and stamp are known."""
        source = self.spec.corpus[file.source]
        if self.left[file.source] == 0 and (file.corpus, file.path) not in self.known:
            return  # beyond `limit`, and so not even read
        settings, limit = _settings(source, self.templates[file.source]), self.left[file.source]
        seen = self.known.get((file.corpus, file.path))
        if seen and (seen.size, seen.stamp, seen.settings) == (file.size, file.stamp, settings):
            digest, rows, indexed = seen.digest, seen.rows, None
            self.suited[file.source].add({})  # it was so when it was indexed
        else:
            indexed = index_file(file, source, self.unit_bytes, 0, limit)
            digest, rows = indexed.digest, indexed.rows
            self.suited[file.source].add(indexed.unsuited)
        done = self.covered.get((file.corpus, file.path, digest, settings), 0)
        wanted = rows if limit is None else min(rows, limit)
        if done < wanted:
            # Units that exist keep their cuts; rows that a larger `limit` adds are cut from there on.
            if indexed is None or done:
                indexed = index_file(file, source, self.unit_bytes, done, wanted - done)
            self._lay(file, indexed, settings)
        if indexed is not None:
            self.types.append(indexed.types)
        self.records.append(
            FileRecord(file.source, file.corpus, file.path, digest, file.size, file.stamp, rows, settings)
        )
        if limit is not None:
            self.left[file.source] = max(0, limit - rows)

    def check_sources(self) -> None:
        """InputError naming a key of the spec that suits none of a source's files."""
        for suited in self.suited:
            suited.check()

    def _lay(self, file: SourceFile, indexed: FileIndex, settings: str) -> None:
        for span in indexed.spans:
            place = file.corpus, file.path, indexed.digest, settings
            unit = Unit(
                unit=unit_id(*place, span.start, span.stop),
                ordinal=self.ordinal,
                corpus=file.corpus,
                path=file.path,
                digest=indexed.digest,
                settings=settings,
                start=span.start,
                stop=span.stop,
                bytes=span.bytes,
            )
            self.units.append(self.former.get(unit.unit, unit))
            self.ordinal += unit.unit not in self.former


def plan_groups(prepared: Prepared, workers: int | None = None) -> list[list[str]]:
    """Ids of the SAEs that are scanned together: as many as fit a worker's memory, in order."""
    if workers is None:  # as many as the Ray executor starts here by default
        workers = (
            max(1, (os.cpu_count() or 1) // prepared.spec.model.threads) if prepared.device == "cpu" else 1
        )
    return groups_within(prepared, memory_budget(workers, prepared.device))


def groups_within(prepared: Prepared, budget: int) -> list[list[str]]:
    """Ids of the SAEs that are scanned together: as many as take `budget` bytes of a worker, in order."""
    groups: list[list[str]] = []
    used = budget + 1
    for sae in prepared.saes:
        size = sae_bytes(sae, prepared.device)
        if used + size > budget:
            groups.append([])
            used = 0
        groups[-1].append(sae.id)
        used += size
    return groups


def sae_bytes(sae: SaeInfo, device: str) -> int:
    """Memory of one SAE in a worker: float32 encoder and decoder, the encoder's 16-bit parts, its summary."""
    parts = 4 if device == "cuda" else 2
    return sae.width * ((8 + parts) * sae.d_in + 2400)


def memory_budget(workers: int, device: str) -> int:
    """Bytes that one worker may use for SAEs: half of this machine's memory, shared; of the GPU's if less."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 // workers
    if device == "cuda" and torch.cuda.is_available():
        host = min(host, torch.cuda.get_device_properties(0).total_memory // 2)
    return int(host)


def local_device() -> str:
    """`cuda` where this machine has a GPU that torch sees, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def environment() -> dict[str, str]:
    """Versions that may change values: recorded with each run, a change is named, not refused."""
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def code_version() -> str:
    try:
        return importlib.metadata.version("corpuscope")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "checkout"


def _sae_record(sae: SaeInfo, prepared: Prepared) -> dict[str, Any]:
    record = asdict(sae)
    for name in ("path", "files", "out", "options"):
        del record[name]
    return record | {
        "uri": sae.uri,
        "site": prepared.sites[sae.site],
        "layer": sae.site.layer,
        "keep": sae.keep_text,
        "fingerprint": prepared.fingerprints[sae.id],
    }


def _unique(files: list[SourceFile]) -> list[SourceFile]:
    seen: dict[tuple[str, str], SourceFile] = {}
    for file in files:
        other = seen.setdefault((file.corpus, file.path), file)
        if other is not file:
            raise InputError(
                f"corpus.uri: {other.uri} and {file.uri} would both be {file.corpus}/{file.path}; "
                "give the sources different `name`s"
            )
    return files


def _settings(source: CorpusSource, template: str | None) -> str:
    """Digest of what a source's settings, its chat template's text among them, do to its documents."""
    settings = [source.format, source.text, source.id, source.metadata, source.sample]
    if template is not None:
        settings += [source.messages, template_digest(template)]
    text = json.dumps(settings)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _place(unit: Unit) -> tuple[str, str, str, str]:
    return unit.corpus, unit.path, unit.digest, unit.settings


def _check_removal(gone: Sequence[Unit], added: Sequence[Unit], live: Sequence[Unit], allowed: bool) -> None:
    """InputError if more than a tenth of the documents would go: with their files, or as files shrink."""
    change: Counter[tuple[str, str]] = Counter()
    for unit in added:
        change[unit.corpus, unit.path] += unit.documents
    for unit in gone:
        change[unit.corpus, unit.path] -= unit.documents
    shrunk = {path: -by for (_, path), by in sorted(change.items()) if by < 0}
    lost, total = sum(shrunk.values()), sum(u.documents for u in live)
    if lost * 10 > total and not allowed:
        raise InputError(
            f"corpus.uri: {lost:,} of {total:,} documents are gone ({', '.join(list(shrunk)[:3])}"
            f"{', …' if len(shrunk) > 3 else ''}); if that is meant, add --allow-removal"
        )


def _metadata(ledger: Ledger, columns: Sequence[str], types: list[dict[str, str]]) -> dict[str, str]:
    """Types of the metadata columns: frozen by the first scan, else merged over the files."""
    have = ledger.identity()
    frozen = have["fixed"]["metadata"] if have else {}
    merged = merge_types(types)
    return {column: frozen.get(column) or merged.get(column, "string") for column in columns}
