"""The commands below `bln-train paper`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bln_train.cli.options import DeviceOption, JsonOption, OptionalRecipeArgument, SetOption, overrides

paper_app = typer.Typer(help="Experiments with the method as it was published.", no_args_is_help=True)


@paper_app.command("synthetic")
def synthetic(
    recipe: OptionalRecipeArgument = "paper_synthetic",
    set_: SetOption = None,
    out: Annotated[Path | None, typer.Option(help="Folder; default runs/<recipe>, numbered if taken.")] = None,
    device: DeviceOption = None,
    json_: JsonOption = False,
) -> None:
    """Follow streams of known mean and standard deviation by the statistics alone; tables, plots and CSV of the errors."""
    from bln_train.console import output
    from bln_train.recipe.load import load_synthetic_recipe
    from bln_train.runs.folder import RunFolder, free_folder

    loaded = load_synthetic_recipe(recipe, overrides(set_, device))
    folder = RunFolder(out or free_folder(Path("runs") / Path(recipe).stem))
    folder.check_usable(loaded, resume=False)

    from bln_train.console.progress import show_share
    from bln_train.console.synthetic import print_synthetic
    from bln_train.experiments.run_synthetic import run_synthetic  # torch, from here on

    with show_share() as progress:
        summary = run_synthetic(loaded, folder, name=recipe, progress=progress)
    if json_:
        output.print_json({**summary, "folder": str(folder.path)})
    else:
        print_synthetic(summary, str(folder.path))
