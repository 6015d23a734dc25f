"""A corpus that means harm to whoever looks at it, and a look at pages that says whether it did.

Texts are HTML, scripts, template syntax of others, marks that turn lines around, control characters, cut
characters and tokens of 100,000 characters; so are ids, metadata, corpus, file and SAE names. An index of
it is made by a real scan.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import tiny

from sae_runtime.terminal import sign

LONG = 100_000
ACTS = (
    "<script>window.evil=1</script>",
    "</script><script>window.evil=1</script>",
    "</title></textarea></style><script>window.evil=1</script>",
    '"><img src=x onerror="window.evil=1">',
    "' onmouseover='window.evil=1' x='",
    "<svg onload=window.evil=1>",
    "<evil-x data-evil='1'>text</evil-x>",
    "<!-- <iframe srcdoc='<script>window.evil=1</script>'>",
    '<a href="javascript:window.evil=1">click</a>',
    "<style>body{display:none}</style><base href=//evil.example/>",
    "{{ 1234567 * 3 }} {% raw %} ${1234567 * 3} <%= 1234567 * 3 %>",
    "&lt;b&gt; &amp;amp; &#x3c;b&#x3e; ]]>",
)
TURNS = "left \u202egnirts desrever\u202c \u2066isolated\u2069 \u200f\u200e end"
CONTROLS = (
    "nul \0 bell \x07 escape \x1b[2J delete \x7f next \x85 line \u2028 paragraph \u2029 tab\t. cr\r. \ufeff"
)
EMOJI = "family 👨‍👩‍👧‍👦 flag 🏴󠁧󠁢󠁥󠁮󠁧󠁿 accent e\u0301 shin \u05e9\u05c1 日本語 \U0010ffff"
TOKENS = (  # of the tokenizer's own, so that each is one token
    "A" * LONG,
    "<script>window.evil=2</script>",
    "\u202eturned\u202c",
    "nul\0nul",
)
TEXTS = (
    *ACTS,
    TURNS,
    CONTROLS,
    EMOJI,
    "x" * 1000,
    "word " * 3 + TOKENS[0] + " word",
    " ".join(TOKENS[1:]),
    "\n" * 40,
    " ",
    "the cat sat on a mat while seven red foxes jumped",
)
COLUMN = "m\"><img src=x onerror='window.evil=1'>/\n{{ 1234567 * 3 }}"
CORPUS = "c</title><script>window.evil=1</script>\u202e"
FILE = "f'\"<svg onload=window.evil=1>\u202e &amp;.jsonl"
SUITE = "s \"'><script>window.evil=1<\\script>&%2f?#"
WIDTH = "width_{{ 1234567 * 3 }}<b onclick=window.evil=1>\u202e'\n"


@dataclass(frozen=True)
class Hostile:
    index: Path
    saes: tuple[str, ...]


def make(folder: Path, model: Path, suites: Path, write_spec: Callable[..., Path], scan: Any) -> Hostile:
    """Scan it. Each text is a document, whose id and metadata are texts too."""
    source, named = folder / "suites" / "s", f"{WIDTH}/average_l0_2"
    found = "tiny-res/layer_1/width_37/average_l0_2", "tiny-res/layer_3/width_130/average_l0_6"
    for layer, path in zip((1, 3), found, strict=True):
        (source / f"layer_{layer}" / named).mkdir(parents=True)
        shutil.copy(suites / path / "params.npz", source / f"layer_{layer}" / named)
    rows = [
        {"id": f"{text[:200]}{n}", "text": text, COLUMN: text[:300], "lang": ["en", ACTS[0]][n % 2], "n": n}
        for n, text in enumerate(TEXTS)
    ]
    tiny.write_rows(folder / "corpus" / FILE, rows)
    with (folder / "corpus" / FILE).open("a", encoding="utf-8") as stream:  # one that goes into quarantine
        stream.write(json.dumps({"id": ACTS[3], "text": 7, COLUMN: ACTS[0], "lang": "en", "n": 1}) + "\n")
    spec = write_spec(
        folder,
        corpus={"name": CORPUS, "uri": f"{folder}/corpus/*.jsonl", "metadata": [COLUMN, "lang", "n"]},
        model={"uri": str(_greedy(model, folder / "model"))},
        saes=[{"uri": str(source), "name": SUITE, "site": "resid_post"}],
    )
    scan(spec)
    return Hostile(folder / "index", tuple(f"{SUITE}/layer_{layer}/{named}" for layer in (1, 3)))


def _greedy(model: Path, folder: Path) -> Path:
    """The model with TOKENS in its tokenizer."""
    from tokenizers import AddedToken
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in TOKENS])
    causal = AutoModelForCausalLM.from_pretrained(model)
    causal.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    causal.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# --- what a page is, to a parser

HARMLESS = re.compile(r"/(?![/\\])|#|\?|https://(www\.)?neuronpedia\.org/")
_VOID = frozenset(re.findall(r"\w+", "meta link input br hr img base col wbr source area embed track"))
_OURS = frozenset(  # elements that pages may be made of
    re.findall(
        r"\w+",
        """
        html head meta title link script body a header nav button main footer span time kbd dialog h1 h2 h3 h4
        p div section article aside table caption thead tbody tfoot tr th td colgroup col dl dt dd ul ol li
        form fieldset legend label input select option optgroup textarea datalist output figure figcaption
        code pre i b em strong small abbr mark details summary progress meter noscript template hr br wbr sub
        sup search hgroup samp var u q data
        """,
    )
)
_DRAWN = frozenset(re.findall(r"\w+", "svg g path line text rect defs clippath circle symbol tspan use"))


@dataclass
class Look(HTMLParser):
    """A page as a browser's parser sees it: its links, texts, and what should not be there."""

    html: str
    drawings: bool = False  # SVG and a style sheet may stand in it, as in a report
    problems: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    fields: list[dict[str, str]] = field(default_factory=list)
    headings: list[int] = field(default_factory=list)
    text: str = ""  # of the body, scripts left out
    tokens: str = ""  # of elements of class `tokens`
    title: str = ""
    data: list[Any] = field(default_factory=list)  # of data blocks
    _open: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.feed(self.html)
        self.close()
        self.problems += [f"<{tag}> is left open" for tag, _ in self._open]
        self.problems += [f"id {each} stands twice" for each in sorted(self.ids) if self.ids.count(each) > 1]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if len(given) < len(attrs):
            self.problems.append(f"<{tag}> has an attribute twice")
        allowed = _OURS | (_DRAWN | {"style"} if self.drawings else set())
        if tag not in allowed:
            self.problems.append(f"<{tag}> is none of ours")
        for name, value in given.items():
            harms = name.startswith("on") or "evil" in name or name in ("style", "srcdoc", "formaction")
            if harms and not (self.drawings and name == "style"):
                self.problems.append(f"<{tag} {name}>")
            if not re.fullmatch(r"[a-z][a-z0-9:-]*", name):
                self.problems.append(f"<{tag} {name[:80]!r}>: no attribute of ours")
            if name in ("href", "src", "action") and not HARMLESS.match(value):
                self.problems.append(f"<{tag} {name}={value[:80]!r}>")
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in ("input", "select", "textarea"):
            self.fields.append(
                given | {"tag": tag, "labelled": str(any(t == "label" for t, _ in self._open))}
            )
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if "id" in given:
            self.ids.append(given["id"])
        if tag not in _VOID:
            self._open.append((tag, given))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        optional = {"p", "li", "dt", "dd", "tr", "td", "th", "option", "thead", "tbody"}
        while self._open and self._open[-1][0] != tag and self._open[-1][0] in optional:
            self._open.pop()
        if not self._open or self._open[-1][0] != tag:
            self.problems.append(f"</{tag}> closes nothing")
        else:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        tag, given = self._open[-1] if self._open else ("", {})
        if tag == "script":
            if given.get("type") == "application/json":
                self.data.append(json.loads(data))
                if "<" in data:
                    self.problems.append("a data block with <")
            elif data.strip():
                self.problems.append(f"a script of its own: {data.strip()[:80]!r}")
        elif tag == "title":
            self.title += data
        elif tag != "style":
            self.text += data
            if any("tokens" in inner.get("class", "").split() for _, inner in self._open):
                self.tokens += data

    def handle_comment(self, data: str) -> None:
        self.problems.append(f"a comment: {data[:80]!r}")

    def unlabelled(self) -> list[dict[str, str]]:
        """Fields that nobody is told the meaning of."""
        labels = set(re.findall(r'<label[^>]*\bfor="([^"]*)"', self.html))
        return [
            each
            for each in self.fields
            if each.get("type") not in ("hidden", "submit", "button")
            and each["labelled"] == "False"
            and not each.get("aria-label")
            and not each.get("aria-labelledby")
            and each.get("id") not in labels
        ]


def shown(text: str) -> str:
    """How a text is to be seen: characters that do not print are signs, a newline ends the line too."""
    return "".join(
        each if each.isprintable() else sign(each) + ("\n" if each == "\n" else "") for each in text
    )


def crawl(get: Callable[[str], str], seeds: list[str], of_a_kind: int = 6, most: int = 150) -> dict[str, str]:
    """Addresses and their HTML, breadth first from the seeds, so many of a path. `get` may raise."""
    found: dict[str, str] = {}
    waiting, kinds = list(dict.fromkeys(seeds)), dict.fromkeys((urlsplit(s).path for s in seeds), 0)
    while waiting and len(found) < most:
        address = waiting.pop(0).split("#")[0]
        path = urlsplit(address).path
        if not address or address in found or kinds.get(path, 0) >= of_a_kind:
            continue
        kinds[path] = kinds.get(path, 0) + 1
        found[address] = get(address)
        for link in Look(found[address]).links:
            target = f"{path}{link}" if link.startswith("?") else link
            if target.startswith("/") and not target.startswith(("/static/", "/vega.js")):
                waiting.append(target)
    return found
