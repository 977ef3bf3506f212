"""The synthetic experiment: its streams, its estimators and its command (each docstring is a law)."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from bln_train.errors import RecipeError
from bln_train.experiments.synthetic import draw_stream, measure, record_points, truth_of
from bln_train.norm import BatchlessNorm1d, BatchlessStatistics
from bln_train.paper.estimators import Cell, Start, Truth, errors_of, estimate
from bln_train.paper.layer import PaperNorm1d
from bln_train.recipe.load import dump_recipe, load_any_recipe, load_recipe, load_synthetic_recipe, parse_any_recipe
from bln_train.recipe.messages import recipe_schema
from bln_train.recipe.synthetic import LEAST_STD, SyntheticRecipe

TINY = {
    "experiment": "synthetic",
    "num_samples": 64,
    "num_repetitions": 3,
    "batch_sizes": [1, 8],
    "report_after": [32, 64],
    "streams": [
        {"name": "gaussian", "mean": 1.0, "std": 0.5},
        {"name": "jump", "mean": 0.0, "std": 1.0, "mean_after": 4.0, "at": 16},
    ],
    "estimators": [
        {"name": "exact"},
        {"name": "batchnorm", "rates": [0.2]},
        {"name": "natural", "rates": [0.2]},
        {"name": "sgd", "parametrizations": ["log", "abs", "inv"], "rates": [0.05]},
        {"name": "adam", "parametrizations": ["abs"], "rates": [0.05]},
    ],
    "runtime": {"device": "cpu"},
}
START = Start(0.0, 1.0, LEAST_STD)
STREAMS = [
    {"name": "gaussian", "mean": -3.0, "std": 2.0},
    {"name": "skewed", "mean": 3.0, "std": 2.0, "shape": 0.5},
    {"name": "heavy-tailed", "mean": 3.0, "std": 0.1, "degrees_of_freedom": 9},
    {"name": "drifting", "mean": 0.0, "std": 1.0, "mean_after": 3.0, "std_after": 4.0},
    {"name": "jump", "mean": 0.0, "std": 1.0, "mean_after": 5.0, "at": 100},
    {"name": "jump", "mean": 0.0, "std": 1.0, "std_after": 0.1, "at": 100},
]


def recipe_of(**changes):
    return SyntheticRecipe.model_validate({**TINY, **changes})


def stream_of(data):
    (stream,) = recipe_of(streams=[data], num_samples=200, batch_sizes=[1], report_after=[200]).streams
    return stream


def cells(*labels):
    """Cells from labels such as `sgd log 0.2`."""
    parts = [label.split() for label in labels]
    return [Cell(p[0], p[1] if len(p) == 3 else None, float(p[-1])) for p in parts]


@pytest.mark.parametrize("data", STREAMS, ids=lambda data: data["name"])
def test_streams_have_the_moments_they_state(data):
    """At each moment of a stream, mean and variance over 4,000 repetitions are the stated ones, within 5 standard errors."""
    stream, repetitions = stream_of(data), 4_000
    truth = truth_of(stream, 200)
    x = draw_stream(stream, 200, repetitions, seed=1, position=0)
    noise = (x - truth.mean[:, None]) / truth.std[:, None]
    kurtosis = float(noise.pow(4).mean())
    assert (noise.mean(1).abs() < 5 / math.sqrt(repetitions)).all()
    assert abs(float(noise.mean())) < 5 / math.sqrt(noise.numel())
    assert ((noise.square().mean(1) - 1).abs() < 5 * math.sqrt(kurtosis / repetitions)).all()
    assert abs(float(noise.square().mean()) - 1) < 5 * math.sqrt(kurtosis / noise.numel())


def test_streams_have_the_shape_they_state():
    """Skewness and kurtosis are those of the log-normal and of Student's t; drift is linear in mean and log std; jumps jump."""
    normal, skewed, heavy = (
        draw_stream(stream_of({**data, "mean": 0.0, "std": 1.0}), 200, 4_000, seed=2, position=0)
        for data in STREAMS[:3]
    )
    square = math.exp(0.25)  # exp(shape^2)
    assert float(skewed.pow(3).mean()) == pytest.approx((square + 2) * math.sqrt(square - 1), rel=0.1)
    assert float(normal.pow(4).mean()) == pytest.approx(3, rel=0.01)
    assert float(heavy.pow(4).mean()) == pytest.approx(3 + 6 / (9 - 4), rel=0.06)
    drift = truth_of(stream_of(STREAMS[3]), 201)
    assert drift.mean.tolist() == pytest.approx([3 * t / 200 for t in range(201)])
    assert drift.std.log().tolist() == pytest.approx([math.log(4) * t / 200 for t in range(201)])
    up, down = (truth_of(stream_of(data), 200) for data in STREAMS[4:])
    assert up.mean.tolist() == [0.0] * 100 + [5.0] * 100
    assert torch.allclose(down.std, torch.tensor([1.0] * 100 + [0.1] * 100, dtype=torch.float64))
    assert up.std.unique().tolist() == [1.0]


