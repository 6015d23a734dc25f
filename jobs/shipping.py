"""What a submitted scan takes along: the code, the resolved spec, its template files. Nothing else.

Invariant: it is made of named parts (modules and SQL of the four packages, the spec, chat templates), so
data, weights and environments cannot slip in; and what the spec names is either there or seen by every
machine of the cluster. The same scan has the same `run`, whoever submits it from wherever.

The shipped code goes before a corpuscope that the cluster has installed: Python looks at a job's own folders
first. What the code needs (torch, transformers, ...) is the cluster's own. Ray names a folder after what is
in it, so the packages are sent apart from the spec: with another spec they are neither sent nor compiled
again. A scan of 24 tiny units took 20 s as the first job of a head and 6 s as the next ones, which had other
specs (2 cores, 2026-11-23).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import ipaddress
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
import yaml

from jobs.specfile import load_spec
from pipelines.spec import ScanSpec
from sae_runtime.errors import InputError, one_line

SPEC = "spec.yaml"
_PACKAGES = ("sae_runtime", "pipelines", "queries", "jobs")
_ENDINGS = (".py", ".sql")
_LIMIT = 32 << 20  # bytes; Ray's own limit is 512 MiB, which every node would download
_OWN = ("memory", "file", "local")  # schemes of what is on this machine, or in this process
_TEMPLATE_LIMIT = 1 << 20  # bytes


@dataclass(frozen=True)
class Shipment:
    """A scan as it is sent to a cluster."""

    run: str  # what would be scanned into what: the same for the same
    index: str
    spec: str  # the path of the spec as the user gave it
    version: str  # and digest, of the shipped code
    code: dict[str, bytes]  # files by path: package/module.py
    job: dict[str, bytes]  # files of the folder that the job runs in

    def write(self, folder: Path) -> dict[str, Any]:
        """Write all under `folder`; what of a Ray runtime environment says so."""
        for place, files in (("code", self.code), ("job", self.job)):
            for name, data in files.items():
                file = folder / place / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
        modules = [str(folder / "code" / package) for package in _PACKAGES]
        return {"working_dir": str(folder / "job"), "py_modules": modules}


def pack(path: str, index: str | None = None, shared: bool = False) -> Shipment:
    """The scan of the spec at `path` into `index`, or the spec's own, ready to be sent.

    Raises InputError for a wrong spec, for what only this machine can see (unless it is `shared`, and then
    for what no other process can), for passwords in URIs, and for more than 32 MiB to send.
    """
    spec, _ = load_spec(path, index)
    for key, uri in _places(spec):
        _check_place(key, uri, shared)
    spec, templates = _with_templates(spec)
    text = yaml.safe_dump(
        spec.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True, width=110
    )
    code = code_files()
    job = {**templates, SPEC: text.encode()}
    check_size({**code, **job})
    return Shipment(_run(spec, templates), spec.index, path, _version(code), code, job)


def code_files() -> dict[str, bytes]:
    """Modules and SQL of the four packages as they are imported here, by path below their common folder."""
    found: dict[str, bytes] = {}
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        root = Path(spec.origin).parent
        for file in sorted(root.rglob("*")):
            if file.suffix in _ENDINGS and file.is_file():
                found[f"{package}/{file.relative_to(root).as_posix()}"] = file.read_bytes()
    return found


def check_size(files: dict[str, bytes]) -> None:
    """InputError, with the largest names, if the files are too many bytes for every node to download."""
    total = sum(map(len, files.values()))
    if total > _LIMIT:
        largest = sorted(files, key=lambda name: -len(files[name]))[:3]
        named = ", ".join(f"{name} ({len(files[name]) / 1e6:,.1f} MB)" for name in largest)
        raise InputError(
            f"the job would take along {total / 1e6:,.0f} MB, and at most {_LIMIT / 1e6:,.0f} MB are "
            f"shipped; the largest are {named}: take them out of the packages"
        )


def _places(spec: ScanSpec) -> Iterator[tuple[str, str]]:
    """(key, URI) of all that must be seen from the cluster; chat templates travel with the job."""
    several = len(spec.corpus) > 1
    for number, source in enumerate(spec.corpus):
        for uri in source.uri:
            yield f"corpus[{number}].uri" if several else "corpus.uri", uri
    yield "model.uri", spec.model.uri
    for number, entry in enumerate(spec.saes):
        yield f"saes[{number}].uri" if len(spec.saes) > 1 else "saes.uri", entry.uri
    yield "index", spec.index


def _check_place(key: str, uri: str, shared: bool) -> None:
    last = uri.rpartition("::")[2]  # of a chain, what the rest is taken out of
    if any(_has_password(part) for part in uri.split("::")):
        raise InputError(
            f"{key}: there is a password in this URI, and whoever sees the job would read it; let the "
            "cluster have credentials of its own, or pass a variable by --env NAME"
        )
    scheme, _, rest = last.rpartition("://")
    if key == "model.uri" and not scheme and not last.startswith("/"):
        return  # an id of the hub: what is a path was made absolute
    if scheme and scheme not in _OWN and not _is_loopback(last):
        return
    if scheme == "memory":
        raise InputError(f"{key}: {uri} is the memory of one process, which no job can see; write to a store")
    if not shared:
        raise InputError(
            f"{key}: {uri} is seen from this machine only; put it where the cluster reads it (s3://, gs://, "
            "hf://), or give --shared if every machine of the cluster has it there"
        )
    if not _is_loopback(last) and not rest.startswith("/"):
        raise InputError(f"{key}: {uri} is relative to a folder of this machine; write the whole path")


def _has_password(uri: str) -> bool:
    try:
        return urlsplit(uri).password is not None
    except ValueError:  # brackets of a glob where a host's would be
        return False


def _is_loopback(uri: str) -> bool:
    try:
        host = urlsplit(uri).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _with_templates(spec: ScanSpec) -> tuple[ScanSpec, dict[str, bytes]]:
    """The spec with its template files named as they lie beside it in the job, and those files."""
    files: dict[str, bytes] = {}
    corpus = []
    for number, source in enumerate(spec.corpus):
        if source.template != "auto":
            name = f"template-{number}.jinja"
            files[name] = _template(source.template)
            source = source.model_copy(update={"template": name})
        corpus.append(source)
    return spec.model_copy(update={"corpus": tuple(corpus)}), files


def _template(uri: str) -> bytes:
    try:
        with fsspec.open(uri, "rb") as stream:
            data = bytes(stream.read(_TEMPLATE_LIMIT + 1))
    except (OSError, ValueError, ImportError) as error:
        problem = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise InputError(f"corpus.template: cannot read {uri}: {problem}") from error
    if len(data) > _TEMPLATE_LIMIT:
        raise InputError(
            f"corpus.template: {uri} has more than {_TEMPLATE_LIMIT >> 20} MiB; is it a template?"
        )
    return data


def _run(spec: ScanSpec, templates: dict[str, bytes]) -> str:
    """A name that follows from what would be scanned into what; when it is due is no part of it."""
    record: dict[str, Any] = spec.model_dump(mode="json", exclude={"schedule"})
    record["templates"] = {name: hashlib.blake2b(data).hexdigest() for name, data in templates.items()}
    text = json.dumps(record, sort_keys=True)
    return f"scan-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


def _version(code: dict[str, bytes]) -> str:
    digest = hashlib.blake2b(digest_size=6)
    for name in sorted(code):
        digest.update(f"{name} {len(code[name])}\n".encode() + code[name])
    try:
        version = importlib.metadata.version("corpuscope")
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        version = "checkout"
    return f"{version} {digest.hexdigest()}"
