"""Commands for the tests of the command line: in this process, or in one of their own that can be interrupted."""

import hashlib
import os
import subprocess
import sys
import time

import pytest
import yaml

from bln_train.cli import app as cli

RECIPE = {
    "data": {"name": "shapes", "num_train": 48, "num_test": 20},
    "model": {"name": "resnet8"},
    "norm": {"name": "batchless", "probe_images": 4, "init_images": 8},
    "train": {"epochs": 2, "effective_batch_size": 16, "micro_batch_size": 8},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "runtime": {"device": "cpu", "num_threads": 1, "log_every_steps": 1},
}
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "BLN_DEBUG"} | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"}


def write_recipe(path, **changes):
    """RECIPE with `section__key=value` changes, as a file."""
    data = {name: dict(section) for name, section in RECIPE.items()}
    for name, value in changes.items():
        section, _, key = name.partition("__")
        data[section] = {**data[section], key: value} if key else value
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def start(*arguments, cwd, env=ENVIRONMENT):
    command = [sys.executable, "-m", "bln_train", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process, timeout=240):
    """Exit code, stdout, stderr; no process outlives its test."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, stdout, stderr


def wait_for(condition, process, timeout=120):
    """Until `condition()` holds while the process runs."""
    end = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def bln(monkeypatch, capfd, tmp_path):
    """Run a command in this process, in an empty folder, through the program's one error boundary."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["bln-train", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capfd.readouterr()
        assert "Traceback" not in printed.err
        assert "bug in bln-train" not in printed.err
        return ended.value.code or 0, printed.out, printed.err

    return call


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: its recipe, its folder, and what `run --json` printed."""
    place = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(place / "tiny.yaml")
    code, stdout, stderr = finish(start("run", "tiny.yaml", "--out", "run", "--json", cwd=place))
    assert code == 0, stderr
    return recipe, place / "run", stdout, stderr


def fingerprint(folder):
    """Names, contents and times of all files below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(p), hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in files]
