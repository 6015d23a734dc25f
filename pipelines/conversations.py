"""Conversations to tokens: the chat template's text, tokenised, and which token is of which message.

Invariant: token ids are those of the tokenizer's own `apply_chat_template(tokenize=True)`, whatever
merges across the borders of contents, except that a content is never parsed for special tokens: what
spells one there is ordinary characters. A token is of the message whose content its first character
lies in, else of the template.

Where contents lie is found by rendering again with marks (private-use characters that the conversation
does not hold) around them and taking the marks out: unless that gives the first rendering, a template
looked at what the marks hid. Then marks move inside surrounding whitespace (templates trim), then
inside tags such as <think> (templates split there); a conversation that none of these suits is refused.
What a template drops has no tokens, what it adds inside a message is the template's.

Special tokens in contents: such a text is tokenised by a copy of the tokenizer in which special tokens
have other names, used where the template wrote one. That costs a second tokenizer's memory, only once
it is needed, and keeps one pass over the whole text, so that prefix spaces and merges stay as they are.

Templates that write today's date get 26 July 2024 (what Llama's write where they have no clock): an
index must not depend on the day of the scan.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import fsspec
import numpy as np

from pipelines.contexts import Segment, special_ids
from pipelines.corpus import Document
from pipelines.messages import Message, strings, texts
from pipelines.spec import CorpusSource
from sae_runtime.errors import DataError, InputError, is_infrastructure, one_line

TEMPLATE = "template"  # the role of tokens that are of no message
_DATE = datetime.datetime(2024, 7, 26)
_MARKS = range(0xF0000, 0xFFFFE)  # plane 15: marks in renderings
_ALIASES = range(0x100000, 0x10F000)  # plane 16: second characters of special tokens' other names
_LEADS = range(0x10FFFD, 0x10F000, -1)  # ... and first characters, the same for all tokens
_MARK = re.compile(f"[{chr(_MARKS[0])}-{chr(_MARKS[-1])}]")
_NOBODY, _GUARDED = -1, -2  # owners of a template's own text, and of strings that are no content
_TAG = re.compile(r"(</?\w+>)")


@dataclass(frozen=True)
class Tokens:
    """A conversation's tokens, as the template has them (a BOS of its own included)."""

    ids: np.ndarray  # int32 [n]
    message: np.ndarray  # int32 [n], the message each token is of, or -1: the template
    roles: tuple[str, ...]  # of the messages

    def segments(self, skip: int = 0) -> tuple[Segment, ...]:
        """Runs of tokens of one message, without the first `skip` tokens. An empty one is all template."""
        message = self.message[skip:]
        if not len(message):
            return (Segment(TEMPLATE, 0, 0, template=True),)
        starts = np.concatenate([[0], np.flatnonzero(np.diff(message)) + 1, [len(message)]]).tolist()
        return tuple(
            Segment(TEMPLATE if owner < 0 else self.roles[owner], start, stop, owner < 0)
            for start, stop in pairwise(starts)
            for owner in [int(message[start])]
        )


def template_text(source: CorpusSource, tokenizer: Any, model: str) -> str | None:
    """The Jinja text of a source's chat template; None for one that has no conversations.

    InputError, naming corpus.template, if there is none or it is no Jinja.
    """
    if source.messages is None:
        return None
    if source.template != "auto":
        text = _file_text(source.template)
    else:
        if not tokenizer.chat_template:
            raise InputError(
                f"corpus.template: the tokenizer of {model} has no chat template; give a Jinja file"
            )
        try:
            text = str(tokenizer.get_chat_template())
        except ValueError as error:  # several templates and none of them the default
            raise InputError(f"corpus.template: the tokenizer of {model}: {one_line(error)}") from error
    _check_syntax(text, tokenizer, "corpus.template" + (f": {source.template}" * (source.template != "auto")))
    return text


