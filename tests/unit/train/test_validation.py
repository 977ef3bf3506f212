"""Validation images: who is held out, what is evaluated on them, and how a comparison reports them."""

from __future__ import annotations

import csv
import json
import statistics
from dataclasses import replace

import pytest
import torch
from helpers import advance, state, tiny_recipe, trained

from bln_train.build.data import load
from bln_train.build.experiment import build_experiment
from bln_train.cli.sizes import expand_dots
from bln_train.console import tables
from bln_train.data.datasets import DataSet, ImageSet, hold_out, load_dataset
from bln_train.errors import DataError, UsageError
from bln_train.experiments import compare
from bln_train.experiments.run import run
from bln_train.recipe.load import load_recipe
from bln_train.records import EpochRecord, best_validation
from bln_train.report.plots import plot_comparison
from bln_train.runs.checkpoint import load_checkpoint, save_checkpoint
from bln_train.runs.folder import RunFolder
from bln_train.train.recovery import explained_failures

SPLIT = {"data__num_train": 60, "data__validation_fraction": 1 / 3}  # 4 of the 6 images of each class are trained on


def numbered(labels):
    """A data set whose images are their own positions."""
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 1, 1).contiguous()
    part = ImageSet(images, torch.tensor(labels))
    return DataSet(part, part, tuple("abc"), "numbered")


def positions(part):
    return part.images[:, 0, 0, 0].tolist()


# Who is held out


@pytest.mark.parametrize(("fraction", "counts"), [(0.2, [4, 2, 1]), (0.5, [10, 5, 3]), (0.75, [15, 8, 4])])
def test_every_class_gives_the_same_fraction(fraction, counts):
    """Each class gives its rounded fraction; both parts are disjoint, in the old order, and together all images."""
    data = numbered([n % 3 if n < 15 else n % 2 if n < 25 else 0 for n in range(35)])
    sizes = torch.bincount(data.train.labels).tolist()
    assert sizes == [20, 10, 5]
    split = hold_out(data, fraction)
    assert torch.bincount(split.validation.labels).tolist() == counts
    held_out, kept = positions(split.validation), positions(split.train)
    assert (held_out, kept) == (sorted(held_out), sorted(kept))
    assert sorted(held_out + kept) == list(range(35))
    for part in (split.train, split.validation):
        assert torch.equal(part.labels, data.train.labels[positions(part)])
    assert split.test is data.test
    assert f"{len(held_out)} of 35" in split.source


def test_the_split_is_a_draw_of_its_own():
    """The same call gives the same images whatever was drawn before; another seed others; which are subset says nothing."""
    data = numbered([n % 3 for n in range(120)])
    first = positions(hold_out(data, 0.25).validation)
    torch.rand(3)
    assert positions(hold_out(data, 0.25).validation) == first
    assert positions(hold_out(data, 0.25, seed=7).validation) != first
    assert positions(hold_out(data, 0.5).validation) != list(range(60))


@pytest.mark.parametrize(("fraction", "class_name"), [(0.05, "c"), (0.95, "c"), (0.02, "a")])
def test_a_class_on_one_side_only_is_an_error(fraction, class_name):
    """A fraction that leaves a class without a training or a validation image is refused, with the class and the numbers."""
    data = numbered([0] * 20 + [1] * 20 + [2] * 5)
    with pytest.raises(
        DataError, match=rf"validation_fraction {fraction} of the \d+ .* class {class_name} is \d"
    ) as caught:
        hold_out(data, fraction)
    assert "data.num_train" in caught.value.hint


def test_the_subset_is_drawn_first():
    """num_train images are chosen as without a split, then divided, so both parts together are that subset."""
    data = load(tiny_recipe(**SPLIT))
    subset = load_dataset("shapes", num_train=60, num_test=10).train
    assert (len(data.train), len(data.validation)) == (40, 20)
    assert torch.bincount(data.validation.labels).tolist() == [2] * 10
    both = torch.cat([data.train.images, data.validation.images]).flatten(1).tolist()
    assert sorted(both) == sorted(subset.images.flatten(1).tolist())
    assert load(tiny_recipe()).validation is None


