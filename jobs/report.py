"""`corpuscope report`: a page about an SAE or about some features as one file, for someone without the index.

Invariant: the file is whole or not there; it is written beside its place and moved there.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import click

from jobs.output import count, message, uris
from sae_runtime.errors import InputError

_MOST = 1000  # features of a report


@click.command()
@click.argument("index")
@click.option("-o", "--output", metavar="FILE", required=True, help="The page; a file there is replaced.")
@click.option("--sae", metavar="SAE", help="Its facts, maps, table and first features.")
@click.option("--feature", "named", metavar="SAE:N", multiple=True, help="This feature; may be given again.")
@click.option("--features", "file", metavar="FILE", help="Features of a file, SAE:N a line.")
@click.option(
    "--sort",
    default="n_tokens",
    show_default=True,
    metavar="COLUMN",
    help="Of the SAE's table, highest first; with a minus before it, lowest first.",
)
@click.option(
    "--limit",
    default=20,
    show_default=True,
    metavar="N",
    type=click.IntRange(1, _MOST),
    help="Of its features.",
)
@click.option(
    "-k", "k", default=10, show_default=True, type=click.IntRange(min=0), help="Contexts of each feature."
)
def report(
    index: str,
    output: str,
    sae: str | None,
    named: tuple[str, ...],
    file: str | None,
    sort: str,
    limit: int,
    k: int,
) -> None:
    """One HTML page about an SAE of INDEX, or about some of its features, to send to someone without it.

    The page needs no network and no script. With --feature or --features, and no --sae, it shows those
    features alone.
    """
    try:
        import starlette  # noqa: F401
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise InputError(f"report: {error.name} is missing; pip install 'corpuscope[explore]'") from None
    from pipelines.words import human
    from queries.explorer.report import Wanted
    from queries.explorer.report import report as make

    features = [split(each, f"--feature {each}") for each in named]
    if file is not None:
        features += _listed(file)
    if len(features) > _MOST:
        raise InputError(
            f"report: {len(features):,} features are more than the {_MOST:,} that a page may have"
        )
    made = make(uris(index), Wanted(sae or "", features, sort, limit, k))
    size = _write(Path(output), made.html.encode())
    message(
        f"{count(made.features, 'feature')} with {count(made.contexts, 'context')}, {human(size)} -> {output}"
    )
    if made.cut:
        message(
            f"{count(made.cut, 'feature')} without contexts, as the page had grown large; "
            "fewer features or a smaller -k"
        )


def split(text: str, where: str) -> tuple[str, int]:
    """`SAE:N` as an SAE's name and a feature. Raises InputError."""
    name, colon, number = text.strip().rpartition(":")
    if not colon or not name or not number.isdecimal():
        raise InputError(f"{where}: SAE:N is wanted, such as average_l0_82:4711")
    return name, int(number)


def _listed(file: str) -> list[tuple[str, int]]:
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"--features {file}: not UTF-8 text; lines of SAE:N are wanted") from None
    found = [split(line, f"{file}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InputError(f"--features {file}: no line names a feature")
    return found


def _write(path: Path, data: bytes) -> int:
    """Write a file at once; its size."""
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(beside, 0o666 & ~umask)
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise
    return len(data)
