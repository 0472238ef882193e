"""Does an answer do what was asked, as far as no judge is needed to see it: format, length, language, and stopping by itself."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from helpers.evaluate import statistics

REFUSAL = re.compile(
    r"\b(?:I|we)(?:'m| am|'re| are)?\s+(?:really |very |truly )?(?:sorry|unable|not able|afraid)\b"
    r"|\b(?:I|we)\s+(?:can(?:no|')?t|can not|won't|will not|must (?:decline|refuse)|do not|don't)\b.{0,40}"
    r"\b(?:help|assist|provide|support|do that|comply|create|write|give|share|fulfil\w*|encourage|condone|engage|answer|discuss)"
    r"|\bas an AI\b.{0,80}\b(?:can(?:no|')?t|unable|not able)\b"
    r"|\b(?:illegal|unethical|harmful|against the law)\b|\bI (?:must |have to )?(?:decline|refuse)\b",
    re.IGNORECASE | re.DOTALL,
)
_SQL = re.compile(
    r"[\s(]*(?:SELECT|WITH|INSERT|CREATE|DELETE|UPDATE)\b.*\b(?:FROM|INTO|TABLE|SET|VALUES|COUNT|AS)\b",
    re.IGNORECASE | re.DOTALL,
)


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
    if len(re.findall(r"[^\W\d_]{2,}", text)) < 4:
        return None
    import py3langid

    return py3langid.classify(text)[0]


def checks_for(meta: dict[str, Any], reference: str, kind: str) -> dict[str, Callable[[str], bool | None]]:
    """Named checks of one item: what its columns ask for (see below), else what its reference shows.

    Columns: format ("json", "list", "sql", "number"), max_words, min_words, language, must_include (a text or a list), regex.
    """
    found: dict[str, Callable[[str], bool | None]] = {}
    wanted = meta.get("format") or ("sql" if kind == "text_to_sql" else _format(reference))
    if wanted in FORMATS:
        found[f"format: {wanted}"] = FORMATS[wanted]
    limits = [_number(meta.get(name)) for name in ("min_words", "max_words")]
    if any(v is not None for v in limits):
        found["length"] = lambda text: (
            (limits[0] or 0) <= len(text.split()) <= (limits[1] if limits[1] is not None else 10**9)
        )
    elif reference.strip():
        most = 3 * len(reference.split()) + 20
        found["length"] = lambda text: 0 < len(text.split()) <= most
    spoken = (
        meta.get("language")
        if isinstance(meta.get("language"), str)
        else (language(reference) if kind == "references" else None)
    )
    if spoken:
        found["language"] = lambda text: None if (heard := language(text)) is None else heard == spoken
    include = meta.get("must_include")
    if include:
        parts = [include] if isinstance(include, str) else [str(p) for p in include]
        found["must include"] = lambda text: all(p.lower() in text.lower() for p in parts)
    if isinstance(meta.get("regex"), str) and len(meta["regex"]) <= 200:
        found["pattern"] = lambda text: _matches(meta["regex"], text)
    return found


def score(
    answers: Sequence[dict[str, Any]], metas: Sequence[dict[str, Any]], references: Sequence[str], kind: str
) -> dict[str, dict[str, Any]]:
    """Check name → share of the answers that pass, over the items it applies to. "stops" and "no loops" apply to all."""
    values: dict[str, list[bool | None]] = {
        "stops by itself": [a["stopped"] for a in answers],
        "no loops": [not repeats(a["text"]) for a in answers],
    }
    for answer, meta, reference in zip(answers, metas, references, strict=True):
        for name, check in checks_for(meta, reference, kind).items():
            values.setdefault(name, []).append(check(answer["text"]))
    return {name: statistics.share(v) for name, v in values.items()}


def _is_json(text: str) -> bool:
    try:
        inner = text.strip().removeprefix("```").removeprefix("json").removesuffix("```")
        return isinstance(json.loads(inner), (dict, list))
    except (ValueError, RecursionError):
        return False


LONGEST_NUMBER = 40  # characters
FORMATS: dict[str, Callable[[str], bool]] = {
    "json": _is_json,
    "list": lambda text: len(re.findall(r"^[ \t]*(?:[-*•]|\d+[.)])[ \t]+\S", text, re.MULTILINE)) >= 2,
    "sql": lambda text: bool(
        re.match(r"(?:```(?:sql(?:ite)?)?)?[\s(]*(?:SELECT|WITH|VALUES)\b", text.lstrip(), re.IGNORECASE)
    ),
    "number": lambda text: (
        len(text.strip()) <= LONGEST_NUMBER and bool(re.fullmatch(r"[-+]?[\d,. ]*\d *%?", text.strip()))
    ),
}


def _format(reference: str) -> str:
    return next((name for name in ("json", "number", "list") if reference.strip() and FORMATS[name](reference)), "")


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _matches(pattern: str, text: str) -> bool | None:
    try:
        return bool(re.search(pattern, text[:5000]))
    except re.error:
        return None
