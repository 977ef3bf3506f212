"""From a YAML file and `--set` to a Recipe or SyntheticRecipe, with every problem at its line in one message. No torch here."""

from __future__ import annotations

import codecs
import difflib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from bln_train.errors import RecipeError, UsageError
from bln_train.recipe.messages import (
    describe_expected,
    describe_unknown,
    describe_value,
    did_you_mean,
    recipe_kind,
    recipe_schema,
    schema_at,
    settings,
    suggest_fix,
    value_at,
)
from bln_train.recipe.recipe import Recipe
from bln_train.recipe.synthetic import SyntheticRecipe
from bln_train.recipe.yaml_file import MAX_DEPTH, Draft, Keys, Place, cut, dotted, printable

MAX_BYTES = 2**20
MAX_SHOWN = 200  # above what all settings of a recipe can have wrong: such a file is something else


def shipped_recipes() -> dict[str, Path]:
    """Map the names of the recipes that come with the program to their files."""
    package = Path(__file__).resolve().parents[1]  # a wheel carries them in the package, a checkout beside it
    inside = package / "shipped_recipes"
    folder = inside if inside.is_dir() else package.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe that trains a network.

    Args:
        source: a shipped recipe's name, or a YAML file.
        overrides: changes such as `train.epochs=3`, the last one wins; see `parse_any_recipe`.

    Raises:
        RecipeError: names every problem with its line.
        UsageError: it is one with `experiment`, which trains no network.
    """
    return _training(load_any_recipe(source, overrides), str(source))


def load_synthetic_recipe(source: str | Path, overrides: Sequence[str] = ()) -> SyntheticRecipe:
    """Load a recipe with `experiment: synthetic`; UsageError for one that trains a network, otherwise as `load_recipe`."""
    recipe = load_any_recipe(source, overrides)
    if isinstance(recipe, SyntheticRecipe):
        return recipe
    name = printable(str(source))
    raise UsageError(
        f"{name}: trains a network and is no synthetic experiment", f"Run it: bln-train run {shlex.quote(name)}"
    )


def load_any_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe | SyntheticRecipe:
    """Load a YAML file, or a shipped recipe by its name, with overrides as in `parse_any_recipe`.

    A name wins over a file of that name; write `./quickstart` for the file. Raises RecipeError with all problems.
    """
    path = shipped_recipes().get(source if isinstance(source, str) else "", Path(source))
    return parse_any_recipe(_read_text(path), origin=str(path), overrides=overrides)


def parse_recipe(text: str, *, origin: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe that trains a network; UsageError for one with `experiment`, otherwise as `parse_any_recipe`."""
    return _training(parse_any_recipe(text, origin=origin, overrides=overrides), origin)


def _training(recipe: Recipe | SyntheticRecipe, origin: str) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    name = printable(origin)
    raise UsageError(
        f"{name}: a synthetic experiment trains no network", f"Run it: bln-train paper synthetic {shlex.quote(name)}"
    )


def parse_any_recipe(text: str, *, origin: str, overrides: Sequence[str] = ()) -> Recipe | SyntheticRecipe:
    """Read a recipe of either kind from YAML text; `origin` is the file name shown in places.

    An override reads `a.b=value` with a YAML value; the last one wins. `norm=batch` (also for optimizer and schedule)
    replaces the section by `{name: batch}`; `norm.name=batch` keeps its other settings. Raises RecipeError with all
    problems.
    """
    draft = Draft(origin)
    data = draft.parse(text, (), lambda line: Place((0, line), f"{origin}:{line}"))
    if not isinstance(data, dict) and not draft.problems:
        draft.report((), f"expected sections ({', '.join(settings(recipe_schema(data)))}), got {describe_value(data)}")
    sections = data if isinstance(data, dict) else {}
    for position, override in enumerate(overrides):
        _override(draft, sections, override, position)
    try:
        recipe = recipe_kind(sections).model_validate(sections)
        if not draft.problems:
            return recipe
    except ValidationError as error:
        if isinstance(data, dict):
            _explain(draft, error, sections)
    problems = [problem[1:] for problem in sorted(draft.problems, key=lambda problem: problem[0])]
    if len(problems) > MAX_SHOWN:
        problems[MAX_SHOWN:] = [(problems[-1][0], f"and {len(problems) - MAX_SHOWN} more problems up to here")]
    again = f"bln-train check {shlex.quote(printable(origin))}"
    example = "quickstart" if recipe_kind(sections) is Recipe else "paper_synthetic"
    raise RecipeError(problems, f"Check again: {again}   A complete example: bln-train recipes show {example}")


