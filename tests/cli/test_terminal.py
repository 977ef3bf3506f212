"""What a person sees in a terminal, through an emulator of one (each docstring is a law)."""

import re
import subprocess
import sys
import time

import pytest
import yaml
from terminal import ENVIRONMENT, Terminal

from bln_train.console.live import Figures, History, Pace, RunView
from bln_train.records import MemoryRecord, StepRecord
from bln_train.runs.folder import RunFolder

TINY = {
    "data": {"name": "shapes", "num_train": 80, "num_test": 20},
    "model": {"name": "paper_cnn"},
    "norm": {"name": "batchless", "probe_images": 4, "init_images": 8},
    "train": {"epochs": 3, "effective_batch_size": 4, "micro_batch_size": 4, "memory_budget": "100MiB"},
    "optimizer": {"name": "sgd", "lr": 0.01},
    "runtime": {"device": "cpu", "num_threads": 1},
}
BLN = [sys.executable, "-m", "bln_train"]
# A run of which nothing is computed: its records come at once, or as the loop says.
RECORDS = """
import sys, time
from bln_train.console.progress import show_cells, show_progress
from bln_train.records import EpochRecord, MemoryRecord, NoticeRecord, StepRecord

def step(n):
    return StepRecord(n, n / 100, 32, 2.5 - n / 100, 0.25, None, 0.1, 1.0, 0.01)

memory = MemoryRecord("cpu", "tracked tensors", 32, 1, 3 * 2**20, *[None] * 8)
"""


@pytest.fixture
def opened(tmp_path):
    """Open terminals that are closed after the test; a text is a Python program."""
    terminals = []

    def call(command, **options):
        if isinstance(command, str):
            command = [sys.executable, "-c", RECORDS + command]
        terminals.append(Terminal(command, cwd=tmp_path, **options))
        return terminals[-1]

    yield call
    for terminal in terminals:
        terminal.close()


def write_recipe(path):
    path.write_text(yaml.safe_dump(TINY), encoding="utf-8")


def lines_with(pictures, *words):
    """The distinct lines of all pictures that hold every word."""
    return {line.rstrip() for picture in pictures for line in picture if all(word in line for word in words)}


def check_sane(terminal):
    """The cursor is there and the terminal's settings are what they were."""
    import termios

    assert not terminal.screen.cursor.hidden
    assert termios.tcgetattr(terminal.slave) == terminal.settings_before


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 50])
def test_a_run_shows_where_it_is_and_leaves_a_tidy_screen(opened, tmp_path, columns):
    """While it trains: step, loss, peak and time left, never wider than the terminal; then epochs and the whole table alone."""
    write_recipe(tmp_path / "r.yaml")
    terminal = opened([*BLN, "run", "r.yaml", "--out", "run"], columns=columns, lines=60)
    terminal.wait()
    assert terminal.process.wait(10) == 0, terminal.text()
    shown = lines_with(terminal.pictures, "step ", "/60 ")
    assert any(re.fullmatch(r"step \d+/60  epoch \d\.\d\d  [━─]+  \d+ s left", line) for line in shown), shown
    assert any(re.match(r"loss \d\.\d{3}  [▁▂▃▄▅▆▇█]", line) for line in lines_with(terminal.pictures, "loss "))
    peaks = lines_with(terminal.pictures, "peak ", "MiB  of 100.00 MiB")
    assert all(re.match(r"peak \d+\.\d\d MiB  of 100.00 MiB  [━─]+  \d+ %$", line) for line in peaks)
    assert peaks
    assert max(map(len, [*shown, *peaks])) <= columns - 2

    check_sane(terminal)
    text = terminal.text()
    assert not [line for line in text if "left" in line or line.startswith(("step ", "peak "))]
    assert [line for line in text if line.startswith("epoch 3: loss")]
    table = text[next(n for n, line in enumerate(text) if line.startswith("┏")) :]
    assert table[-1].startswith("run:    run")
    summary = RunFolder(tmp_path / "run").summary()
    accuracy = f"{100 * summary['test_accuracy']:.2f} %"
    assert any(re.fullmatch(rf"│ test accuracy +│ +{accuracy} │", line) for line in table)
    assert not any("…" in line for line in text)
    assert len({len(line) for line in table if line[0] in "┏┡│├└"}) == 1


