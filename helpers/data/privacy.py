"""Personal data that has a form (e-mail, phone, card, bank account, IP address), found and masked.

presidio's recognisers are used one by one, without its analyzer engine: no language model, no network. What has no
form is not found, and the report says so: see NOT_FOUND.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from helpers.data.tables import StepReport
from helpers.data.turns import Row, all_messages, map_contents
from helpers.errors import TunebookError

NOT_FOUND = (
    "names of people and companies, postal addresses, dates of birth, passport, licence and tax numbers, user names, "
    "passwords and keys, phone numbers outside the regions asked for or without separators and a word such as 'phone' "
    "before them, anything spelled out in words, and whatever stands in tool definitions or tool calls"
)
# A text without the trigger cannot hold the entity; the look costs a hundredth of a recogniser.
TRIGGERS = {
    "EMAIL_ADDRESS": re.compile(r"\w@\w"),
    "PHONE_NUMBER": re.compile(r"\d(?:[\s().\-/–]{0,3}\d){6}"),
    "CREDIT_CARD": re.compile(r"\d(?:[ \-]?\d){11}"),
    "IBAN_CODE": re.compile(r"[A-Za-z]{2}\d{2}"),
    "IP_ADDRESS": re.compile(r"\d\.\d{1,3}\.\d|[0-9A-Fa-f]:[0-9A-Fa-f:]*:[0-9A-Fa-f]"),
    "US_SSN": re.compile(r"\d{3}[- .]\d{2}[- .]\d{4}"),
    "CRYPTO": re.compile(r"\b(?:bc1|[13])[a-zA-HJ-NP-Z0-9]{25}"),
}
REGIONS = ("US", "GB", "DE", "FR", "CN", "IN", "BR", "IL")  # whose phone numbers are known without a country code
MIN_SCORE = 0.4
# Lines, and long ones piece by piece, cut at white space where there is some: some recognisers are quadratic.
PIECES = re.compile(r".{1,500}(?=\s|$)|.{1,500}", re.MULTILINE)
LONG_NUMBER = re.compile(r"\d{41,}")  # no entity has so many digits; the telephone matcher takes seconds for a thousand
RECOGNIZERS = {"PHONE_NUMBER": "Phone", "EMAIL_ADDRESS": "Email", "CREDIT_CARD": "CreditCard", "IBAN_CODE": "Iban"}
RECOGNIZERS |= {"IP_ADDRESS": "Ip", "US_SSN": "UsSsn", "CRYPTO": "Crypto"}
LOCAL_PART = re.compile(r"[!-~\u00c0-\u024f]+@")
PHONE_WORD = re.compile(
    r"phone|tel\b|tel[.:]|call|mobil|cell|fax|sms|whatsapp|handy|dial|text me|电话|手机|致电|联系", re.IGNORECASE
)


def mask_personal_data(rows: Iterable[list[Row]], report: StepReport, action: str = "mask") -> Iterator[list[Row]]:
    """Replace personal data in every message by its kind, such as <EMAIL_ADDRESS>.

    action: "mask", "drop" (the row goes) or "count" (nothing changes). Every count and the list of what is not looked
    for go to the report.
    """
    found: Counter[str] = Counter()
    report.figures |= {"looked_for": list(TRIGGERS), "not_looked_for": NOT_FOUND}
    for batch in rows:
        report.seen += len(batch)
        kept = []
        for row in batch:
            here: Counter[str] = Counter()
            new = map_contents(row, functools.partial(_masked, found=here))
            found.update(here)
            if here and action == "drop":
                report.drop(row, "personal data", ", ".join(f"{count} {kind}" for kind, count in here.items()))
                continue
            if here and action == "mask":
                changed = zip(all_messages(row), all_messages(new), strict=True)
                old, now = next((a["content"], b["content"]) for a, b in changed if a != b)
                report.alter(old, now, f"masked {next(iter(here))}")
            kept.append(new if action == "mask" else row)
        report.kept += len(kept)
        report.figures["found"] = dict(found.most_common())
        if kept:
            yield kept


def _masked(text: str, found: Counter[str]) -> str:
    for start, end, kind in reversed(find(text)):
        text = f"{text[:start]}<{kind}>{text[end:]}"
        found[kind] += 1
    return text


def find(text: str) -> list[tuple[int, int, str]]:
    """Spans of personal data in `text`, not overlapping, as (start, end, kind)."""
    spans = []
    for kind in (kind for kind, trigger in TRIGGERS.items() if trigger.search(text)):
        for piece in PIECES.finditer(text):
            seen = LONG_NUMBER.sub(lambda digits: "x" * len(digits[0]), piece[0])
            hits = _recognizer(kind).analyze(seen, [kind], None) if TRIGGERS[kind].search(seen) else []
            for hit in hits:
                start = _plausible(kind, seen, hit.start, hit.end)
                if hit.score >= MIN_SCORE and start >= 0:
                    spans.append((hit.score, hit.end - start, piece.start() + start, piece.start() + hit.end, kind))
    chosen, taken = list[tuple[int, int, str]](), bytearray(len(text))
    for _, _, start, end, kind in sorted(spans, reverse=True):
        if taken.find(1, start, end) < 0:
            taken[start:end] = bytes([1]) * (end - start)
            chosen.append((start, end, kind))
    return sorted(chosen)


def _plausible(kind: str, text: str, start: int, end: int) -> int:
    """Where the hit text[start:end] really begins; -1 when it is a false one."""
    hit = text[start:end]
    if kind == "EMAIL_ADDRESS":  # \w takes in a Chinese sentence before the address
        local = LOCAL_PART.search(hit)
        return start + local.start() if local else start
    if kind == "IP_ADDRESS" and ":" in hit and not any(map(str.isdigit, hit)):  # a::b in C++
        return -1
    if kind == "PHONE_NUMBER" and hit.isdigit() and not PHONE_WORD.search(text, max(0, start - 40), start):
        return -1  # ten bare digits are an id at least as often
    return start


@functools.cache
def _recognizer(kind: str) -> Any:
    try:
        from presidio_analyzer import predefined_recognizers as known
    except ImportError:
        told = (
            "personal_data needs the package presidio-analyzer; install it, in Colab by also_install in the first cell"
        )
        raise TunebookError(f"{told}, and run the cells again.") from None
    made = getattr(known, f"{RECOGNIZERS[kind]}Recognizer")
    if kind == "PHONE_NUMBER":
        return made(supported_regions=list(REGIONS))
    recognizer = made()
    if kind == "EMAIL_ADDRESS":
        import tldextract

        # presidio's own check lets tldextract fetch its list of suffixes; the list in the wheel does.
        suffixes = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)
        recognizer.validate_result = lambda found: suffixes(found.rsplit("@", 1)[-1]).suffix != ""
    return recognizer
