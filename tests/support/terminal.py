"""A program in a terminal emulator: what a person would have seen, at any moment."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time

import pyte

ENVIRONMENT = {
    k: v for k, v in os.environ.items() if k not in ("BLN_DEBUG", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")
}
ENVIRONMENT |= {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}


class Terminal:
    """Runs a command on a pseudo-terminal of its own, with its echo of ^C, and keeps each picture of the screen.

    Args:
        stdout: where stdout goes instead, as subprocess has it; stdin and stderr are the terminal's.
    """

    def __init__(self, command, *, columns, cwd, lines=24, env=None, stdout=None):
        self.screen = pyte.HistoryScreen(columns, lines, history=1000)
        self.stream = pyte.ByteStream(self.screen)
        self.raw, self.pictures = b"", []
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.settings_before = termios.tcgetattr(slave)
        self.slave = slave
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**ENVIRONMENT, **(env or {})},
            stdin=slave,
            stdout=slave if stdout is None else stdout,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )

    def read(self, seconds=0.05):
        """Take in what is written within a moment; returns whether there was anything."""
        ready, _, _ = select.select([self.master], [], [], seconds)
        if not ready:
            return False
        data = os.read(self.master, 65536)
        self.raw += data
        self.stream.feed(data)
        self.pictures.append(list(self.screen.display))
        return True

    def wait(self, condition=lambda terminal: False, timeout=120):
        """Read until `condition(self)`, or until the program has ended and all it wrote is read."""
        end = time.monotonic() + timeout
        while not condition(self):
            assert time.monotonic() < end, self.text()
            if not self.read() and self.process.poll() is not None:
                return

    def press(self, key):
        """Type a key, such as "\\x03" for Ctrl-C."""
        os.write(self.master, key.encode())

    def text(self):
        """The lines that scrolled off and those on the screen, without the empty ones at the end."""
        above = ["".join(line[n].data for n in range(self.screen.columns)) for line in self.screen.history.top]
        lines = [line.rstrip() for line in [*above, *self.screen.display]]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    def close(self):
        """End what is left of it; exit code."""
        self.process.kill()
        code = self.process.wait()
        os.close(self.master)
        os.close(self.slave)
        return code
