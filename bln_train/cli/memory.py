"""The commands that say what training takes: `memory` measures, `plan` predicts."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bln_train.cli.complete import complete_norms
from bln_train.cli.options import (
    DeviceOption,
    JsonOption,
    NormsOption,
    OptionalRecipeArgument,
    RecipeArgument,
    SetOption,
    overrides,
    sizes,
    split,
)
from bln_train.errors import BlnError, DoesNotFitError, RunFolderError, UsageError

if TYPE_CHECKING:
    from bln_train.plan.planner import Variant

_MAX_TIMELINES = 12


def memory(
    recipe: OptionalRecipeArgument = "cifar10_mb1",
    norm: NormsOption = "none,batch,group,batchless",
    micro_batch: Annotated[str, typer.Option(help="Micro-batches, comma-separated.")] = "1,8,64",
    effective_batch: Annotated[str, typer.Option(help="Effective batches, comma-separated.")] = "1,128,1024",
    set_: SetOption = None,
    device: DeviceOption = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps of each cell.")] = 5,
    out: Annotated[
        Path | None, typer.Option(help="Folder; default memory/<recipe>. Its memory.* files are overwritten.")
    ] = None,
    timeline: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.svg",
            help="Draw live bytes through one step, a panel for each cell, 12 at most; with CUDA, snapshots for PyTorch's memory "
            "viewer beside it.",
        ),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Measure memory and time of training over norms and batch sizes, on random images, learning nothing."""
    from bln_train.console import output, tables
    from bln_train.console.progress import show_cells
    from bln_train.experiments.compare import plan_cells
    from bln_train.recipe.load import load_recipe
    from bln_train.report.plots import plot_memory

    loaded = load_recipe(recipe, overrides(set_, device)).untrained()
    if loaded.train.memory_budget is not None:
        output.say("note: train.memory_budget bounds `run`; here every cell takes what it takes.")
    folder = out or Path("memory") / Path(recipe).stem
    cells = plan_cells(
        loaded,
        folder,
        norms=split(norm),
        effective_batches=sizes(effective_batch, "--effective-batch"),
        micro_batches=sizes(micro_batch, "--micro-batch"),
    )
    if timeline is not None:
        _check_timeline(timeline, len(cells))

    from bln_train.experiments import sweep  # torch, from here on

    with show_cells(sweep.num_stages(cells)) as show:
        document = sweep.measure(loaded, cells, folder, num_repeats=repeats, show=show, timeline=timeline)
    sweep.write_tables(folder, document)
    plot_memory(folder, document)
    if timeline is not None:
        _plot_timelines(timeline, document)
    if json_:
        output.print_json({**document, "folder": str(folder)})
    else:
        tables.print_memory(document)
        output.print_line(f"files:  {folder}/memory.json, memory.csv, memory.svg{f', {timeline}' if timeline else ''}")
    if not any(row["peak_bytes"] for row in document["rows"]):
        raise BlnError("no cell could be measured", f"The reasons are in {folder / sweep.TABLE_JSON}.")


def _check_timeline(place: Path, num_cells: int) -> None:
    if place.suffix != ".svg":
        raise UsageError(f"--timeline: {place} is no .svg file", "Example: --timeline timeline.svg")
    if num_cells > _MAX_TIMELINES:
        raise UsageError(
            f"--timeline: {num_cells} cells are more than {_MAX_TIMELINES} panels",
            "Name fewer, for example --norm batch,batchless --micro-batch 1 --effective-batch 32",
        )
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"cannot create {place.parent}: {error.strerror}", "Choose another --timeline.") from error


def _plot_timelines(place: Path, document: dict[str, Any]) -> None:
    from bln_train.records import TimelineRecord
    from bln_train.report.plots import plot_timelines

    found = [
        (
            f"{row['norm']}, micro-batch {row['micro_batch_size']} of {row['effective_batch_size']}",
            TimelineRecord(**row["timeline"]),
        )
        for row in document["rows"]
        if row["timeline"] is not None
    ]
    environment = document["environment"]
    about = f"{document['model']}, {document['precision']}, {document['optimizer']}"
    if found:
        plot_timelines(
            place, found, f"{about}; {environment['device']}, torch {environment['torch']}, {document['date']}"
        )


