"""The demo corpus: the Python reference manual and standard library that come with the running Python.

Invariant: for one Python installation the files are the same bytes every time. Documents are ordered by
a hash of their id, so the first N of them are a varied sample and a larger N only appends.
Trade-off: documents are cut to `--max-chars` at a line break, so that 124,000 SmolLM2 tokens (51,000 of
them the manual's) hold 56 topics and 56 modules, at the price of nothing from after a file's first pages.
Counted on Python 3.11.7 with the defaults; uncut, manual and library are 2.8 million tokens.
"""

from __future__ import annotations

import hashlib
import io
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import zstandard

Document = dict[str, Any]  # id, text, kind, chars and, for code, package

SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "pydoc_data",  # the manual itself, as one Python literal
}
# Code pages written by a program are tables of hexadecimal digits, a tenth of the library's tokens.
GENERATED_BY = "gencodec.py"


def manual() -> list[Document]:
    """Every topic of the reference manual, uncut, in order of hash."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise click.ClickException(
            "this Python comes without pydoc_data.topics: install its full standard library"
        ) from error
    found = [
        {"id": name, "text": text, "kind": "manual", "chars": len(text)} for name, text in topics.items()
    ]
    return sorted(found, key=order)


def stdlib() -> list[Document]:
    """Every module of the standard library, uncut, in order of hash; files left out are printed."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found, generated = [], 0
    for path in _python_files(root, SKIPPED_FOLDERS):
        name = path.relative_to(root).as_posix()
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            click.echo(f"left out {name}: not UTF-8 at byte {error.start}", err=True)
            continue
        if GENERATED_BY in text[:400]:
            generated += 1
            continue
        package = name.split("/")[0].removesuffix(".py")
        if text.strip():
            found.append({"id": name, "text": text, "kind": "code", "package": package, "chars": len(text)})
    click.echo(f"left out {generated} code pages written by {GENERATED_BY}", err=True)
    return sorted(found, key=order)


def order(document: Document) -> str:
    """The sort key of documents: a hash of the id, the same on every machine."""
    return hashlib.blake2b(document["id"].encode(), digest_size=8).hexdigest()


def cut(document: Document, max_chars: int) -> Document:
    """`document` with at most `max_chars` characters of text, ended at a line break where there is one."""
    text = document["text"]
    if len(text) > max_chars:
        text = text[: text.rfind("\n", 0, max_chars) + 1] or text[:max_chars]
    return {**document, "text": text, "chars": len(text)}


def _python_files(root: Path, skipped: set[str]) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        if not skipped.intersection(path.relative_to(root).parts[:-1]):
            yield path


def _json_lines(documents: list[Document]) -> bytes:
    lines = io.StringIO()
    for document in documents:
        lines.write(json.dumps(document, ensure_ascii=False) + "\n")
    return lines.getvalue().encode()


@click.command()
@click.argument("out_dir", type=click.Path(file_okay=False, path_type=Path))
@click.option("--documents", default=56, show_default=True, help="Most topics, and most modules, to write.")
@click.option("--max-chars", default=10000, show_default=True, help="Cut longer documents to this length.")
def main(out_dir: Path, documents: int, max_chars: int) -> None:
    """Write OUT_DIR/manual.jsonl and OUT_DIR/stdlib.jsonl.zst."""
    out_dir.mkdir(parents=True, exist_ok=True)
    topics = [cut(document, max_chars) for document in manual()[:documents]]
    modules = [cut(document, max_chars) for document in stdlib()[:documents]]
    (out_dir / "manual.jsonl").write_bytes(_json_lines(topics))
    packed = zstandard.ZstdCompressor(level=10).compress(_json_lines(modules))
    (out_dir / "stdlib.jsonl.zst").write_bytes(packed)
    for name, written in (("manual.jsonl", topics), ("stdlib.jsonl.zst", modules)):
        chars = sum(document["chars"] for document in written)
        click.echo(f"{out_dir / name}: {len(written)} documents, {chars:,} characters")


if __name__ == "__main__":
    main()
