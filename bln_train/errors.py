"""The errors a user can cause: what happened, the next command, and the exit code. No torch here."""

from __future__ import annotations

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_DOES_NOT_FIT = 3
EXIT_INTERRUPTED = 130


class BlnError(Exception):
    """A failure with a message for the person at the terminal: `problem` says what and where, `hint` what to do next."""

    exit_code = EXIT_FAILED

    def __init__(self, problem: str, hint: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.problem}\n{self.hint}" if self.hint else self.problem


class UsageError(BlnError, ValueError):
    """Wrong command line, recipe or argument: exit code 2."""

    exit_code = EXIT_USAGE


class RecipeError(UsageError):
    """One or more problems in a recipe, each with its place; all of them in one message.

    `problems` holds (place, what is wrong) pairs, where a place reads `file.yaml:12: train.epochs`.
    """

    def __init__(self, problems: list[tuple[str, str]], hint: str = "") -> None:
        self.problems = problems
        lines = [f"{place}: {what}" if place else what for place, what in problems]
        super().__init__("\n".join(lines), hint)


class DataError(BlnError):
    """The data set is absent, unreadable or does not match the recipe: exit code 1."""


class RunFolderError(BlnError):
    """The run folder cannot be written, or belongs to another recipe: exit code 1."""


class CheckpointError(BlnError):
    """A checkpoint is missing, damaged or of another model: exit code 1."""


class ExportError(BlnError):
    """A network cannot be exported, or what was written does not compute what it does: exit code 1."""


class DivergedError(BlnError):
    """Loss or gradient stopped being finite: exit code 1."""


class ProcessError(BlnError):
    """Another process of the same run ended or did not answer: exit code 1."""


class DoesNotFitError(BlnError):
    """Training does not fit in memory: exit code 3."""

    exit_code = EXIT_DOES_NOT_FIT


class InterruptedRunError(BlnError):
    """Ctrl-C or SIGTERM, after the state was saved: exit code 130."""

    exit_code = EXIT_INTERRUPTED


def first_line(error: BaseException) -> str:
    """An error's first line, at most 200 characters of it; its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
