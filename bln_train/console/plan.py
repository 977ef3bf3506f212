"""A plan as a table, on stdout. No torch here."""

from __future__ import annotations

from typing import Any

from rich.markup import escape

from bln_train.console.output import print_line
from bln_train.console.tables import narrow_table, print_table
from bln_train.system.units import format_bytes


def print_plan(document: dict[str, Any]) -> None:
    """Predicted memory by micro-batch, which micro-batch fits, and what would help, within 80 columns."""
    _print_rows(document)
    _print_weights(document)
    for name, problem in document["problems"].items():
        print_line(f"not planned: {name}: {problem}")
    _print_what_is_counted(document)
    if document["budget_bytes"] is not None:
        _print_fits(document)


def _print_rows(document: dict[str, Any]) -> None:
    """Predicted memory, a row for each micro-batch."""
    cuda, budget = document["predicted_for"] == "cuda", document["budget_bytes"]
    headings = ["micro-\nbatch", "weights\netc.", "activa-\ntions", "of them\nan image"]
    headings += ["work-\nspace", "graphs", "round-\ning"] if cuda else []
    headings += ["total"] if budget is None else ["total", "fits"]
    table = narrow_table(
        "predicted",
        headings,
        title=f"Predicted peak of training for {'CUDA' if cuda else 'the CPU'}: {escape(document['model'])}, "
        f"{document['images']},\neffective batch {document['effective_batch_size']}, {document['precision']}, "
        f"{document['optimizer']}; MiB",
    )
    before = None  # a variant's name stands in its first row
    for row in document["rows"]:
        if before not in (None, row["variant"]):
            table.add_section()
        weights = sum(row[f"{part}_bytes"] for part in ("parameter", "gradient", "optimizer", "other"))
        scratch = [_mib(row[f"{part}_bytes"]) for part in ("workspace", "graph", "rounding")] if cuda else []
        table.add_row(
            escape(_short(row)) if row["variant"] != before else "",
            str(row["micro_batch_size"]),
            _mib(weights),
            _mib(row["activation_bytes"]),
            _mib(row["activation_bytes_per_image"]),
            *scratch,
            _mib(row["total_bytes"]),
            *([] if budget is None else ["yes" if row["fits"] else "no"]),
        )
        before = row["variant"]
    print_table(table)


def _print_weights(document: dict[str, Any]) -> None:
    """What the column `weights etc.` adds up, for each variant."""
    first_of = {row["variant"]: row for row in reversed(document["rows"])}
    for name, row in reversed(first_of.items()):
        parts = (
            ("parameters", "parameter"),
            ("gradients", "gradient"),
            ("optimizer", "optimizer"),
            ("buffers", "other"),
        )
        written = " + ".join(f"{label} {format_bytes(row[f'{key}_bytes'])}" for label, key in parts)
        print_line(f"weights etc. of {name}: {written}")


def _print_what_is_counted(document: dict[str, Any]) -> None:
    """What the column `total` counts, and what it leaves out."""
    if document["predicted_for"] == "cuda" and document["rows"]:
        row = document["rows"][0]
        print_line(
            f"total: with CUDA's context, {format_bytes(row['context_bytes'])}; it and workspace are assumed, see the README; "
            "nothing here is measured"
        )
    elif document["rows"]:
        print_line(
            "total: tensors alive at once; libraries, data set and kernels' scratch come on top; nothing here is measured"
        )


def _print_fits(document: dict[str, Any]) -> None:
    """The budget, the largest micro-batch within it, and settings that would help."""
    budget = document["budget_bytes"]
    print_line(f"budget: {format_bytes(budget)} ({document['budget_source']})")
    for name, size in document["largest_fit"].items():
        print_line(f"largest micro-batch that fits: {'none' if size is None else size} ({name})")
    for remedy in document["remedies"]:
        note = f" ({remedy['note']})" if remedy["note"] else ""
        verdict = "fits" if remedy["total_bytes"] <= budget else "does not fit"
        print_line(
            f"at micro-batch 1, {format_bytes(remedy['total_bytes'])}, {verdict}: --set {remedy['setting']}{note}"
        )


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.2f}"


def _short(row: dict[str, Any]) -> str:
    """The norm, and below it what was varied, without the sections of its keys."""
    return "\n".join(
        [row["norm"], *(f"{key.rpartition('.')[2]}={value}"[:24] for key, value in row["settings"].items())]
    )
