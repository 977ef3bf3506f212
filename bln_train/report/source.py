"""Reading the folders of runs, comparisons and memory sweeps for a report. Nothing in them is trusted. No torch here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from bln_train.errors import BlnError, UsageError, first_line
from bln_train.recipe.load import load_any_recipe
from bln_train.recipe.recipe import Recipe
from bln_train.records import EpochRecord, MemoryRecord, NoticeRecord, Record, StepRecord, TimelineRecord
from bln_train.runs.folder import BASE_RECIPE, CELLS, ENVIRONMENT, FAILED, MEMORY_TABLE, RECIPE, RunFolder


@dataclass(frozen=True)
class Run:
    """A run folder's content."""

    path: Path
    recipe: Recipe
    environment: dict[str, str]
    finished: bool
    data: str
    """Where its images came from, "" where it does not say."""
    epochs: list[EpochRecord]
    steps: list[StepRecord]
    memory: MemoryRecord | None
    timeline: TimelineRecord | None
    notices: list[str]

    @property
    def last(self) -> EpochRecord | None:
        """The last epoch that ended."""
        return self.epochs[-1] if self.epochs else None

    @property
    def effective_batch_size(self) -> int:
        """Images behind a step, as the run had them where it says."""
        return self.memory.effective_batch_size if self.memory else self.recipe.train.effective_batch_size

    @property
    def micro_batch_size(self) -> int:
        """Images in memory at once, as the run had them where it says."""
        return self.memory.micro_batch_size if self.memory else self.recipe.first_micro_batch_size


@dataclass(frozen=True)
class Sweep:
    """What `bln-train memory` measured."""

    path: Path
    title: str
    """Network, precision, optimizer, method."""
    environment: dict[str, str]
    floor_bytes: int | None
    rows: list[dict[str, Any]]
    """As memory.json has them: names are text, figures numbers or None."""
    timelines: list[tuple[str, TimelineRecord]]
    """Norm and timeline of the cells that have one."""


def cell_name(row: dict[str, Any]) -> str:
    """What a row of a sweep measured."""
    return f"{row['norm']}, micro-batch {row['micro_batch_size']} of {row['effective_batch_size']}"


@dataclass(frozen=True)
class Sources:
    """All that a report is about."""

    runs: list[Run]
    sweeps: list[Sweep]
    failures: list[str]
    """Cells of comparisons that did not finish, each with its reason."""


def read_sources(paths: Sequence[Path]) -> Sources:
    """Read folders of runs, comparisons and memory sweeps, the same one once.

    Raises:
        UsageError: some are none; every one is named.
    """
    runs: dict[Path, Run] = {}
    sweeps: dict[Path, Sweep] = {}
    failures: dict[Path, str] = {}
    problems = []
    for path in paths:
        try:
            if (path / BASE_RECIPE).is_file():
                found, failed = _read_comparison(path)
                runs |= found
                failures |= failed
            elif (path / MEMORY_TABLE).is_file():
                sweeps[path.resolve()] = _read_sweep(path)
            else:
                runs[path.resolve()] = _read_run(path)
        except (BlnError, OSError) as error:
            problems.append(f"{path}: {first_line(error)}")
    if problems:
        raise UsageError(
            "\n".join(problems),
            "Give folders that `run`, `compare` or `memory` wrote: runs/..., comparisons/..., memory/...",
        )
    return Sources(list(runs.values()), list(sweeps.values()), list(failures.values()))


def _read_run(path: Path) -> Run:
    if not path.exists():
        raise UsageError("does not exist")
    if not path.is_dir():
        raise UsageError("is a file, not a folder")
    if not (path / RECIPE).is_file():
        raise UsageError("holds no run, no comparison and no memory sweep")
    recipe = load_any_recipe(path / RECIPE)
    if not isinstance(recipe, Recipe):
        raise UsageError("holds a synthetic experiment, which has its own plots and tables there")
    folder = RunFolder(path)
    records = [record for record in folder.records() if is_sound(record)]
    summary = folder.summary()
    memories = [r for r in records if isinstance(r, MemoryRecord) and r.peak_bytes is not None]
    timelines = [r for r in records if isinstance(r, TimelineRecord)]
    return Run(
        path=path,
        recipe=recipe,
        environment=_texts(_read_json(path / ENVIRONMENT)),
        finished=summary is not None,
        data=str((summary or {}).get("data") or ""),
        epochs=[r for r in records if isinstance(r, EpochRecord)],
        steps=[r for r in records if isinstance(r, StepRecord)],
        memory=memories[-1] if memories else None,
        timeline=timelines[-1] if timelines else None,
        notices=[r.text for r in records if isinstance(r, NoticeRecord)],
    )


