"""Results as tables, on stdout. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from bln_train.console.output import out, print_line, say
from bln_train.system.units import format_bytes, format_number, format_percent, format_seconds


def memory_rows(memory: dict[str, Any]) -> list[tuple[str, str]]:
    """A memory record as (what, how much) rows; what was not measured reads `-`."""
    allocator = memory["method"] == "allocator"
    split = [
        (f"  {part}", format_bytes(memory[f"{key}_bytes"]))
        for part, key in (
            ("parameters", "parameter"),
            ("gradients", "gradient"),
            ("optimizer", "optimizer"),
            ("activations", "activation"),
            ("other", "other"),
        )
    ]
    return [
        ("peak, allocated" if allocator else "peak, tracked tensors", format_bytes(memory["peak_bytes"])),
        *split,
        ("reserved by the allocator", format_bytes(memory["reserved_bytes"])),
        ("whole card in use", format_bytes(memory["device_bytes"])),
        ("process peak (libraries and data included)", format_bytes(memory["process_bytes"])),
    ]


def print_summary(summary: dict[str, Any], folder: str) -> None:
    """The table at the end of a run, on stdout."""
    memory = summary["memory"]
    table = Table(title=f"{escape(summary['name'])}: {summary['model']}, norm {summary['norm']}", title_justify="left")
    table.add_column("result")
    table.add_column("value", justify="right", no_wrap=True)
    for what, of in (("accuracy", format_percent), ("loss", format_number)):
        best = summary.get(f"best_validation_{what}")
        if best is not None:
            epoch = summary[f"best_validation_{what}_epoch"]
            table.add_row(f"best validation {what} (epoch {epoch} of {summary['epochs']})", of(best))
    table.add_row("test accuracy", format_percent(summary["test_accuracy"]))
    table.add_row("test loss", format_number(summary["test_loss"]))
    table.add_row("train loss (last epoch)", format_number(summary["train_loss"]))
    table.add_row("images/s (training)", format_number(summary["images_per_second"], 1))
    table.add_row("steps, time", f"{summary['steps']}, {format_seconds(summary['seconds'])}")
    table.add_section()
    table.add_row("effective batch, micro-batch", f"{memory['effective_batch_size']}, {memory['micro_batch_size']}")
    for what, value in memory_rows(memory):
        table.add_row(what, value)
    print_table(table)
    world_size = summary["environment"].get("world_size", 1)
    processes = f"; {world_size} processes, memory of the first" if world_size > 1 else ""
    print_line(f"device: {memory['device']}{processes}")
    print_line(f"data:   {summary['data']}")
    print_line(f"run:    {folder}")


def print_export(result: dict[str, Any]) -> None:
    """What `export` wrote, what became of the norms, and how the file compares with the run."""
    norms = result["norms"]
    batch = f", batch {result['batch']}" if result["batch"] else ""
    print_line(
        f"{result['file']}: {result['model']}, norm {result['norm']}, after step {result['step']}{batch}, "
        f"{format_bytes(result['bytes'])}"
    )
    print_line(
        f"norms: {len(norms['merged'])} merged into weights, {len(norms['maps'])} kept as a scale and shift, "
        f"{len(norms['kept'])} kept as they are"
    )
    print_line(
        f"on {result['num_compared']} {result['compared_on']}: largest difference from the run {result['max_abs_difference']:.2e}, "
        f"relative to the largest output {result['max_rel_difference']:.2e} (tolerance {result['tolerance']:g}), "
        f"same top-1 {format_percent(result['top1_agreement'])}"
    )
    for reason in sorted({*norms["maps"].values(), *norms["kept"].values()}):
        names = [name for kind in ("maps", "kept") for name, why in norms[kind].items() if why == reason]
        say(f"not merged: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''} ({reason})")


def print_comparison(rows: list[dict[str, Any]], device: str) -> None:
    """The table of a comparison, on stdout."""
    headings = (
        "effective\nbatch",
        "micro-\nbatch",
        "peak\nmemory",
        "images\n/s",
        "train\nloss",
        "test\naccuracy %",
        "runs",
    )
    table = narrow_table("norm", headings, title="Peak memory of training and accuracy")
    failures = []
    for row in rows:
        table.add_row(
            row["norm"],
            str(row["effective_batch_size"]),
            str(row["micro_batch_size"]),
            format_bytes(row["peak_bytes"]),
            format_number(row["images_per_second"], 0),
            format_number(row["train_loss_mean"]),
            _format_mean(row, "test_accuracy", digits=2, scale=100),
            f"{row['num_finished']}/{row['num_seeds']}",
        )
        failures += [
            f"{row['norm']}, effective {row['effective_batch_size']}, micro {row['micro_batch_size']}: {text}"
            for text in row["failures"]
        ]
    print_table(table)
    if any(row["best_validation_loss_mean"] is not None for row in rows):
        _print_best_validation(rows)
    for line in failures:
        print_line(f"did not finish: {line}")
    if any(row["norm"] == "batch" and row["micro_batch_size"] < row["effective_batch_size"] for row in rows):
        print_line(
            "batch below the full micro-batch normalises each micro-batch by itself: another, usually worse, method"
        )
    print_line(f"device: {device}; mean ± standard deviation over the runs")


def _print_best_validation(rows: list[dict[str, Any]]) -> None:
    headings = ("effective\nbatch", "micro-\nbatch", "best\nloss", "in\nepoch", "best\naccuracy %", "in\nepoch")
    table = narrow_table("norm", headings, title="\nBest epoch on the validation images")
    for row in rows:
        table.add_row(
            row["norm"],
            str(row["effective_batch_size"]),
            str(row["micro_batch_size"]),
            _format_mean(row, "best_validation_loss", digits=3),
            _format_range(row["best_validation_loss_epoch_by_run"]),
            _format_mean(row, "best_validation_accuracy", digits=2, scale=100),
            _format_range(row["best_validation_accuracy_epoch_by_run"]),
        )
    print_table(table)
    print_line("test accuracy: of the last epoch's weights, looked at once")


def _format_mean(row: dict[str, Any], key: str, *, digits: int, scale: float = 1.0) -> str:
    mean, std = row[f"{key}_mean"], row[f"{key}_std"]
    text = format_number(None if mean is None else scale * mean, digits)
    return text if std is None else f"{text} ± {scale * std:.{digits}f}"


def _format_range(values: list[int]) -> str:
    if not values:
        return "-"
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def print_memory(document: dict[str, Any]) -> None:
    """The table of a memory sweep, on stdout, within 80 columns."""
    rows, floor = document["rows"], document["floor"]
    headings = (
        "micro-\nbatch",
        "effective\nbatch",
        "saved/\nimage",
        "peak\nmemory",
        "peak/\nfloor",
        "ms/\nimage",
        "x\nnone",
    )
    table = narrow_table(
        "norm",
        headings,
        title=f"What training takes: {escape(document['model'])}, {document['precision']}, {document['optimizer']}",
    )
    sizes = None
    for row in rows:
        if sizes not in (None, (row["micro_batch_size"], row["effective_batch_size"])):
            table.add_section()
        sizes = (row["micro_batch_size"], row["effective_batch_size"])
        table.add_row(
            row["norm"],
            str(row["micro_batch_size"]),
            str(row["effective_batch_size"]),
            format_bytes(row["saved_bytes_per_image"]),
            format_bytes(row["peak_bytes"]),
            format_number(row["peak_over_floor"], 2),
            format_number(row["ms_per_image"], 2),
            format_number(row["ms_over_none"], 2),
        )
    print_table(table)
    for row in rows:
        if row["problem"]:
            print_line(
                f"not measured: {row['norm']}, micro-batch {row['micro_batch_size']} of "
                f"{row['effective_batch_size']}: {row['problem']}"
            )
    if floor is None:
        print_line(f"floor: - ({document['floor_problem']})")
    else:
        print_line(
            f"floor: {format_bytes(floor['floor_bytes'])} = parameters {format_bytes(floor['parameter_bytes'])} + "
            f"optimizer {format_bytes(floor['optimizer_bytes'])} + one image's tensors "
            f"{format_bytes(floor['live_bytes'])}, norm none"
        )
    shorter = {r["num_timed_images"] for r in rows if r["num_timed_images"] not in (None, r["effective_batch_size"])}
    if shorter:
        print_line(
            f"ms/image: whole steps of the effective batch, or of {', '.join(map(str, sorted(shorter)))} images where "
            "that is larger, and then the work done once a step weighs more than it would"
        )
    environment = document["environment"]
    steps = "two steps" if document["method"] == "tracked tensors" else "two steps, or until all is recorded"
    print_line(f"peak:   {document['method']}, {steps}; medians of {document['num_repeats']} interleaved repetitions")
    print_line(f"data:   {document['data']}; nothing is learned")
    print_line(f"device: {environment['device']}; torch {environment['torch']}; {document['date']}")


def print_migration(result: dict[str, Any]) -> None:
    """Every layer that was changed, on stdout."""
    table = Table(
        title=f"{escape(result['source'])} to {escape(result['out'])}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("layer", overflow="fold")
    table.add_column("was")
    table.add_column("is")
    table.add_column("channels", justify="right")
    table.add_column("standard deviation", justify="right")
    for change in result["changes"]:
        low, high = change["smallest_std"], change["largest_std"]
        spread = "-" if low is None else f"{low:.3g} .. {high:.3g}"
        table.add_row(escape(change["layer"]), change["before"], change["after"], str(change["num_channels"]), spread)
    print_table(table)
    print_line(f"{len(result['changes'])} layers changed, {result['num_tensors']} tensors written to {result['out']}")


def print_table(table: Table) -> None:
    """A table on stdout; where it is wider than the terminal, its rows one below the other, so that no number is cut."""
    unbounded = out.options.update(max_width=10_000)
    least, most = out.measure(table, options=unbounded)
    if (most if all(column.no_wrap for column in table.columns) else least) <= out.width:
        out.print(table)
        return
    if table.title is not None:
        out.print(table.title, style="table.title")
    names, *columns = ([*column.cells] for column in table.columns)
    headings = [_heading(column.header) for column in table.columns[1:]]
    room = max(map(len, headings))
    for n, name in enumerate(names):
        if name:  # a row without a name belongs to the row above
            out.print(name, style="bold")
        for heading, cells in zip(headings, columns, strict=True):
            out.print(f"  {heading:{room}}  {cells[n]}")


def _heading(header: RenderableType) -> str:
    """A heading in one line: a word that was divided is whole again."""
    return str(header).replace("-\n", "-").replace("/\n", "/").replace("\n/", "/").replace("\n", " ")


def narrow_table(first: str, headings: Iterable[str], title: str | None = None) -> Table:
    """An empty table of a name and numbers without room between its columns: many of them fit 80 columns."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def print_findings(findings: list[dict[str, Any]]) -> None:
    """What `doctor` found, with advice below each finding that needs it, folded to any width."""
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")
    table.add_column(overflow="fold", ratio=1)
    colours = {"ok": "green", "warning": "yellow", "problem": "bold red"}
    for finding in findings:
        status = f"[{colours[finding['status']]}]{finding['status']}[/]"
        table.add_row(status, escape(finding["name"]), escape(finding["value"]))
        if finding["advice"]:
            table.add_row("", "", f"-> {escape(finding['advice'])}")
    out.print(table)
    counts = [sum(finding["status"] == status for finding in findings) for status in ("problem", "warning")]
    print_line(", ".join(f"{n} {word}{'s' * (n != 1)}" for n, word in zip(counts, ("problem", "warning"), strict=True)))
