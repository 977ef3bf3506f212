"""One process at a time in a run folder: a lock of the system's, which ends with the process that holds it. No torch here."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from bln_train.errors import RunFolderError

LOCK = "run.lock"
_BUSY = (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`, made where it is not there; readers (evaluate, export, report) ask for no lock.

    The file run.lock says who holds it. It goes when the block ends, and so do folders that were made for it and stayed empty;
    of a process that was killed the file stays, which stops nobody.

    Raises:
        RunFolderError: another process holds the folder, or it cannot be written.
    """
    made = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _acquire(path)
    except OSError as error:
        raise RunFolderError(f"cannot write {path}: {error.strerror or error}", "Choose another --out.") from error
    try:
        with file:
            holder = {
                "pid": os.getpid(),
                "host": platform.node(),
                "since": datetime.now().isoformat(sep=" ", timespec="seconds"),
            }
            with contextlib.suppress(OSError):  # a full disk: the lock holds all the same, without a name
                file.truncate(0)
                file.write(json.dumps(holder).encode())
                file.flush()
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # before the lock goes, or it might be the next holder's
                    path.unlink()
    finally:
        for each in made:
            with contextlib.suppress(OSError):  # not empty
                each.rmdir()


def _acquire(path: Path) -> BinaryIO:
    """The lock file, open and locked; raises RunFolderError if another process holds it."""
    while True:
        file = open(path, "ab", buffering=0)  # noqa: SIM115 # the caller closes it
        try:
            _lock(file)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except FileNotFoundError:
            pass
        except OSError as error:
            file.close()
            if error.errno not in _BUSY:
                raise
            raise RunFolderError(
                f"{path.parent} is in use by {_holder(path)}",
                "Wait for it to end, or choose another --out. Nothing was changed.",
            ) from error
        file.close()  # its holder left and took the file along in between: begin anew


def _lock(file: BinaryIO) -> None:
    if sys.platform == "win32":
        import msvcrt

        file.seek(1 << 30)  # far behind the text, which others may go on reading
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
