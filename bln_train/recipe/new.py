"""A first recipe from three answers: data, model, memory. No torch here."""

from __future__ import annotations

import math
import shlex
from pathlib import Path

import yaml

from bln_train.models.names import check_model_name, is_foreign
from bln_train.recipe.editor_schema import with_modeline
from bln_train.recipe.load import parse_recipe
from bln_train.recipe.messages import did_you_mean
from bln_train.recipe.yaml_file import printable
from bln_train.system.units import parse_bytes

DATA_SETS = ("shapes", "cifar10", "cifar100")
_COMMENTS_FROM = 32  # column
_Line = tuple[str, str]  # YAML, and the comment behind it


def problem_with_data(data: str) -> str:
    """What is wrong with an answer that should name a data set or an image folder; "" if nothing is."""
    if data in DATA_SETS:
        return ""
    folder = Path(data)
    if not data or not folder.is_dir():
        return f"'{data}' is no data set ({', '.join(DATA_SETS)}) and no folder{did_you_mean(data, list(DATA_SETS))}"
    missing = [part for part in ("train", "test") if not (folder / part).is_dir()]
    return f"{data} has no {' and no '.join(missing)}; it needs train/<class>/* and test/<class>/*" if missing else ""


def problem_with_model(model: str) -> str:
    """What is wrong with a model's name; "" if nothing is."""
    return check_model_name(model) or ""


def problem_with_memory(memory: str) -> str:
    """What is wrong with a size of memory, which may be empty; "" if nothing is."""
    try:
        if memory:
            parse_bytes(memory)
    except ValueError as error:
        return str(error)
    return ""


def usual_model(data: str) -> str:
    """The model to offer for a data set or folder."""
    return {"shapes": "resnet8", "cifar10": "resnet20", "cifar100": "resnet20"}.get(data, "torchvision:resnet18")


def compose_recipe(file: Path, *, data: str, model: str, memory: str = "", init: str = "") -> str:
    """The text of a recipe to be written to `file`, with a comment at what is likely to be changed.

    Args:
        file: what its commands call it.
        data: `shapes`, `cifar10`, `cifar100`, or an image folder.
        model: as `model.name`.
        memory: what training may take, such as `4GiB`; empty for one image at a time.
        init: as `model.init`; empty for random weights.

    Raises:
        RecipeError: the answers do not go together.
    """
    text_and_comments = [
        *_header(file, data, model, memory),
        *_data_section(data, model),
        *_model_section(model, init),
        ("norm:", ""),
        ("  name: batchless", "to compare: bln-train compare RECIPE --norm batch,batchless,group"),
        *_train_section(data, model, memory, init),
        *_optimizer_and_schedule(model, init),
    ]
    lines = (f"{line:{_COMMENTS_FROM}} # {comment}" if comment else line for line, comment in text_and_comments)
    text = with_modeline("\n".join(lines) + "\n", file.parent)
    parse_recipe(text, origin=str(file))
    return text


def _header(file: Path, data: str, model: str, memory: str) -> list[_Line]:
    called = printable(shlex.quote(str(file)))
    budget = f" --budget {shlex.quote(memory)}" if memory else ""
    batches = f"effective batch {_effective_batch(data, model)}, micro-batch {'auto' if memory else 1}"
    return [
        (f"# {model} on {printable(data)}, {batches}.", ""),
        ("#", ""),
        (f"#   bln-train check {called}", ""),
        (f"#   bln-train plan {called}{budget}", ""),
        (f"#   bln-train run {called}", ""),
        ("#", ""),
        ("# An editor that knows YAML schemas shows every other setting, its range and its default, and a run folder's", ""),
        ("# recipe.yaml has all of them. Settings behind a # are suggestions.", ""),
    ]  # fmt: skip


def _data_section(data: str, model: str) -> list[_Line]:
    lines = [("data:", ""), (f"  name: {data if data in DATA_SETS else 'folder'}", "")]
    if data not in DATA_SETS:
        lines += [
            (f"  root: {_quoted(data)}", "train/<class>/* and test/<class>/*"),
            (f"  image_size: {224 if is_foreign(model) else 32}", "pixels"),
        ]
    return [
        *lines,
        ("  # num_train: 1000", "a subset with the same number of each class, for a first try"),
        ("  # validation_fraction: 0.2", "held out of the training images; the test images are then for the end"),
    ]


def _model_section(model: str, init: str) -> list[_Line]:
    lines = [("model:", ""), (f"  name: {model}", "")]
    if init:
        lines.append(
            (f"  init: {_quoted(init)}", "trained weights, of which only the head is new where classes differ")
        )
    elif is_foreign(model):
        lines.append(("  # init: pretrained", "trained weights; or a file, see `bln-train migrate`"))
    return lines


def _train_section(data: str, model: str, memory: str, init: str) -> list[_Line]:
    lines = [
        ("train:", ""),
        (f"  epochs: {10 if init else 5 if data == 'shapes' else 30}", ""),
        (f"  effective_batch_size: {_effective_batch(data, model)}", "images behind one optimizer step"),
    ]
    if memory:
        lines += [
            ("  micro_batch_size: auto", "the fastest that fits the budget; the result is the same"),
            (f"  memory_budget: {_quoted(memory)}", "bytes of the device, CUDA's context included"),
        ]
    else:
        lines.append(("  micro_batch_size: 1", "images in memory at once; the result is the same for any"))
    return [*lines, ("  # precision: bf16", "activations of half the size")]


def _optimizer_and_schedule(model: str, init: str) -> list[_Line]:
    return [
        ("optimizer:", ""),
        ("  name: sgd", ""),
        (f"  lr: {'1.0e-3' if init else '0.1'}", "peak" if init else "peak; with model.init rather 1.0e-3"),
        (f"  weight_decay: {'1.0e-4' if is_foreign(model) else '5.0e-4'}", ""),
        ("  # accumulate_into: momentum", "the same training with one buffer of the weights' size less"),
        ("schedule:", ""),
        ("  name: cosine", ""),
        (f"  warmup_epochs: {0.0 if init else 0.5}", "fewer than train.epochs"),
    ]


def _effective_batch(data: str, model: str) -> int:
    return 32 if is_foreign(model) or data == "shapes" else 128


def _quoted(text: str) -> str:
    """A text as a YAML value, quoted where it has to be."""
    return yaml.safe_dump(text, width=math.inf, allow_unicode=True).removesuffix("...\n").strip()
