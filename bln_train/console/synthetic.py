"""The tables of a synthetic experiment, on stdout. No torch here."""

from __future__ import annotations

from typing import Any

from bln_train.console.output import print_line
from bln_train.console.tables import narrow_table, print_table
from bln_train.system.units import format_seconds


def print_synthetic(summary: dict[str, Any], folder: str) -> None:
    """The tables of a synthetic experiment, on stdout; six streams fit in 80 columns."""
    streams = list(dict.fromkeys(row["stream"] for row in summary["errors"]))
    sizes = list(dict.fromkeys(row["batch_size"] for row in summary["errors"]))
    labels = summary["estimators"]
    cells = {(r["num_samples"], r["batch_size"], r["label"], r["stream"]): r for r in summary["errors"]}
    for num_samples in dict.fromkeys(row["num_samples"] for row in summary["errors"]):
        for size in sizes:
            print_line(f"Errors of mean and std after {num_samples} samples in batches of {size}")
            table = narrow_table("estimator", [f"{stream}\nmean  std" for stream in streams])
            for label in labels:
                found = [cells.get((num_samples, size, label, stream)) for stream in streams]
                table.add_row(label, *(_error_pair(row) for row in found))
            print_table(table)
    if summary["recoveries"]:
        jumps = list(dict.fromkeys(row["stream"] for row in summary["recoveries"]))
        print_line(f"Samples after a jump until both errors are at most {summary['recovered_below']:g}")
        table = narrow_table("estimator", [f"{jump}\nbatch {size}" for jump in jumps for size in sizes])
        times = {(r["label"], r["stream"], r["batch_size"]): r["num_samples"] for r in summary["recoveries"]}
        for label in labels:
            found_times = [times.get((label, jump, size)) for jump in jumps for size in sizes]
            table.add_row(label, *("-" if t is None else str(t) for t in found_times))
        print_table(table)
    last = [row for row in summary["errors"] if row["num_samples"] == summary["errors"][-1]["num_samples"]]
    for row in last:
        if row["num_diverged"]:
            print_line(
                f"not finite: {row['num_diverged']} of {summary['num_repetitions']}, {row['label']}, {row['stream']}, "
                f"batches of {row['batch_size']}"
            )
    print_line(
        f"errors: medians over {summary['num_repetitions']} repetitions; of the mean in standard deviations, of the standard "
        "deviation |log ratio|"
    )
    print_line("-:      not there: batchnorm takes no batch of 1; a recovery that did not come")
    print_line(
        f"device: {summary['environment']['device']}; torch {summary['environment']['torch']}; {summary['date']}"
    )
    print_line(f"run:    {folder}; errors.csv, {len(summary['plots'])} plots; {format_seconds(summary['seconds'])}")


def _error_pair(row: dict[str, Any] | None) -> str:
    return "-" if row is None else f"{_format_error(row['mean_error_median'])} {_format_error(row['std_error_median'])}"


def _format_error(error: float) -> str:
    """An error in four characters: .012, 1.23, 12.3, >99."""
    if error >= 99:
        return " >99"
    return f"{error:.3f}"[1:] if error < 0.9995 else f"{error:.3g}".ljust(4, "0")
