"""`bln-train doctor`: every finding has a state and, where it is not ok, what to do; a problem is exit code 1."""

from __future__ import annotations

import errno
import json
import platform
import re
import shutil
import tempfile
from collections import namedtuple

import pytest
import torch
from typer.testing import CliRunner

from bln_train.cli.app import app
from bln_train.errors import EXIT_FAILED
from bln_train.experiments import doctor


@pytest.fixture
def examined(monkeypatch, tmp_path):
    """Exit code and findings by name of `doctor --json` in an empty folder, the self-test's difference replaced by 0."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BLN_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(doctor, "largest_difference", lambda device: 0.0)
    monkeypatch.setattr(doctor, "why_not_compiled", lambda: "")

    def call():
        result = CliRunner().invoke(app, ["doctor", "--json"])
        findings = json.loads(result.stdout)["findings"]
        assert all(f["status"] in ("ok", "warning", "problem") for f in findings)
        assert all(f["advice"] for f in findings if f["status"] != "ok")
        assert result.exit_code == (EXIT_FAILED if any(f["status"] == "problem" for f in findings) else 0)
        return result.exit_code, {f["name"]: f for f in findings}

    return call


def test_a_healthy_machine_has_no_problem(examined, tmp_path):
    """Versions, devices, data, folders and the self-test of every device are there, nothing is written, the code is 0."""
    code, found = examined()
    assert code == 0
    assert found["torch"]["value"] == torch.__version__
    names = [
        "python",
        "torchvision",
        "cuda",
        "compiled kernels",
        "system",
        "cpu",
        "data",
        "runs folder",
        "cache folder",
    ]
    assert set(names) < set(found)
    devices = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
    assert [name for name in found if name.startswith("law 1 on ")] == [f"law 1 on {device}" for device in devices]
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_measured_is_a_dash(examined):
    """Without a CUDA device neither its context nor its version is made up."""
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    _, found = examined()
    assert found["cuda context"]["value"] == "-"
    assert found["cuda"]["value"].startswith(("-", "not in", str(torch.version.cuda)))


def test_data_sets_are_found(examined, tmp_path):
    """An archive, an extracted archive and an image folder are named."""
    (tmp_path / "data" / "cifar10" / "train").mkdir(parents=True)
    (tmp_path / "data" / "cifar-100-python.tar.gz").write_bytes(b"")
    value = examined()[1]["data"]["value"]
    assert "cifar10 (train)" in value
    assert "cifar100 (cifar-100-python.tar.gz)" in value


Usage = namedtuple("Usage", "total used free")


def refuse(*args, **kwargs):
    raise OSError(errno.EROFS, "Read-only file system")


def fail(device):
    raise RuntimeError("illegal instruction\nmore")


@pytest.mark.parametrize(
    ("change", "name", "status", "message"),
    [
        ((doctor, "largest_difference", lambda device: 3e-3), "law 1 on cpu", "problem", r"differ by 3\.0e-03, above 1e-12"),
        ((doctor, "largest_difference", fail), "law 1 on cpu", "problem", r"^failed: illegal instruction$"),
        ((tempfile, "TemporaryFile", refuse), "runs folder", "problem", "Read-only file system"),
        ((tempfile, "TemporaryFile", refuse), "cache folder", "warning", "Read-only file system"),
        ((shutil, "disk_usage", lambda path: Usage(1, 1, 2**29)), "runs folder", "warning", "512.00 MiB free"),
        ((shutil, "disk_usage", lambda path: Usage(1, 1, 2**20)), "runs folder", "problem", "1.00 MiB free"),
        ((platform, "release", lambda: "5.15-microsoft-standard-WSL2"), "system", "warning", ""),
        ((doctor, "why_not_compiled", lambda: "no C compiler is installed (cc)"), "compiled kernels", "warning", "no C comp"),
        ((doctor, "_num_cores", lambda: 0), "cpu", "warning", "of 0 cores"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found(examined, monkeypatch, change, name, status, message):
    """Each thing that can be wrong is a warning or a problem with its cause."""
    monkeypatch.setattr(*change)
    _, found = examined()
    assert found[name]["status"] == status
    assert re.search(message, found[name]["value"])


def test_a_driver_without_a_device_is_a_warning(examined, monkeypatch):
    """A driver that PyTorch cannot use is said, with the way to one that can."""
    monkeypatch.setattr(doctor, "_driver", lambda: "570.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    finding = examined()[1]["cuda"]
    assert finding["status"] == "warning"
    assert "driver 570.1, but no device" in finding["value"]


@pytest.mark.parametrize("columns", ["20", "40", "200"])
def test_a_narrow_terminal_loses_nothing(monkeypatch, capfd, columns):
    """Whatever the width, every character of every finding and its advice is printed."""
    from rich.console import Console

    from bln_train.console import tables

    findings = [
        {"name": "a name", "value": f"[bold]{'x' * 70}", "status": "warning", "advice": "do:this " * 9 + "now"},
        {"name": "b", "value": "-", "status": "ok", "advice": ""},
    ]
    monkeypatch.setattr(tables, "out", Console(width=int(columns), highlight=False, emoji=False))
    tables.print_findings(findings)
    printed = "".join(capfd.readouterr().out.split())
    assert printed.count("x") == 70
    assert printed.count("do:this") == 9
    assert "[bold]" in printed
    assert printed.endswith("0problems,1warning")


def test_the_self_test_is_not_empty(monkeypatch):
    """Law 1 holds here in float64, and the same self-test on BatchNorm, for which it does not, is far from it."""
    assert doctor.largest_difference("cpu") < doctor.LARGEST_DIFFERENCE
    monkeypatch.setattr(doctor, "_SELF_TEST", {**doctor._SELF_TEST, "norm": {"name": "batch"}})
    monkeypatch.setattr(doctor, "_MICRO_BATCHES", (4,))
    assert doctor.largest_difference("cpu") > 1e-3