@pytest.mark.slow
def test_ctrl_c_leaves_a_sane_terminal(opened, tmp_path):
    """Ctrl-C says at once that it is stopping, then that the state is saved and how to go on; nothing of the view is left."""
    write_recipe(tmp_path / "r.yaml")
    terminal = opened([*BLN, "run", "r.yaml", "--set", "train.epochs=400", "--out", "run"], columns=60)
    terminal.wait(lambda t: any(re.match(r"step [1-9]", line) for line in t.screen.display))
    terminal.press("\x03")
    terminal.wait()
    assert terminal.process.wait(10) == 130
    assert b"stopping; the last whole step's state will be saved" in terminal.raw  # on the screen until it is saved
    check_sane(terminal)
    text = terminal.text()
    assert any(re.match(r"error: stopped after step \d+ of 8000; the state is saved", line) for line in text)
    assert "Go on with: bln-train run run/recipe.yaml" in " ".join(text)
    assert not [
        line for line in text if "left" in line or line.startswith(("step ", "loss ", "peak ", "stopping", "^C"))
    ]
    assert (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.slow
def test_a_comparison_shows_its_cells(opened, tmp_path):
    """A cell's name, share and figures while it runs; then a line for each, and figures whole where no table fits."""
    write_recipe(tmp_path / "r.yaml")
    command = [*BLN, "compare", "r.yaml", "--norm", "group,batch", "--out", "out"]
    terminal = opened(command, columns=50, lines=80)
    terminal.wait()
    assert terminal.process.wait(10) == 0, terminal.text()
    assert lines_with(terminal.pictures, "1/2 group-effective4-micro4-seed0")
    assert any(re.match(r"[━─]+  \d+ %  \d+ s left", line) for line in lines_with(terminal.pictures, "left"))
    assert lines_with(terminal.pictures, "peak ", "of 100.00 MiB")
    check_sane(terminal)
    text = terminal.text()
    assert [line[:5] for line in text if "seed0 epoch 3" in line] == ["[1/2]", "[2/2]"]
    assert not [line for line in text if "left" in line]
    assert len([line for line in text if re.fullmatch(r"  peak memory +\d+\.\d\d MiB", line)]) == 2
    assert not any("…" in line for line in text)


def test_nothing_is_wider_than_the_terminal():
    """At any width what the view shows is in one piece: short of room, parts are left out, never wrapped."""
    figures, pace = Figures(), Pace()
    for n in range(1, 60):
        figures.add(StepRecord(n, n / 100, 32, 2.5 - n / 100, 0.25, None, 0.1, 1.0, 0.01))
    figures.memory = MemoryRecord("cpu", "allocator", 32, 1, 2 * 2**20, 3 * 2**20, *[None] * 7)
    view = RunView(figures, pace, 100, limit_bytes=4 * 2**20)
    for width in range(1, 200):
        lines = list(view.lines(width, ascii_only=False))
        assert len(lines) == 3
        assert max(line.cell_len for line in lines) <= width
        assert any("…" in line.plain for line in lines) == (width < 13)
    widest = [line.plain for line in lines]
    assert re.fullmatch(r"step 59/100  epoch 0\.59  ━+─+  - left", widest[0])
    assert re.fullmatch(r"loss 2\.\d+  █[▁▂▃▄▅▆▇█]+▁ *  accuracy 25\.0 %  3200 images/s", widest[1])
    assert re.fullmatch(r"peak 2\.00 MiB  reserved 3\.00 MiB  of 4\.00 MiB  ━+─+  75 %", widest[2])
    assert "█" not in "".join(line.plain for line in view.lines(80, ascii_only=True))


def test_a_resumed_run_begins_where_it_was():
    """Before its first step a resumed run shows how far it is, and no figures that it has not."""
    figures = Figures()
    figures.step = 40
    lines = [line.plain for line in RunView(figures, Pace(), 100, None).lines(80, ascii_only=False)]
    assert lines[0].startswith("step 40/100")
    assert re.fullmatch(r"loss -\s+accuracy -  - images/s", lines[1])
    assert lines[2] == "peak -"


def test_the_time_left_is_that_of_the_pace(monkeypatch):
    """Time left follows the mean pace since the last restart, and runs down between two reports."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    pace = Pace()
    pace.reach(0.0)
    assert pace.seconds_left() is None
    now = 200.0
    pace.reach(0.1)
    assert pace.seconds_left() == pytest.approx(900)
    pace.restart()
    assert pace.seconds_left() is None
    now = 210.0
    pace.reach(0.2)
    now = 215.0
    assert pace.seconds_left() == pytest.approx(75)


def test_a_history_of_any_length_fits_any_width():
    """A curve keeps the first and the last of a long series, in as many numbers as there is room for."""
    history = History(capacity=8)
    assert history.means(5) == []
    for n in range(1000):
        history.add(float(n))
    for room in range(1, 12):
        means = history.means(room)
        assert 1 <= len(means) <= room
        assert means == sorted(means)
        if room > 1:
            assert (means[0] < 500, means[-1] > 500) == (True, True)


def test_notices_stand_above_the_view(opened):
    """A layer's warning appears when it comes, whole, broken between words, and stays when the view is gone."""
    program = """
with show_progress(100) as progress:
    progress(step(1))
    time.sleep(0.3)
    progress(NoticeRecord("step 1: Channels that are dead, their inputs do not vary: blocks.0.norm1 (3 of 16).", 1))
    progress(step(2))
    time.sleep(0.6)
"""
    terminal = opened(program, columns=50)
    terminal.wait()
    with_view = next(p for p in terminal.pictures if any("blocks.0.norm1" in line for line in p) and "step 2" in p[2])
    assert [line.rstrip() for line in with_view[:2]] == [
        "note: step 1: Channels that are dead, their inputs",
        "do not vary: blocks.0.norm1 (3 of 16).",
    ]
    assert terminal.text() == [line.rstrip() for line in with_view[:2]]


def test_an_error_leaves_a_sane_terminal(opened):
    """An exception while the view is drawn shows the cursor again and its message on a line of its own."""
    terminal = opened(
        "with show_progress(10) as progress:\n progress(step(1)); time.sleep(0.4); raise ValueError('broken')",
        columns=60,
    )
    terminal.wait()
    check_sane(terminal)
    assert lines_with(terminal.pictures, "step 1/10")
    assert terminal.text()[0].startswith("Traceback")
    assert terminal.text()[-1] == "ValueError: broken"


PLAIN = """
with show_progress(10) as progress:
    progress(NoticeRecord("a notice"))
    progress(step(1))
    progress(EpochRecord(1, 1, 2.0, 0.25, 200.0, 2.1, 0.2, 10, 1.0))
    time.sleep(0.4)
with show_cells(1) as show:
    show(0, "batch")(0.5, step(1))
"""
PLAIN_LINES = ["note: a notice", "epoch 1: loss 2.000, 25.00 %; test loss 2.100, 20.00 %; 200 images/s", "[1/1] batch"]


@pytest.mark.parametrize("forced", [{}, {"TERM": "dumb"}])
def test_in_a_pipe_there_are_plain_lines(tmp_path, forced):
    """A pipe gets whole lines, no escape codes."""
    command = [sys.executable, "-c", RECORDS + PLAIN]
    found = subprocess.run(
        command, cwd=tmp_path, env={**ENVIRONMENT, **forced}, capture_output=True, text=True, check=True
    )
    assert (found.stdout, found.stderr.splitlines()) == ("", PLAIN_LINES)


def test_forced_colours_in_a_pipe_move_no_cursor(tmp_path):
    """FORCE_COLOR colours the lines of a pipe, and that is all."""
    command = [sys.executable, "-c", RECORDS + PLAIN]
    env = {**ENVIRONMENT, "FORCE_COLOR": "1"}
    printed = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stderr
    assert "\x1b[33mnote:\x1b[0m" in printed
    assert set(re.findall(r"\x1b\[[0-9;?]*([A-Za-z])", printed)) == {"m"}


def test_a_dumb_terminal_gets_plain_lines(opened):
    """TERM=dumb cannot move its cursor: plain lines, no escape codes."""
    terminal = opened(PLAIN, columns=100, env={"TERM": "dumb"})
    terminal.wait()
    assert terminal.text() == PLAIN_LINES
    assert b"\x1b" not in terminal.raw


@pytest.mark.parametrize(("env", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_no_color_is_honoured(opened, env, coloured):
    """With NO_COLOR the view is drawn in the terminal's own colour; its bars differ all the same."""
    program = (
        "with show_progress(10, limit_bytes=2**23) as progress:\n progress(step(5)); progress(memory); time.sleep(0.6)"
    )
    terminal = opened(program, columns=80, env=env)
    terminal.wait(lambda t: "step 5" in t.screen.display[0])
    cells = [cell for row in terminal.screen.buffer.values() for cell in row.values()]
    assert any(cell.fg != "default" for cell in cells) == coloured
    assert re.search("━─", terminal.screen.display[0])


def test_the_view_is_drawn_a_few_times_a_second(opened):
    """However fast steps are, the terminal is written to a few times a second, and a step costs microseconds."""
    program = """
with show_progress(10**6) as progress:
    progress(step(1))
    began, n = time.monotonic(), 1
    while time.monotonic() - began < 1.5:
        n += 1
        progress(step(n))
print("taken", 1e6 * 1.5 / n)
"""
    terminal = opened(program, columns=80)
    terminal.wait()
    assert terminal.raw.count(b"images/s") <= 9
    assert float(terminal.text()[-1].split()[1]) < 200
