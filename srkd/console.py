"""What every command shares: one sentence for the user's mistakes, honest exit codes."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from srkd.errors import MissingError, SrkdError

if TYPE_CHECKING:
    from collections.abc import Callable

INTERRUPTED = 130


def run_command(main: Callable[[list[str] | None], int], argv: list[str] | None = None) -> int:
    """Run a command's `main`; an `SrkdError` becomes its message on stderr and its exit code."""
    try:
        return main(argv)
    except SrkdError as error:
        if str(error):  # of several processes one speaks
            print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # noqa: T201
        return INTERRUPTED
    except MemoryError as error:
        print(f"error: out of memory ({error}); use a smaller size.", file=sys.stderr)  # noqa: T201
        return MissingError.exit_code
    except BrokenPipeError:
        # The reader went away (`| head`): not an error, and nothing more can be said on stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a name that is too long, a full /dev/stdout, a folder that went away
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}.", file=sys.stderr)  # noqa: T201
        return SrkdError.exit_code
