"""Answers against references: exact match, token F1, ROUGE-L (rouge-score) and chrF (sacrebleu), each from 0 to 1."""

from __future__ import annotations

import functools
import re
import string
from collections import Counter
from typing import Any

METRICS = {"exact": "exact match", "f1": "token F1", "rouge_l": "ROUGE-L", "chrf": "chrF"}
# Scripts written without spaces between words: Thai, Lao, Tibetan, Myanmar, Khmer, kana, Han, Yi.
UNSPACED_RANGES = (
    (0x0E00, 0x0EFF), (0x0F00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3005, 0x3007), (0x3040, 0x30FF),
    (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xA000, 0xA4CF), (0xF900, 0xFAFF), (0xFF66, 0xFF9D),
    (0x20000, 0x3FFFF),
)  # fmt: skip
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_UNSPACED = "".join(f"{chr(a)}-{chr(b)}" for a, b in UNSPACED_RANGES)
_WORDS = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def normal(text: str) -> str:
    """Lower case, without punctuation, English articles and extra blanks, as SQuAD compares (Rajpurkar et al. 2016)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", text).split())


def f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over shared words; single characters where a script puts no spaces."""
    a, b = (Counter(_WORDS.findall(normal(text))) for text in (answer, reference))
    if not a or not b:
        return float(a == b)
    return 2 * (a & b).total() / (a.total() + b.total())


@functools.cache
def _scorers() -> tuple[Any, Any]:
    from rouge_score import rouge_scorer
    from sacrebleu.metrics import CHRF

    class Words:
        def tokenize(self, text: str) -> list[str]:
            return _WORDS.findall(text.lower())

    return rouge_scorer.RougeScorer(["rougeL"], tokenizer=Words()), CHRF()


def scores(answer: str, reference: str) -> dict[str, float | None]:
    """All four metrics of one answer; None for all where the reference has no text, since nothing is defined then."""
    if not reference.strip():
        return dict.fromkeys(METRICS)
    rouge, chrf = _scorers()
    return {
        "exact": float(normal(answer) == normal(reference)),
        "f1": f1(answer, reference),
        "rouge_l": float(rouge.score(reference, answer)["rougeL"].fmeasure),
        "chrf": float(chrf.sentence_score(answer, [reference]).score) / 100,
    }


def entry(text: str, reference: str, metric: str) -> dict[str, Any]:
    """What answers.jsonl says of an answer (score, error, detail), and all its metrics under "metrics"."""
    values = scores(text, reference)
    value = values[metric]
    found = {"score": value, "error": "", "detail": "", "metrics": values}
    if value is not None and value < 0.999:
        empty = not text.strip()
        found["error"] = "empty" if empty else "wrong"
        found["detail"] = "the answer is empty" if empty else f"{metric} {value:.2f}"
    return found
