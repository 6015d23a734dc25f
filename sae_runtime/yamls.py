"""YAML of unknown origin: plain values only, within bounds of time and memory.

Invariant: before a value is made the document is a tree of at most `_NODES` nodes, with every alias counted
as what it stands for, so that ten lines cannot mean a billion values, by merge keys neither. Text of
`LIMIT` bytes takes 0.8 s at worst. Tags make nothing but what YAML makes without them.
"""

from __future__ import annotations

from typing import Any

import yaml

LIMIT = 2**18  # bytes of a document
_NODES = 20_000
_NUMBER = 400  # characters; Python takes quadratic time for them
_PLAIN = "tag:yaml.org,2002:"
_NAMES = ("str", "int", "float", "bool", "null", "map", "seq", "merge", "timestamp")
_TAGS = {_PLAIN + name for name in _NAMES}


class Loader(yaml.SafeLoader):
    """YAML's plain values. Whatever is wrong with a text is a YAMLError, where possible with its place."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._nodes = 0

    def get_single_data(self) -> Any:
        try:
            node = self.get_single_node()
            if node is None:
                return None
            _check(node)
            return self.construct_document(node)
        except RecursionError as error:
            raise yaml.YAMLError("it is nested too deep") from error
        except (ValueError, OverflowError) as error:  # a date that is none
            raise yaml.YAMLError(f"a value is none: {error}") from error

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._nodes += 1
        if self._nodes > _NODES:
            raise _wrong(f"it has more than {_NODES:,} values", self.peek_event().start_mark)
        return super().compose_node(parent, index)


def _check(root: yaml.Node) -> None:
    """A YAMLError for tags that mean more than plain values, long numbers, and aliases that multiply."""
    counted: dict[int, int] = {}

    def count(node: yaml.Node) -> int:
        known = counted.get(id(node))
        if known is not None:
            return known
        counted[id(node)] = _NODES  # while it is being counted: within itself, it is too large
        if node.tag not in _TAGS:
            tag = node.tag.replace(_PLAIN, "!!")
            raise _wrong(f"the tag {tag} is not read here; write the value without it", node.start_mark)
        size = 1
        if isinstance(node, yaml.ScalarNode):
            if node.tag in (_PLAIN + "int", _PLAIN + "float") and len(node.value) > _NUMBER:
                raise _wrong(f"a number of {len(node.value):,} characters", node.start_mark)
        else:
            for item in node.value:
                size += sum(map(count, item)) if isinstance(item, tuple) else count(item)
                if size > _NODES:
                    raise _wrong(
                        f"its aliases stand for more than {_NODES:,} values, or for one within itself",
                        node.start_mark,
                    )
        counted[id(node)] = size
        return size

    count(root)


def _wrong(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)
