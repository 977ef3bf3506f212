"""Damaged run folders: nothing in a checkpoint is executed, no changed weight is taken, metrics are cut back to what is whole."""

import contextlib
import random
import shutil
from pathlib import Path

import pytest
import torch
from crash_runs import RECIPE, check_end, equal
from damage import cut, flip, flip_in_pickle, in_file_mutations, not_whole, zeros
from helpers import state

from bln_train.build.experiment import build_experiment
from bln_train.build.trained_run import evaluate_checkpoint
from bln_train.errors import CheckpointError
from bln_train.experiments.run import run
from bln_train.records import EpochRecord, MemoryRecord, NoticeRecord, StepRecord
from bln_train.runs import checkpoint_files as checkpoint_files_module
from bln_train.runs.checkpoint import find_checkpoint, keep_checkpoint, load_checkpoint
from bln_train.runs.checkpoint_files import checkpoint_files, go_on_from
from bln_train.runs.folder import RunFolder


@pytest.fixture
def three(straight, tmp_path, monkeypatch):
    """A copy of the undisturbed run with three checkpoints; the working directory is apart."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(straight[0], tmp_path / "run")
    assert [p.name for p in checkpoint_files(tmp_path / "run")] == [
        "checkpoint.pt",
        "checkpoint-23.pt",
        "checkpoint-22.pt",
    ]
    return tmp_path / "run"


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(three, straight):
    """Whatever happens to newer files of a folder: never other weights, never silence, nothing executed.

    Damage that changes no part of the file (behind its end, in a field that nobody reads) leaves the very weights, and is no harm.
    """
    draw, after = random.Random(2), straight[1]
    whole = {file: file.read_bytes() for file in checkpoint_files(three)}
    newest, *_ = whole
    newest_content = whole[newest]
    scratch = three.parent / "scratch.pt"
    scratch.write_bytes(newest_content)
    mutations = [*not_whole(scratch).items()] * 2
    mutations += [(f.__name__, f) for f in (cut, flip, zeros, flip_in_pickle) for _ in range(25)]
    num_harmless = 0
    for number, (name, mutate) in enumerate(mutations):
        damaged = list(whole)[: 1 + number % 2]
        for file in damaged:
            file.write_bytes(mutate(whole[file], draw))
        found = find_checkpoint(three)
        assert equal(after[found.state["step"]], found.state["model"])
        if found.file in damaged:
            assert name in ("flip", "flip_in_pickle", "zeros", "longer", "twice"), name
            num_harmless += 1
        else:
            assert found.file == list(whole)[len(damaged)], name
            assert f"using {found.file}" in found.notices[-1]
        for file in damaged[: damaged.index(found.file) if found.file in damaged else None]:
            assert any(str(file) in notice for notice in found.notices)
            with pytest.raises(CheckpointError, match="checkpoint"):
                load_checkpoint(file)
        for file in damaged:
            file.write_bytes(whole[file])
    assert len(mutations) >= 100
    print(f"{num_harmless} of {len(mutations)} left the very weights")
    assert not Path("trapped").exists()


def test_swapped_checkpoints_are_known_by_their_content(three, straight):
    """Files that changed their names are what their content says: the weights of the step that is stated, always."""
    first, second, third = checkpoint_files(three)
    for one, other in ((first, second), (second, third), (first, third)):
        contents = one.read_bytes(), other.read_bytes()
        one.write_bytes(contents[1])
        other.write_bytes(contents[0])
        found = find_checkpoint(three)
        assert equal(straight[1][found.state["step"]], found.state["model"])
    run(RECIPE, RunFolder(three), name="crash", resume=True)
    check_end(three, straight)


def test_no_whole_checkpoint_is_an_error_that_names_all(three):
    """Where none is whole a resume is exit 1 with every name, and changes nothing."""
    for file in checkpoint_files(three):
        file.write_bytes(file.read_bytes()[:-5])
    (three / "summary.json").unlink()
    before = {p.name: p.read_bytes() for p in three.iterdir()}
    with pytest.raises(CheckpointError) as error:
        run(RECIPE, RunFolder(three), name="crash", resume=True)
    assert all(str(file) in error.value.problem for file in checkpoint_files(three))
    assert error.value.exit_code == 1
    assert {p.name: p.read_bytes() for p in three.iterdir()} == before


def test_a_run_goes_on_from_the_checkpoint_before(three, straight):
    """Resumed over a damaged checkpoint: said in a notice, metrics cut back, the same end; the damaged file is replaced."""
    checkpoint = three / "checkpoint.pt"
    checkpoint.write_bytes(flip(checkpoint.read_bytes(), random.Random(3)))
    said = []
    run(RECIPE, RunFolder(three), name="crash", resume=True, listen=said.append)
    texts = [record.text for record in said if isinstance(record, NoticeRecord)]
    assert any("checkpoint.pt is damaged" in text for text in texts)
    assert any("checkpoint-23.pt, of step 23" in text for text in texts)
    assert [record.step for record in said if isinstance(record, StepRecord)] == [24]
    check_end(three, straight)
    assert find_checkpoint(three).notices == []


def test_an_earlier_checkpoint_takes_the_place_of_damaged_ones(three, straight):
    """A run that is killed right after it went on finds what it went on from, and nothing else."""
    for name in ("checkpoint.pt", "checkpoint-23.pt"):
        (three / name).write_bytes(b"damaged")
    found = find_checkpoint(three)
    assert (found.file.name, found.state["step"]) == ("checkpoint-22.pt", 22)
    go_on_from(three, found.file, 22)
    assert [p.name for p in checkpoint_files(three)] == ["checkpoint.pt"]
    found = find_checkpoint(three)
    assert found.notices == []
    assert equal(straight[1][22], found.state["model"])


def test_a_save_of_the_same_step_that_was_killed_costs_no_earlier_checkpoint(three):
    """Step and epoch end are two saves of one step; the second was killed before its rename."""
    replacing = checkpoint_files_module.replacing_checkpoint

    @contextlib.contextmanager
    def killed(path):
        with replacing(path.with_name("elsewhere")) as file:
            yield file

    before = {file: file.read_bytes() for file in checkpoint_files(three)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_files_module, "replacing_checkpoint", killed)
        keep_checkpoint(three, {"step": 24, "other": 1}, 3)
    (three / "elsewhere").unlink()
    assert {file: file.read_bytes() for file in checkpoint_files(three)} == before
    found = find_checkpoint(three)
    assert (found.state["step"], found.notices) == (24, [])
    go_on_from(three, found.file, 24)
    assert {file: file.read_bytes() for file in checkpoint_files(three)} == before


def test_a_damaged_checkpoint_gets_no_second_name(three):
    """A checkpoint.pt that cannot be read is replaced by the next save, and takes no place among the ones before it."""
    (three / "checkpoint.pt").write_bytes(b"damaged")
    keep_checkpoint(three, {"step": 25}, 3)
    assert [file.name for file in checkpoint_files(three)] == ["checkpoint.pt", "checkpoint-23.pt", "checkpoint-22.pt"]


def test_a_file_alone_is_whole_or_refused(straight, tmp_path, monkeypatch):
    """A checkpoint outside a run folder: CheckpointError with a reason, or the very weights; nothing executed."""
    monkeypatch.chdir(tmp_path)
    draw, content = random.Random(4), (straight[0] / "checkpoint.pt").read_bytes()
    scratch = tmp_path / "scratch.pt"
    scratch.write_bytes(content)
    random_ones = [(f.__name__, f) for f in (cut, flip, zeros, flip_in_pickle) for _ in range(20)]
    mutations = [*in_file_mutations(scratch).items(), *random_ones]
    trainer = build_experiment(RECIPE, initialize=False).trainer
    trainer.load_state_dict(load_checkpoint(scratch))
    expected = {key: value.clone() for key, value in state(trainer).items()}
    refused = []
    for name, mutate in mutations:
        scratch.write_bytes(content)
        scratch.write_bytes(mutate(content, draw))
        try:
            trainer.load_state_dict(load_checkpoint(scratch))
        except CheckpointError as error:
            refused.append(error.problem)
        else:
            assert name in ("flip", "flip_in_pickle", "zeros", "longer", "twice"), name
            assert equal(expected, state(trainer)), name
    assert all(len(problem) < 500 and "\n" not in problem for problem in refused)
    print(f"{len(refused)} of {len(mutations)} refused, the others the very weights")
    assert not Path("trapped").exists()


def test_a_folder_with_one_checkpoint_goes_on(straight, tmp_path):
    """A folder with checkpoint.pt alone, of an earlier step, evaluates and resumes, and keeps three from then on."""
    folder = tmp_path / "run"
    shutil.copytree(straight[0], folder)
    for file in checkpoint_files(folder)[1:]:
        shutil.copyfile(file, folder / "checkpoint.pt")
        file.unlink()
    (folder / "summary.json").unlink()
    assert find_checkpoint(folder).notices == []
    assert evaluate_checkpoint(folder)[2] == 22
    run(RECIPE, RunFolder(folder), name="crash", resume=True)
    check_end(folder, straight)


def test_keep_checkpoints(tmp_path):
    """N are kept, of N steps, also where one step is saved twice; with 1 there is the latest alone."""
    for num_kept in (1, 2, 4):
        folder = tmp_path / str(num_kept)
        folder.mkdir()
        for step in (1, 2, 3, 3, 4, 6, 6, 6):
            keep_checkpoint(folder, {"step": step, "x": torch.tensor(step)}, num_kept)
        found = [int(load_checkpoint(file)["x"]) for file in checkpoint_files(folder)]
        assert found == [6, 4, 3, 2][:num_kept]


# Metrics


@pytest.mark.parametrize("tail", [b'{"kind": "step", "st', bytes(500), b"\xff\xfe\x00", b""])
def test_metrics_are_cut_back(straight, tmp_path, tail):
    """A torn last line, one of zeros or of no text goes without a word; a resumed run doubles and drops no line."""
    folder = tmp_path / "run"
    shutil.copytree(straight[0], folder)
    (folder / "summary.json").unlink()
    (folder / "checkpoint.pt").unlink()  # so it resumes after step 23, with the lines of step 24 and the epoch there
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(tail)
    said = []
    run(RECIPE, RunFolder(folder), name="crash", resume=True, listen=said.append)
    assert not any("damaged lines" in r.text for r in said if isinstance(r, NoticeRecord))
    check_end(folder, straight)


def test_damaged_lines_in_between_are_told(straight, tmp_path):
    """A line that was damaged is left out, the others stay, and their number is said."""
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(straight[0], folder.path)
    lines = (folder.path / "metrics.jsonl").read_bytes().split(b"\n")
    lines[4], lines[7] = bytes(30), lines[7][:20]
    (folder.path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert folder.cut_back(23, epoch_is_open=True) == 2
    steps = [r.step for r in folder.records() if isinstance(r, StepRecord)]
    assert len([*folder.records()]) == len((folder.path / "metrics.jsonl").read_text().splitlines())
    assert len(steps) >= 21
    assert max(steps) == 23


def test_the_end_of_an_epoch_is_written_once(straight, tmp_path):
    """A run killed between an epoch's record and the checkpoint after it writes that record again, not twice."""
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(straight[0], folder.path)
    folder.cut_back(3, epoch_is_open=True)
    assert not any(isinstance(r, EpochRecord) for r in folder.records())
    shutil.copyfile(straight[0] / "metrics.jsonl", folder.path / "metrics.jsonl")
    folder.cut_back(3, epoch_is_open=False)
    assert sum(isinstance(r, EpochRecord) for r in folder.records()) == 1


def test_a_resumed_run_keeps_its_memory_record(straight, tmp_path):
    """Killed after its last step, a run that only writes the summary has the peak that was measured, not none."""
    folder = tmp_path / "run"
    shutil.copytree(straight[0], folder)
    (folder / "summary.json").unlink()
    summary = run(RECIPE, RunFolder(folder), name="crash", resume=True)
    assert summary["memory"]["peak_bytes"]
    assert sum(isinstance(r, MemoryRecord) for r in RunFolder(folder).records()) == 2
