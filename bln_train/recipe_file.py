"""From a YAML file and `--set` to a Recipe, with every problem at its line in one message. No torch here."""

from __future__ import annotations

import difflib
import functools
import math
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from bln_train.errors import RecipeError
from bln_train.recipe import Recipe

MAX_BYTES = 2**20
MAX_DEPTH = 10
MAX_SHOWN = 200  # above what all settings of a recipe can have wrong: such a file is something else
_UNPRINTABLE = yaml.reader.Reader.NON_PRINTABLE
_NUMBER = re.compile(r"(?P<mantissa>[-+]?(?:\d{1,18}\.?\d{0,18}|\.\d{1,18}))(?:[eE](?P<exponent>[-+]?\d{1,2}))?", re.A)
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*)")

_Keys = tuple[str | int, ...]
_Schema = dict[str, Any]


class _Place(NamedTuple):
    order: tuple[int, int]  # (0, line) in the file, (1, position) for --set: problems are sorted by it
    prefix: str  # `file.yaml:12` or `--set a.b=3`
    keys: _Keys = ()  # what an override itself names, so that its place does not say it twice


def shipped_recipes() -> dict[str, Path]:
    """Map the names of the recipes that come with the program to their files."""
    package = Path(__file__).resolve().parent  # a wheel carries them in the package, a checkout beside it
    inside = package / "shipped_recipes"
    folder = inside if inside.is_dir() else package.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load a YAML file, or a shipped recipe by its name, with overrides as in `parse_recipe`.

    A name wins over a file of that name; write `./quickstart` for the file. Raises RecipeError with all problems.
    """
    path = shipped_recipes().get(source if isinstance(source, str) else "", Path(source))
    return parse_recipe(_read_text(path), origin=str(path), overrides=overrides)


def parse_recipe(text: str, *, origin: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from YAML text; `origin` is the file name shown in places.

    An override reads `a.b=value` with a YAML value; the last one wins. `norm=batch` (also for optimizer and schedule)
    replaces the section by `{name: batch}`; `norm.name=batch` keeps its other settings. Raises RecipeError with all
    problems.
    """
    draft = _Draft(origin)
    data = draft.parse(text, (), lambda line: _Place((0, line), f"{origin}:{line}"))
    if not isinstance(data, dict) and not draft.problems:
        draft.report((), f"expected sections ({', '.join(_settings(_schema()))}), got {_show(data)}")
    sections = data if isinstance(data, dict) else {}
    for position, override in enumerate(overrides):
        draft.override(sections, override, position)
    try:
        recipe = Recipe.model_validate(sections)
        if not draft.problems:
            return recipe
    except ValidationError as error:
        if isinstance(data, dict):
            draft.explain(error, sections)
    problems = [problem[1:] for problem in sorted(draft.problems, key=lambda problem: problem[0])]
    if len(problems) > MAX_SHOWN:
        problems[MAX_SHOWN:] = [(problems[-1][0], f"and {len(problems) - MAX_SHOWN} more problems up to here")]
    again = f"bln-train check {shlex.quote(_printable(origin))}"
    raise RecipeError(problems, f"Check again: {again}   A complete example: bln-train recipes show quickstart")