def dump_recipe(recipe: Recipe | SyntheticRecipe) -> str:
    """Write the resolved recipe, defaults included, as YAML that loads back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_text(path: Path) -> str:
    """The text of a recipe file; raises RecipeError where there is none."""
    place = str(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)  # bounded: the path may be a device
        if len(content) <= MAX_BYTES:
            return content.decode()
        place = f"{path}:{content.count(10) + 1}"
        what = "goes on beyond 1 MiB here; this is not a recipe"
    except UnicodeDecodeError as error:
        place = f"{path}:{error.object.count(10, 0, error.start) + 1}"
        if error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            what = "is UTF-16 text; save the file as UTF-8"
        else:
            what = (
                f"byte 0x{error.object[error.start]:02x} at position {error.start} is not UTF-8; save the file as UTF-8"
            )
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
    raise RecipeError([(printable(place), printable(what))], "Shipped recipes: bln-train recipes list")


def _override(draft: Draft, data: dict[str, Any], override: str, position: int) -> None:
    """Apply one `a.b=value` to `data`, or report what is wrong with it."""
    path, equals, text = override.partition("=")
    keys: Keys = tuple(path.strip().split("."))
    place = Place((1, position), f"--set {cut(override, 80)}", keys)
    if not equals or "" in keys or len(keys) > MAX_DEPTH:
        return draft.report(keys, "write it as section.key=value", place)
    section = data
    for end, key in enumerate(keys[:-1], start=1):
        if section.get(str(key)) is None:
            section[str(key)], draft.places[keys[:end]] = {}, place
            draft.refused.discard(keys[:end])
        section = section[str(key)]
        if not isinstance(section, dict):
            return draft.report(keys, f"{dotted(keys[:end])} is no section; it has nothing below it", place)
    draft.forget(keys)
    draft.places[keys] = place
    value = draft.parse(text, keys, lambda line: place)
    if isinstance(value, str) and "discriminator" in schema_at(keys, data):
        value, draft.places[*keys, "name"] = {"name": value}, place
    section[str(keys[-1])] = value


def _explain(draft: Draft, error: ValidationError, data: dict[str, Any]) -> None:
    """Report the schema's complaints in the words of this file, each setting once."""
    seen = set(draft.refused)
    for detail in error.errors(include_url=False):
        kind, keys = detail["type"], _keys_in_file(draft, detail["type"], detail["loc"], data)
        if kind == "value_error":
            for line in str(detail["ctx"]["error"]).split("\n"):  # `key: what` below this section
                key, _, what = line.partition(": ")
                named = (*keys, *(int(k) if k.isdecimal() else k for k in key.split("."))) if what else keys
                is_key = named in draft.places or schema_at(named, data)
                draft.report(*((named, what) if what and is_key else (keys, line)))
            continue
        schema, value = schema_at(keys, data), value_at(keys, data)
        unnamed = isinstance(value, dict) and "discriminator" in schema
        keys = (*keys, "name") if unnamed else keys
        if any(keys[:end] in seen for end in range(len(keys) + 1)):
            continue
        seen.add(keys)
        if kind == "extra_forbidden":
            what = describe_unknown(keys, data)
        elif kind == "missing" and not isinstance(detail["loc"][-1], int):
            what = f"is missing; expected {describe_expected(schema)}"
        elif unnamed:
            names, name = list(schema["discriminator"]["mapping"]), value.get("name")
            what_kind = keys[-2] if isinstance(keys[-2], str) else "name"
            got = f"unknown {what_kind} {name!r}{did_you_mean(name, names)}" if "name" in value else "is missing"
            what = f"{got}; known: {', '.join(names)}"
        else:
            fix = suggest_fix(schema, value, draft.plain.get(keys))
            what = f"expected {describe_expected(schema)}, got {describe_value(value)}{fix}"
        draft.report(keys, what)


def _keys_in_file(draft: Draft, kind: str, keys: Keys, data: dict[str, Any]) -> Keys:
    """Where a complaint of pydantic's belongs in the file."""
    found: Keys = ()
    by_name = False
    for key in keys:
        if not by_name:  # pydantic puts the name of a section chosen by it in between
            found = (*found, key)
        by_name = not by_name and "discriminator" in schema_at(found, data)
    keys = found
    if (kind == "missing" and not isinstance(keys[-1], int)) or kind == "extra_forbidden":
        return keys  # not written, or not known: nothing to look up
    if kind == "missing":
        keys = keys[:-1]  # a list that is too short
    while not (keys in draft.places and schema_at(keys, data)):
        keys = keys[:-1]  # pydantic names the member of a union, such as the number of `number or auto`
    return keys
