"""The JSON Schema of recipes for editors, and the line in a recipe that names it. No torch here.

It is pydantic's schema with additions for editors:

* Every description names the allowed values and the default.
* A section chosen by its name is a choice by `if`. A typo is then an unknown key of that choice, not "none of four".
* A norm's preset has its own defaults.

The draft is draft-07, which editors know best.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from bln_train.models.names import MODEL_NAMES
from bln_train.recipe.load import shipped_recipes
from bln_train.recipe.messages import Schema, describe_expected
from bln_train.recipe.norms import NORM_NAMES, Norm
from bln_train.recipe.recipe import Recipe
from bln_train.recipe.synthetic import SyntheticRecipe

SCHEMA_NAME = "recipe.schema.json"
MODELINE = "# yaml-language-server: $schema="
_DEVICE: Schema = {"pattern": r"^(auto|cpu|cuda(:[0-9]+)?)$", "examples": ["auto", "cpu", "cuda"]}
_SIZE = r"^\s*[0-9]+(\.[0-9]+)?\s*(([KkMmGgTt][Ii]?)?[Bb])?\s*$"
# What only our validators know of a text.
_TEXTS: dict[tuple[str, str], Schema] = {
    ("Model", "name"): {
        "anyOf": [
            {"enum": list(MODEL_NAMES)},
            {"pattern": r"^wrn[0-9]+_[0-9]+$"},
            {"pattern": r"^torchvision:[a-z0-9_]+$"},
            {"pattern": r"^timm:[a-z0-9_]+(\.[a-z0-9_]+)?$"},
        ],
        "examples": ["torchvision:resnet50", "timm:resnet26d"],
    },
    ("Model", "init"): {"examples": ["pretrained"]},
    ("Train", "memory_budget"): {"pattern": _SIZE, "examples": ["4GiB", "800MiB"]},
    ("Runtime", "device"): _DEVICE,
    ("SyntheticRuntime", "device"): _DEVICE,
}


def editor_schema() -> Schema:
    """The JSON Schema of both kinds of recipe, as `bln-train recipes schema` prints it."""
    definitions: dict[str, Schema] = {}
    for kind in (Recipe, SyntheticRecipe):
        whole = kind.model_json_schema()
        raw = {**whole.pop("$defs"), kind.__name__: whole}
        for name, section in raw.items():
            definitions[name] = _section(name, section, raw, definitions)
    in_use = json.dumps(definitions)
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "bln-train recipe",
        "type": "object",
        "if": {"required": ["experiment"]},
        "then": _reference("SyntheticRecipe"),
        "else": _reference("Recipe"),
        "definitions": {
            name: section
            for name, section in sorted(definitions.items())
            if name in ("Recipe", "SyntheticRecipe") or json.dumps(_reference(name))[1:-1] in in_use
        },
    }


def schema_file() -> Path:
    """The schema that is shipped beside the recipes."""
    return next(iter(shipped_recipes().values())).with_name(SCHEMA_NAME)


def with_modeline(text: str, folder: Path | None = None) -> str:
    """A shipped recipe's text with the line that leads an editor in `folder` to the schema.

    Beside the schema it is a name, elsewhere (the default) the address of this installation's file.
    """
    beside = folder is not None and folder.resolve() == schema_file().parent
    _, _, rest = text.partition("\n") if text.startswith(MODELINE) else ("", "", text)
    return f"{MODELINE}{SCHEMA_NAME if beside else schema_file().as_uri()}\n{rest}"


def _reference(name: str) -> Schema:
    return {"$ref": f"#/definitions/{name}"}


def _section(name: str, section: Schema, raw: dict[str, Schema], definitions: dict[str, Schema]) -> Schema:
    """A section as editors get it; those that one of its keys chooses by name become definitions."""
    required = section.get("required", [])
    return {
        "type": "object",
        "description": _one_line(section.get("description", "")),
        "additionalProperties": False,
        "required": required,
        "properties": {
            key: _setting(name, key, setting, raw, definitions, is_required=key in required)
            for key, setting in section["properties"].items()
        },
    }


def _setting(
    section: str,
    key: str,
    setting: Schema,
    raw: dict[str, Schema],
    definitions: dict[str, Schema],
    *,
    is_required: bool,
) -> Schema:
    """One key: what it is, what may stand there, its default."""
    if "discriminator" in setting:
        return _choice(key, setting, raw, definitions)
    if "$ref" in setting:  # a section
        return _reference(setting["$ref"].rpartition("/")[2])
    items = setting.get("items", {})
    if "discriminator" in items:
        return {
            "type": "array",
            "minItems": 1,
            "items": _choice(key, items, raw, definitions),
            "description": _one_line(setting["description"]),
        }
    facts = "" if key == "name" else _sentence(describe_expected(setting))
    if not is_required:
        facts += f" Default: {_as_yaml(setting['default'])}."
    found = {word: value for word, value in setting.items() if word not in ("title", "prefixItems")}
    if "prefixItems" in setting:
        found["items"] = setting["prefixItems"]  # as draft-07 has it
    text = _TEXTS.get((section, key), {})
    if "anyOf" in found and "pattern" in text:
        found["anyOf"] = [{**one, **text} if one.get("type") == "string" else one for one in found["anyOf"]]
    else:
        found |= text
    return {**found, "description": f"{_one_line(setting.get('description', ''))} {facts}".strip()}


def _choice(key: str, setting: Schema, raw: dict[str, Schema], definitions: dict[str, Schema]) -> Schema:
    """A section chosen by its name: each name's own settings and defaults."""
    mapping: dict[str, str] = setting["discriminator"]["mapping"]
    names = [name for name in NORM_NAMES if name in mapping] if key == "norm" else list(mapping)
    for name in names:
        own = dict(raw[mapping[name].rpartition("/")[2]])
        if key == "norm":
            own = _with_defaults_of(name, own)
        section = _section(mapping[name].rpartition("/")[2], own, raw, definitions)
        section["properties"]["name"] = {
            "const": name,
            "description": section["properties"]["name"]["description"],
        }
        definitions[f"{key}-{name}"] = section
    return {
        "type": "object",
        "required": ["name"],
        "properties": {"name": {"enum": names, "description": f"One of: {', '.join(names)}."}},
        "allOf": [
            {
                "if": {"required": ["name"], "properties": {"name": {"const": name}}},
                "then": _reference(f"{key}-{name}"),
            }
            for name in names
        ],
        **({"description": _one_line(setting["description"])} if "description" in setting else {}),
    }


def _with_defaults_of(name: str, section: Schema) -> Schema:
    """A norm's settings with what they are where only its name is given."""
    defaults = TypeAdapter[Any](Norm).validate_python({"name": name}).model_dump(mode="json")
    properties = {
        key: setting if key == "name" else {**setting, "default": defaults[key]}
        for key, setting in section["properties"].items()
    }
    return {**section, "properties": properties, "required": ["name"]}


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _as_yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