def test_every_cell_has_the_same_split():
    """Norm, seed and batch sizes change nothing about who is held out."""
    first = load(tiny_recipe(**SPLIT))
    for changes in ({"norm": {"name": "batch"}}, {"train__seed": 5}, {"train__micro_batch_size": 1}):
        other = load(tiny_recipe(**SPLIT, **changes))
        assert torch.equal(other.validation.images, first.validation.images)
        assert torch.equal(other.train.images, first.train.images)


def test_held_out_images_do_not_touch_training():
    """Other validation and test images, same weights to the bit: moments, initial statistics and steps see none of them."""
    recipe = tiny_recipe(**SPLIT, train__epochs=1, train__effective_batch_size=20)
    data = load(recipe)
    noise = replace(data, validation=ImageSet(255 - data.validation.images, data.validation.labels.flip(0)))
    found = []
    for images in (data, noise, replace(data, validation=None)):
        trainer = build_experiment(recipe, data=images).trainer
        advance(trainer)
        found.append(state(trainer))
    assert all(torch.equal(found[0][key], other[key]) for other in found[1:] for key in found[0])


# What is evaluated on them


def test_validation_every_epoch_and_test_once():
    """Evaluated epochs report the validation images; the test images are looked at once, at the end, by the last weights."""
    recipe = tiny_recipe(**SPLIT, train__epochs=3, train__eval_every_epochs=2)
    trainer = build_experiment(recipe).trainer
    evaluated, plain = [], trainer.evaluate

    def note(images):
        evaluated.append(len(images))
        return plain(images)

    trainer.evaluate = note
    epochs = [r for r in advance(trainer) if isinstance(r, EpochRecord)]
    assert evaluated == [20, 20, 10]
    assert [r.validation_loss is None for r in epochs] == [True, False, False]
    assert [r.test_loss is None for r in epochs] == [True, True, False]
    assert [(r.num_validation_images, r.num_test_images) for r in epochs] == [(0, 0), (20, 0), (20, 10)]
    on_validation, on_test = plain(trainer.data.validation), plain(trainer.data.test)
    assert (epochs[-1].validation_loss, epochs[-1].validation_accuracy) == on_validation[:2]
    assert (epochs[-1].test_loss, epochs[-1].test_accuracy) == on_test[:2]
    (epoch,) = [
        r for r in advance(build_experiment(tiny_recipe(train__epochs=1)).trainer) if isinstance(r, EpochRecord)
    ]
    assert (epoch.validation_loss, epoch.num_validation_images, epoch.num_test_images) == (None, 0, 10)


@pytest.mark.parametrize("stop", [2, 3])
def test_resume_with_a_split_is_bitwise(stop, tmp_path):
    """Law 4 holds with validation images: mid-epoch and between an epoch's last step and its evaluation."""
    recipe = tiny_recipe(**SPLIT, train__precision="fp32")
    straight = build_experiment(recipe).trainer
    records = advance(straight)
    save_checkpoint(tmp_path / "checkpoint.pt", trained(recipe, stop).state_dict())
    second = build_experiment(recipe, initialize=False).trainer
    second.load_state_dict(load_checkpoint(tmp_path / "checkpoint.pt"))
    more = advance(second)
    expected, found = state(straight), state(second)
    assert all(torch.equal(expected[key], found[key]) for key in expected)

    def figures(of):
        return [
            (r.epoch, r.validation_loss, r.validation_accuracy, r.test_loss) for r in of if isinstance(r, EpochRecord)
        ]

    assert figures(more) == figures(records)
    assert len(figures(more)) == 2


def epoch_record(epoch, loss, accuracy):
    return EpochRecord(epoch, epoch, 1.0, 0.5, None, None, None, 0, None, loss, accuracy, 20)


def test_the_best_epochs_are_the_first_of_lowest_loss_and_of_highest_accuracy():
    """Loss and accuracy choose their epochs apart; of equals the first; infinite and missing losses are passed over."""
    figures = [(None, None), (float("nan"), 0.1), (0.9, 0.6), (0.7, 0.5), (0.7, 0.6), (float("inf"), 0.2)]
    found = best_validation([epoch_record(n, *pair) for n, pair in enumerate(figures)])
    assert (found["best_validation_loss"], found["best_validation_loss_epoch"]) == (0.7, 3)
    assert (found["best_validation_accuracy"], found["best_validation_accuracy_epoch"]) == (0.6, 2)
    for nothing in ([], [epoch_record(1, None, None)]):
        assert [v for k, v in best_validation(nothing).items() if k.startswith("best")] == [None] * 4


