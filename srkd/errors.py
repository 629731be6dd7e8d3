"""Errors a user can mend. Each message says what we got, what we need, and what to do next.

A command prints the message (no traceback) and exits with `exit_code`.
"""


class SrkdError(Exception):
    """The request is wrong: a flag, a recipe, a file, a shape."""

    exit_code = 2


class MissingError(SrkdError):
    """This machine lacks something: a library, a GPU, an engine built for another machine."""

    exit_code = 3


class CheckFailedError(SrkdError):
    """The work was done, but a check on it did not pass."""

    exit_code = 1


def nearest(name: str, valid: "list[str] | tuple[str, ...]") -> str:
    """`valid` as a readable list, led by the closest match to `name` when there is one."""
    from difflib import get_close_matches

    close = get_close_matches(name, valid, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}Valid: {', '.join(sorted(valid))}."
