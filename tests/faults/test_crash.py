"""Crash safety: whenever a run is killed or stopped, whatever its disk does, it goes on bit for bit or says why not."""

import contextlib
import errno
import importlib
import os
import random
import signal
import stat
import subprocess
import sys
import time

import pytest
import torch
from crash_runs import NUM_STEPS, RECIPE, check_end, check_killed, check_stopped, equal, figures
from helpers import state, tiny_recipe, trained

from bln_train.build.experiment import build_experiment
from bln_train.build.trained_run import evaluate_checkpoint
from bln_train.errors import InterruptedRunError, RunFolderError
from bln_train.experiments.run import run
from bln_train.records import EpochRecord, StepRecord
from bln_train.runs.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from bln_train.runs.checkpoint_files import checkpoint_files
from bln_train.runs.folder import RunFolder
from bln_train.system.lock import LOCK, locked
from bln_train.system.signals import StopRequested


@pytest.mark.slow
def test_fifty_kills_at_random_moments(worker, straight, tmp_path):
    """A chain of SIGKILLs, before the first step, in a step, in a save: every resume is on the undisturbed trajectory."""
    draw, num_kills, number = random.Random(0), 0, 0
    folder = tmp_path / "run-0"
    while num_kills < 50:
        pid = worker.start(folder)
        early = draw.random() < 0.2
        code = None if early else worker.ready()
        time.sleep(draw.uniform(0, 0.5))
        if code is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.kill(pid, signal.SIGKILL)
            code = worker.wait()
        if code == 0:
            check_end(folder, straight)
            number += 1
            folder = tmp_path / f"run-{number}"
            continue
        assert code == -signal.SIGKILL
        num_kills += 1
        check_killed(folder, straight[1])
    assert worker.run(folder) == 0
    check_end(folder, straight)
    number += 1
    print(f"{num_kills} kills over {number} runs")


@pytest.mark.slow
def test_a_kill_at_each_disk_operation(worker, straight, tmp_path):
    """SIGKILL in the middle of each write, before each fsync, rename, link, removal: of a beginning, of a resume, of saves."""
    for at in range(1, 16):  # a run that begins
        folder = tmp_path / f"begun-{at}"
        assert worker.run(folder, fault="kill", at=at) == -signal.SIGKILL
        check_killed(folder, straight[1])
    assert worker.run(folder) == 0
    check_end(folder, straight)
    folder = tmp_path / "chain"  # one that was killed before
    for at in range(1, 46):
        assert worker.run(folder, fault="kill", at=at) in (0, -signal.SIGKILL)
        check_killed(folder, straight[1])
        if RunFolder(folder).summary() is not None:
            check_end(folder, straight)
            folder = tmp_path / f"chain-{at}"
    assert worker.run(folder) == 0
    check_end(folder, straight)


