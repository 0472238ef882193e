"""Answers against references: exact match, token F1, ROUGE-L (rouge-score) and chrF (sacrebleu), each per item in 0 to 1."""

from __future__ import annotations

import functools
import re
import string
from collections import Counter
from typing import Any

from helpers.data.shingles import UNSPACED_RANGES

METRICS = ("exact", "f1", "rouge_l", "chrf")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_UNSPACED = "".join(f"{chr(a)}-{chr(b)}" for a, b in UNSPACED_RANGES)
_WORDS = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def normal(text: str) -> str:
    """Lower case, without punctuation, English articles and extra blanks, as SQuAD's own script compares (Rajpurkar et al. 2016)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", text).split())


def words(text: str) -> list[str]:
    """Words of the normal form; single characters where a script puts no spaces."""
    return _WORDS.findall(normal(text))


def f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over shared words."""
    a, b = Counter(words(answer)), Counter(words(reference))
    if not a or not b:
        return float(a == b)
    shared = sum((a & b).values())
    return 2 * shared / (a.total() + b.total())


@functools.cache
def _rouge() -> Any:
    from rouge_score import rouge_scorer

    class Words:
        def tokenize(self, text: str) -> list[str]:
            return _WORDS.findall(text.lower())

    return rouge_scorer.RougeScorer(["rougeL"], tokenizer=Words())


@functools.cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


def scores(answer: str, reference: str) -> dict[str, float | None]:
    """All four metrics of one answer; None for all where the reference has no text, since nothing is defined then."""
    if not reference.strip():
        return dict.fromkeys(METRICS)
    return {
        "exact": float(normal(answer) == normal(reference)),
        "f1": f1(answer, reference),
        "rouge_l": float(_rouge().score(reference, answer)["rougeL"].fmeasure),
        "chrf": float(_chrf().sentence_score(answer, [reference]).score) / 100,
    }


def entry(text: str, reference: str, metric: str, stopped: bool) -> dict[str, Any]:
    """An answer's entry in answers.jsonl (without tokens), and all its metrics under "metrics"."""
    values = scores(text, reference)
    value = values[metric]
    error = "" if value is None or value >= 0.999 else "empty" if not text.strip() else "wrong"
    detail = f"{metric} {value:.2f}" if error == "wrong" else "the answer is empty" if error else ""
    return {
        "text": text,
        "sql": None,
        "score": value,
        "valid": None,
        "error": error,
        "detail": detail,
        "structural": None,
        "stopped": stopped,
        "result": None,
        "metrics": values,
    }
