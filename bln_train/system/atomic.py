"""Files written whole or not at all. No torch here."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from bln_train.errors import RunFolderError

TEMPORARY = ".tmp"


@contextmanager
def replacing(path: Path, what: str = "", hint: str = "Choose another --out.") -> Iterator[BinaryIO]:
    """A file to write that takes `path`'s place when the block ends: write, fsync, rename, fsync of the folder.

    Whatever ends the block early, a second Ctrl-C included, leaves `path` as it was and no other file; only a process that is
    killed leaves `path`.tmp, which the next writer overwrites.

    Raises:
        RunFolderError: the disk is full, or the folder cannot be written; `what` (with a space after it) and `hint` go into it.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise RunFolderError(f"cannot write {what}{path}: {error.strerror or error}", hint) from error
    finally:  # a file written whole has moved
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file (text as UTF-8) whole or not at all; raises RunFolderError where that is impossible."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut, where the system can (not on Windows)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
