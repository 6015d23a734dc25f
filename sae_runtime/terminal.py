"""Text of others as a terminal may have it: no character of it moves the cursor or turns the line around.

Invariant: what `plain` gives is one line without control characters, without the marks that change the
direction of text, and can be encoded. Letters, accents and joined emoji stay.
"""

from __future__ import annotations

import re

_SIGNS = {"\n": "↵", "\t": "→", "\r": "␍"}
_CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str, keep: str = "") -> str:
    """The text with signs for what steers a terminal, but for the characters of `keep`."""
    return _CONTROL.sub(lambda found: found[0] if found[0] in keep else sign(found[0]), text)


def escaped(text: str) -> str:
    """JSON text with JSON's own escapes for what steers a terminal; its spaces and newlines stay."""
    return _CONTROL.sub(lambda found: found[0] if found[0] in "\n\t\r" else f"\\u{ord(found[0]):04x}", text)


def in_bytes(text: str) -> str:
    """Text with what steers a terminal as its UTF-8 in hexadecimal, `\\x1b`, as SQL's E'' strings have it."""
    return _CONTROL.sub(lambda found: "".join(f"\\x{byte:02x}" for byte in found[0].encode()), text)


def sign(character: str) -> str:
    """What stands for a character that is not printed, such as ↵ or \\u{1b}."""
    return _SIGNS.get(character, f"\\u{{{ord(character):x}}}")
