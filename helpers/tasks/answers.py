"""What is asked of a model and what it answers, whatever runs it: transformers, llama.cpp or an endpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn. temperature 0 is greedy, without a seed; max_new_tokens counts the end of turn."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 17

    def key(self) -> dict[str, Any]:
        """What the answers depend on, for the cache: a greedy answer has no seed."""
        return asdict(self) if self.temperature > 0 else {"max_new_tokens": self.max_new_tokens, "temperature": 0.0}


@dataclass(frozen=True)
class Answer:
    """text: without special tokens and outer blanks; tokens: how many were generated; stopped: it ended its turn;
    failed: why there is no answer (endpoints), else ""."""

    text: str
    tokens: int
    stopped: bool
    failed: str = ""
