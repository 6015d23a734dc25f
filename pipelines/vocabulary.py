"""The vocabulary as bytes: what each token stands for, so that text is joined and decoded truthfully.

Invariant: joining the bytes of a document's tokens gives the document's UTF-8 text, for byte-level BPE
(GPT-2's byte alphabet) and for SentencePiece vocabularies with byte fallback; special tokens stand for
their own spelling. Multi-byte characters may be cut across tokens, so `text` alone is for display.
"""

from __future__ import annotations

import re
from typing import Any

import pyarrow as pa

from pipelines.schema import VOCABULARY_SCHEMA

_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


def vocabulary(tokenizer: Any) -> pa.Table:
    """Columns token, text, bytes for every id of the tokenizer, in order."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}
    byte_level = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)
    pieces = [
        added[i].encode() if i in added else token_bytes(token or "", byte_level)
        for i, token in enumerate(tokens)
    ]
    return pa.table(
        {
            "token": pa.array(range(len(pieces)), pa.int32()),
            "text": [piece.decode(errors="replace") for piece in pieces],
            "bytes": pa.array(pieces, pa.binary()),
        },
        schema=VOCABULARY_SCHEMA,
    )


def token_bytes(token: str, byte_level: bool) -> bytes:
    """The bytes that a vocabulary entry stands for."""
    if byte_level:
        return b"".join(bytes([_BYTE_OF[c]]) if c in _BYTE_OF else c.encode() for c in token)
    match = _FALLBACK.fullmatch(token)
    if match:
        return bytes([int(match[1], 16)])
    return token.replace("\u2581", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: printable Latin-1 bytes stand for themselves, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    hidden = [byte for byte in range(256) if byte not in printable]
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()
