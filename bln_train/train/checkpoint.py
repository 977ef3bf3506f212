"""Checkpoints: written whole or not at all, loaded without executing anything."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from bln_train.errors import CheckpointError, RunFolderError

FORMAT_KEY, FORMAT = "bln_train_format", 1


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, containers) to `path` by write, fsync, rename.

    Raises:
        RunFolderError: the disk is full or the folder cannot be written; an earlier checkpoint at `path` is intact.
    """
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({FORMAT_KEY: FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        temporary.unlink(missing_ok=True)
        raise RunFolderError(
            f"cannot write the checkpoint {path}: {error}",
            "Free some space or choose another folder with --out; the previous checkpoint is intact.",
        ) from error


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, where the system can (not on Windows)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Load a checkpoint by torch's weights-only unpickler, which builds tensors and plain containers and nothing else.

    Raises:
        CheckpointError: missing, damaged, or not written by bln-train.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}", "Give a run folder or a checkpoint file that exists.")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums of the parts
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"{path} is damaged: {damaged} does not match its checksum")
        state = torch.load(path, map_location=device, weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        OSError,
        AttributeError,
        zipfile.BadZipFile,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged or not a checkpoint of bln-train: {reason}") from error
    if not isinstance(state, dict) or state.get(FORMAT_KEY) != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this version of bln-train (format {FORMAT})")
    return state
