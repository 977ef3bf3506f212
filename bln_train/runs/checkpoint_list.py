"""The checkpoints of a run folder: their names, and the list by which each is known. No torch here.

    checkpoint.pt           the latest state
    checkpoint-<step>.pt    those before it
    checkpoints.json        step, size and SHA-256 of each, newest first

The list names a new state before its file has its place, and an old one until its file has gone, so that whenever the process is
killed every whole file is on it. A state is known by its content, whatever its file is called. A folder of an earlier version
has no list.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from bln_train.errors import CheckpointError
from bln_train.system.atomic import TEMPORARY, replacing, write_atomically

CHECKPOINT, LIST = "checkpoint.pt", "checkpoints.json"
_EARLIER = re.compile(r"checkpoint-(\d+)\.pt", re.ASCII)
_INTACT = "Free some space or choose another folder with --out; the previous checkpoint is intact."


@dataclass(frozen=True)
class Entry:
    """What the list says of a checkpoint."""

    step: int
    bytes: int
    sha256: str


def replacing_checkpoint(path: Path) -> contextlib.AbstractContextManager[BinaryIO]:
    """`replacing` with a checkpoint's words."""
    return replacing(path, "the checkpoint ", _INTACT)


def keep(folder: Path, write: Callable[[BinaryIO], Entry], num_kept: int) -> None:
    """Let `write` write the folder's new checkpoint.pt, and keep the `num_kept` - 1 last ones of other steps beside it.

    Raises:
        RunFolderError: the disk is full or the folder cannot be written; the checkpoints that were there are intact.
    """
    newest, old = folder / CHECKPOINT, read_list(folder) or []
    with replacing_checkpoint(newest) as file:
        kept: list[Entry] = []
        for entry in [write(file), *old]:
            if len(kept) < num_kept and all(entry.step != other.step for other in kept):
                kept.append(entry)
        if old and old[0] in kept and newest.exists():
            _link(newest, _earlier(folder, old[0].step))
        # Until the rename checkpoint.pt is the old one, which need not be among those that are kept.
        _write_list(folder, kept + [entry for entry in old[:1] if entry not in kept])
    _remove_others(folder, kept)


def settle(folder: Path, file: Path, step: int) -> None:
    """Go on from `file`, of `step`: it becomes checkpoint.pt, and what is damaged or newer goes.

    Raises:
        RunFolderError: the folder cannot be written; nothing is lost.
    """
    with open(file, "rb") as content:
        own = Entry(step, os.fstat(content.fileno()).st_size, hashlib.file_digest(content, "sha256").hexdigest())
    old = read_list(folder) or []
    # By step, not by place: a save of the same step that was killed before its rename has put `file` at the list's end.
    kept = [own, *(entry for entry in old if entry.step < step)]
    if file.name != CHECKPOINT:
        with replacing_checkpoint(folder / CHECKPOINT) as copy, open(file, "rb") as content:
            shutil.copyfileobj(content, copy)
    if old != kept:
        _write_list(folder, kept)
    _remove_others(folder, kept)


def has_checkpoint(folder: Path) -> bool:
    """Whether there is any checkpoint in a run folder, whole or not."""
    return bool(checkpoint_files(folder))


def checkpoint_files(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, whole or not, the newest first."""
    newest = folder / CHECKPOINT
    return [*([newest] if newest.is_file() else []), *_earlier_files(folder)]


def open_known(path: Path) -> BinaryIO:
    """`path` open for reading: if it is a checkpoint's name in a folder with a list, its content is on that.

    Raises:
        CheckpointError: it is not.
    """
    listable = path.name == CHECKPOINT or _EARLIER.fullmatch(path.name) is not None
    while True:
        file = open(path, "rb")  # noqa: SIM115 # the caller closes it
        try:
            digest = hashlib.file_digest(file, "sha256").hexdigest() if listable else ""
            # Read after the file: a run that goes on meanwhile lists a state before its file is in place.
            entries = read_list(path.parent) if listable else None
            if entries is None or any(entry.sha256 == digest for entry in entries):
                return file
            replaced = not os.path.samestat(os.fstat(file.fileno()), os.stat(path))
        except BaseException:
            file.close()
            raise
        file.close()
        if not replaced:  # by a newer one, while it was read
            raise CheckpointError(f"{path} is damaged: {LIST} knows no checkpoint with its SHA-256")


def read_list(folder: Path) -> list[Entry] | None:
    """The folder's list, the newest first; None where it has none, or a damaged one."""
    try:
        entries = [Entry(**entry) for entry in json.loads((folder / LIST).read_bytes())["checkpoints"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    whole = all(type(e.step) is int and type(e.bytes) is int and type(e.sha256) is str for e in entries)
    return entries if whole and entries else None


def _write_list(folder: Path, entries: list[Entry]) -> None:
    write_atomically(folder / LIST, json.dumps({"checkpoints": [asdict(entry) for entry in entries]}, indent=2) + "\n")


def _earlier(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step}.pt"


def _earlier_files(folder: Path) -> list[Path]:
    """checkpoint-<step>.pt, the newest first."""
    steps = {file: int(match[1]) for file in folder.glob("checkpoint-*.pt") if (match := _EARLIER.fullmatch(file.name))}
    return sorted(steps, key=steps.__getitem__, reverse=True)


def _link(file: Path, name: Path) -> None:
    """Give `file` the second name `name`; a copy where a file can have only one."""
    name.unlink(missing_ok=True)
    try:
        os.link(file, name)
    except OSError:
        with replacing_checkpoint(name) as copy, open(file, "rb") as content:
            shutil.copyfileobj(content, copy)


def _remove_others(folder: Path, kept: list[Entry]) -> None:
    """Remove what is not among `kept`, whose first is checkpoint.pt, and what a process that was killed left half written."""
    names = {_earlier(folder, entry.step) for entry in kept[1:]}
    for file in [*_earlier_files(folder), *folder.glob(f"checkpoint*{TEMPORARY}")]:
        if file not in names:
            with contextlib.suppress(OSError):
                file.unlink()
