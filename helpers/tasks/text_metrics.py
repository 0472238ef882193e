"""What an answer's text alone says: is it near the reference, does it do what was asked, does it refuse.

Against references: exact match, token F1, ROUGE-L (rouge-score) and chrF (sacrebleu), each from 0 to 1.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from typing import Any

from helpers.tasks import extraction
from helpers.tasks.questions import Item

#: What a reference may be compared by besides `METRICS`, which every answer is measured by.
NAMED = {"number": "final number", "choice": "multiple choice", "regex": "pattern match"}
METRICS = {"exact": "exact match", "f1": "token F1", "rouge_l": "ROUGE-L", "chrf": "chrF"}
# Scripts written without spaces between words: Thai, Lao, Tibetan, Myanmar, Khmer, kana, Han, Yi.
UNSPACED_RANGES = (
    (0x0E00, 0x0EFF), (0x0F00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3005, 0x3007), (0x3040, 0x30FF),
    (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xA000, 0xA4CF), (0xF900, 0xFAFF), (0xFF66, 0xFF9D),
    (0x20000, 0x3FFFF),
)  # fmt: skip
_ARTICLES = re.compile(r"\b(?:a|an|the)\b(?=\s)")
_UNSPACED = "".join(f"{chr(a)}-{chr(b)}" for a, b in UNSPACED_RANGES)
_WORDS = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
# Marks of a sentence and of Markdown; those within a number, a word or an expression belong to it.
_MARKS = re.compile(
    r"[\"“”„«»()\[\]{}…]|\*\*|`|[.,:;!?]+(?=\s|\Z)|(?<![^\s])['‘’]|['‘’](?=\s|\Z)|(?<=[^\W\d])[-/–—](?=[^\W\d])"
)
_VALUE = re.compile(r"([^\w\s+.-]*)([+-]?(?:\d{1,3}(?:,\d{3})+|[1-9]\d{0,30}|0)?(?:\.\d{1,30})?)([^\d\s]*)")

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
_NUMBER, LONGEST_NUMBER = re.compile(r"[-+−]?[$€£¥]?[\d,. ]*\d *[%$€£¥]?"), 40  # characters
_ENTRY = re.compile(r"^[ \t]*(?:[-*•]|\d+[.)])[ \t]+\S", re.MULTILINE)
Check = Callable[[str], bool | None]


def normal(text: str, articles: bool = False) -> str:
    """Lower case, without a sentence's punctuation, English articles and extra blanks, as SQuAD compares (Rajpurkar et
    al. 2016); signs and symbols stay, numbers are written alike (1,000.0 is 1000), and some text is left of any."""
    text = text.casefold().replace("−", "-").strip()
    words = [_number(word) for word in _MARKS.sub(" ", text).split()]
    kept = _ARTICLES.sub(" ", " ".join(words)).split() if not articles else words
    found = " ".join(kept or words)
    return found if any(map(str.isalnum, found)) else text


def _number(word: str) -> str:
    found = _VALUE.fullmatch(word)
    if not found or not any(map(str.isdigit, found[2])):
        return word
    return f"{found[1]}{Decimal(found[2].replace(',', '')).normalize() + 0:f}{found[3]}"


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
            return _WORDS.findall(normal(text, articles=True))

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


def compared(text: str, reference: str, metric: str) -> float | None:
    """1 or 0 by a metric of `NAMED`; None for a reference that has no such thing."""
    if wanted := calls(reference):
        return float(calls(text) == wanted)
    if metric == "number":
        mine, theirs = number(text), number(reference)
        return None if theirs is None else float(mine is not None and abs(mine - theirs) <= abs(theirs) / 10**9)
    if metric == "choice":
        letter = choice(reference)
        rest = re.sub(r"\A\W*[A-Ja-j]\W+", "", reference)
        return float(choice(text) == letter or normal(text) == normal(rest)) if letter else None
    import regex

    try:
        return float(bool(regex.search(reference, text, timeout=1.0)))
    except (regex.error, TimeoutError, RecursionError):
        return None


def entry(text: str, reference: str, metric: str) -> dict[str, Any]:
    """What answers.jsonl says of an answer (score, error, detail), and all of `METRICS` under "metrics".

    metric: a key of METRICS or NAMED. A reference that holds tool calls is compared by them, whatever the metric.
    """
    text, reference = extraction.without_thinking(text), extraction.without_thinking(reference)
    values = scores(text, reference)
    value = compared(text, reference, metric) if metric in NAMED or calls(reference) else values[metric]
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
    "sql": extraction.is_query,
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


# ---------------------------------------------------------------- tool calls


# What stands before the arguments alone: Mistral's, DeepSeek's and Llama's other spellings.
_NAMED = re.compile(
    r"(?:\A|\}|\[TOOL_CALLS\]|<function=|sep｜>)\s*([\w.-]+)(?:>|\[CALL_ID\]\w+)?(?:\[ARGS\])?(?:\s*```(?:json)?\s*)?\Z"
)


def calls(text: str) -> Counter[tuple[str, str]]:
    """The tool calls in a text: (name, arguments as JSON with sorted keys, whole numbers as integers). JSON as Hermes,
    Llama, Mistral, DeepSeek and OpenAI write it, Qwen3-Coder's tags, and lists of Python calls."""
    found = [
        call
        for value, start, _ in extraction.embedded_json(text)
        for call in _calls(value, text[max(0, start - 120) : start])
    ]
    for name, body in re.findall(r"<function=([\w.-]+)>\s*(<parameter=[^\0]{0,20000}?)</function>", text):
        given = re.findall(r"<parameter=([\w.-]+)>\n?(.*?)\n?</parameter>", body, re.DOTALL)
        found.append((name, {key: _value(value) for key, value in given}))
    listed = re.sub(r"<\|?\w+\|?>", "", text).strip()
    if not found and re.match(r"\[\s*[\w.]+\(", listed):
        with suppress(SyntaxError, ValueError, RecursionError, MemoryError, AttributeError):
            for node in ast.parse(listed, mode="eval").body.elts:  # type: ignore[attr-defined]
                found.append((ast.unparse(node.func), {k.arg: ast.literal_eval(k.value) for k in node.keywords}))
    return Counter((name, json.dumps(_whole(given), sort_keys=True, default=str)) for name, given in found)


