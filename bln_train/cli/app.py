"""The command line: thin commands, one error boundary. torch is imported only by commands that compute."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from bln_train.cli.complete import complete_recipe
from bln_train.cli.doctor import doctor
from bln_train.cli.memory import memory, plan
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
from bln_train.cli.paper import paper_app
from bln_train.cli.recipes import recipes_app
from bln_train.cli.report import report
from bln_train.cli.sizes import expand_dots, parse_size
from bln_train.errors import EXIT_FAILED, EXIT_INTERRUPTED, BlnError, DivergedError, InterruptedRunError, UsageError
from bln_train.system.launch import launch, refuse_several_processes

app = typer.Typer(
    name="bln-train",
    help="Train convolutional networks one image at a time, with the result of the whole batch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(recipes_app, name="recipes")
app.add_typer(paper_app, name="paper")

_FIRST_WORD_SECONDS = 2.0


@app.callback()
def before_any_command(context: typer.Context) -> None:  # noqa: D103  # a docstring would replace the help text
    if context.invoked_subcommand != "run":
        refuse_several_processes(f"bln-train {context.invoked_subcommand}")


@app.command()
def run(
    recipe: RecipeArgument,
    set_: SetOption = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/<recipe>, numbered if taken.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run folder's checkpoint, bit for bit.")
    ] = False,
    device: DeviceOption = None,
    json_: JsonOption = False,
) -> None:
    """Train a recipe; the run folder keeps recipe, metrics, checkpoint and summary."""
    from bln_train.console import output, tables
    from bln_train.console.progress import Progress, show_progress
    from bln_train.recipe.load import load_recipe
    from bln_train.runs.folder import RunFolder, free_folder, latest_folder

    loaded = load_recipe(recipe, overrides(set_, device))
    name = Path(recipe).stem
    base = Path("runs") / name
    if out is None:
        out = (latest_folder(base) or base) if resume else free_folder(base)
    folder = RunFolder(out)
    if launch().rank == 0:
        folder.check_usable(loaded, resume=resume)

    from bln_train.experiments.run import run as run_recipe  # torch, from here on
    from bln_train.system.machine import memory_limit

    with ExitStack() as display:
        progress: Progress  # once there is one

        def announce(experiment: Any) -> None:
            nonlocal progress
            trainer = experiment.trainer
            output.say(
                f"{recipe}: {loaded.model.name}, norm {loaded.norm.name}, effective batch "
                f"{loaded.train.effective_batch_size}, micro-batch {trainer.accumulation.micro_batch_size}, "
                f"{trainer.num_steps} steps on {experiment.device}"
                f"{f' in {launch().size} processes' if launch().size > 1 else ''}; {experiment.data.source}"
            )
            if trainer.num_steps_done:
                output.say(f"resumed at step {trainer.num_steps_done}")
            limit_bytes = memory_limit(experiment.device, loaded.train.memory_budget)
            progress = display.enter_context(show_progress(trainer.num_steps, trainer.num_steps_done, limit_bytes))

        summary = run_recipe(
            loaded,
            folder,
            name=recipe,
            resume=resume,
            announce=announce,
            listen=lambda record: progress(record),
            say_stopping=lambda text: progress.stopping(text),
        )
    if launch().rank:
        return  # rank 0 speaks for all
    if json_:
        output.print_json({**summary, "folder": str(out)})
    else:
        tables.print_summary(summary, str(out))


@app.command()
def compare(
    recipe: OptionalRecipeArgument = "quickstart",
    norm: NormsOption = "batch,batchless",
    effective_batch: Annotated[
        str,
        typer.Option(
            help="Effective batches, comma-separated, `1,2,4,...,1024` or `2,4,6,...,12`; default the recipe's."
        ),
    ] = "",
    micro_batch: Annotated[
        str,
        typer.Option(
            help="Micro-batches, the same way, `full` for the effective batch; default the recipe's and full, or full "
            "alone where the recipe's micro-batch is its effective batch."
        ),
    ] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each cell, with seeds counted from the recipe's.")] = 1,
    set_: SetOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder; default comparisons/<recipe>. The same command goes on.")
    ] = None,
    device: DeviceOption = None,
    json_: JsonOption = False,
) -> None:
    """Run a grid of norms and batch sizes and put accuracy, peak memory and speed side by side."""
    from bln_train.console import output, tables
    from bln_train.console.progress import show_cells
    from bln_train.experiments import compare as grid
    from bln_train.recipe.load import load_recipe
    from bln_train.report.plots import plot_comparison
    from bln_train.runs.tensorboard import require_tensorboard
    from bln_train.system.units import parse_bytes

    loaded = load_recipe(recipe, overrides(set_, device))
    folder = out or Path("comparisons") / Path(recipe).stem
    cells = grid.plan_cells(
        loaded,
        folder,
        norms=[n.strip() for n in norm.split(",") if n.strip()],
        effective_batches=sizes(effective_batch, "--effective-batch") if effective_batch else (),
        micro_batches=[
            "full" if text == "full" else parse_size(text, "--micro-batch")
            for text in expand_dots(split(micro_batch), "--micro-batch")
        ],
        num_seeds=seeds,
    )
    require_tensorboard(loaded)
    grid.open_comparison(folder, loaded)
    budget = loaded.train.memory_budget
    with show_cells(len(cells), None if budget is None else parse_bytes(budget)) as show:
        grid.run_cells(cells, show, show.stopping)
    table, environment = grid.rows(cells), grid.environment_of(cells)
    grid.write_tables(folder, table, environment)
    plot_comparison(folder, table, environment.get("device", "-"))
    if json_:
        output.print_json({"environment": environment, "rows": table, "folder": str(folder)})
    else:
        tables.print_comparison(table, environment.get("device", "-"))
        output.print_line(f"tables and plots: {folder}")
    if not any(row["num_finished"] for row in table):
        raise BlnError("no cell of the comparison finished", f"Logs: {folder}/cells/*.log")


app.command()(memory)
app.command()(plan)


@app.command()
def evaluate(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run folder or a checkpoint file.")],
    layers: Annotated[
        bool, typer.Option("--layers", help="Each batchless layer's likelihood of the test images too.")
    ] = False,
    device: DeviceOption = None,
    json_: JsonOption = False,
) -> None:
    """Test loss and accuracy of a run; executes nothing from the file."""
    if not source.exists():
        raise UsageError(f"{source} does not exist", "Give a run folder (runs/...) or a checkpoint file.")
    from bln_train.build.trained_run import evaluate_checkpoint
    from bln_train.console import output
    from bln_train.system.units import format_percent

    recipe, found, step = evaluate_checkpoint(source, device, layers=layers, notify=output.note)
    if json_:
        output.print_json({"step": step, "model": recipe.model.name, "norm": recipe.norm.name, **found._asdict()})
    else:
        output.print_line(
            f"{recipe.model.name}, norm {recipe.norm.name}, after step {step}: test loss {found.loss:.4f}, "
            f"accuracy {format_percent(found.accuracy)} over {found.num_images} images",
        )
        for name, nll in (found.nll_by_layer or {}).items():
            output.print_line(f"nll {nll:10.4f}  {name}")


@app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run folder or a checkpoint file.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="model.onnx, model.pt2 or model.safetensors.")],
    batch: Annotated[
        str, typer.Option(help="Images at once: `dynamic` or a number; default dynamic. Not of .safetensors.")
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    json_: JsonOption = False,
) -> None:
    """Write a trained network, norms folded away, for use without bln-train; executes nothing from the checkpoint."""
    if not source.exists():
        raise UsageError(f"{source} does not exist", "Give a run folder (runs/...) or a checkpoint file.")
    if batch and out.suffix == ".safetensors":
        raise UsageError("--batch: a .safetensors file holds weights, which have no batch", "Leave it out.")
    number = None if batch in ("", "dynamic") else parse_size(batch, "--batch", "dynamic, or --batch 1")
    from bln_train.console import output, tables
    from bln_train.export.export import export_run

    result = export_run(source, out, batch=number, force=force, notify=output.note)
    if json_:
        output.print_json(result)
    else:
        tables.print_export(result)


@app.command()
def migrate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A run folder, a checkpoint, a state dict, torchvision:<name> or timm:<name>."
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The file to write: .pt, .pth or .safetensors.")],
    to: Annotated[str, typer.Option(help="batchless or batch.")] = "batchless",
    eps: Annotated[
        float | None, typer.Option(help="Of the BatchNorm; default the network's, 1e-5 where that is not known.")
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            help="Take statistics that a state dict lacks from this recipe's images.",
            autocompletion=complete_recipe,
        ),
    ] = None,
    set_: SetOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    json_: JsonOption = False,
) -> None:
    """Turn trained BatchNorm into Batchless Normalization with the same function, or back; executes nothing from a file."""
    if to not in ("batchless", "batch"):
        raise UsageError(f"--to: '{to}' is neither batchless nor batch")
    if set_ and calibrate is None:
        raise UsageError("--set changes the recipe of --calibrate, and none is given")
    from bln_train.console import output, tables
    from bln_train.recipe.load import load_recipe

    recipe = None if calibrate is None else load_recipe(calibrate, set_ or ())

    from bln_train.export.migrate import migrate as migrate_weights  # torch, from here on

    result = migrate_weights(source, out, to=to, eps=eps, calibrate=recipe, force=force)
    for text in result["notices"]:
        output.say(f"note: {text}")
    if json_:
        output.print_json(result)
    else:
        tables.print_migration(result)


@app.command()
def check(recipe: RecipeArgument, set_: SetOption = None) -> None:
    """Check a recipe without running it; every problem at once."""
    from bln_train.console import output
    from bln_train.recipe.load import load_any_recipe
    from bln_train.recipe.recipe import Recipe
    from bln_train.runs.tensorboard import require_tensorboard

    loaded = load_any_recipe(recipe, set_ or ())
    if not isinstance(loaded, Recipe):
        return output.print_line(
            f"{recipe}: ok (synthetic, {len(loaded.streams)} streams of {loaded.num_samples} samples, "
            f"{loaded.num_repetitions} repetitions, batches of {', '.join(map(str, loaded.batch_sizes))})"
        )
    require_tensorboard(loaded)
    output.print_line(
        f"{recipe}: ok ({loaded.model.name} on {loaded.data.name}, norm {loaded.norm.name}, "
        f"effective batch {loaded.train.effective_batch_size}, micro-batch {loaded.train.micro_batch_size})",
    )


app.command()(report)
app.command()(doctor)


def main() -> None:
    """Entry point: run a command, and turn every failure into a message and an exit code."""
    debug = os.environ.get("BLN_DEBUG") == "1"
    atexit.register(gc.freeze)  # or Python looks for cycles among all that torch is, a second for a process that ends
    try:
        app()
    except BlnError as error:
        if debug:
            raise
        if launch().rank:  # rank 0 has the word: where it failed too, torchrun ends this process meanwhile
            time.sleep(_FIRST_WORD_SECONDS)
            if isinstance(error, InterruptedRunError | DivergedError):  # so did every process
                sys.exit(error.exit_code)
        from bln_train.console.output import print_error

        print_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        if debug:
            raise
        typer.echo("interrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except OSError as error:
        if debug:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(EXIT_FAILED)
    except Exception as error:
        if debug:
            raise
        typer.echo(f"error: {type(error).__name__}: {error}", err=True)
        typer.echo("This is a bug in bln-train, or of the libraries below; BLN_DEBUG=1 shows where.", err=True)
        sys.exit(EXIT_FAILED)
