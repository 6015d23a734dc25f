"""`corpuscope export`: an index in the formats of the tools that people already use.

Invariant: what cannot be exported exactly is refused or named, and a folder that an export did not finish
says so (queries/export.py).
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from jobs.output import count, message, opened
from sae_runtime.errors import InputError

# Options that only one format has, and the arguments that they are.
_ONLY = {
    "neuronpedia": {
        "features": "--features",
        "model_id": "--model-id",
        "source_set": "--source-set",
        "creator_id": "--creator-id",
        "batch": "--batch",
    },
    "delphi": {"ctx": "--ctx", "splits": "--splits"},
    "parquet": {},
}
_some = click.IntRange(min=1)


@click.command()
@click.argument("index")
@click.option(
    "--format",
    "format_",
    type=click.Choice(list(_ONLY)),
    required=True,
    help="Neuronpedia's importable layout, delphi's latent cache, or plain Parquet files.",
)
@click.option("-o", "--output", metavar="DIR", required=True, help="Folder to write into; any fsspec URI.")
@click.option("--sae", "names", metavar="SAE", multiple=True, help="Only this one; may be given again.")
@click.option("--overwrite", is_flag=True, help="Replace an export that is in DIR, whole or not.")
@click.option("--features", metavar="N", type=_some, help="neuronpedia: each SAE's first N features.")
@click.option("--model-id", metavar="ID", help="neuronpedia: its name of the model.")
@click.option("--source-set", metavar="NAME", help="neuronpedia: its name of the suite.")
@click.option("--creator-id", metavar="ID", help="neuronpedia: the user there that it is to belong to.")
@click.option("--batch", metavar="N", type=_some, help="neuronpedia: features in a file [512].")
@click.option("--ctx", metavar="N", type=_some, help="delphi: tokens of a window [256].")
@click.option("--splits", metavar="N", type=_some, help="delphi: files of an SAE, at most [5, or by memory].")
def export(
    index: str, format_: str, output: str, names: tuple[str, ...], overwrite: bool, **chosen: Any
) -> None:
    """Hand INDEX to the tools people already use. DIR is whole once README.json is in it.

    neuronpedia: release, model, source set and source, features with statistics and histograms, and their
    top and sampled contexts in windows of up to 128 tokens. delphi: every token row, contexts cut anew into
    full windows of --ctx tokens; needs `keep: tokens`, or exports the sampled documents. parquet: the
    views, a folder an SAE.
    """
    from jobs.progress import Steps
    from queries.export import Folder, saes
    from queries.lookup import resolve_sae

    given = {name: value for name, value in chosen.items() if value is not None}
    for other, options in _ONLY.items():
        for name in options.keys() & given.keys():
            if other != format_:
                raise InputError(f"{options[name]}: is for --format {other}, not {format_}")
    con = opened(index)
    found = saes(con, [resolve_sae(con, name) for name in names])
    if format_ == "delphi":
        from queries.delphi import refuse

        refuse(found)
    folder = Folder(output, overwrite, [uri for uri in index.split(",") if uri])
    writer = {"neuronpedia": _neuronpedia, "delphi": _delphi, "parquet": _parquet}[format_]
    try:
        facts = writer(con, found, folder, given, Steps())
    except InputError:
        folder.abandon()
        raise
    folder.finish({"format": format_, "index": index, "saes": [sae.id for sae in found]} | facts)
    message(f"{count(len(found), 'SAE')} -> {output}")


def _neuronpedia(con: Any, saes: Any, folder: Any, given: dict[str, Any], told: Any) -> dict[str, Any]:
    from queries import neuronpedia

    called = {"model_id": "model", "creator_id": "creator"}
    settings = neuronpedia.Settings(**{called.get(name, name): value for name, value in given.items()})
    written = neuronpedia.write(con, saes, folder, settings, told)
    for one in written:
        message(f"{one.sae}: {count(one.features, 'feature')}, {one.activations:,} windows -> {one.folder}")
    return {
        "sources": [asdict(one) for one in written],
        "tokens": "bytes that are no UTF-8 by themselves, and NUL, are shown as <0xE2>",
        "frac_nonzero": "n_nonzero / n_tokens, counted tokens",
        "binContains": "share of counted tokens whose absolute activation is in [binMin, binMax); top: -1",
        "values": "0 is not active or not counted",
    }


def _delphi(con: Any, saes: Any, folder: Any, given: dict[str, Any], told: Any) -> dict[str, Any]:
    from queries import delphi

    settings = delphi.Settings(**given)
    written = delphi.write(con, saes, folder, settings, told)
    cuts = {}
    for sae, one in zip(saes, written, strict=True):
        message(f"{one.sae}: {count(one.rows, 'row')} in {count(one.splits, 'file')} -> {one.folder}")
        cuts[sae.keep] = one.cut
    for keep, cut in cuts.items():
        message(
            f"keep: {keep}: {count(cut.windows, 'window')} of {settings.ctx} tokens of "
            f"{count(cut.documents, 'document')}; {cut.dropped:,} of {count(cut.tokens, 'token')} "
            f"({cut.dropped / max(cut.tokens, 1):.2%}) are dropped, as they fill no window; "
            f"{cut.uncounted:,} in windows are not counted and have no rows"
        )
    counted = delphi.counted(con)
    for sae in saes:
        if sae.n_tokens < counted:
            message(
                f"{sae.id}: {counted - sae.n_tokens:,} more tokens of the index are not counted at its site "
                "(norm_above)"
            )
    return {
        "latents": [asdict(one) for one in written],
        "note": "windows are of one document's tokens, without BOS; tokens not counted have no rows",
    }


def _parquet(con: Any, saes: Any, folder: Any, given: dict[str, Any], told: Any) -> dict[str, Any]:
    from queries import export_parquet

    written = export_parquet.write(con, saes, folder, told)
    for sae in saes:
        if left_out := export_parquet.missing(sae):
            instead = "; sampled_activations has the sampled documents' rows" if sae.rate else ""
            message(f"{sae.id}: keep: {sae.keep} has no {' and no '.join(left_out)}{instead}")
    message(f"{count(len(written), 'file')} with {count(sum(one.rows for one in written), 'row')}")
    return {
        "files": {one.file: one.rows for one in written},
        "note": "columns are those of the views of these names; an SAE's files are in the folder of its id",
        "not_kept": {sae.id: export_parquet.missing(sae) for sae in saes if export_parquet.missing(sae)},
    }