def template_digest(text: str) -> str:
    """What stands for a template in a unit's identity."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


class Conversations:
    """Tokenises conversations by one chat template (Jinja text)."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        self._tokenizer = tokenizer
        self._template = _with_fixed_date(template)
        self._special = np.array(sorted(special_ids(tokenizer)), np.int64)
        self._names = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
        self._spells = _any_of(self._names[i] for i in self._special.tolist() if i in self._names)
        self._aliased: _Aliased | None = None

    def tokenize(self, documents: Sequence[Document]) -> list[Tokens]:
        """The tokens of each document's messages. DataError saying what is wrong with the first bad one."""
        rendered = []
        for document in documents:
            try:
                rendered.append(self._rendered(document.messages or ()))
            except ValueError as error:
                raise DataError(str(error)) from error
        encoded = self._encode([each.text for each in rendered])
        found = []
        for document, each, (ids, starts, stops) in zip(documents, rendered, encoded, strict=True):
            try:
                ids, message = self._owned(each, ids, starts, stops)
            except ValueError as error:
                raise DataError(str(error)) from error
            roles = tuple(message["role"] for message in document.messages or ())
            found.append(Tokens(ids.astype(np.int32), message, roles))
        return found

    def _encode(self, batch: list[str]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(ids, first character, character after the last) of each text's tokens."""
        if not batch:
            return []
        backend = self._tokenizer.backend_tokenizer
        processor = backend.post_processor
        backend.post_processor = None  # it adds nothing here, but some cut spaces off the offsets
        try:
            encoded = self._tokenizer(
                batch,
                add_special_tokens=False,
                return_attention_mask=False,
                return_offsets_mapping=True,
                verbose=False,
            )
        finally:
            backend.post_processor = processor
        pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [_arrays(ids, offsets) for ids, offsets in pairs]

    def _owned(
        self, rendered: _Rendered, ids: np.ndarray, starts: np.ndarray, stops: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids and the message of each; tokenised again if a content was parsed for special tokens."""
        owner = rendered.owner
        inside = np.concatenate([[0], np.cumsum(owner != _NOBODY)])
        touched = inside[stops] > inside[starts]
        if not (np.isin(ids, self._special) & touched).any():
            return ids, np.maximum(owner[starts], _NOBODY)
        return self._guarded(rendered)

    def _guarded(self, rendered: _Rendered) -> tuple[np.ndarray, np.ndarray]:
        """`_owned` with the names of special tokens in contents taken for ordinary characters."""
        lead = next(char for char in map(chr, _LEADS) if char not in rendered.text)
        if self._aliased is None or self._aliased.lead != lead:
            self._aliased = _Aliased(self._tokenizer, self._names, set(self._special.tolist()), lead)
        pieces, owners, markers = [], [], 0
        for start, stop in rendered.runs():
            piece = rendered.text[start:stop]
            if rendered.owner[start] == _NOBODY:
                piece, count = self._aliased.rename(piece)
                markers += count
            pieces.append(piece)
            owners.append(np.full(len(piece), rendered.owner[start], np.int32))
        owner = np.concatenate([*owners, np.full(1, _NOBODY, np.int32)])
        ids, is_marker, starts = self._aliased.encode("".join(pieces))
        message = np.where(is_marker, _NOBODY, owner[starts])
        if int(is_marker.sum()) != markers:
            raise ValueError("the tokenizer does not find the chat template's special tokens beside those "
                             "that a message spells")  # fmt: skip
        made = np.isin(ids, self._special) & (message != _NOBODY)
        if made.any():
            name = self._names.get(int(ids[made][0]), str(ids[made][0]))
            raise ValueError(f"a message spells the special token {name}, which this tokenizer makes of "
                             "ordinary characters too")  # fmt: skip
        return ids, np.maximum(message, _NOBODY).astype(np.int32)

    def _rendered(self, messages: Sequence[Message]) -> _Rendered:
        """The template's text and where contents lie in it. ValueError if that cannot be told."""
        if not messages:
            return _Rendered("", np.full(1, _NOBODY, np.int32))
        text, messages = self._plain(messages)
        owner = np.full(len(text) + 1, _NOBODY, np.int32)  # one more: where the text ends
        for start, stop, number in self._spans(messages, text):
            owner[start:stop] = number
        return _Rendered(text, owner)

    def _plain(self, messages: Sequence[Message]) -> tuple[str, Sequence[Message]]:
        """The rendering, and the messages that gave it: parts are joined for a template that knows none."""
        several = [m for m in messages if isinstance(m["content"], list)]
        joined = [
            {**m, "content": "".join(texts(m))} if isinstance(m["content"], list) else m for m in messages
        ]
        if not several:
            return self._render(messages), messages
        try:
            text = self._render(messages)
        except ValueError:
            return self._render(joined), joined
        spelt = [
            form
            for m in several
            for form in (str(m["content"]), json.dumps(m["content"], ensure_ascii=False))
        ]
        lost = [part for m in several for part in texts(m) if part.strip() not in text]
        if lost or any(form in text for form in spelt):
            return self._render(joined), joined
        return text, messages

    def _render(self, messages: Sequence[Message]) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), chat_template=self._template, tokenize=False
            )
        except Exception as error:  # a template is code of the user's, which can fail in any way
            if is_infrastructure(error):
                raise
            raise ValueError(f"the chat template refuses it: {one_line(error)}") from error
        return str(text)

    def _spans(self, messages: Sequence[Message], text: str) -> list[_Span]:
        """Where in `text` contents lie, ascending."""
        used = set(text).union(*strings(list(messages)))

        def attempt(cut: _Cut) -> list[_Span] | None:
            try:
                marked = _Marked(messages, cut, self._spells, used)
                return marked.spans(self._render(marked.messages), text)
            except ValueError:  # a template may refuse what it does not know
                return None

        found = attempt(_trimmed(set()))
        if found is not None:
            return found
        sides = {
            (message["role"], side)
            for message in messages
            for content in texts(message)
            for side, bare in (("left", content.lstrip()), ("right", content.rstrip()))
            if bare != content
        }
        found = attempt(_trimmed(sides)) if sides else None
        if found is None:
            found = attempt(lambda role, content: _between_tags(content))
            if found is None:
                raise ValueError("the chat template changes the text of its messages, so that their tokens "
                                 "cannot be told from its own; give another `corpus.template`")  # fmt: skip
            return found
        # Not every role is trimmed, nor on both sides: marks go back out where that changes nothing.
        for side in sorted(sides):
            wider = attempt(_trimmed(sides - {side}))
            if wider is not None:
                sides, found = sides - {side}, wider
        return found


