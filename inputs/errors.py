"""What the user can mend is told in one line, and what the user should know in another."""

import os


class UserError(ValueError):
    """Something the user can mend. The scripts show it as one line and end with status 2."""


def need(condition, message: str) -> None:
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def first_line(error: Exception) -> str:
    """What an error of a library says, in one line; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def note(text: str) -> None:
    """One line on standard output, from the first process of a run alone."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"note: {text}", flush=True)