def test_seeds_reproduce():
    """The same recipe gives the same rows; another seed gives others, and so does another place among the streams."""
    recipe = recipe_of()
    device = torch.device("cpu")
    assert measure(recipe, device) == measure(recipe, device)
    assert measure(recipe, device) != measure(recipe_of(seed=1), device)
    stream = recipe.streams[0]
    drawn = [draw_stream(stream, 64, 3, seed=0, position=n) for n in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_natural_update_is_the_moving_average_it_claims_to_be(batch_size):
    """mean <- (1-r) mean + r E[x], var <- (1-r) var + r E[(x - old mean)^2], to 1e-10."""
    recipe = recipe_of()
    x = draw_stream(recipe.streams[0], 64, 3, seed=0, position=0)
    (estimates,) = estimate(cells("natural 0.2"), x, batch_size, [64], start=START).values()
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for batch in x.split(batch_size):
        second = (batch - mean).square().mean(0)
        mean, var = 0.8 * mean + 0.2 * batch.mean(0), 0.8 * var + 0.2 * second
    torch.testing.assert_close(estimates[0, 0], mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(estimates[0, 1], var.sqrt(), rtol=1e-10, atol=1e-10)


def test_natural_means_are_batchnorms():
    """At the same rate the natural mean is BatchNorm's running mean; the standard deviations differ by their definition."""
    recipe = recipe_of()
    x = draw_stream(recipe.streams[1], 64, 3, seed=0, position=0)
    natural, batch = estimate(cells("natural 0.2", "batchnorm 0.2"), x, 8, [8, 64], start=START).values()
    torch.testing.assert_close(natural[:, 0], batch[:, 0], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(natural[:, 1], batch[:, 1], rtol=1e-3)


def test_batchnorm_is_left_out_where_it_cannot_train():
    """At batch size 1 nn.BatchNorm1d raises, so there is no such row; every other cell has its rows."""
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        nn.BatchNorm1d(3)(torch.zeros(1, 3))
    errors, _ = measure(recipe_of(), torch.device("cpu"))
    labels = {size: {r["label"] for r in errors if r["batch_size"] == size} for size in (1, 8)}
    assert labels[8] - labels[1] == {"batchnorm 0.2"}
    assert len(labels[8]) == 1 + 1 + 1 + 3 + 1


@pytest.mark.parametrize("label", ["natural 0.2", "sgd abs 0.05", "sgd inv 0.05", "adam log 0.05", "adam inv 0.05"])
def test_micro_batches_of_one_give_the_whole_batch(label):
    """What the experiment estimates from batches of 8 is what the layer learns from 8 accumulated micro-batches of 1."""
    recipe, (cell,) = recipe_of(), cells(label)
    x = draw_stream(recipe.streams[0], 64, 3, seed=0, position=0)
    (whole,) = estimate([cell], x, 8, [64], start=START).values()
    if cell.name == "natural":
        layer = BatchlessNorm1d(3, affine=False, correction_rate=0.0, statistics_rate=cell.rate, dtype=torch.float64)
    else:
        form = {"parametrization": cell.parametrization, "nll_reduction": "sum", "eps": LEAST_STD}
        layer = PaperNorm1d(3, affine=False, dtype=torch.float64, **form)
    statistics = BatchlessStatistics(layer)
    optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}.get(cell.name, torch.optim.SGD)(
        layer.parameters(), lr=cell.rate
    )
    for batch in x.split(8):
        for one in batch.split(1):
            layer(one)
            (statistics.nll() / 8).backward()
        statistics.update(8)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(whole[0], torch.stack((layer.mean, layer.std)).detach(), rtol=1e-12, atol=1e-12)


def test_repetitions_do_not_meet():
    """A channel's estimates do not depend on the channels beside it, not even on one that overflows."""
    recipe = recipe_of()
    grid = cells("natural 0.2", "sgd abs 0.05", "sgd log 0.05", "adam inv 0.05", "batchnorm 0.2")
    x = draw_stream(recipe.streams[0], 64, 3, seed=0, position=0)
    alone = estimate(grid, x[:, :1], 8, [64], start=START)
    beside = estimate(grid, torch.cat((x[:, :1], 1e200 * x[:, 1:]), 1), 8, [64], start=START)
    for cell in grid:
        torch.testing.assert_close(alone[cell][..., 0], beside[cell][..., 0], rtol=1e-12, atol=1e-12)


def test_errors_are_against_the_last_sample_seen():
    """|mean_hat - mean| / std and |log(std_hat / std)| at the last sample; what is not finite counts as infinite."""
    truth = Truth(torch.tensor([0.0, 2.0]).double(), torch.tensor([1.0, 4.0]).double())
    estimates = torch.tensor([[[1.0, -1.0], [1.0, math.e]], [[4.0, math.nan], [2.0, math.inf]]]).double()
    error = errors_of(estimates, truth, [1, 2])
    expected = [[[1.0, 1.0], [0.0, 1.0]], [[0.5, math.inf], [math.log(2), math.inf]]]
    torch.testing.assert_close(error, torch.tensor(expected).double(), rtol=1e-6, atol=1e-6)


def test_recovery_is_read_off_the_errors():
    """The samples until recovery are those of the first row after the jump whose two medians are below the bound."""
    recipe = recipe_of()
    errors, recoveries = measure(recipe, torch.device("cpu"))
    assert len(recoveries) == 6 + 7
    assert any(row["num_samples"] for row in recoveries)
    for row in recoveries:
        own = [e for e in errors if all(e[k] == row[k] for k in ("stream", "label", "batch_size"))]
        medians = [(e["num_samples"] - 16, max(e["mean_error_median"], e["std_error_median"])) for e in own]
        assert row["num_samples"] == next((after for after, m in medians if after > 0 and m <= 0.25), None)


def test_points_are_whole_batches_on_a_logarithmic_grid():
    """Recorded numbers of samples are multiples of the batch, hold those reported, and are dense after a jump."""
    recipe = recipe_of()
    assert record_points(recipe, 8) == [8, 16, 24, 32, 40, 48, 56, 64]
    assert record_points(recipe, 1)[:8] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert set(range(17, 25)) < set(record_points(recipe, 1, at=16))
    assert len(record_points(recipe, 1)) < 32


# recipes


def test_a_recipe_round_trips():
    """What a run folder keeps loads back equal; the two kinds of recipe share no section's name, and mypy sees one of each."""
    recipe = load_any_recipe("paper_synthetic")
    assert parse_any_recipe(dump_recipe(recipe), origin="r.yaml") == recipe
    assert not set(recipe_schema({})["$defs"]) & set(recipe_schema({"experiment": "synthetic"})["$defs"])
    assert load_synthetic_recipe("paper_synthetic") == recipe
    with pytest.raises(ValueError, match="trains no network"):
        load_recipe("paper_synthetic")
    with pytest.raises(ValueError, match="quickstart: trains a network"):
        load_synthetic_recipe("quickstart")


BAD = """\
experiment: synthetic
num_samples: 100
batch_size: [1, 8]
batch_sizes: [1, 8]
report_after: [64]
streams:
  - {name: gausian, mean: 0.0, std: 1.0}
  - {name: gaussian, mean: 0.0, std: -1.0}
  - {name: jump, mean: 0.0, std: 1.0, at: 50}
  - {name: heavy-tailed, mean: 0.0, std: 1.0, degrees_of_fredom: 7}
estimators:
  - {name: sgd, rates: [1e-3]}
  - {name: adam, rates: []}
  - {name: natural, parametrizations: [log], rates: [2.0]}
  - {name: adam, parametrizations: [logg], rates: [0.1]}
"""


def test_a_bad_recipe_gives_all_problems_at_once():
    """Every problem is named with its line, the near word, and once."""
    with pytest.raises(RecipeError) as caught:
        parse_any_recipe(BAD, origin="r.yaml", overrides=["runtime.device=gpu"])
    assert [place for place, _ in caught.value.problems] == [
        "r.yaml:3: batch_size",
        "r.yaml:7: streams[0].name",
        "r.yaml:8: streams[1].std",
        "r.yaml:9: streams[2].mean_after",
        "r.yaml:10: streams[3].degrees_of_fredom",
        "r.yaml:12: estimators[0].rates[0]",
        "r.yaml:13: estimators[1].rates",
        "r.yaml:14: estimators[2].rates[0]",
        "r.yaml:14: estimators[2].parametrizations",
        "r.yaml:15: estimators[3].parametrizations[0]",
        "--set runtime.device=gpu",
    ]
    text = caught.value.problem
    for meant in ("`batch_sizes`?", "`gaussian`?", "`degrees_of_freedom`?", "`log`?", "write 1.0e-3", "at least one"):
        assert meant in text
    assert "recipes show paper_synthetic" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "place", "what"),
    [
        ({"num_samples": 60}, "num_samples", "whole number of batches of 8"),
        ({"report_after": [30]}, "report_after", "whole number of batches of 8"),
        ({"report_after": [128]}, "report_after", "above num_samples"),
        ({"batch_sizes": [8, 1]}, "batch_sizes", "rising"),
        ({"streams": [STREAMS[0], dict(STREAMS[0])]}, "streams[1]", "give each a label"),
        ({"streams": [STREAMS[4]]}, "streams[0].at", "not before the end"),
        ({"estimators": [{"name": "sgd", "rates": [0.1, 0.1]}]}, "estimators", "sgd log 0.1 is there 2 times"),
        ({"num_repetitions": 2**24}, "num_samples", "above 134217728"),
        ({"init_std": 1e-4}, "init_std", "above 0.001"),
        ({"experiment": "synthetc"}, "experiment", "did you mean `synthetic`?"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_at_their_place(changes, place, what):
    """What no single setting has wrong is reported at the setting to change."""
    with pytest.raises(RecipeError) as caught:
        parse_any_recipe(yaml.safe_dump({**TINY, **changes}), origin="r.yaml")
    assert any(p.endswith(f": {place}") and what in w for p, w in caught.value.problems), caught.value.problems


# command line


@pytest.fixture
def bln(bln):
    """The same in a folder that holds tiny.yaml."""
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY))
    return bln


def test_run_leaves_a_folder_and_prints_what_it_holds(bln):
    """The folder holds recipe, environment, errors, recoveries, a plot per stream and batch size; `--json`, the tables and
    the CSV give the same errors; an equal run repeats them; the same or another recipe's folder is refused, unchanged."""
    Path("tiny.yaml").write_text(yaml.safe_dump({**TINY, "streams": TINY["streams"][1:]}))
    code, out, err = bln("paper", "synthetic", "tiny.yaml", "--out", "a", "--json")
    assert code == 0, err
    summary, folder = json.loads(out), Path("a")
    assert load_any_recipe(folder / "recipe.yaml") == load_any_recipe("tiny.yaml")
    plots = ["jump_batch1.svg", "jump_batch8.svg"]
    assert summary["plots"] == plots
    files = ["environment.json", "errors.csv", "recipe.yaml", "recoveries.csv", "summary.json", *plots]
    assert sorted(p.name for p in folder.iterdir()) == sorted(files)
    with (folder / "errors.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["num_samples"] in ("32", "64")]
    assert len(rows) == len(summary["errors"]) == 2 * (6 + 7)
    for row, told in zip(rows, summary["errors"], strict=True):
        assert row == {key: "" if value is None else str(value) for key, value in told.items()}
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    for arguments, problem in (
        (("paper", "synthetic", "tiny.yaml", "--out", "a"), "already holds this run"),
        (("paper", "synthetic", "tiny.yaml", "--out", "a", "--set", "seed=1"), "run of another recipe"),
        (("run", "quickstart", "--out", "a", "--resume"), "run of another recipe"),
    ):
        code, _, err = bln(*arguments)
        assert code == 1
        assert problem in err
        assert "--resume" not in err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    code, out, err = bln("paper", "synthetic", "tiny.yaml")
    assert code == 0, err
    assert (Path("runs/tiny/errors.csv")).read_bytes() == before["errors.csv"]
    lines = out.splitlines()
    begin = lines.index("Errors of mean and std after 64 samples in batches of 8")
    printed = next(line for line in lines[begin:] if line.startswith("sgd log 0.05")).split()[3:]
    told = [r for r in summary["errors"] if (r["label"], r["batch_size"], r["num_samples"]) == ("sgd log 0.05", 8, 64)]
    values = [r[key] for r in told for key in ("mean_error_median", "std_error_median")]
    assert [float(text) for text in printed] == pytest.approx(values, abs=6e-3)
    assert "batchnorm 0.2" in lines[next(n for n, line in enumerate(lines) if "batches of 1" in line) + 5]


def test_estimates_that_are_not_finite_are_counted_and_printed(bln):
    """A rate that overflows gives infinite errors: null in JSON, `>99` in the table, with a line that counts them."""
    diverging = {"estimators": [{"name": "sgd", "parametrizations": ["inv"], "rates": [50.0]}], "batch_sizes": [8]}
    Path("bad.yaml").write_text(yaml.safe_dump({**TINY, "streams": TINY["streams"][:1], **diverging}))
    code, out, err = bln("paper", "synthetic", "bad.yaml")
    assert code == 0, err
    assert ">99" in out
    assert "not finite: 3 of 3, sgd inv 50, gaussian, batches of 8" in out.splitlines()
    last = json.loads(Path("runs/bad/summary.json").read_text())["errors"][-1]
    assert (last["mean_error_median"], last["num_diverged"]) == (None, 3)


def test_what_makes_no_sense_is_refused(bln):
    """--resume, a device that is not there, and commands that train are refused with the command to type; nothing is written."""
    code, out, _ = bln("check", "tiny.yaml")
    assert (code, out) == (0, "tiny.yaml: ok (synthetic, 2 streams of 64 samples, 3 repetitions, batches of 1, 8)\n")
    for arguments, problem in (
        (("paper", "synthetic", "tiny.yaml", "--resume"), "No such option: --resume"),
        (("run", "tiny.yaml"), "Run it: bln-train paper synthetic tiny.yaml"),
        (("run", "tiny.yaml", "--resume"), "Run it: bln-train paper synthetic tiny.yaml"),
        (("paper", "synthetic", "quickstart"), "Run it: bln-train run quickstart"),
        (("compare", "tiny.yaml"), "trains no network"),
        (("memory", "tiny.yaml"), "trains no network"),
        (("paper", "synthetic", "tiny.yaml", "--device", "gpu"), "runtime.device"),
        (("paper", "synthetic", "tiny.yaml", "--device", "cuda:99"), "runtime.device is cuda:99"),
        (("check", "tiny.yaml", "--set", "train.epochs=3"), "no such setting"),
    ):
        code, out, err = bln(*arguments)
        assert (code, out) == (2, ""), err
        assert problem in err
    assert [path.name for path in Path().iterdir()] == ["tiny.yaml"]