@dataclass(frozen=True)
class _Rendered:
    """A template's text; `owner` int32 [characters + 1]: the message whose content each is of, or below 0."""

    text: str
    owner: np.ndarray

    def runs(self) -> Iterator[tuple[int, int]]:
        """Stretches of one owner."""
        ends = np.flatnonzero(np.diff(self.owner[:-1])) + 1
        edges = [0, *ends.tolist(), len(self.text)]
        return pairwise(edges)


@dataclass(frozen=True)
class _Piece:
    """A stretch of a content: what is before it since the last, itself, and what is after the last one."""

    before: str
    text: str
    after: str = ""


_Cut = Callable[[str, str], list[_Piece]]  # role and content to what is marked of it
_Span = tuple[int, int, int]  # start, stop, owner


def _trimmed(sides: set[tuple[str, str]]) -> _Cut:
    """Contents as one piece each, without their outer whitespace on the `sides` (role, left or right)."""

    def cut(role: str, content: str) -> list[_Piece]:
        start = len(content) - len(content.lstrip()) if (role, "left") in sides else 0
        stop = len(content.rstrip()) if (role, "right") in sides else len(content)
        if start >= stop:
            return []
        return [_Piece(content[:start], content[start:stop], content[stop:])]

    return cut


def _between_tags(content: str) -> list[_Piece]:
    """What lies between a content's tags, without outer whitespace."""
    found: list[_Piece] = []
    before = ""
    for part in _TAG.split(content):
        core = "" if _TAG.fullmatch(part) else part.strip()
        if not core:
            before += part
            continue
        start = part.index(core)
        found.append(_Piece(before + part[:start], core))
        before = part[start + len(core) :]
    if found:
        last = found.pop()
        found.append(_Piece(last.before, last.text, before))
    return found


