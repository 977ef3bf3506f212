"""Strict YAML: plain data with the line of every key, and every problem reported instead of guessed at.

Stricter than PyYAML: no tags, anchors, aliases or merge keys, no key twice, no dates or base-60 numbers, no control
characters. Nothing here knows what a recipe is; no pydantic, no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import yaml

MAX_DEPTH = 10
MAX_NODES = 5000  # PyYAML reads some thousand a second, and a recipe has some dozens
_UNPRINTABLE = yaml.reader.Reader.NON_PRINTABLE
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*)")

Keys = tuple[str | int, ...]


class Place(NamedTuple):
    """Where a value was written."""

    order: tuple[int, int]
    """(0, line) in the file, (1, position) for an override: problems are sorted by it."""
    prefix: str
    """`file.yaml:12` or `--set a.b=3`."""
    keys: Keys = ()
    """What an override itself names, so that its place does not say it twice."""


class Draft:
    """Plain data on its way in: where each key was written, and the problems so far."""

    def __init__(self, origin: str) -> None:
        self.places: dict[Keys, Place] = {(): Place((0, 1), f"{origin}:1")}
        self.plain: dict[Keys, str] = {}  # unquoted scalars as written
        self.refused: set[Keys] = set()  # reported while reading: the schema need not complain again
        self.problems: list[tuple[tuple[int, int], str, str]] = []

    def report(self, keys: Keys, what: str, place: Place | None = None) -> None:
        """Note a problem at a key, or at the nearest section around it that was written."""
        around = (keys[:end] for end in range(len(keys), -1, -1))
        place = place or next(self.places[near] for near in around if near in self.places)
        named = f": {dotted(keys)}" if keys and keys != place.keys else ""
        self.problems.append((place.order, printable(place.prefix + named), printable(what)))

    def forget(self, keys: Keys) -> None:
        """Drop what was noted at a key and below it: it is about to be written anew."""
        for known in [known for known in self.places if known[: len(keys)] == keys]:
            del self.places[known]
            self.plain.pop(known, None)
            self.refused.discard(known)

    def parse(self, text: str, keys: Keys, at: Callable[[int], Place]) -> Any:
        """Plain data from YAML, its places noted below `keys`; None with a problem reported where it is not YAML."""
        odd = _UNPRINTABLE.search(text)
        if odd:
            line, what = text.count("\n", 0, odd.start()) + 1, f"control character {odd[0]!r}; remove it"
        else:
            loader = _Loader(text)
            try:
                node = loader.get_single_node()
                if node is not None:
                    return self._walk(node, keys, node.start_mark.line + 1, at)
                line, what = 1, "has no value; write null for none" if keys else "the recipe is empty"
            except yaml.MarkedYAMLError as error:
                line, what = _syntax(error, text)
            except (yaml.YAMLError, ValueError, OverflowError) as error:  # PyYAML itself trips over "\UFFFFFFFF"
                line, what = loader.line + 1, f"not valid YAML: {error}"
        self.refused.add(keys)
        self.report(keys, what, at(line))
        return None

    def _walk(self, node: yaml.Node, keys: Keys, line: int, at: Callable[[int], Place]) -> Any:
        self.places[keys] = at(line)
        if isinstance(node, yaml.SequenceNode):
            return [self._walk(item, (*keys, i), item.start_mark.line + 1, at) for i, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            return self._scalar(node, keys)
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line, key, kind = key_node.start_mark.line + 1, key_node.value, key_node.tag.rpartition(":")[2]
            if kind == "merge":
                self.report(keys, "merge keys (<<) are refused: recipes are plain, write the values again", at(line))
            elif kind != "str" or _UNPRINTABLE.search(key):
                self.report(keys, f"a key must be text, got `{cut(key) if isinstance(key, str) else kind}`", at(line))
            elif key in data:
                first = self.places[*keys, key].prefix
                self.report((*keys, key), f"written twice, first at {first}; remove one", at(line))
            else:
                data[key] = self._walk(value_node, (*keys, key), line, at)
        return data

    def _scalar(self, node: yaml.Node, keys: Keys) -> Any:
        text, kind = str(node.value), node.tag.rpartition(":")[2]
        if not getattr(node, "style", None):
            self.plain[keys] = text
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() in ("yes", "true", "on")
        what = f"YAML reads `{cut(text)}` as a special value ({kind}); put it in quotes if you mean text"
        if kind == "str":
            odd = _UNPRINTABLE.search(text)  # from an escape such as "\0": no name or path needs one
            if not odd:
                return text
            what = f"control character {odd[0]!r}; remove it"
        elif kind == "int":
            if _INTEGER.fullmatch(text) and len(text) <= 18:
                return int(text.replace("_", ""))
            what = f"`{cut(text)}` is not a finite, plain decimal number below 10^18"
        elif kind == "float":
            if not set(text) & set(":nN") and math.isfinite(number := float(text.replace("_", ""))):
                return number
            what = f"`{cut(text)}` is not a finite, plain decimal number"
        self.refused.add(keys)
        self.report(keys, what)
        return None


class _Loader(yaml.SafeLoader):
    """Composes plain trees only; raises MarkedYAMLError at an anchor, alias or tag, and where it is too deep or too much."""

    depth = num_nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose one node, refused before PyYAML recurses into it."""
        event = self.peek_event()
        refusal = ""
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            refusal = "anchors and aliases (& and *) are refused: recipes are plain, write the value again"
        elif event.tag is not None:
            refusal = f"the tag {cut(event.tag)} is refused: recipes are plain values"
        elif self.depth >= MAX_DEPTH:
            refusal = f"nested deeper than {MAX_DEPTH} levels"
        elif self.num_nodes >= MAX_NODES:
            refusal = f"more than {MAX_NODES} keys and values up to here; this is not a recipe"
        if refusal:
            raise yaml.MarkedYAMLError(problem=refusal, problem_mark=event.start_mark)
        self.depth += 1
        self.num_nodes += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _syntax(error: yaml.MarkedYAMLError, text: str) -> tuple[int, str]:
    """The line and, readably, the complaint of PyYAML."""
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    if re.match(r"[ \t]*\t", "".join(text.splitlines()[line - 1 : line])):
        return line, "tabs cannot indent YAML; use spaces"
    if error.context == "expected a single document in the stream":
        return line, "a second document (---) starts here; a recipe is one document"
    if type(error) is yaml.MarkedYAMLError:  # our own
        return line, error.problem or ""
    return line, f"not valid YAML: {error.problem}" + (f" ({error.context})" if error.context else "")


def cut(text: str, length: int = 60) -> str:
    """At most `length` characters of a text."""
    return text if len(text) <= length else f"{text[:length]}..."


def dotted(keys: Keys) -> str:
    """Keys as a reader writes them: `data.augment.flip`, `schedule.milestones[2]`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{cut(key)}" for key in keys).removeprefix(".")


def printable(text: str) -> str:
    """Escape what would break a line or a terminal: control characters, newlines, lone surrogates."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
