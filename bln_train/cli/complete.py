"""What the shell offers for a word that is being typed. No torch here, and nothing that takes long: a person waits for it."""

from __future__ import annotations

from collections.abc import Iterator


def complete_recipe(incomplete: str) -> list[str]:
    """Names of shipped recipes; where none fits, the shell offers files."""
    from bln_train.recipe.load import shipped_recipes

    return [name for name in shipped_recipes() if name.startswith(incomplete)]


def complete_norms(incomplete: str) -> list[str]:
    """Norms in a comma-separated list: what the last of them may become, without those that are there."""
    from bln_train.recipe.norms import NORM_NAMES

    before, comma, last = incomplete.rpartition(",")
    there = before.split(",")
    return [f"{before}{comma}{name}" for name in NORM_NAMES if name.startswith(last) and name not in there]


def complete_device(incomplete: str) -> list[str]:
    """Devices as a recipe names them."""
    return [name for name in ("auto", "cpu", "cuda", "cuda:0") if name.startswith(incomplete)]


def complete_setting(incomplete: str) -> list[str]:
    """Keys of a recipe with `=`, and once the key is there its values: models, norms, words to choose from."""
    from bln_train.recipe.messages import recipe_schema

    key, equals, _ = incomplete.partition("=")
    found: list[str] = []
    for section in recipe_schema(None)["properties"]:
        variants = list(_variants(section))
        names = [name for name, _ in variants if name]
        if key == section and equals:
            found += [f"{key}={name}" for name in names]
        for setting in dict.fromkeys(setting for _, settings in variants for setting in settings):
            path = f"{section}.{setting}"
            if not equals:
                found.append(f"{path}=")
            elif key == path:
                choices = [settings[setting] for _, settings in variants if setting in settings]
                words = (
                    names if setting == "name" and names else [w for choice in choices for w in _words(path, choice)]
                )
                found += [f"{path}={word}" for word in dict.fromkeys(words)]
    return [text for text in found if text.startswith(incomplete)]


def _variants(section: str) -> Iterator[tuple[str, dict[str, dict[str, object]]]]:
    """Each name that a section may have, "" where it is no choice of names, with what may be set there."""
    from bln_train.recipe.messages import recipe_schema, resolve

    schema = recipe_schema(None)["properties"][section]
    for name in schema.get("discriminator", {}).get("mapping", {"": None}):
        yield name, resolve(schema, {"name": name})["properties"]


def _words(path: str, schema: dict[str, object]) -> Iterator[str]:
    """The words among a setting's values."""
    from bln_train.models.names import MODEL_NAMES, TIMM, TORCHVISION

    if path == "model.name":
        yield from (*MODEL_NAMES, TORCHVISION, TIMM)
    choices = schema.get("anyOf", [schema])
    assert isinstance(choices, list)
    for choice in choices:
        yield from choice.get("enum", [choice["const"]] if "const" in choice else [])
        if choice.get("type") == "boolean":
            yield from ("true", "false")
