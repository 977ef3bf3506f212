"""The names of a run folder's checkpoints, and which of them are kept. No torch here.

    checkpoint.pt           the latest state
    checkpoint-<step>.pt    the states before it

The old checkpoint.pt gets its second name before the new one takes its place, so a crash loses no whole file.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from bln_train.system.atomic import TEMPORARY, replacing

CHECKPOINT = "checkpoint.pt"
_EARLIER = re.compile(r"checkpoint-(\d+)\.pt", re.ASCII)
_INTACT = "Free some space or choose another folder with --out; the previous checkpoint is intact."


def replacing_checkpoint(path: Path) -> contextlib.AbstractContextManager[BinaryIO]:
    """`replacing`, with an error that speaks of the checkpoint."""
    return replacing(path, "the checkpoint ", _INTACT)


def rotate(folder: Path, write: Callable[[BinaryIO], None], *, step: int, old_step: int | None, num_kept: int) -> None:
    """Let `write` write the new checkpoint.pt, and keep the `num_kept` - 1 latest earlier states beside it.

    Args:
        step: of the new state. Files of this step or a later one are removed.
        old_step: of the checkpoint.pt that is there; None if there is none, or a damaged one.

    Raises:
        RunFolderError: the disk is full or the folder cannot be written; the checkpoints that were there are intact.
    """
    newest = folder / CHECKPOINT
    with replacing_checkpoint(newest) as file:
        write(file)
        if num_kept > 1 and old_step is not None and old_step < step:
            _link(newest, folder / f"checkpoint-{old_step}.pt")
    before = sorted((number for number in _steps(folder).values() if number < step), reverse=True)
    _remove_others(folder, before[: num_kept - 1])


def go_on_from(folder: Path, file: Path, step: int) -> None:
    """Make `file`, a state of `step`, the folder's checkpoint.pt, and remove the states of this step and later ones.

    Raises:
        RunFolderError: the folder cannot be written; nothing is lost.
    """
    if file.name != CHECKPOINT:
        _copy(file, folder / CHECKPOINT)
    _remove_others(folder, [number for number in _steps(folder).values() if number < step])


def has_checkpoint(folder: Path) -> bool:
    """Whether there is any checkpoint in a run folder, whole or not."""
    return bool(checkpoint_files(folder))


def checkpoint_files(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, whole or not, the newest first."""
    newest, steps = folder / CHECKPOINT, _steps(folder)
    return [*([newest] if newest.is_file() else []), *sorted(steps, key=steps.__getitem__, reverse=True)]


def _steps(folder: Path) -> dict[Path, int]:
    """The steps of the files checkpoint-<step>.pt, by their names."""
    return {file: int(match[1]) for file in folder.glob("checkpoint-*.pt") if (match := _EARLIER.fullmatch(file.name))}


def _link(file: Path, name: Path) -> None:
    """Give `file` the second name `name`; a copy where the file system has no links."""
    name.unlink(missing_ok=True)
    try:
        os.link(file, name)
    except OSError:
        _copy(file, name)


def _copy(file: Path, name: Path) -> None:
    with replacing_checkpoint(name) as copy, open(file, "rb") as content:
        shutil.copyfileobj(content, copy)


def _remove_others(folder: Path, kept: list[int]) -> None:
    """Remove the states before checkpoint.pt whose steps are not in `kept`, and half-written files of a killed process."""
    others = [file for file, step in _steps(folder).items() if step not in kept]
    for file in [*others, *folder.glob(f"checkpoint*{TEMPORARY}")]:
        with contextlib.suppress(OSError):
            file.unlink()
