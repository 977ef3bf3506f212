"""A recipe's schema in words: what is expected at a key, what may have been meant, what came instead. No torch here."""

from __future__ import annotations

import difflib
import functools
import re
from typing import Any

from bln_train.recipe.recipe import Recipe
from bln_train.recipe.synthetic import SyntheticRecipe
from bln_train.recipe.yaml_file import Keys, cut

Schema = dict[str, Any]
_NUMBER = re.compile(r"(?P<mantissa>[-+]?(?:\d{1,18}\.?\d{0,18}|\.\d{1,18}))(?:[eE](?P<exponent>[-+]?\d{1,2}))?", re.A)


def recipe_kind(data: Any) -> type[Recipe] | type[SyntheticRecipe]:
    """Which kind of recipe the data are meant as: one with the key `experiment` trains no network."""
    return SyntheticRecipe if isinstance(data, dict) and "experiment" in data else Recipe


@functools.cache
def _schema(kind: type[Recipe] | type[SyntheticRecipe]) -> Schema:
    return kind.model_json_schema()


def recipe_schema(data: Any) -> Schema:
    """What pydantic publishes about the kind of recipe that the data are: types, bounds, defaults."""
    return _schema(recipe_kind(data))


@functools.cache
def _definitions() -> dict[str, Schema]:
    return {**_schema(SyntheticRecipe)["$defs"], **_schema(Recipe)["$defs"]}  # no two classes share a name


def resolve(schema: Schema, value: Any = None) -> Schema:
    """Follow a reference, and for a section chosen by name the name that `value` gives."""
    if "discriminator" in schema and isinstance(value, dict):
        schema = {"$ref": schema["discriminator"]["mapping"].get(str(value.get("name")))}
    reference = schema.get("$ref")
    return _definitions()[reference.rpartition("/")[2]] if reference else schema


def schema_at(keys: Keys, data: Any) -> Schema:
    """What the schema says about a key in this data; {} where it knows no such key."""
    schema, value = recipe_schema(data), data
    for key in keys:
        schema = resolve(schema, value)
        if isinstance(key, int):
            schema = (schema.get("prefixItems", [])[key : key + 1] or [schema.get("items", {})])[0]
        else:
            schema = schema.get("properties", {}).get(key, {})
        value = value_at((key,), value)
    return schema


def value_at(keys: Keys, data: Any) -> Any:
    """The value at a key; None where the data have none."""
    for key in keys:
        found = key in data if isinstance(data, dict) else isinstance(data, list) and key in range(len(data))
        data = data[key] if found else None
    return data


def settings(section: Schema) -> list[str]:
    """Keys of a section, `name` first."""
    return sorted(section.get("properties", {}), key=lambda key: key != "name")


def describe_unknown(keys: Keys, data: Any) -> str:
    """Say that a key is unknown, where it belongs or what may be meant, and what is known there."""
    key, parent, section = str(keys[-1]), schema_at(keys[:-1], data), value_at(keys[:-1], data)
    known = settings(resolve(parent, section))
    of_recipe = not keys[:-1] and recipe_kind(data) is Recipe
    what, meant = "no such section" if of_recipe else "no such setting", did_you_mean(key, known)
    if "discriminator" in parent:
        what = f"`{section['name']}` has no such setting"
        names = parent["discriminator"]["mapping"]
        owners = [name for name in names if key in settings(resolve(parent, {"name": name}))]
        meant = f"; it belongs to {', '.join(owners)}" if owners else meant
    if not meant:
        sections = {
            home: resolve(schema_at((home,), data), data.get(home)) for home in recipe_schema(data)["properties"]
        }
        homes = [home for home, section in sections.items() if key in settings(section)]
        meant = f"; did you mean {homes[0]}.{key}?" if homes and key != "name" else ""
    return f"{what}{meant}; known: {', '.join(known)}"


def describe_expected(schema: Schema) -> str:
    """A schema in words, such as `a whole number, at least 1, or null`."""
    schema = resolve(schema)
    if "anyOf" in schema:
        return ", or ".join(describe_expected(choice) for choice in schema["anyOf"])
    if "discriminator" in schema or "properties" in schema:
        keys = settings(schema) or ["name: " + "|".join(schema["discriminator"]["mapping"])]
        return f"a section ({', '.join(keys)})"
    if "const" in schema or "enum" in schema:
        return " or ".join(f"`{choice}`" for choice in schema.get("enum", [schema.get("const")]))
    if "prefixItems" in schema:
        return f"a list of {len(schema['prefixItems'])}, each {describe_expected(schema['prefixItems'][0])}"
    if "items" in schema:
        return f"a list, each {describe_expected(schema['items'])}"
    words = {"integer": "a whole number", "number": "a number", "string": "text", "boolean": "true or false"}
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    limits = " and ".join(f"{word} {schema[bound]}" for bound, word in bounds.items() if bound in schema)
    return words.get(schema.get("type", ""), "null") + (f", {limits}" if limits else "")


def suggest_fix(schema: Schema, value: Any, written: str | None) -> str:
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
    return did_you_mean(
        value, [str(name) for choice in choices for name in choice.get("enum", [choice.get("const", "")])]
    )


def did_you_mean(text: Any, known: list[str]) -> str:
    """A question naming the closest of the known words, or nothing."""
    near = difflib.get_close_matches(text, known, n=1) if isinstance(text, str) else []
    return f"; did you mean `{near[0]}`?" if near else ""


def describe_value(value: Any) -> str:
    """A value as the message says what came."""
    if isinstance(value, dict | list):
        return f"a list of {len(value)}" if isinstance(value, list) else "a section"
    if isinstance(value, str):
        return f"the text {cut(value)!r}"
    return "nothing (null)" if value is None else str(value).lower()
