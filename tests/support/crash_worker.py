"""Runs recipes in processes that may be killed: imports everything once, then forks for each line on stdin.

A line is JSON: recipe, folder, resume, and perhaps a `fault`: what happens at the `at`-th call that changes the disk, one of
"kill" (SIGKILL), "term" (SIGTERM), "twice" (SIGINT twice), "full" (no space left). Answers on stdout: the process id, `ready` when
the first step is next, `exit CODE` in the end.
"""

import builtins
import errno
import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch

from bln_train.errors import BlnError
from bln_train.experiments.run import run
from bln_train.recipe.recipe import Recipe
from bln_train.runs.folder import RunFolder


def break_disk(fault, at):
    """Let `fault` happen at the `at`-th fsync, rename, link, removal or first write to an open file from now on."""
    calls = 0

    def touch():
        nonlocal calls
        calls += 1
        if calls != at:
            return
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        elif fault == "twice":
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        elif fault == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def broken(function):
        def call(*args, **kwargs):
            touch()
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "link", "unlink"):
        setattr(os, name, broken(getattr(os, name)))

    plain_open = builtins.open

    def open_(file, mode="r", *args, **kwargs):
        opened = plain_open(file, mode, *args, **kwargs)
        if mode in ("wb", "a") and str(file).endswith((".tmp", ".jsonl")):
            return Torn(opened, touch)
        return opened

    builtins.open = open_


class Torn:
    """A file whose first write comes in two halves, with a fault perhaps in between: a checkpoint has a hundred writes."""

    def __init__(self, file, touch):
        self.file, self.touch, self.is_new = file, touch, True

    def write(self, data):
        if not self.is_new:
            return self.file.write(data)
        self.is_new, half = False, len(data) // 2
        self.file.write(data[:half])
        self.file.flush()
        self.touch()
        self.file.write(data[half:])
        return len(data)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def child(task):
    """One run in this process; returns its exit code."""

    def ready(experiment):
        print("ready", flush=True)
        if task.get("fault"):
            break_disk(task["fault"], task["at"])

    if task.get("fault") == "kill":
        break_disk("kill", task["at"])
        task.pop("fault")
    folder = RunFolder(Path(task["folder"]))
    try:
        run(Recipe.model_validate(task["recipe"]), folder, name="crash", resume=task["resume"], announce=ready)
    except BlnError as error:
        print(str(error), file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:  # for the command 130 too, but a run that saved and stopped is another thing
        return 131
    return 0


def warm_up(folder):
    task = json.loads(sys.stdin.readline())
    recipe = Recipe.model_validate(task["recipe"])
    run(
        recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_steps": 2})}),
        RunFolder(folder),
        name="warm",
    )
    print("warm", flush=True)


def main():
    torch.set_num_threads(1)
    for line in sys.stdin:
        if not line.startswith("{"):  # a folder for a run in this process: what it imports its forks need not
            warm_up(Path(line.strip()))
            continue
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                code = child(json.loads(line))
            except Exception:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        print(pid, flush=True)
        print("exit", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