class _Marked:
    """Messages with a pair of marks around each piece of their contents.

    Other strings of a message that spell a special token are marked whole, so that they are guarded too.
    """

    def __init__(
        self, messages: Sequence[Message], cut: _Cut, spells: re.Pattern[str], used: set[str]
    ) -> None:
        self._cut, self._spells = cut, spells
        self._free = (char for char in map(chr, _MARKS) if char not in used)
        self._pieces: list[tuple[int, _Piece]] = []  # (owner, piece) of marks 2 k and 2 k + 1
        self._number: dict[str, int] = {}  # of each mark
        self.messages = [self._message(number, message) for number, message in enumerate(messages)]

    def _message(self, number: int, message: Message) -> Message:
        content, role = message["content"], message["role"]
        marked = {key: self._guarded(value) for key, value in message.items() if key != "content"}
        if isinstance(content, list):
            content = [{**part, "text": self._text(number, role, part["text"])} for part in content]
        elif content is not None:
            content = self._text(number, role, content)
        return {**marked, "content": content}

    def _guarded(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._between_marks(_GUARDED, [_Piece("", value)]) if self._spells.search(value) else value
        if isinstance(value, list):
            return [self._guarded(item) for item in value]
        return {k: self._guarded(v) for k, v in value.items()} if isinstance(value, dict) else value

    def _text(self, number: int, role: str, text: str) -> str:
        pieces = self._cut(role, text)
        return self._between_marks(number, pieces) if pieces else text

    def _between_marks(self, owner: int, pieces: list[_Piece]) -> str:
        marked = ""
        for piece in pieces:
            first, last = next(self._free, ""), next(self._free, "")
            if not last:
                raise ValueError("too many messages in one conversation")
            self._number[first], self._number[last] = 2 * len(self._pieces), 2 * len(self._pieces) + 1
            self._pieces.append((owner, piece))
            marked += piece.before + first + piece.text + last
        return marked + pieces[-1].after

    def spans(self, rendered: str, text: str) -> list[_Span] | None:
        """Where in `text` the pieces are; None unless `rendered` is it with whole pairs of marks."""
        found: list[_Span] = []
        plain: list[str] = []
        at = begun = done = 0
        opened: int | None = None
        for match in _MARK.finditer(rendered):
            number = self._number.get(match[0])
            if number is None:
                continue  # the text's own
            plain.append(rendered[done : match.start()])
            at, done = at + len(plain[-1]), match.end()
            if opened is None and number % 2 == 0:
                opened, begun = number, at
            elif opened is not None and number == opened + 1:
                owner, piece = self._pieces[opened // 2]
                floor = found[-1][1] if found else 0
                found.append((*self._widened(text, begun, at, piece, floor), owner))
                opened = None
            else:
                return None
        plain.append(rendered[done:])
        return found if opened is None and "".join(plain) == text else None

    @staticmethod
    def _widened(text: str, start: int, stop: int, piece: _Piece, floor: int) -> tuple[int, int]:
        """A piece with the tags around it, where the template kept them as they are.

        Whitespace alone stays outside: it may be the template's as well.
        """
        before, after = piece.before, piece.after
        if before.strip() and start - len(before) >= floor and text[:start].endswith(before):
            start -= len(before)
        if after.strip() and text.startswith(after, stop):
            stop += len(after)
        return start, stop


class _Aliased:
    """A copy of a tokenizer in which special tokens go by other names, `lead` and one more character."""

    def __init__(self, tokenizer: Any, names: dict[int, str], special: set[int], lead: str) -> None:
        from tokenizers import Tokenizer

        self.lead = lead
        data = json.loads(tokenizer.backend_tokenizer.to_str())
        data["post_processor"] = data["truncation"] = data["padding"] = None
        self._alias: dict[str, str] = {}
        ids: dict[str, int] = {}  # by the name in the copy
        for number, token in enumerate(data["added_tokens"]):
            if token["id"] in special:
                alias = lead + chr(_ALIASES[number])
                self._alias[token["content"]] = token["content"] = alias
            ids[token["content"]] = token["id"]
        self._copy = Tokenizer.from_str(json.dumps(data))
        self._any = _any_of(names.values())
        # The copy may number added tokens anew.
        added = {token.content: i for i, token in self._copy.get_added_tokens_decoder().items()}
        self._id = np.arange(1 + max([*added.values(), self._copy.get_vocab_size()]))
        for name, number in ids.items():
            self._id[added[name]] = number
        self._markers = np.array([added[alias] for alias in self._alias.values()], np.int64)

    def rename(self, text: str) -> tuple[str, int]:
        """`text` of the template with the other names of its special tokens, and how many it has."""
        count = 0

        def other(match: re.Match[str]) -> str:
            nonlocal count
            count += match[0] in self._alias
            return self._alias.get(match[0], match[0])

        return self._any.sub(other, text), count

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids as the original numbers them, which are the template's markers, first characters)."""
        encoded = self._copy.encode(text, add_special_tokens=False)
        ids, starts, _ = _arrays(encoded.ids, encoded.offsets)
        return self._id[ids], np.isin(ids, self._markers), starts


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest of `names`, as tokenizers do; nothing where there are none."""
    longest = sorted(set(names), key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, longest)) or "(?!)")


def _arrays(ids: Any, offsets: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    pairs = np.array(offsets, np.int64).reshape(-1, 2)
    return np.array(ids, np.int64), pairs[:, 0], pairs[:, 1]


def _file_text(uri: str) -> str:
    try:
        with fsspec.open(uri, "rb") as stream:
            return bytes(stream.read()).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"corpus.template: {uri}: not UTF-8 text at byte {error.start}") from error
    except (OSError, ValueError, ImportError) as error:
        problem = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise InputError(f"corpus.template: cannot read {uri}: {problem}") from error


def _check_syntax(text: str, tokenizer: Any, place: str) -> None:
    from jinja2 import TemplateSyntaxError

    try:
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}], chat_template=_with_fixed_date(text), tokenize=False
        )
    except TemplateSyntaxError as error:
        line = error.lineno - ("strftime_now" in text)
        raise InputError(f"{place}: line {line}: not a Jinja template: {one_line(error)}") from error
    except ImportError as error:
        raise InputError(f"{place}: {one_line(error)}") from error
    except Exception:  # a template that compiled may want other messages than these: rows will tell
        return


def _with_fixed_date(template: str) -> str:
    """`template` with a `strftime_now` that knows one date only, put on a line before its first."""
    if "strftime_now" not in template:
        return template
    codes = ["-d", "-m", "-I", "-H", *"aAbBdeHIjmMpSuyY"]
    replaced = "".join(f"|replace('%{code}', '{_DATE.strftime('%' + code)}')" for code in codes)
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n{template}"
