"""Activations as scipy matrices: one document's tokens by features, or documents by features.

Invariant: a row is a token (or a document) whether anything fired there or not, in the document's own order,
once each; what a `keep` left out is refused by name, never a zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import duckdb
import numpy as np
import scipy.sparse

from queries.export import Sae, ask, saes, sampled_documents
from queries.lookup import resolve_sae
from sae_runtime.errors import InputError

_DTYPES = {"max": np.float32, "n_tokens": np.int32, "sum": np.float64}


def csr(con: duckdb.DuckDBPyConnection, sae: str, document: int) -> scipy.sparse.csr_matrix:
    """float32 [tokens of the document, width]: activations of an SAE (its id, or what names it).

    Rows are the document's own tokens in order: without BOS, and once where contexts overlap. Rows of tokens
    that are not counted are empty. InputError for an unknown document, or one whose rows were not kept.
    """
    (found,) = saes(con, [resolve_sae(con, sae)])
    span = ask(
        con,
        """
        SELECT count(*) AS documents, coalesce((SELECT sum(len(tokens) - first) FROM contexts
            WHERE document = $1), 0)::BIGINT AS tokens FROM documents WHERE document = $1
        """,
        [document],
    ).to_pylist()[0]
    if not span["documents"]:
        raise InputError(f"document: there is no document {document} in this index")
    _check_kept(con, found, document)
    rows = ask(
        con,
        f"""
        SELECT c.start - c.first + a.position AS token, a.feature, a.activation
        FROM {"activations" if found.rate >= 1 else "sampled_activations"} AS a
        JOIN contexts AS c ON c.context = a.context
        WHERE a.sae = $1 AND c.document = $2
        """,
        [found.id, document],
    )
    values = rows["activation"].to_numpy().astype(np.float32, copy=False)
    return _matrix(
        values, rows["token"].to_numpy(), rows["feature"].to_numpy(), (span["tokens"], found.width)
    )


def _matrix(
    values: np.ndarray, row: np.ndarray, column: np.ndarray, shape: tuple[int, int]
) -> scipy.sparse.csr_matrix:
    made = scipy.sparse.csr_matrix((values, (row, column)), shape=shape)
    made.sort_indices()
    return made


def _check_kept(con: duckdb.DuckDBPyConnection, sae: Sae, document: int) -> None:
    if sae.rate >= 1 or (sae.rate and document in sampled_documents(con, sae.rate)):
        return
    raise InputError(
        f"activations of {sae.id} were not kept in document {document} (keep: {sae.keep}); scan with "
        "`keep: tokens`, or take documents_csr"
    )


def documents_csr(
    con: duckdb.DuckDBPyConnection,
    sae: str,
    value: Literal["max", "n_tokens", "sum"] = "max",
    documents: Sequence[int] | None = None,
) -> tuple[scipy.sparse.csr_matrix, np.ndarray]:
    """([documents, width], int64 keys of its rows): a column of `document_features` of an SAE.

    `max` is float32 (the furthest from 0, sign kept), `n_tokens` int32 and `sum` float64. All documents in
    the order of their keys, or those given in that order. InputError for an unknown document, or where
    `keep: none` kept no rows.
    """
    if value not in _DTYPES:
        raise InputError(f"value: {value!r} is none of {', '.join(_DTYPES)}")
    (found,) = saes(con, [resolve_sae(con, sae)])
    if found.keep == "none":
        raise InputError(
            f"document_features of {found.id} were not kept (keep: none); scan with another `keep`"
        )
    known = ask(con, "SELECT document FROM documents ORDER BY document")["document"].to_numpy()
    keys = known if documents is None else np.array(documents, np.int64)
    if documents is not None:
        if len(np.unique(keys)) != len(keys):
            raise InputError("documents: one is given twice")
        if len(unknown := np.setdiff1d(keys, known)):
            raise InputError(f"documents: there is no document {unknown[0]} in this index")
    rows = ask(
        con, f"SELECT document, feature, {value} AS value FROM document_features WHERE sae = $1", [found.id]
    )
    of = rows["document"].to_numpy()
    wanted = np.isin(of, keys)
    order = np.argsort(keys)
    at = order[np.searchsorted(keys, of[wanted], sorter=order)]
    values = rows["value"].to_numpy()[wanted].astype(_DTYPES[value], copy=False)
    return _matrix(values, at, rows["feature"].to_numpy()[wanted], (len(keys), found.width)), keys