def plan(
    recipe: RecipeArgument,
    budget: Annotated[
        str,
        typer.Option(
            help="Memory that training may take, e.g. 4GiB; default train.memory_budget, or what is free on this device."
        ),
    ] = "",
    norm: Annotated[
        str, typer.Option(help="Norms, comma-separated; default the recipe's.", autocompletion=complete_norms)
    ] = "",
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=V1,V2",
            help="Values of a setting to put side by side, e.g. train.precision=fp32,bf16; repeatable.",
        ),
    ] = None,
    micro_batch: Annotated[str, typer.Option(help="Micro-batches; default 1, 2, 4, ... and the effective batch.")] = "",
    context: Annotated[str, typer.Option(help="Memory of CUDA's context; default 400MiB.")] = "",
    set_: SetOption = None,
    device: Annotated[
        str | None,
        typer.Option(help="Predict for cuda, present or not, or cpu; default cuda unless the recipe says cpu."),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Predict the memory of training, and which micro-batch fits a budget; needs no GPU, reads no data and trains nothing."""
    if device not in (None, "cuda", "cpu"):
        raise UsageError(f"--device: '{device}' is neither cuda nor cpu")
    _bytes(budget, "--budget")
    context_bytes = _bytes(context, "--context")
    from bln_train.console.output import print_json
    from bln_train.console.plan import print_plan
    from bln_train.recipe.load import load_recipe

    loaded = load_recipe(recipe, set_ or ())
    budget_bytes = _bytes(budget or loaded.train.memory_budget or "", "--budget")
    cuda = device == "cuda" or (device is None and loaded.runtime.device != "cpu")
    if context_bytes is not None and not cuda:
        raise UsageError("--context: there is no CUDA context on the CPU", "Leave it out.")
    varied = [_values(text) for text in vary or ()]
    if len({key for key, _ in varied}) < len(varied):
        raise UsageError("--vary: names a setting twice", "Put all its values into one --vary.")

    with _no_search_for_cycles():
        from bln_train.plan import planner  # torch, from here on

        document = planner.make_plan(
            _variants(recipe, set_ or (), varied, split(norm)),
            sizes(micro_batch, "--micro-batch") if micro_batch else (),
            cuda=cuda,
            budget_bytes=budget_bytes,
            context_bytes=context_bytes,
        )
    if json_:
        print_json(document)
    else:
        print_plan(document)
    if document["budget_bytes"] is not None and not any(row["fits"] for row in document["rows"]):
        raise DoesNotFitError(*planner.why_nothing_fits(document))


@contextmanager
def _no_search_for_cycles() -> Iterator[None]:
    """Keep Python from looking for garbage in cycles, which is a second where torch is imported and there is none."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _variants(
    recipe: str, settings: Sequence[str], varied: Sequence[tuple[str, list[str]]], norms: Sequence[str]
) -> list[Variant]:
    """Every combination of the varied settings and norms; one that cannot be keeps its problem, unless it is the only one."""
    from bln_train.plan.planner import Variant
    from bln_train.recipe.load import load_recipe

    variants: list[Variant] = []
    for values in itertools.product(*(values for _, values in varied)):
        chosen = dict(zip((key for key, _ in varied), values, strict=True))
        base = load_recipe(recipe, [*settings, *(f"{key}={value}" for key, value in chosen.items())]).untrained()
        for name in norms or [base.norm.name]:
            try:
                variants.append(Variant(name, chosen, base.with_norm(name)))
            except UsageError as error:
                if not varied and len(norms) < 2:
                    raise
                variants.append(Variant(name, chosen, None, problem=error.problem))
    return variants


def _bytes(text: str, option: str) -> int | None:
    from bln_train.system.units import parse_bytes

    try:
        return parse_bytes(text) if text else None
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from error


def _values(text: str) -> tuple[str, list[str]]:
    key, equals, values = text.partition("=")
    if not equals or not key or not split(values):
        raise UsageError(f"--vary: '{text}' is not KEY=V1,V2", "Example: --vary train.precision=fp32,bf16")
    return key.strip(), split(values)