def _calls(value: Any, before: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list):
        for inner in value:
            yield from _calls(inner, "")
    elif (
        isinstance(value, dict)
        and (inner := value.get("tool_calls") or value.get("function"))
        and not isinstance(inner, str)
    ):
        yield from _calls(inner, "")
    elif isinstance(value, dict):
        name = value.get("name") or value.get("function")
        given = next((value[key] for key in ("arguments", "parameters", "args", "input") if key in value), None)
        given = _value(given) if isinstance(given, str) else given
        if isinstance(name, str) and isinstance(given, dict):
            yield name, given
        elif named := _NAMED.search(before):
            yield named[1], value


def _value(text: str) -> Any:
    """A text's JSON, else the text."""
    with suppress(ValueError, RecursionError):
        return json.loads(text, strict=False)
    return text


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _whole(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_whole(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


# ---------------------------------------------------------------- the last number, the letter chosen


_AMOUNT = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,40})(?:\.\d{1,40})?(?:[eE][-+]?\d{1,2})?|\.\d{1,40}"
_ENDS_IN = re.compile(rf"(?<![\w.)])([-+−]?)\s?[$€£¥]?({_AMOUNT})(?:\s*/\s*(\d{{1,40}}))?")
_SAID = re.compile(
    r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}|####\s*([^\n]+)|\banswer\s*(?:is|was|:|=)\s*:?([^\n]+?)(?:[.!]\s|$)",
    re.I | re.M,
)
_LETTERS = (
    r"\A\W*([A-Ja-j])\W*\Z",
    r"\\boxed\{\W*(?:\\?text\{)?\W*([A-J])\b",
    r"\b(?:[Aa]nswer|[Cc]hoice|[Oo]ption|ANSWER)\b(?:\s+(?:is|would\s+be|must\s+be|should\s+be))?(?:\s+(?:option|choice))?\W{0,6}([A-J])\b(?!['’])",
    r"\A\W*([A-J])(?:[).:,]|\s+[-–—]\s|\*\*)",
    r"\(([A-J])\)|\b([B-HJ])\b(?!['’])",
)


def number(text: str) -> Fraction | None:
    """The number that a text ends in, or that it calls its answer (boxed, behind ####, "the answer is")."""
    text = re.sub(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", text.replace("{,}", ",").replace("\\,", ""))
    said = ["".join(parts) for parts in _SAID.findall(text)]
    for place in (*reversed(said), text):
        values = list(_ENDS_IN.finditer(place.rpartition("=")[2])) or list(_ENDS_IN.finditer(place))
        for found in values[:1] if place is not text and "=" not in place else values[-1:]:
            sign, amount, below = found.groups()
            value = Fraction(amount.replace(",", "")) / (int(below or 1) or 1)
            return -value if sign in ("-", "−") else value
    return None


def choice(text: str) -> str:
    """The letter, A to J, that a text chooses; "" for none or for two at once."""
    for pattern in _LETTERS:
        if found := list(re.finditer(pattern, text)):
            both = re.match(r"\W{0,4}\s*(?:or|and|/|&)\W+[A-J]\b", text[found[-1].end() :])
            both = both or re.search(r"\b[A-J]\W+(?:or|and|/|&)\W+\Z", text[: found[-1].end() - 1].rstrip("("))
            return "" if both else (found[-1][1] or found[-1][2]).upper()
    return ""