def test_the_summary_reports_the_best_epochs(tmp_path, capsys):
    """A run's summary and table hold the best figures of its metrics, and the test figures of its last epoch."""
    folder = RunFolder(tmp_path / "run")
    summary = run(tiny_recipe(**SPLIT, train__epochs=3), folder, name="tiny")
    epochs = [r for r in folder.records() if isinstance(r, EpochRecord)]
    assert len({r.validation_loss for r in epochs}) == 3
    assert summary["best_validation_loss"] == min(r.validation_loss for r in epochs)
    assert summary["best_validation_accuracy"] == max(r.validation_accuracy for r in epochs)
    assert summary["test_loss"] == epochs[-1].test_loss is not None
    tables.print_summary(summary, "run")
    printed = capsys.readouterr().out
    assert f"best validation loss (epoch {summary['best_validation_loss_epoch']} of 3)" in printed


# How a comparison reports them


@pytest.fixture
def cells(tmp_path):
    """Cells with summaries as a run leaves them, without the runs; one failed."""
    recipe = tiny_recipe(**SPLIT)
    cells = compare.plan_cells(
        recipe, tmp_path, norms=["batchless", "batchless-paper-abs"], effective_batches=[4, 16], num_seeds=3
    )
    for n, cell in enumerate(cells):
        if n == 11:
            cell.folder.path.with_suffix(".failed").write_text("it broke")
            continue
        cell.folder.create(cell.recipe, {})
        best = best_validation([epoch_record(1, 2.0, 0.25), epoch_record(2 + n % 3, 1 + n / 10, 0.5 + n / 100)])
        figures = {"train_loss": 1.0, "test_loss": 1.5, "test_accuracy": 0.4, "images_per_second": 9.0}
        memory = {"peak_bytes": 2**27}
        cell.folder.finish({**figures, **best, "memory": memory, "environment": {"device": "cpu"}})
    return cells


def test_comparison_shows_the_best_epochs(cells, tmp_path, capsys):
    """Means and spreads over the finished seeds in rows, CSV, JSON, an 80-column table and two more plots."""
    rows = compare.rows(cells)
    losses = [1.0, 1.1, 1.2]
    assert rows[0]["best_validation_loss_by_run"] == pytest.approx(losses)
    assert rows[0]["best_validation_loss_mean"] == pytest.approx(1.1)
    assert rows[0]["best_validation_loss_std"] == pytest.approx(statistics.stdev(losses))
    assert rows[0]["best_validation_accuracy_mean"] == pytest.approx(0.51)
    assert rows[0]["best_validation_loss_epoch_by_run"] == [2, 3, 4]
    assert len(rows[3]["best_validation_accuracy_by_run"]) == rows[3]["num_finished"] == 2
    compare.write_tables(tmp_path, rows, {})
    assert json.loads((tmp_path / "comparison.json").read_text())["rows"] == rows
    lines = list(csv.DictReader((tmp_path / "comparison.csv").read_text().splitlines()))
    assert float(lines[0]["best_validation_accuracy_std"]) == pytest.approx(0.01)
    assert not any(key.endswith("by_run") for key in lines[0])
    tables.print_comparison(rows, "cpu")
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "1.100 ± 0.100" in printed
    assert "51.00 ± 1.00" in printed
    assert "2-4" in printed
    names = ["accuracy", "peak_memory", "validation_loss", "validation_accuracy"]
    assert [path.stem for path in plot_comparison(tmp_path, rows, "cpu")] == names
    assert all(b"<polyline" in (tmp_path / f"{name}.svg").read_bytes() for name in names)


