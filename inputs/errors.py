"""Errors that users can fix, and notes: one line each."""

import os


class UserError(ValueError):
    """An error that the user can fix. The scripts print it as one line and exit with status 2."""


def need(condition: object, message: str) -> None:
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def first_line(error: Exception) -> str:
    """The first line of a library's error message; if that is empty, the name of its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def note(text: str) -> None:
    """Print one line on standard output, on the first process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"note: {text}", flush=True)
