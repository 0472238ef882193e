"""A GGUF file behind the same methods as a Hugging Face model, run by the llama.cpp that users run.

Prompts are rendered from the template inside the file by llama.cpp's own Jinja and cut into tokens by its own tokenizer:
what is judged is the whole chain that a person downloads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from helpers.evaluate.generate import common
from helpers.tasks.answers import Answer, Decoding

PARALLEL = 32  # answers at once; on 2 cores 16 gains 15 % less, 64 nothing more


class GgufModel:
    """path: the file; end_of_turn: text of the token that ends an assistant's turn ("<|im_end|>")."""

    path_note = "llama.cpp"

    def __init__(self, path: Path, end_of_turn: str = ""):
        self.path, self._end_text = Path(path), end_of_turn
        self._context = 512
        self.runtime = self._open()
        if not self.runtime.chat_template:
            from helpers.errors import TunebookError

            raise TunebookError(
                f"{self.path} has no chat template inside, so nobody can know how to prompt it; export it again."
            )

    def _open(self) -> Any:
        from helpers.gguf.llama_cpp import LlamaCpp

        return LlamaCpp(self.path, context=self._context, parallel=PARALLEL)

    def _need(self, context: int) -> None:
        """Open the file again with a longer context where the present one is too short."""
        if context > self._context:
            self._context = -(-context // 256) * 256
            self.runtime.close()
            self.runtime = self._open()

    def close(self) -> None:
        self.runtime.close()

    def encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of the conversation with the generation prompt; one BOS where the model has one."""
        text = self.runtime.apply_template([dict(m) for m in messages])
        ids = self.runtime.tokenize(text, add_special=True)
        return ids[1:] if len(ids) > 1 and ids[0] == ids[1] and ids[0] == self._bos() else ids

    def tokens(self, text: str, end: bool = False) -> list[int]:
        """Token ids of plain text, with the end of turn after it when `end`."""
        ids = self.runtime.tokenize(text, parse_special=False)
        return ids + (self.runtime.tokenize(self._end_text) if end and self._end_text else [])

    def tokenize(self, text: str, add_special: bool = False) -> list[int]:
        """Token ids of a text in which control tokens count as such; with the model's own BOS when `add_special`."""
        return self.runtime.tokenize(text, add_special=add_special)

    def ends(self) -> list[int]:
        """Ids of the tokens that end an answer."""
        return self.runtime.end_ids

    def _bos(self) -> int | None:
        ids = self.runtime.tokenize("", add_special=True)
        return ids[0] if ids else None

    def generate(
        self, prompts: Sequence[Sequence[int]], decoding: Decoding, done: Callable[[int, Answer], None] | None = None
    ) -> list[Answer]:
        """An answer a prompt, the longest prompts first; each is handed to `done` when it ends, so that a killed run keeps it."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        rows = [list(prompts[i]) for i in order]
        shared = min((common(rows[0], r) for r in rows), default=0)
        longest = max((len(r) - shared for r in rows), default=0) + decoding.max_new_tokens + 8
        self._need(shared + min(PARALLEL, len(rows)) * longest)
        answers: list[Answer | None] = [None] * len(prompts)

        def finish(place: int, made: Any) -> None:
            i, stopped = order[place], made.finish == "stop"
            answers[i] = Answer(made.text.strip(), len(made.token_ids) + stopped, stopped)
            if done:
                done(i, answers[i])

        self.runtime.generate(
            rows, max_tokens=decoding.max_new_tokens, temperature=decoding.temperature, seed=decoding.seed, done=finish
        )
        return answers

    def logprobs(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        """For each (prompt ids, completion ids) the natural log-probability of every completion token, from the runtime's logits."""
        return [values for values, _ in self.score(pairs)]

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[list[float], bool]]:
        """The same, each with whether every completion token was the most likely one."""
        import numpy as np

        found = []
        for prompt, completion in pairs:
            ids = list(prompt) + list(completion)
            self._need(len(ids))
            first, at, values, greedy = max(len(prompt) - 1, 0), 0, [], True
            for logits in self.runtime.iter_logits(ids[:-1]):
                rows = logits[max(first - at, 0) :].astype(np.float64)
                target = np.array(ids[max(first, at) + 1 : at + len(logits) + 1], dtype=np.int64)
                if len(target):
                    top = rows.max(-1)
                    values += (
                        rows[np.arange(len(target)), target] - top - np.log(np.exp(rows - top[:, None]).sum(-1))
                    ).tolist()
                    greedy &= bool((rows.argmax(-1) == target).all())
                at += len(logits)
            found.append((values, greedy))
        return found

    def continue_text(self, text: str, max_tokens: int, stop: Sequence[str], temperature: float = 0.0) -> str:
        """Plain continuation of a text, up to one of `stop`."""
        ids = self.runtime.tokenize(text, add_special=True)
        self._need(len(ids) + max_tokens + 8)
        return self.runtime.generate([ids], max_tokens=max_tokens, stop=stop, temperature=temperature)[0].text
