"""The one error type that people are meant to read."""


class TunebookError(Exception):
    """Something the person at the keyboard can put right.

    The message says what was found, what was expected and what to do, in one or two sentences. Notebooks show it
    without a traceback; command lines print it and exit with a non-zero status.
    """

    def _render_traceback_(self) -> list[str]:
        """IPython asks for this instead of drawing a traceback."""
        return [f"{type(self).__name__}: {self}"]