@pytest.mark.slow
def test_the_command_survives_sigkill(straight, tmp_path):
    """The real command, killed twice with its whole process, goes on with --resume to the very bits of the undisturbed run."""
    from bln_train.recipe.load import dump_recipe

    (tmp_path / "crash.yaml").write_text(dump_recipe(RECIPE))
    folder = tmp_path / "run"
    for least in (3, 9):
        command = [sys.executable, "-m", "bln_train", "run", "crash.yaml", "--out", "run"]
        process = subprocess.Popen(
            command + ["--resume"] * folder.exists(), cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE
        )
        while process.poll() is None and len(figures(folder)) < least:
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        check_killed(folder, straight[1])
    ended = subprocess.run([*command, "--resume"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "resumed at step" in ended.stderr
    check_end(folder, straight)


# Signals


@pytest.mark.parametrize("at", [1, 3, 5])
def test_sigterm_while_saving(worker, straight, tmp_path, at):
    """SIGTERM in the middle of a checkpoint's files: the save ends, exit 130, no file half written, and a resume is bitwise."""
    folder = tmp_path / "run"
    assert worker.run(folder, fault="term", at=at) == 130
    check_stopped(folder, straight[1])
    assert worker.run(folder) == 0
    check_end(folder, straight)


@pytest.mark.parametrize("at", range(1, 16, 2))
def test_second_ctrl_c_while_saving_leaves_at_once(worker, straight, tmp_path, at):
    """Two SIGINTs within a write: KeyboardInterrupt (the command: exit 130), no half-written file, the one before intact."""
    folder = tmp_path / "run"
    assert worker.run(folder, fault="twice", at=at) == 131
    check_stopped(folder, straight[1])


@pytest.mark.parametrize(
    "changes",
    [
        {"norm__name": "batchless"},
        {"norm": {"name": "batchless-paper"}, "optimizer": {"name": "adam", "lr": 0.003}},
        {"norm": {"name": "batch"}},
        {"norm": {"name": "group"}},
        {"norm__name": "batchless", "optimizer": {"name": "sgd", "lr": 0.1, "accumulate_into": "momentum"}},
    ],
    ids=["batchless", "paper", "batch", "group", "momentum"],
)
def test_a_stop_between_micro_steps_loses_nothing(changes):
    """Asked to stop at any micro-step or evaluation, the state is the last whole step's; the step is taken again, to the bit."""
    recipe = tiny_recipe(**changes, train__micro_batch_size=6, train__precision="fp32")
    straight = state(trained(recipe))
    trainer = build_experiment(recipe).trainer
    draw, whole, num_stops = random.Random(1), {}, 0

    def stop():
        return draw.random() < 0.3

    while trainer.num_steps_done < trainer.num_steps or trainer.epoch_is_open:
        step, open_ = trainer.num_steps_done, trainer.epoch_is_open
        before = {key: value.clone() for key, value in state(trainer).items()}
        try:
            for record in trainer.steps(stop):
                if isinstance(record, StepRecord | EpochRecord):
                    step, open_ = trainer.num_steps_done, trainer.epoch_is_open
                    before = {key: value.clone() for key, value in state(trainer).items()}
        except StopRequested:
            num_stops += 1
            assert (trainer.num_steps_done, trainer.epoch_is_open) == (step, open_)
            whole = state(trainer)
            moved = [key for key in before if not torch.equal(before[key], whole[key])]
            assert all(key.endswith("weight") and before[key].dim() == 4 for key in moved), moved  # filters are centred
            assert all(p.grad is None for p in trainer.accumulation.parameters)
    assert num_stops >= (1 if trainer.accumulation.into_momentum else 3)  # that one stops while evaluating only
    assert equal(straight, state(trainer))


# Disks


@pytest.mark.parametrize("at", range(1, 14))
def test_a_full_disk_is_one_clear_error(worker, straight, tmp_path, at):
    """No space at any write of a save: exit 1, the earlier checkpoints intact, no file half written; later it goes on."""
    folder = tmp_path / "run"
    code = worker.run(folder, fault="full", at=at)
    assert code in (1, 0)  # 0: where the removal of an old checkpoint, or of the lock, fails
    assert not list(folder.glob("*.tmp"))
    check_killed(folder, straight[1])
    assert worker.run(folder) == 0
    assert equal(straight[1][NUM_STEPS], load_checkpoint(folder / "checkpoint.pt")["model"])
    assert figures(folder) == figures(straight[0])


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounts a small disk")
def test_a_small_disk(straight, tmp_path):
    """On a real disk of 2 MiB a save fails with the disk's own words, and the one before it stands."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        folder = tmp_path / "run"
        with pytest.raises(RunFolderError, match="No space left on device") as error:
            run(RECIPE, RunFolder(folder), name="crash")
        assert error.value.exit_code == 1
        assert "intact" in error.value.hint
        assert not list(folder.glob("*.tmp"))
        check_killed(folder, straight[1])
        assert find_checkpoint(folder).state["step"] >= 1
        subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
        with pytest.raises(RunFolderError, match="cannot be written"):
            run(RECIPE, RunFolder(folder), name="crash", resume=True)
        assert evaluate_checkpoint(folder)[2] >= 1  # reading needs no lock and writes nothing
        subprocess.run(["mount", "-o", "remount,rw,size=8m", tmp_path], check=True)
        run(RECIPE, RunFolder(folder), name="crash", resume=True)
        check_end(folder, straight)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_file_system_without_links(straight, tmp_path, monkeypatch):
    """Where a file can have one name only the earlier checkpoints are copies."""

    def refuse(*args):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    run(RECIPE, RunFolder(tmp_path / "run"), name="crash")
    check_end(tmp_path / "run", straight)


# The lock


def test_a_run_folder_has_one_process(straight, worker, tmp_path):
    """The second process is refused with the first one's id; reading is not; after a SIGKILL the folder is free again."""
    folder = tmp_path / "run"
    pid = worker.start(folder)
    assert worker.process.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 60
    while not checkpoint_files(folder):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(pid, signal.SIGSTOP)
    try:
        before = {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".tmp"}
        with pytest.raises(RunFolderError, match=f"in use by process {pid} on .* since 20") as error:
            run(RECIPE, RunFolder(folder), name="crash", resume=True)
        assert error.value.exit_code == 1
        assert {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".tmp"} == before
        assert evaluate_checkpoint(folder)[2] >= 1
    finally:
        os.kill(pid, signal.SIGKILL)
    worker.wait()
    assert (folder / LOCK).exists()
    assert worker.run(folder) == 0
    check_end(folder, straight)


def test_a_lock_leaves_nothing(tmp_path):
    """A run that ends before it began leaves no lock file and none of the folders made for it."""
    with locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / LOCK).exists()
    assert list(tmp_path.iterdir()) == []


def test_saving_alone_is_whole_or_not_at_all(tmp_path, monkeypatch):
    """A failed write, of whatever kind, leaves the earlier file and no other."""
    path = tmp_path / "x.pt"
    save_checkpoint(path, {"step": 1})
    before = path.read_bytes()

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFolderError, match=r"cannot write the checkpoint .*No space left on device"):
        save_checkpoint(path, {"step": 2})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_save_survives_a_power_cut(tmp_path, monkeypatch):
    """The content is on the disk before the file takes its place, and its place before the save is over."""
    calls = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(handle):
        kind = os.fstat(handle)
        calls.append("folder" if stat.S_ISDIR(kind.st_mode) else "file" if kind.st_size else "empty file")
        fsync(handle)

    def note_replace(*paths):
        calls.append("rename")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    save_checkpoint(tmp_path / "x.pt", {"step": 1})
    assert calls == ["file", "rename", "folder"]


def test_a_stop_saves_the_step_it_stopped_after(straight, tmp_path, monkeypatch):
    """Between two checkpoints: the last whole step's state, its metrics on the disk before it."""
    runtime = RECIPE.runtime.model_copy(update={"checkpoint_every_steps": None})
    calls, folder = [], RunFolder(tmp_path / "run")

    def noted(name, own):
        return lambda *args: [calls.append(name), own(*args)][1]

    for owner, name in (
        (RunFolder, "sync"),
        (importlib.import_module("bln_train.experiments.run_log"), "keep_checkpoint"),
    ):
        monkeypatch.setattr(owner, name, noted(name, getattr(owner, name)))

    def stop_after_two(record):
        if isinstance(record, StepRecord) and record.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InterruptedRunError, match="after step 2 of 24"):
        run(RECIPE.model_copy(update={"runtime": runtime}), folder, name="crash", listen=stop_after_two)
    assert calls == ["sync", "keep_checkpoint"]
    found = find_checkpoint(folder.path).state
    assert found["step"] == 2
    assert equal(straight[1][2], found["model"])
