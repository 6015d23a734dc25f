"""A conversation as a corpus row holds it, checked and brought to one form.

Invariant: what comes out is a tuple of dicts with a string `role` and a `content` that is a string, a
list of text parts, or None for a message that only calls tools; every other key of a message is kept,
because chat templates read some, but for those that are null (Arrow gives each row every key).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from pipelines.readers import shown

Message = dict[str, Any]
SHAREGPT = {"human": "user", "gpt": "assistant"}


def conversation(value: Any) -> tuple[Message, ...]:
    """The messages of a column's value: a list of {role, content} or {from, value}, or JSON text of one.

    ValueError says what is wrong, as the end of a sentence that begins with the column.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(f"is {shown(value)}, not a list of messages nor JSON text of one") from None
    if not isinstance(value, list):
        raise ValueError(f"is {shown(value)}, not a list of messages")
    return tuple(_message(number, item) for number, item in enumerate(value))


def texts(message: Message) -> list[str]:
    """The texts of a message's content, in order."""
    content = message["content"]
    if isinstance(content, list):
        return [part["text"] for part in content]
    return [] if content is None else [content]


def text_bytes(value: Any) -> int:
    """UTF-8 bytes of the contents in a column's value; 0 where it cannot be read as a conversation."""
    try:
        return content_bytes(conversation(value))
    except ValueError:
        return 0


def content_bytes(messages: Sequence[Message]) -> int:
    """UTF-8 bytes of the contents of messages."""
    return sum(len(text.encode()) for message in messages for text in texts(message))


def strings(value: Any) -> Iterator[str]:
    """Every string inside a JSON value, keys included."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            left.extend(item)
            left.extend(item.values())
        elif isinstance(item, list):
            left.extend(item)


def _message(number: int, item: Any) -> Message:
    if not isinstance(item, dict):
        raise ValueError(f"holds {shown(item)} as message {number}, not a mapping with role and content")
    message = {key: value for key, value in item.items() if value is not None}
    if "role" not in message and "from" in message:
        sender = message.pop("from")
        message["role"] = SHAREGPT.get(sender, sender) if isinstance(sender, str) else sender
        if "value" in message:
            message["content"] = message.pop("value")
    for key in ("role", "content"):
        if key not in message and not (key == "content" and message.get("tool_calls")):
            keys = ", ".join(map(str, item)) or "nothing"
            raise ValueError(f"holds message {number} without a {key} (it has {keys})")
    role = message.pop("role")
    if not isinstance(role, str) or not role:
        raise ValueError(f"holds message {number} with the role {shown(role)}, not a name")
    content = message.pop("content", None)
    if isinstance(content, list):
        content = [_part(number, part) for part in content]
    elif content is not None and not isinstance(content, str):
        raise ValueError(f"holds message {number} with the content {shown(content)}, not text")
    message = {"role": role, "content": content, **message}
    for text in strings(message):
        try:
            text.encode()  # JSON can escape half a surrogate pair, which no tokenizer takes
        except UnicodeEncodeError:
            raise ValueError(
                f"holds message {number} with {shown(text)}, which is not Unicode text"
            ) from None
    return message


def _part(number: int, item: Any) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise ValueError(f"holds message {number} with the content part {shown(item)}, not a mapping")
    part = {key: value for key, value in item.items() if value is not None}
    if part.get("type", "text") != "text":
        raise ValueError(
            f"holds message {number} with a content part of type {shown(part['type'])}; only text is scanned"
        )
    if not isinstance(part.get("text"), str):
        raise ValueError(f"holds message {number} with the content part {shown(item)}, which has no text")
    return {"type": "text", **part}
