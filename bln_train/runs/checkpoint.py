"""Checkpoints: written whole or not at all, the newest whole one found, loaded without executing anything."""

from __future__ import annotations

import hashlib
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from bln_train.errors import CheckpointError, first_line
from bln_train.runs.checkpoint_list import (
    CHECKPOINT,
    LIST,
    Entry,
    checkpoint_files,
    keep,
    open_known,
    read_list,
    replacing_checkpoint,
)

FORMAT_KEY, FORMAT = "bln_train_format", 1


class Found(NamedTuple):
    """A checkpoint that was read."""

    file: Path
    state: dict[str, Any]
    notices: list[str]
    """What is wrong with newer ones, and which was taken; empty where nothing is."""


class _Summing:
    """A file that sums what is written to it, and keeps the error of a write: torch raises one of its own in its place."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.num_bytes = file, hashlib.sha256(), 0
        self.error: BaseException | None = None

    def write(self, data: bytes) -> int:
        try:
            self.file.write(data)
            self.digest.update(data)
        except BaseException as error:
            self.error = error
            raise
        self.num_bytes += len(data)
        return len(data)

    def flush(self) -> None:  # torch calls it; `replacing` flushes in the end
        pass


def _write(file: BinaryIO, state: dict[str, Any]) -> Entry:
    summing = _Summing(file)
    try:
        torch.save({FORMAT_KEY: FORMAT, **state}, summing)  # type: ignore[arg-type]  # it only writes
    except RuntimeError as error:
        if summing.error is not None:
            raise summing.error from error
        raise
    return Entry(int(state.get("step", 0)), summing.num_bytes, summing.digest.hexdigest())


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, containers) to `path` by write, fsync, rename.

    Raises:
        RunFolderError: the disk is full or the folder cannot be written; an earlier checkpoint at `path` is intact.
    """
    with replacing_checkpoint(path) as file:
        _write(file, state)


def keep_checkpoint(folder: Path, state: dict[str, Any], num_kept: int) -> None:
    """Make `state` the folder's checkpoint.pt, and keep the last ones before it, `num_kept` in all; see `checkpoint_list`.

    Raises:
        RunFolderError: the disk is full or the folder cannot be written; the checkpoints that were there are intact.
    """
    keep(folder, lambda file: _write(file, state), num_kept)


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
    if read_list(folder) is None and (folder / LIST).exists():
        notices.append(f"{folder / LIST} is damaged; checkpoints are checked by the checksums of their parts alone")
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

    A file of a run folder has to be one that the folder's list knows by its SHA-256; one without a list is checked by the CRC-32
    of its parts. No part may be compressed, so nothing takes more memory than the file is long.

    Raises:
        CheckpointError: missing, damaged, or not written by bln-train.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}", "Give a run folder or a checkpoint file that exists.")
    try:
        with open_known(path) as file:
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
