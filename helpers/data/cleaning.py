"""Cleaning steps on rows, each optional: Unicode repair, language, length, repetition, gibberish; and their order.

Each takes and gives batches of rows and writes what it changed or removed into its StepReport, with an example for
every reason. No rule assumes that words are separated by spaces.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from helpers.data import decontamination, dedup
from helpers.data.privacy import mask_personal_data
from helpers.data.shingles import shingles
from helpers.data.tables import StepReport, Table
from helpers.data.toxicity import drop_toxic
from helpers.data.turns import Row, answer_of, map_contents, spoken, text_of
from helpers.data.vocabulary import token_ids
from helpers.errors import TunebookError
from helpers.params import DataParams

Fault = tuple[str, str] | None
MIN_LETTERS_FOR_LANGUAGE = 20  # below, py3langid guesses; Chinese says in 20 characters what English says in 60
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r")
UNREADABLE = re.compile("[\ufffd\ue000-\uf8ff\ufff0-\ufff8\x00-\x08\x0e-\x1f\x80-\x9f\U000f0000-\U0010ffff]")
NOT_LETTERS = re.compile(r"[\W_]+")
BLOB = re.compile(r"[A-Za-z0-9+/=_%]{501,}")
LATIN_WORD = re.compile(r"(?<!\w)[a-z]{4,}(?!\w)")
NO_VOWEL = re.compile(r"^[^aeiouy]+$|[bcdfghjklmnpqrstvwxz]{6,}")
RUN = re.compile(r"([^\s\-=_.*#~+|/\\])\1{59,}")


def run(
    rows: Table,
    p: DataParams,
    report: Callable[[str], StepReport],
    evaluation: Table | None = None,
    tokenizer: Callable[[], Any] | None = None,
    measure: bool = False,
) -> Table:
    """Rows through every step that is switched on, in a fixed order: repair, judge, deduplicate, decontaminate.

    report: gives a step of this name its account. evaluation: rows that must not be trained on. measure: also measure
    which share of planted evaluation questions would be found.
    """
    found: Iterable[list[Row]] = rows
    if not len(rows):
        return rows
    if p.repair_unicode:
        found = repair_unicode(found, report("Unicode repair"))
    if p.languages:
        found = keep_languages(found, report("language"), p.languages)
    if p.min_chars or p.max_chars or p.min_tokens:
        counting = tokenizer() if p.min_tokens and tokenizer else None
        found = keep_lengths(found, report("length"), p.min_chars, p.max_chars, p.min_tokens, counting)
    if p.drop_repetitive:
        found = drop_repetitive(found, report("repetition"))
    if p.drop_gibberish:
        found = drop_gibberish(found, report("gibberish"))
    if p.personal_data != "off":
        found = mask_personal_data(found, report("personal data"), action=p.personal_data)
    if p.toxicity != "none":
        found = drop_toxic(found, report("toxicity"), p.toxicity, p.toxicity_threshold)
    if p.exact_duplicates:
        found = dedup.exact_duplicates(found, report("exact duplicates"))
    if p.near_duplicates:
        found = dedup.near_duplicates(found, report("near-duplicates"), p.near_duplicates)
    if evaluation is not None and p.decontaminate:
        account = report("decontamination")
        found = decontamination.decontaminate(found, account, evaluation, p.decontaminate)
        if measure:
            carriers = next(iter(rows), [])
            recall = decontamination.injection_recall(evaluation, carriers, p.decontaminate, 200, p.seed)
            account.figures |= {} if math.isnan(recall) else {"injection_recall": recall}  # nothing to plant
    return found if isinstance(found, Table) else Table.collect(found)


def repair_unicode(rows: Iterable[list[Row]], report: StepReport) -> Iterator[list[Row]]:
    """Mend mojibake, control characters, lone surrogates and line ends with ftfy, and normalise to NFC.

    What may be meant is left alone: HTML entities, curly quotes, full-width forms, ligatures, white space.
    """
    import ftfy

    kept_as_it_is = ("unescape_html", "fix_latin_ligatures", "fix_character_width", "uncurl_quotes", "explain")
    config = ftfy.TextFixerConfig(normalization="NFC", **dict.fromkeys(kept_as_it_is, False))

    def mended(text: str) -> str:
        return text if text.isascii() and not CONTROL.search(text) else ftfy.fix_text(text, config)

    for batch in rows:
        report.seen += len(batch)
        done = [map_contents(row, mended) for row in batch]
        for row, new in zip(batch, done, strict=True):
            if new is not row:
                report.alter(text_of(row), text_of(new), "repaired characters")
        report.kept += len(done)
        yield done


def keep_languages(rows: Iterable[list[Row]], report: StepReport, languages: str) -> Iterator[list[Row]]:
    """Keep rows whose conversation (without system prompt) is in one of `languages`: ISO 639-1 codes, "en,zh".

    py3langid decides; texts of fewer than 20 letters are kept and counted as undecided. SQL and code count as text, so
    use it on data that is mostly prose. Raises TunebookError for a code that the model does not know.
    """
    wanted = {code.strip().lower() for code in languages.split(",") if code.strip()}
    identifier = _identifier()
    known = set(identifier.labels)
    if not wanted or wanted - known:
        takes = f"codes that py3langid knows: {', '.join(sorted(known))}"
        raise TunebookError(f"languages is {languages!r}; it takes {takes}.")
    found: Counter[str] = Counter()

    def judge(batch: list[Row]) -> Iterator[Fault]:
        for row in batch:
            text = "\n".join(spoken(row))
            decided = sum(map(str.isalpha, text[:200])) >= MIN_LETTERS_FOR_LANGUAGE
            language = identifier.classify(text[:2_000])[0] if decided else "undecided"
            found[language] += 1
            yield None if not decided or language in wanted else (f"language {language}", "")
        report.figures["languages"] = dict(found.most_common())

    return report.sift(rows, judge)


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def keep_lengths(
    rows: Iterable[list[Row]],
    report: StepReport,
    min_chars: int = 1,
    max_chars: int = 0,
    min_tokens: int = 0,
    tokenizer: Any = None,
) -> Iterator[list[Row]]:
    """Keep rows whose answer has at least `min_chars` characters (white space aside) and `min_tokens` tokens of
    `tokenizer`, and whose whole text has at most `max_chars` characters. 0 sets no limit.
    """

    def judge(batch: list[Row]) -> Iterator[Fault]:
        answers = [answer_of(row) for row in batch]
        tokens = map(len, token_ids(tokenizer, answers)) if min_tokens else [0] * len(batch)
        for row, answer, count in zip(batch, answers, tokens, strict=True):
            chars = len("".join(answer.split()))
            size = len(text_of(row)) if max_chars else 0
            if chars < min_chars:
                yield "answer too short", f"{chars} characters, fewer than {min_chars}"
            elif size > max_chars:
                yield "too long", f"{size:,} characters, more than {max_chars:,}"
            elif count < min_tokens:
                yield "answer too short", f"{count} tokens, fewer than {min_tokens}"
            else:
                yield None

    return report.sift(rows, judge)


def drop_repetitive(rows: Iterable[list[Row]], report: StepReport, most: float = 0.5) -> Iterator[list[Row]]:
    """Drop rows whose answer repeats itself.

    More than `most` of its 5-word (8-character) shingles are repeats, in answers of 40 shingles and more; or of its
    lines, among eight or more lines of 8 characters and more; or a single character stands 60 times in a row, unless it
    draws a rule. The rules follow Gopher's (Rae et al. 2021, https://arxiv.org/abs/2112.11446, table A1), loosened:
    instruction data holds tables, code and verse.
    """

    def judge(batch: list[Row]) -> Iterator[Fault]:
        answers = [answer_of(row) for row in batch]
        for answer, share in zip(answers, repeated_shares(answers).tolist(), strict=True):
            lines = [line for raw in answer.splitlines() if len(line := raw.strip()) >= 8]
            again = 1 - len(set(lines)) / len(lines) if len(lines) >= 8 else 0.0
            if share > most:
                yield "repetitive", f"{share:.0%} of its 5-word shingles are repeats"
            elif again > most:
                yield "repetitive", f"{again:.0%} of its lines are repeats"
            elif found := RUN.search(answer):
                yield "repetitive", f"{found.group(1)!r} {len(found.group())} times in a row"
            else:
                yield None

    return report.sift(rows, judge)


def repeated_shares(texts: list[str], minimum: int = 40) -> np.ndarray:
    """Share of the shingles of every text that occurred before in it, float64 (texts,); 0 for fewer than `minimum`."""
    flat, offsets = shingles(texts, words=5, chars=8, symbols=False)  # a ruled table is no repetition
    sizes = np.diff(offsets)
    place: np.ndarray = np.repeat(np.arange(len(texts), dtype=np.uint64), sizes)
    keys = np.sort(place << np.uint64(40) | flat >> np.uint64(24))
    again = keys[1:][keys[1:] == keys[:-1]] >> np.uint64(40)
    repeats = np.bincount(again.astype(np.int64), minlength=len(texts))
    return np.where(sizes >= minimum, repeats / np.maximum(sizes, 1), 0.0)


def drop_gibberish(rows: Iterable[list[Row]], report: StepReport) -> Iterator[list[Row]]:
    """Drop rows whose conversation holds text that nobody wrote for a reader; `gibberish` has the rules."""

    def judge(batch: list[Row]) -> Iterator[Fault]:
        for row in batch:
            why = gibberish("\n".join(spoken(row)))
            yield ("gibberish", why) if why else None

    return report.sift(rows, judge)


def gibberish(text: str) -> str:
    """Why a text is not of any language, or "".

    Over 1 % replacement or private-use characters (from 20 characters on); under 30 % letters and digits (from 50); a
    run of more than 500 characters without space or punctuation in a script that has spaces; Latin words without
    vowels or with six consonants in a row making up over a third of ten words or more.
    """
    solid = len(text) - sum(map(text.count, " \n\t"))
    if solid >= 20 and (bad := len(UNREADABLE.findall(text))) > solid * 0.01:
        return f"{bad} unreadable characters in {solid}"
    if solid >= 50 and (share := len(NOT_LETTERS.sub("", text)) / solid) < 0.3:
        return f"only {share:.0%} letters and digits"
    if blob := BLOB.search(text):
        return f"an unbroken run of {len(blob.group())} characters"
    words = LATIN_WORD.findall(text.lower())
    odd = [word for word in words if NO_VOWEL.search(word)] if len(words) >= 10 else []
    if len(odd) > len(words) / 3:
        return f"{len(odd)} of {len(words)} words cannot be spoken, such as {odd[0][:30]!r}"
    return ""