def _read_comparison(path: Path) -> tuple[dict[Path, Run], dict[Path, str]]:
    cells = path / CELLS
    runs = {folder.parent.resolve(): _read_run(folder.parent) for folder in sorted(cells.glob(f"*/{RECIPE}"))}
    failures = {
        file.resolve(): f"{file.stem}: {file.read_text(encoding='utf-8', errors='replace').strip()[:500]}"
        for file in sorted(cells.glob(f"*{FAILED}"))
    }
    if not runs and not failures:
        raise UsageError("is a comparison of which no cell was begun")
    return runs, failures


def _read_sweep(path: Path) -> Sweep:
    document = _read_json(path / MEMORY_TABLE)
    rows = document.get("rows")
    if not isinstance(rows, list) or not rows:
        raise UsageError(f"its {MEMORY_TABLE} is damaged")
    sound, timelines = [], []
    for row in rows:
        if not isinstance(row, dict) or not all(_is_count(row.get(f"{n}_batch_size")) for n in ("micro", "effective")):
            raise UsageError(f"its {MEMORY_TABLE} is damaged")
        texts = {key: str(row.get(key) or "") for key in ("norm", "problem")}
        sound.append({key: value for key, value in row.items() if _is_number(value)} | texts)
        timelines += [(texts["norm"], timeline) for timeline in _timeline(row.get("timeline"))]
    floor = document.get("floor")
    floor_bytes = floor.get("floor_bytes") if isinstance(floor, dict) else None
    environment = _texts({**_dict(document.get("environment")), "date": document.get("date")})
    title = ", ".join(str(document.get(key) or "-") for key in ("model", "precision", "optimizer", "method"))
    return Sweep(path, title, environment, floor_bytes if _is_count(floor_bytes) else None, sound, timelines)


def _timeline(value: Any) -> Iterator[TimelineRecord]:
    try:
        record = TimelineRecord(**value)
    except TypeError:
        return
    if is_sound(record):
        yield record


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file, {} where there is none: whatever it lacks prints as not measured."""
    try:
        return _dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, RecursionError):
        return {}


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _texts(values: dict[str, Any]) -> dict[str, str]:
    return {str(key): "-" if value is None else str(value) for key, value in values.items()}


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def is_sound(record: Record) -> bool:
    """Whether a record from a file has numbers where its class has them, and lists of one length; None stands for a number."""
    if not all(_fits(getattr(record, field.name), str(field.type)) for field in fields(record)):
        return False
    if isinstance(record, TimelineRecord):
        lengths = {len(getattr(record, field.name)) for field in fields(record) if field.name.endswith("_bytes")}
        return (
            lengths == {sum(record.num_points)}
            and len(record.phases) == len(record.num_points)
            and min(record.num_points, default=0) > 0
        )
    return True


def _fits(value: Any, annotation: str) -> bool:
    if annotation.startswith("dict[str, LayerRecord]"):
        return value is None or all(
            _fits(getattr(layer, field.name), str(field.type))
            for layer in value.values()
            for field in (fields(layer) if is_dataclass(layer) else ())
        )
    if annotation.startswith("dict"):
        return value is None or (isinstance(value, dict) and all(map(_is_number, value.values())))
    if annotation == "list[int]":
        return isinstance(value, list) and all(map(_is_count, value))
    if annotation == "list[str]":
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    if annotation == "str":
        return isinstance(value, str)
    if annotation.startswith("int"):
        return _is_count(value) or (value is None and annotation != "int")
    return _is_number(value)
