"""Checkpoints: written whole or not at all, found again even when newer ones are damaged, loaded without executing anything."""

from __future__ import annotations

import os
import warnings
import zipfile
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from bln_train.errors import CheckpointError, first_line
from bln_train.runs.checkpoint_files import CHECKPOINT, checkpoint_files, replacing_checkpoint, rotate

FORMAT_KEY, FORMAT = "bln_train_format", 1


class Found(NamedTuple):
    """A checkpoint that was read."""

    file: Path
    state: dict[str, Any]
    notices: list[str]
    """What is wrong with newer checkpoints, and which file was used; empty where nothing is wrong."""


class _ErrorKeeping:
    """A file that remembers the error of a failed write: torch raises a RuntimeError without a reason in its place."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: BaseException | None = None

    def write(self, data: bytes) -> int:
        try:
            self.file.write(data)
        except BaseException as error:
            self.error = error
            raise
        return len(data)

    def flush(self) -> None:  # torch calls it; `replacing` flushes in the end
        pass


def _write(state: dict[str, Any], file: BinaryIO) -> None:
    keeping = _ErrorKeeping(file)
    try:
        torch.save({FORMAT_KEY: FORMAT, **state}, keeping)  # type: ignore[arg-type]  # torch only writes to it
    except RuntimeError as error:
        if keeping.error is not None:
            raise keeping.error from error
        raise


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, containers) to `path` by write, fsync, rename.

    Raises:
        RunFolderError: the disk is full or the folder cannot be written; an earlier checkpoint at `path` is intact.
    """
    with replacing_checkpoint(path) as file:
        _write(state, file)


def keep_checkpoint(folder: Path, state: dict[str, Any], num_kept: int) -> None:
    """Make `state` the folder's checkpoint.pt, and keep the last states before it, `num_kept` in all; see `rotate`.

    Raises:
        RunFolderError: the disk is full or the folder cannot be written; the checkpoints that were there are intact.
    """
    old_step = _step_of(folder / CHECKPOINT) if num_kept > 1 else None
    rotate(folder, partial(_write, state), step=state["step"], old_step=old_step, num_kept=num_kept)


def _step_of(path: Path) -> int | None:
    """The step of a checkpoint, of which no tensor is read; None where there is none, or a damaged one."""
    try:
        step = torch.load(path, map_location="meta", mmap=True, weights_only=True)["step"]
    except Exception:  # a damaged file ends in whatever error its damage leads to
        return None
    return step if type(step) is int else None


def find_checkpoint(folder: Path, device: torch.device | str = "cpu") -> Found:
    """Read the newest checkpoint of a run folder that is whole.

    Raises:
        CheckpointError: there is none; every one is named with what is wrong.
    """
    files = checkpoint_files(folder)
    if not files:
        raise CheckpointError(
            f"no checkpoint at {folder / CHECKPOINT}", "Give a run folder or a checkpoint file that exists."
        )
    notices: list[str] = []
    if files[0].name != CHECKPOINT:
        notices.append(f"{folder / CHECKPOINT} is missing")
    for file in files:
        try:
            state = load_checkpoint(file, device)
        except CheckpointError as error:
            notices.append(error.problem)
            continue
        if notices:
            notices.append(f"using {file}, of step {state['step']}")
        return Found(file, state, notices)
    raise CheckpointError("\n".join(["no checkpoint is whole", *notices]), "Begin anew with another --out.")


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Load a checkpoint by torch's weights-only unpickler, which builds tensors and plain containers and nothing else.

    The file is a zip archive, and the CRC-32 of each part is checked. No part may be compressed, so loading takes no more memory
    than the file is long.

    Raises:
        CheckpointError: missing, damaged, not written by bln-train, or of another format than `FORMAT`.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}", "Give a run folder or a checkpoint file that exists.")
    try:
        with open(path, "rb") as file:
            _check_parts(path, file)
            file.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of foreign pickles, which are refused
                state = torch.load(file, map_location=device, weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file ends in whatever error its damage leads to
        raise CheckpointError(f"{path} is damaged or not a checkpoint of bln-train: {first_line(error)}") from error
    if not isinstance(state, dict) or type(state.get(FORMAT_KEY)) is not int or state[FORMAT_KEY] != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this version of bln-train (format {FORMAT})")
    if type(state.get("step")) is not int or state["step"] < 0:
        raise CheckpointError(f"{path} is damaged: its step is not a count")
    return state


def _check_parts(path: Path, file: BinaryIO) -> None:
    """Refuse compressed and overlapping parts before any is read, and then those whose checksum is wrong."""
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size for part in parts):
            raise CheckpointError(f"{path} is not a checkpoint of bln-train: it has compressed parts")
        if sum(part.file_size for part in parts) > os.fstat(file.fileno()).st_size:
            raise CheckpointError(f"{path} is damaged: its parts are larger than the file")
        if len({part.filename for part in parts}) != len(parts):
            raise CheckpointError(f"{path} is damaged: two parts have one name")
        wrong = archive.testzip()  # torch.load does not look at these checksums
    if wrong is not None:
        raise CheckpointError(f"{path} is damaged: {wrong} does not match its checksum")
