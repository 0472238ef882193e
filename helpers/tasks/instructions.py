"""Does an answer do what was asked, as far as no judge is needed: format, length, language, stopping by itself."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from helpers.tasks.questions import Item

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
LONGEST_NUMBER = 40  # characters
Check = Callable[[str], bool | None]


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


def _is_list(text: str) -> bool:
    return len(re.findall(r"^[ \t]*(?:[-*•]|\d+[.)])[ \t]+\S", text, re.MULTILINE)) >= 2


def _is_sql(text: str) -> bool:
    return bool(re.match(r"(?:```(?:sql(?:ite)?)?)?[\s(]*(?:SELECT|WITH|VALUES)\b", text.lstrip(), re.IGNORECASE))


def _is_number(text: str) -> bool:
    return len(text.strip()) <= LONGEST_NUMBER and bool(re.fullmatch(r"[-+]?[\d,. ]*\d *%?", text.strip()))


FORMATS: dict[str, Check] = {"json": _is_json, "number": _is_number, "list": _is_list, "sql": _is_sql}


def checks_for(meta: dict[str, Any], reference: str, kind: str) -> dict[str, Check]:
    """Named checks of one item: what its columns ask for, else what its reference shows.

    Columns: format ("json", "list", "sql", "number"), max_words, min_words, language, must_include, regex.
    """
    found: dict[str, Check] = {}
    shown = (name for name in ("json", "number", "list") if reference.strip() and FORMATS[name](reference))
    wanted = meta.get("format") or ("sql" if kind == "text_to_sql" else next(shown, ""))
    if wanted in FORMATS:
        found[f"format: {wanted}"] = FORMATS[wanted]
    fewest, most = (v if type(v) in (int, float) else None for v in (meta.get("min_words"), meta.get("max_words")))
    if fewest is None and most is None and reference.strip():
        fewest, most = 1, 3 * len(reference.split()) + 20
    if fewest is not None or most is not None:
        limits = (fewest or 0, float("inf") if most is None else most)
        found["length"] = lambda text: limits[0] <= len(text.split()) <= limits[1]
    spoken = meta.get("language") if isinstance(meta.get("language"), str) else None
    if spoken is None and kind == "references":
        spoken = language(reference)
    if spoken:
        found["language"] = lambda text: None if (heard := language(text)) is None else heard == spoken
    if include := meta.get("must_include"):
        parts = [include] if isinstance(include, str) else [str(p) for p in include]
        found["must include"] = lambda text: all(p.lower() in text.lower() for p in parts)
    if isinstance(meta.get("regex"), str) and len(meta["regex"]) <= 200:
        with contextlib.suppress(re.error):
            pattern = re.compile(meta["regex"])
            found["pattern"] = lambda text: bool(pattern.search(text[:5000]))
    return found


def score(answers: Sequence[dict[str, Any]], items: Sequence[Item], kind: str) -> dict[str, list[bool | None]]:
    """Check name → whether each answer passes, over the items it applies to. "stops" and "no loops" apply to all."""
    values: dict[str, list[bool | None]] = {
        "stops by itself": [a["stopped"] for a in answers],
        "no loops": [not repeats(a["text"]) for a in answers],
    }
    for answer, item in zip(answers, items, strict=True):
        for name, check in checks_for(item.meta, item.reference, kind).items():
            values.setdefault(name, []).append(check(answer["text"]))
    return values