def test_without_a_split_a_comparison_is_as_before(cells, tmp_path, capsys):
    """Summaries without validation figures: no second table, no further plots."""
    for cell in cells[:-1]:
        summary = cell.folder.summary()
        cell.folder.finish({key: None if "validation" in key else value for key, value in summary.items()})
    rows = compare.rows(cells)
    assert rows[0]["best_validation_loss_mean"] is None
    assert rows[0]["best_validation_loss_by_run"] == []
    tables.print_comparison(rows, "cpu")
    assert "alidation" not in capsys.readouterr().out
    assert [path.stem for path in plot_comparison(tmp_path, rows, "cpu")] == ["accuracy", "peak_memory"]


def test_the_papers_grid(tmp_path):
    """The shipped experiment: whole batches, a fifth held out, statistics from 1000 images for every norm that takes any."""
    recipe = load_recipe("paper_cifar10")
    norms = ["none", "batch", "batchless-paper-abs", "batchless-paper", "batchless-paper-inv", "batchless"]
    cells = compare.plan_cells(recipe, tmp_path, norms=norms, effective_batches=[1, 2, 128])
    assert [(c.norm, c.effective_batch_size) for c in cells] == [(n, b) for n in norms for b in (1, 2, 128)]
    for cell in cells:
        assert cell.recipe.train.micro_batch_size == cell.effective_batch_size
        assert cell.recipe.data == recipe.data
        assert cell.recipe.optimizer == recipe.optimizer
        assert cell.recipe.num_init_images == (1000 if "batchless" in cell.norm else 0)
    split = compare.plan_cells(tiny_recipe(train__micro_batch_size=2), tmp_path, norms=["batch"], effective_batches=[4])
    assert [c.micro_batch_size for c in split] == [2, 4]


def test_batchnorm_at_batch_1_says_why():
    """The paper's network normalises dense layers, so BatchNorm on one image has no variance there: an error that says so."""
    sizes = {"train__effective_batch_size": 1, "train__micro_batch_size": 1}
    recipe = tiny_recipe(model__name="paper_cnn", norm={"name": "batch"}, **sizes)
    with pytest.raises(UsageError, match="one value per channel"), explained_failures(recipe.first_micro_batch_size):
        advance(build_experiment(recipe).trainer, 1)


# Lists of sizes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8,1,64", [8, 1, 64]),
        ("1,2,4,...,1024", [2**n for n in range(11)]),
        ("3,9,27,...,243", [3, 9, 27, 81, 243]),
        ("2,4,6,...,12", [2, 4, 6, 8, 10, 12]),
        ("1,2,3,...,5", [1, 2, 3, 4, 5]),
        ("1,2,...,7", [1, 2, 3, 4, 5, 6, 7]),  # doubling would miss 7
        ("1,10,...,10000", [1, 10, 100, 1000, 10000]),  # steps of 9 would be more than 1000 sizes
        ("1,2,4,...,16,100,3", [1, 2, 4, 8, 16, 100, 3]),
    ],
)
def test_dots_continue_a_list(text, expected):
    """`...` continues by equal steps or factors up to the size after it; what follows and lists without stay."""
    assert expand_dots(text.split(","), "--x") == [str(size) for size in expected]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1,2,...,8", "is this 1,2,3,...,8 or 1,2,4,...,8"),
        ("1,3,...,9", "is this 1,3,5,...,9 or 1,3,9,...,9"),
        ("1,...,8", "two sizes"),
        ("...,8", "two sizes"),
        ("1,2,4,...", "the last one"),
        ("1,2,4,...,8,...,32", "one `...`"),
        ("1,2,4,...,1000", "to 1000"),
        ("1,2,5,...,14", "equal"),
        ("1,2,4,...,4", "equal"),
        ("8,4,2,...,1", "equal"),
        ("2,2,...,2", "equal"),
        ("1,2,3,...,999999999", "at most 1000 sizes"),
        ("1,2,x,...,8", "'x' is not a batch size"),
        ("1,2,4,...,full", "'full' is not a batch size"),
    ],
)
def test_dots_that_do_not_say_which(text, words):
    """What continues in two ways, in none, without an end or without a beginning is refused with the list as written."""
    with pytest.raises(UsageError, match=words.replace("...", r"\.\.\.")) as caught:
        expand_dots(text.split(","), "--x")
    assert "--x" in str(caught.value)
