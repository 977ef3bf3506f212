"""Several real processes, as torchrun starts them (docstrings are laws); test_parallel.py has the same in threads."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_runs import wait_for
from helpers import largest_difference, tiny_recipe
from test_parallel import RAGGED, trained

from bln_train.recipe.load import dump_recipe
from bln_train.runs.checkpoint import load_checkpoint
from bln_train.system.launch import Launch, launch

ROOT = Path(__file__).parents[2]


TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}


def test_torchrun_is_read_off_its_environment(monkeypatch):
    """Rank and size are torchrun's; alone a process is the first of one."""
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    assert launch() == Launch(0, 1, 0)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert launch() == Launch(0, 2, 0)


@pytest.mark.parametrize("command", [["compare"], ["memory"], ["check", "quickstart"], ["paper", "synthetic"]])
def test_only_training_runs_take_several_processes(command, tmp_path):
    """Other commands refuse torchrun, and say what it is for."""
    run = [sys.executable, "-m", "bln_train", *command]
    found = subprocess.run(run, cwd=tmp_path, env=environment() | TORCHRUN, capture_output=True, text=True)
    assert found.returncode == 2
    assert "is for one process, and torchrun started 2" in found.stderr


LEFT_AT_THE_END = """
import os
import torch
from bln_train.train.distributed import joined
with joined(torch.device("cpu"), 60) as world:
    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)  # imports what would hold the group, see `joined`
    world.barrier()
    within = len(os.listdir("/proc/self/task"))
assert within > 1 == len(os.listdir("/proc/self/task"))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts native threads in /proc")
def test_no_thread_of_the_process_group_outlives_it(tmp_path):
    """A thread of gloo's that frees a tensor while Python ends aborts the process: none is left to do so."""
    (tmp_path / "ends.py").write_text(LEFT_AT_THE_END)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "ends.py"]
    found = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def torchrun(num_processes, *arguments, cwd):
    """bln-train in several real processes, in a session of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    return subprocess.Popen(
        [*command, "-m", "bln_train", *map(str, arguments)],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process, timeout=150):
    """Exit code, stdout, stderr; the workers end with the test too."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        for worker in children(process.pid):
            os.kill(worker, signal.SIGKILL)
        process.kill()
        raise
    return process.returncode, out, err


def children(pid):
    """Process ids by rank; torchrun starts them in that order."""
    return sorted(int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def recipe_file(folder, **changes):
    path = folder / "tiny.yaml"
    path.write_text(dump_recipe(tiny_recipe(**RAGGED | {"runtime__log_every_steps": 1} | changes)), encoding="utf-8")
    return path


LONG = {"train__epochs": 500, "runtime__process_timeout_seconds": 6}


def training_for_long(tmp_path, num_processes=2):
    """A run of real processes that is under way and has saved a checkpoint."""
    process = torchrun(num_processes, "run", recipe_file(tmp_path, **LONG), "--out", "long", cwd=tmp_path)
    wait_for((tmp_path / "long" / "checkpoint.pt").exists, process)
    return process


@pytest.mark.slow
def test_torchrun_ends_where_one_process_does(tmp_path):
    """Real processes: one folder, one summary on stdout, and the weights of one process; a run of 3 goes on as 2."""
    recipe = recipe_file(tmp_path)
    whole = trained(tiny_recipe(**RAGGED))[0]
    code, out, err = ended(
        torchrun(3, "run", recipe, "--set", "train.max_steps=2", "--out", "r", "--json", cwd=tmp_path)
    )
    assert code == 0, err
    assert json.loads(out)["environment"]["world_size"] == 3
    code, out, err = ended(torchrun(2, "run", recipe, "--out", "r", "--resume", "--json", cwd=tmp_path))
    assert code == 0, err
    assert err.count("resumed at step 2") == 1
    assert json.loads(out)["steps"] == whole.num_steps_done
    saved = load_checkpoint(tmp_path / "r" / "checkpoint.pt")["model"]
    assert largest_difference(whole.accumulation.model.state_dict(), saved) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_all(tmp_path, victim):
    """A process that dies ends all of them at once, with a code that is not 0; the last checkpoint is whole."""
    process = training_for_long(tmp_path)
    workers, began = children(process.pid), time.monotonic()
    os.kill(workers[victim], signal.SIGKILL)
    code, _, err = ended(process)
    assert code != 0
    assert time.monotonic() - began < 30
    assert "another process has ended" in err or "SIGKILL" in err or "Signal 9" in err
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert load_checkpoint(tmp_path / "long" / "checkpoint.pt")["step"] > 0


@pytest.mark.slow
def test_a_hung_process_ends_all_within_the_timeout(tmp_path):
    """A process that stops answering ends all of them after runtime.process_timeout_seconds, and the message names that."""
    process = training_for_long(tmp_path)
    workers, began = children(process.pid), time.monotonic()
    os.kill(workers[1], signal.SIGSTOP)
    wait_for(lambda: not Path(f"/proc/{workers[0]}").exists() or "Z" in state_of(workers[0]), process, timeout=60)
    assert time.monotonic() - began < 6 + 20
    code, _, err = ended(process)
    assert code != 0
    assert "another process did not answer in time" in err
    assert "runtime.process_timeout_seconds" in err


def state_of(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


@pytest.mark.slow
def test_sigterm_saves_and_the_run_goes_on(tmp_path):
    """SIGTERM to torchrun stops every process after the same step with code 130, saved once; one process goes on from there."""
    process = training_for_long(tmp_path, num_processes=3)
    process.send_signal(signal.SIGTERM)
    code, _, err = ended(process)
    assert code != 0
    assert err.count("the state is saved") == 1
    step = load_checkpoint(tmp_path / "long" / "checkpoint.pt")["step"]
    assert f"stopped after step {step} of" in err
    lines = (tmp_path / "long" / "metrics.jsonl").read_text().splitlines()
    assert max(json.loads(line)["step"] for line in lines if "step" in json.loads(line)) == step


@pytest.mark.slow
def test_an_error_is_said_once(tmp_path):
    """A mistake that every process sees is reported by the first, and torchrun's code is not 0."""
    code, out, err = ended(torchrun(3, "run", recipe_file(tmp_path), "--set", "train.epoch=3", cwd=tmp_path))
    assert code != 0
    assert out == ""
    assert err.count("did you mean `epochs`") == 1


@pytest.mark.slow
def test_the_process_grid():
    """Law 2 over 1, 2, 3, 4 real processes by micro-batch 1, 3, 8: below 1e-10 after 20 steps; prints the table."""
    script = ROOT / "benchmarks" / "process_grid.py"
    found = subprocess.run([sys.executable, script], env=environment(), stdout=subprocess.PIPE, text=True)
    print(found.stdout)
    assert found.returncode == 0
