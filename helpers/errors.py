"""The one error type that people are meant to read, and how a command ends; foreign text with nothing hidden in it."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

# Characters that would hide or reorder text, or steer a terminal: shown as what they are. Tab and line end stay.
HIDDEN: dict[int, str] = {c: chr(0x2400 + c) for c in range(0x20) if c not in (0x09, 0x0A)} | {0x7F: "␡"}
HIDDEN |= {
    c: f"⟨U+{c:04X}⟩"
    for c in [*range(0x80, 0xA0), 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF]
}


def clean(text: object) -> str:
    """Any value as text: control and direction characters made visible, lone surrogates replaced."""
    return str(text).encode("utf-8", "replace").decode("utf-8").translate(HIDDEN)


class TunebookError(Exception):
    """Something the person at the keyboard can put right.

    The message says what was found, what was expected and what to do, in one or two sentences. Notebooks show it
    without a traceback; command lines print it and exit with a non-zero status. Foreign text in it is shown `clean`.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(clean(message))

    def _render_traceback_(self) -> list[str]:
        """IPython asks for this instead of drawing a traceback."""
        return [f"{type(self).__name__}: {self}"]


class Stopped(TunebookError):
    """A person stopped the work; the message says what is safe and how to go on."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def command(main: Callable[..., int]) -> Callable[..., int]:
    """A command line's `main` that never ends in a traceback for what a person did: a TunebookError is one line and
    status 1, an interrupt is status 130, and a reader of the output that has gone (`| head`) is status 141."""

    @functools.wraps(main)
    def guarded(*arguments: Any) -> int:
        try:
            status = main(*arguments)
            sys.stdout.flush()
            return status
        except TunebookError as error:
            said = str(error) if isinstance(error, Stopped) else f"Stopped: {error}"
            # torchrun ends in what stands in this file, after the traceback of its own: the message is seen last, once.
            if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
                with contextlib.suppress(OSError), open(report, "w", encoding="utf-8") as file:
                    json.dump({"message": said, "timestamp": int(time.time())}, file)
            if not report or (os.environ.get("RANK") == "0" and "TUNEBOOK_LAUNCHED" not in os.environ):
                print(f"\n{said}", file=sys.stderr)
            return 130 if isinstance(error, Stopped) else 1
        except KeyboardInterrupt:
            print("\nInterrupted; the same command resumes where it stopped.", file=sys.stderr)
            return 130
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still in the buffer goes nowhere
            return 141

    return guarded
