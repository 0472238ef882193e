"""The one error type that people are meant to read."""

from __future__ import annotations

import errno
from pathlib import Path


class TunebookError(Exception):
    """Something the person at the keyboard can put right.

    The message says what was found, what was expected and what to do, in one or two sentences. Notebooks show it
    without a traceback; command lines print it and exit with a non-zero status.
    """

    def _render_traceback_(self) -> list[str]:
        """IPython asks for this instead of drawing a traceback."""
        return [f"{type(self).__name__}: {self}"]


def disk_error(error: OSError, path: Path) -> Exception:
    """An OSError as an error message when it means a full disk or a forbidden place, else the error itself."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TunebookError(
            f"No space left on the disk while writing {path}; free some room and run the same command again, it "
            "resumes where it stopped."
        )
    if error.errno in (errno.EACCES, errno.EROFS):
        return TunebookError(f"{path} cannot be written ({error.strerror}); set TUNEBOOK_RUNS to a folder that can.")
    return error
