"""A GGUF model in a process of its own: it may crash alone, and its threads don't wait for torch's.

Prompts are rendered from the template inside the file by llama.cpp's own Jinja and cut into tokens by its own
tokenizer: what is judged is the whole chain that a person downloads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from helpers import worker
from helpers.errors import TunebookError
from helpers.gguf.llama_cpp import Completion, LlamaCpp
from helpers.tasks.questions import Answer, Decoding

PARALLEL = 32  # answers at once; on 2 cores 16 gains 15 % less, 64 nothing more
Ids = Sequence[int]


class GgufModel:
    """The parent's side; the same methods as a Hugging Face model in evaluation. Close it.

    path: the file; end_of_turn: text of the token that ends an assistant's turn ("<|im_end|>"). Raises TunebookError,
    with the runtime's last lines when its process ends.
    """

    path_note = "llama.cpp"
    is_runtime = True

    def __init__(self, path: Path, end_of_turn: str = ""):
        self.path, start = Path(path), {"path": str(path), "end_of_turn": end_of_turn}
        self._child = worker.Worker("helpers.gguf.runner:Served", start=start, name=f"llama.cpp with {self.path.name}")
        self.close = self._child.close

    def _ask(self, method: str, *arguments: Any, on_event: worker.Event | None = None) -> Any:
        return self._child.ask([method, *arguments], on_event, timeout_s=None)

    def encode(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of the conversation with the generation prompt; one BOS where the model has one."""
        return self._ask("encode", list(messages))

    def tokens(self, text: str, end: bool = False) -> list[int]:
        """Token ids of plain text, with the end of turn after it when `end`."""
        return self._ask("tokens", text, end)

    def tokenize(self, text: str, add_special: bool = False) -> list[int]:
        """Token ids of a text in which control tokens count as such; with the model's own BOS when `add_special`."""
        return self._ask("tokenize", text, add_special)

    def ends(self) -> list[int]:
        """Ids of the tokens that end an answer."""
        return self._ask("end_ids")

    def generate(
        self, prompts: Sequence[Ids], decoding: Decoding, done: Callable[[int, Answer], None] | None = None
    ) -> list[Answer]:
        """An answer to each prompt, in order; `done(index, answer)` as they come, so that a killed run keeps them."""
        answers: dict[int, Answer] = {}

        def event(value: Any) -> None:
            answers[value[0]] = Answer(*value[1:])
            if done:
                done(value[0], answers[value[0]])

        self._ask("answer", [list(p) for p in prompts], *astuple(decoding), on_event=event)
        return [answers[i] for i in range(len(prompts))]

    def score(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[tuple[list[float], bool]]:
        """For each (prompt ids, completion ids) the natural log-probability of every completion token, from the
        runtime's logits, and whether every one was the most likely token."""
        return [self._ask("score", list(prompt), list(completion)) for prompt, completion in pairs]

    def logprobs(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[list[float]]:
        return [values for values, _ in self.score(pairs)]

    def continue_text(self, text: str, max_tokens: int, stop: Sequence[str], temperature: float = 0.0) -> str:
        """Plain continuation of a text, up to one of `stop`."""
        return self._ask("continue_text", text, max_tokens, list(stop), temperature)


class Served(LlamaCpp):
    """The child's side: a request is the name of a method and its arguments."""

    def __init__(self, path: str, end_of_turn: str):
        super().__init__(path, parallel=PARALLEL)
        self._end = end_of_turn
        if not self.chat_template:
            raise TunebookError(
                f"{path} has no chat template inside, so nobody can know how to prompt it; export it again."
            )

    def __call__(self, request: list[Any], event: worker.Event) -> Any:
        method, *arguments = request
        self._event: Any = event
        return getattr(self, method)(*arguments)

    def encode(self, messages: list[dict[str, Any]]) -> list[int]:
        ids = self.tokenize(self.apply_template(messages), add_special=True)
        doubled = len(ids) > 1 and ids[0] == ids[1] and ids[:1] == self.tokenize("", add_special=True)[:1]
        return ids[1:] if doubled else ids

    def tokens(self, text: str, end: bool) -> list[int]:
        return self.tokenize(text, parse_special=False) + (self.tokenize(self._end) if end and self._end else [])

    def answer(self, prompts: list[list[int]], max_tokens: int, temperature: float, seed: int) -> None:
        """The longest prompts first."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))

        def finish(place: int, made: Completion) -> None:
            stopped = made.finish == "stop"
            self._event([order[place], made.text.strip(), len(made.token_ids) + stopped, stopped])

        self.generate([prompts[i] for i in order], max_tokens, temperature=temperature, seed=seed, done=finish)

    def continue_text(self, text: str, max_tokens: int, stop: list[str], temperature: float) -> str:
        return self.generate([self.tokenize(text, add_special=True)], max_tokens, stop, temperature)[0].text
