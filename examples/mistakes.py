"""How a script of this folder that does not import train_ltd.py ends on its user's mistake: as that one does."""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent


def user_message(error: BaseException) -> str | None:
    """Return what is to be said of a user's mistake; `None` for all that needs a traceback.

    That is a `SystemExit` with words, an `OSError` that names a file, or a `ValueError` that a file of this folder has
    raised.
    """
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, str) else None
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    raised_at = traceback.extract_tb(error.__traceback__)[-1]
    raised_here = Path(raised_at.filename).resolve().is_relative_to(EXAMPLES)
    # Python raises it too, where numbers cannot be unpacked: that is a fault of the script.
    if isinstance(error, ValueError) and raised_here and raised_at.line.startswith("raise "):
        return str(error)
    return None


def run_script(main: Callable, parse_args: Callable) -> None:
    """Run a script. A mistake ends it with the line `error: ...` and exit code 2."""
    try:
        main(parse_args())
    except (Exception, SystemExit) as error:
        message = user_message(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