def dump_recipe(recipe: Recipe) -> str:
    """Write the resolved recipe, defaults included, as YAML that loads back to an equal Recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_text(path: Path) -> str:
    """The text of a recipe file; raises RecipeError where there is none."""
    place, what = str(path), "is above 1 MiB; this is not a recipe"
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)  # bounded: the path may be a device
        if len(content) <= MAX_BYTES:
            return content.decode()
    except UnicodeDecodeError as error:
        place = f"{path}:{error.object.count(10, 0, error.start) + 1}"
        what = f"byte 0x{error.object[error.start]:02x} at position {error.start} is not UTF-8; save the file as UTF-8"
    except IsADirectoryError:
        inside = sorted(map(str, path.glob("*.y*ml")))[:5]
        what = "is a directory" + (f"; it holds {', '.join(inside)}" if inside else "")
    except FileNotFoundError:
        files = sorted(path.parent.glob("*.y*ml"))
        meant = {name: str(file) for file in files for name in (str(file), file.stem)}
        meant |= {name: name for name in shipped_recipes()}
        near = [meant[key] for text in (str(path), path.stem) for key in difflib.get_close_matches(text, meant, n=1)]
        what = "no such file or shipped recipe" + (f"; did you mean {near[0]}?" if near else "")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        what = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    raise RecipeError([(_printable(place), _printable(what))], "Shipped recipes: bln-train recipes list")


class _Loader(yaml.SafeLoader):
    """Composes plain trees only; raises MarkedYAMLError at an anchor, alias, tag or deep nesting."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose one node, refused before PyYAML recurses into it."""
        event = self.peek_event()
        refusal = ""
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            refusal = "anchors and aliases (& and *) are refused: recipes are plain, write the value again"
        elif event.tag is not None:
            refusal = f"the tag {event.tag} is refused: recipes are plain values"
        elif self.depth >= MAX_DEPTH:
            refusal = f"nested deeper than {MAX_DEPTH} levels"
        if refusal:
            raise yaml.MarkedYAMLError(problem=refusal, problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Draft:
    """Data on its way to a recipe, where each key was written, and the problems so far."""

    def __init__(self, origin: str) -> None:
        self.places: dict[_Keys, _Place] = {(): _Place((0, 1), f"{origin}:1")}
        self.plain: dict[_Keys, str] = {}  # unquoted scalars as written
        self.refused: set[_Keys] = set()  # reported while reading: the schema need not complain again
        self.problems: list[tuple[tuple[int, int], str, str]] = []

    def report(self, keys: _Keys, what: str, place: _Place | None = None) -> None:
        """Note a problem at a key, or at the nearest section around it that was written."""
        around = (keys[:end] for end in range(len(keys), -1, -1))
        place = place or next(self.places[near] for near in around if near in self.places)
        named = f": {_dotted(keys)}" if keys and keys != place.keys else ""
        self.problems.append((place.order, _printable(place.prefix + named), _printable(what)))

    def parse(self, text: str, keys: _Keys, at: Callable[[int], _Place]) -> Any:
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

    def _walk(self, node: yaml.Node, keys: _Keys, line: int, at: Callable[[int], _Place]) -> Any:
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
                self.report(keys, f"a key must be text, got `{_cut(key) if isinstance(key, str) else kind}`", at(line))
            elif key in data:
                first = self.places[*keys, key].prefix
                self.report((*keys, key), f"written twice, first at {first}; remove one", at(line))
            else:
                data[key] = self._walk(value_node, (*keys, key), line, at)
        return data

    def _scalar(self, node: yaml.Node, keys: _Keys) -> Any:
        text, kind = str(node.value), node.tag.rpartition(":")[2]
        if not getattr(node, "style", None):
            self.plain[keys] = text
        odd = _UNPRINTABLE.search(text)  # from an escape such as "\0": no name or path needs one
        if kind == "null" or (kind == "str" and not odd):
            return text if kind == "str" else None
        if kind == "bool":
            return text.lower() in ("yes", "true", "on")
        if kind == "int" and _INTEGER.fullmatch(text) and len(text) <= 18:
            return int(text.replace("_", ""))
        if kind == "float" and not set(text) & set(":nN") and math.isfinite(number := float(text.replace("_", ""))):
            return number
        special = f"YAML reads `{_cut(text)}` as a special value ({kind}); put it in quotes if you mean text"
        what = f"control character {odd[0]!r}; remove it" if odd else special
        if kind in ("int", "float"):
            what = f"`{_cut(text)}` is not a finite, plain decimal number" + (" below 10^18" if kind == "int" else "")
        self.refused.add(keys)
        self.report(keys, what)
        return None

    def override(self, data: dict[str, Any], override: str, position: int) -> None:
        """Apply one `a.b=value` to `data`, or report what is wrong with it."""
        path, equals, text = override.partition("=")
        keys: _Keys = tuple(path.strip().split("."))
        place = _Place((1, position), f"--set {_cut(override, 80)}", keys)
        if not equals or "" in keys or len(keys) > MAX_DEPTH:
            return self.report(keys, "write it as section.key=value", place)
        section = data
        for end, key in enumerate(keys[:-1], start=1):
            if section.get(str(key)) is None:
                section[str(key)], self.places[keys[:end]] = {}, place
                self.refused.discard(keys[:end])
            section = section[str(key)]
            if not isinstance(section, dict):
                return self.report(keys, f"{_dotted(keys[:end])} is no section; it has nothing below it", place)
        for known in [known for known in self.places if known[: len(keys)] == keys]:
            del self.places[known]
            self.plain.pop(known, None)
            self.refused.discard(known)
        self.places[keys] = place
        value = self.parse(text, keys, lambda line: place)
        if isinstance(value, str) and "discriminator" in _schema_at(keys, {}):
            value, self.places[*keys, "name"] = {"name": value}, place
        section[str(keys[-1])] = value

    def explain(self, error: ValidationError, data: dict[str, Any]) -> None:
        """Report the schema's complaints in the words of this file, each setting once."""
        seen = set(self.refused)
        for detail in error.errors(include_url=False):
            kind, keys = detail["type"], detail["loc"]
            if len(keys) > 1 and "discriminator" in _schema_at(keys[:1], data):
                keys = (keys[0], *keys[2:])  # pydantic puts the section's name in between
            if kind == "missing" and isinstance(keys[-1], int):
                kind, keys = "too_short", keys[:-1]
            while kind not in ("missing", "extra_forbidden") and not (keys in self.places and _schema_at(keys, data)):
                keys = keys[:-1]  # pydantic names the member of a union, such as the number of `number or auto`
            if kind == "value_error":
                for line in str(detail["ctx"]["error"]).split("\n"):  # `key: what` below this section
                    key, _, what = line.partition(": ")
                    named = (*keys, *key.split(".")) if what else keys
                    self.report(*((named, what) if what and _schema_at(named, data) else (keys, line)))
                continue
            schema, value = _schema_at(keys, data), _value_at(keys, data)
            unnamed = isinstance(value, dict) and "discriminator" in schema
            keys = (*keys, "name") if unnamed else keys
            if any(keys[:end] in seen for end in range(len(keys) + 1)):
                continue
            seen.add(keys)
            if kind == "extra_forbidden":
                what = _unknown(keys, data)
            elif kind == "missing":
                what = f"is missing; expected {_expected(schema)}"
            elif unnamed:
                names, name = list(schema["discriminator"]["mapping"]), value.get("name")
                got = f"unknown {keys[0]} {name!r}{_near(name, names)}" if "name" in value else "is missing"
                what = f"{got}; known: {', '.join(names)}"
            else:
                what = f"expected {_expected(schema)}, got {_show(value)}{_advice(schema, value, self.plain.get(keys))}"
            self.report(keys, what)


@functools.cache
def _schema() -> _Schema:
    return Recipe.model_json_schema()


def _resolve(schema: _Schema, value: Any = None) -> _Schema:
    """Follow a reference, and for a section chosen by name the name that `value` gives."""
    if "discriminator" in schema and isinstance(value, dict):
        schema = {"$ref": schema["discriminator"]["mapping"].get(str(value.get("name")))}
    reference = schema.get("$ref")
    return _schema()["$defs"][reference.rpartition("/")[2]] if reference else schema


def _schema_at(keys: _Keys, data: Any) -> _Schema:
    """What the schema says about a key in this data; {} where it knows no such key."""
    schema, value = _schema(), data
    for key in keys:
        schema = _resolve(schema, value)
        if isinstance(key, int):
            schema = (schema.get("prefixItems", [])[key : key + 1] or [schema.get("items", {})])[0]
        else:
            schema = schema.get("properties", {}).get(key, {})
        value = _value_at((key,), value)
    return schema


def _value_at(keys: _Keys, data: Any) -> Any:
    for key in keys:
        found = key in data if isinstance(data, dict) else isinstance(data, list) and key in range(len(data))
        data = data[key] if found else None
    return data


def _settings(section: _Schema) -> list[str]:
    return sorted(section.get("properties", {}), key=lambda key: key != "name")


def _unknown(keys: _Keys, data: Any) -> str:
    """Say that a key is unknown, where it belongs or what may be meant, and what is known there."""
    key, parent, section = str(keys[-1]), _schema_at(keys[:-1], data), _value_at(keys[:-1], data)
    known = _settings(_resolve(parent, section))
    what, meant = "no such setting" if keys[:-1] else "no such section", _near(key, known)
    if "discriminator" in parent:
        what = f"`{section['name']}` has no such setting"
        names = parent["discriminator"]["mapping"]
        owners = [name for name in names if key in _settings(_resolve(parent, {"name": name}))]
        meant = f"; it belongs to {', '.join(owners)}" if owners else meant
    if not meant:
        sections = {home: _resolve(_schema_at((home,), data), data.get(home)) for home in _schema()["properties"]}
        homes = [home for home, section in sections.items() if key in _settings(section)]
        meant = f"; did you mean {homes[0]}.{key}?" if homes and key != "name" else ""
    return f"{what}{meant}; known: {', '.join(known)}"


def _expected(schema: _Schema) -> str:
    """A schema in words, such as `a whole number, at least 1, or null`."""
    schema = _resolve(schema)
    if "anyOf" in schema:
        return ", or ".join(_expected(choice) for choice in schema["anyOf"])
    if "discriminator" in schema or "properties" in schema:
        keys = _settings(schema) or ["name: " + "|".join(schema["discriminator"]["mapping"])]
        return f"a section ({', '.join(keys)})"
    if "const" in schema or "enum" in schema:
        return " or ".join(f"`{choice}`" for choice in schema.get("enum", [schema.get("const")]))
    if "prefixItems" in schema:
        return f"a list of {len(schema['prefixItems'])}, each {_expected(schema['prefixItems'][0])}"
    if "items" in schema:
        return f"a list, each {_expected(schema['items'])}"
    words = {"integer": "a whole number", "number": "a number", "string": "text", "boolean": "true or false"}
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    limits = " and ".join(f"{word} {schema[bound]}" for bound, word in bounds.items() if bound in schema)
    return words.get(schema.get("type", ""), "null") + (f", {limits}" if limits else "")


def _advice(schema: _Schema, value: Any, written: str | None) -> str:
    """What to write instead, where YAML took a value for something else than its author."""
    choices = schema.get("anyOf", [schema])
    kinds = {choice.get("type") for choice in choices}
    number = _NUMBER.fullmatch(value) if isinstance(value, str) else None
    if number and kinds & {"integer", "number"}:
        mantissa, exponent = number["mantissa"], int(number["exponent"] or 0)
        fix = f"{mantissa}{'' if '.' in mantissa else '.0'}e{exponent:+}" if exponent else mantissa
        if "number" not in kinds and exponent and float(value).is_integer() and abs(float(value)) < 1e15:
            fix = str(int(float(value)))
        return f"; YAML reads `{value}` as text; write {fix}" if written else f"; write {fix} without quotes"
    if isinstance(value, bool) and written and "string" in kinds:
        return f"; YAML reads `{written}` as {str(value).lower()}; put it in quotes"
    return _near(value, [str(name) for choice in choices for name in choice.get("enum", [choice.get("const", "")])])


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


def _near(text: Any, known: list[str]) -> str:
    near = difflib.get_close_matches(text, known, n=1) if isinstance(text, str) else []
    return f"; did you mean `{near[0]}`?" if near else ""


def _show(value: Any) -> str:
    """A value as the message says what came."""
    if isinstance(value, dict | list):
        return f"a list of {len(value)}" if isinstance(value, list) else "a section"
    if isinstance(value, str):
        return f"the text {_cut(value)!r}"
    return "nothing (null)" if value is None else str(value).lower()


def _cut(text: str, length: int = 60) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


def _dotted(keys: _Keys) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{_cut(key)}" for key in keys).removeprefix(".")


def _printable(text: str) -> str:
    """Escape what would break a line or a terminal: control characters, newlines, lone surrogates."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
