"""A GGUF candidate in a process of its own: a crash of the C++ runtime costs that candidate, not the evaluation.

Its threads don't wait for torch's, and its memory is gone when it ends. One JSON line a request, one or more a reply.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from helpers import machine
from helpers.errors import TunebookError
from helpers.tasks.answers import Answer, Decoding

METHODS = ("encode", "tokens", "tokenize", "ends", "score", "continue_text")


class GgufProcess:
    """`GgufModel`'s methods, answered by a child. Raises TunebookError with the runtime's last words when the child ends."""

    path_note = "llama.cpp"
    is_runtime = True

    def __init__(self, path: Path, end_of_turn: str = ""):
        self.path = Path(path)
        self._log = tempfile.TemporaryFile()
        self._child = subprocess.Popen(
            [sys.executable, "-m", "helpers.evaluate.gguf_process", str(self.path), end_of_turn],
            cwd=machine.PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
            bufsize=1,
        )
        try:
            self._reply()
        except TunebookError:
            self.close()
            raise

    def close(self) -> None:
        """End the child; a second call does nothing."""
        if self._child.poll() is None:
            self._child.stdin.close()
            try:
                self._child.wait(20)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
        self._child.stdout.close()
        self._log.close()

    def __getattr__(self, name: str) -> Any:
        if name not in METHODS:
            raise AttributeError(name)
        return lambda *arguments: self._call(name, arguments)

    def generate(
        self, prompts: Sequence[Sequence[int]], decoding: Decoding, done: Callable[[int, Answer], None] | None = None
    ) -> list[Answer]:
        """An answer a prompt, in order; `done(index, answer)` as they come."""
        answers: list[Answer | None] = [None] * len(prompts)

        def event(value: list) -> None:
            answers[value[0]] = Answer(*value[1:])
            if done:
                done(value[0], answers[value[0]])

        self._call(
            "generate", [list(map(list, prompts)), decoding.max_new_tokens, decoding.temperature, decoding.seed], event
        )
        return answers

    def logprobs(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        return [values for values, _ in self._call("score", [pairs])]

    def _call(self, name: str, arguments: Sequence[Any], event: Callable[[Any], None] | None = None) -> Any:
        with contextlib.suppress(OSError, ValueError):  # a child that has ended: reading its reply says why
            self._child.stdin.write(json.dumps([name, list(arguments)]) + "\n")
        return self._reply(event)

    def _reply(self, event: Callable[[Any], None] | None = None) -> Any:
        for line in self._child.stdout:
            kind, value = json.loads(line)
            if kind == "event" and event:
                event(value)
            elif kind == "error":
                raise TunebookError(value)
            elif kind == "value":
                return value
        self._log.seek(0)
        said = [line.strip() for line in self._log.read().decode("utf-8", "replace").splitlines() if line.strip()]
        raise TunebookError(
            f"llama.cpp ended while working on {self.path.name} (status {self._child.wait()}"
            + (f": {said[-1][:200]}" if said else "")
            + "); export the file again or use a newer llama.cpp."
        )


def _serve(path: str, end_of_turn: str) -> None:
    """The child: requests on stdin, replies on the real stdout; what C code prints goes to stderr."""
    from helpers.evaluate.gguf_model import GgufModel

    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def send(kind: str, value: Any) -> None:
        out.write(json.dumps([kind, value]) + "\n")

    try:
        model = GgufModel(Path(path), end_of_turn)
    except (TunebookError, OSError, RuntimeError, ValueError) as error:
        send("error", str(error))
        return
    send("value", None)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            if name == "generate":
                prompts, *decoding = arguments
                model.generate(
                    prompts, Decoding(*decoding), lambda i, a: send("event", [i, a.text, a.tokens, a.stopped, a.failed])
                )
                send("value", None)
            else:
                send("value", getattr(model, name)(*arguments))
        except (TunebookError, OSError, RuntimeError, ValueError) as error:
            send("error", str(error))
    model.close()


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2])
