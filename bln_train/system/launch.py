"""How this process was started: alone, or by torchrun as one of several. No torch here."""

from __future__ import annotations

import os
from typing import NamedTuple

from bln_train.errors import UsageError


class Launch(NamedTuple):
    """A process among those that torchrun started; alone it is rank 0 of 1."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Its number on this machine."""


def launch() -> Launch:
    """What torchrun says in the environment; RANK and WORLD_SIZE alone are not enough: cluster software sets them too."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Launch()
    return Launch(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"]))


def refuse_several_processes(what: str) -> None:
    """Raises UsageError under torchrun, for what one process does."""
    if launch().size > 1:
        raise UsageError(
            f"{what} is for one process, and torchrun started {launch().size}",
            "Leave torchrun out; it is for `run` of a training recipe.",
        )
