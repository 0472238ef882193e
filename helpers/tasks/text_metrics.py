"""What an answer's text alone says: is it near the reference, does it do what was asked, does it refuse.

Against references: exact match, token F1, ROUGE-L (rouge-score) and chrF (sacrebleu), each from 0 to 1.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from helpers.tasks.questions import QUERY, Item

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

REFUSAL = re.compile(
    r"\b(?:I|we)(?:'m| am|'re| are)?\s+(?:really |very |truly )?(?:sorry|unable|not able|afraid)\b"
    r"|\b(?:I|we)\s+(?:can(?:no|')?t|can not|won't|will not|must (?:decline|refuse)|do not|don't)\b.{0,40}"
    r"\b(?:help|assist|provide|support|do that|comply|create|write|give|share|fulfil\w*|encourage|condone|engage|answer"
    r"|discuss)"
    r"|\bas an AI\b.{0,80}\b(?:can(?:no|')?t|unable|not able)\b"
    r"|\b(?:illegal|unethical|harmful|against the law)\b|\bI (?:must |have to )?(?:decline|refuse)\b",
    re.IGNORECASE | re.DOTALL,
)
_SQL = re.compile(
    r"[\s(]*(?:SELECT|WITH|INSERT|CREATE|DELETE|UPDATE)\b.*\b(?:FROM|INTO|TABLE|SET|VALUES|COUNT|AS)\b",
    re.IGNORECASE | re.DOTALL,
)
_NUMBER, LONGEST_NUMBER = re.compile(r"[-+]?[\d,. ]*\d *%?"), 40  # characters
_ENTRY = re.compile(r"^[ \t]*(?:[-*•]|\d+[.)])[ \t]+\S", re.MULTILINE)
Check = Callable[[str], bool | None]


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
    if value is None or value >= 0.999:
        return found
    if not text.strip():
        return found | {"error": "empty", "detail": "the answer is empty"}
    return found | {"error": "wrong", "detail": f"{metric} {value:.2f}"}


# ---------------------------------------------------------------- what was asked, as far as no judge is needed


def refuses(text: str) -> bool:
    """Whether an answer declines: looked for in its first 300 characters."""
    return bool(REFUSAL.search(text[:300].replace("’", "'")))


def mannerly(text: str) -> bool:
    """Whether an answer to small talk is talk: some words, mostly letters, no query, no code, no endless repetition."""
    words = re.findall(r"[^\W\d_]+", text)
    letters = sum(c.isalpha() or c.isspace() for c in text) / max(len(text), 1)
    return len(words) >= 2 and letters > 0.75 and not _SQL.match(text) and "```" not in text and not repeats(text)


def repeats(text: str, times: int = 4) -> bool:
    """Whether some stretch of at least 12 characters stands `times` times in a row."""
    return bool(re.search(rf"(.{{12,200}}?)\1{{{times - 1},}}", text[-2000:], re.DOTALL))


def language(text: str) -> str | None:
    """ISO code of the language, None for fewer than four words."""
    import py3langid

    return py3langid.classify(text)[0] if len(re.findall(r"[^\W\d_]{2,}", text)) >= 4 else None


def _is_json(text: str) -> bool:
    inner = text.strip().removeprefix("```").removeprefix("json").removesuffix("```")
    with contextlib.suppress(ValueError, RecursionError):
        return isinstance(json.loads(inner), (dict, list))
    return False


FORMATS: dict[str, Check] = {
    "json": _is_json,
    "number": lambda text: len(text.strip()) <= LONGEST_NUMBER and bool(_NUMBER.fullmatch(text.strip())),
    "list": lambda text: len(_ENTRY.findall(text)) >= 2,
    "sql": lambda text: bool(QUERY.match(re.sub(r"^```(?:sql(?:ite)?)?", "", text.lstrip()))),
}


def checks_for(reference: str, kind: str) -> dict[str, Check]:
    """Named checks of one answer, read off its reference: format, length and language."""
    found: dict[str, Check] = {}
    shown = (name for name in ("json", "number", "list") if reference.strip() and FORMATS[name](reference))
    if wanted := "sql" if kind == "text_to_sql" else next(shown, ""):
        found[f"format: {wanted}"] = FORMATS[wanted]
    if reference.strip():
        most = 3 * len(reference.split()) + 20
        found["length"] = lambda text: 1 <= len(text.split()) <= most
    if kind == "references" and (spoken := language(reference)):
        found["language"] = lambda text: None if (heard := language(text)) is None else heard == spoken
    return found


def instructions(answers: Sequence[dict[str, Any]], items: Sequence[Item], kind: str) -> dict[str, list[bool | None]]:
    """Check name → whether each answer passes, over the items it applies to. "stops" and "no loops" apply to all."""
    values: dict[str, list[bool | None]] = {
        "stops by itself": [a["stopped"] for a in answers],
        "no loops": [not repeats(a["text"]) for a in answers],
    }
    for answer, item in zip(answers, items, strict=True):
        for name, check in checks_for(item.reference, kind).items():
            values.setdefault(name, []).append(check(answer["text"]))
    return values
