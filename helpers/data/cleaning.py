"""Cleaning steps on rows, each optional: Unicode repair, language, length, repetition and gibberish.

Each takes and gives batches of rows and writes what it changed or removed into its StepReport, with an example for
every reason. No rule assumes that words are separated by spaces.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from helpers.data.shingles import shingles
from helpers.data.tables import StepReport, Table
from helpers.data.turns import Row, answer_of, map_contents, text_of
from helpers.errors import TunebookError

MIN_LETTERS_FOR_LANGUAGE = 20  # below, py3langid guesses; Chinese says in 20 characters what English says in 60
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r")


def run(rows: Iterable[list[Row]], p: Any, job: Any, evaluation: Table | None, label: str = "") -> Table:
    """Rows through every step that is switched on, in a fixed order: repair, judge, deduplicate, decontaminate.

    p: parameters of the data stage. job: gives `_step(name) -> StepReport` and the tokenizer. label: put before the steps' names.
    """
    from helpers.data import decontamination, dedup

    def step(name: str) -> Any:
        return job._step(label + name)

    if p.repair_unicode:
        rows = repair_unicode(rows, step("Unicode repair"))
    if p.languages:
        rows = keep_languages(rows, step("language"), p.languages)
    if p.min_chars or p.max_chars or p.min_tokens:
        rows = keep_lengths(
            rows, step("length"), p.min_chars, p.max_chars, p.min_tokens, 0, job.tokenizer if p.min_tokens else None
        )
    if p.drop_repetitive:
        rows = drop_repetitive(rows, step("repetition"))
    if p.drop_gibberish:
        rows = drop_gibberish(rows, step("gibberish"))
    if p.personal_data != "off":
        from helpers.data.privacy import mask_personal_data

        rows = mask_personal_data(rows, step("personal data"), action=p.personal_data)
    if p.toxicity != "none":
        from helpers.cache import Answers
        from helpers.data.toxicity import drop_toxic

        rows = drop_toxic(
            rows, step("toxicity"), p.toxicity, p.toxicity_threshold, Answers(job.path / "work", "toxicity")
        )
    if p.exact_duplicates:
        rows = dedup.exact_duplicates(rows, step("exact duplicates"))
    if p.near_duplicates:
        rows = dedup.near_duplicates(rows, step("near-duplicates"), p.near_duplicates)
    if evaluation is not None and p.decontaminate:
        report = step("decontamination")
        rows = decontamination.decontaminate(rows, report, evaluation, p.decontaminate)
        if not label:
            carriers = next(iter(job.training.table), [])
            report.figures["injection_recall"] = decontamination.injection_recall(
                evaluation, carriers, p.decontaminate, 200, p.seed
            )
    return rows if isinstance(rows, Table) else Table.collect(rows)


def repair_unicode(rows: Iterable[list[Row]], report: StepReport) -> Iterator[list[Row]]:
    """Mend mojibake, control characters, lone surrogates and line ends with ftfy, and normalise to NFC.

    What may be meant is left alone: HTML entities, curly quotes, full-width forms, ligatures, white space.
    """
    repair = _repairer()
    for batch in rows:
        report.seen += len(batch)
        mended = []
        for row in batch:
            new = map_contents(row, repair)
            if new is not row:
                before, after = text_of(row), text_of(new)
                at = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), 0)
                report.alter(before[max(0, at - 40) :], after[max(0, at - 40) :], "repaired characters")
            mended.append(new)
        report.kept += len(batch)
        yield mended


def keep_languages(
    rows: Iterable[list[Row]], report: StepReport, languages: str | Iterable[str]
) -> Iterator[list[Row]]:
    """Keep rows whose conversation (without system prompt) is in one of `languages`: ISO 639-1 codes, "en,zh".

    py3langid decides; texts of fewer than 20 letters are kept and counted as undecided. SQL and code count as text, so
    use it on data that is mostly prose. Raises TunebookError for a code that the model does not know.
    """
    wanted = {
        code.strip().lower()
        for code in (languages.split(",") if isinstance(languages, str) else languages)
        if code.strip()
    }
    identifier = _identifier()
    known = set(identifier.labels)
    if not wanted or wanted - known:
        raise TunebookError(
            f"languages is {languages!r}; it takes codes that py3langid knows, separated by commas: {', '.join(sorted(known))}."
        )
    found: Counter = Counter()
    for batch in rows:
        report.seen += len(batch)
        kept = []
        for row in batch:
            text = conversation(row)
            if sum(map(str.isalpha, text[:200])) < MIN_LETTERS_FOR_LANGUAGE:
                found["undecided"] += 1
                kept.append(row)
                continue
            language = identifier.classify(text[:2_000])[0]
            found[language] += 1
            if language in wanted:
                kept.append(row)
            else:
                report.drop(row, f"language {language}")
        report.kept += len(kept)
        report.figures["languages"] = dict(found.most_common())
        if kept:
            yield kept


def keep_lengths(
    rows: Iterable[list[Row]],
    report: StepReport,
    min_chars: int = 1,
    max_chars: int = 0,
    min_tokens: int = 0,
    max_tokens: int = 0,
    tokenizer: Any = None,
) -> Iterator[list[Row]]:
    """Keep rows whose answer has at least `min_chars` characters (white space aside) and whose whole text has at most
    `max_chars`; min_tokens and max_tokens say the same in tokens of `tokenizer`. 0 sets no limit.
    """
    if (min_tokens or max_tokens) and tokenizer is None:
        raise TunebookError("A length in tokens was asked for without a tokenizer; pass the one that the model uses.")
    for batch in rows:
        report.seen += len(batch)
        answers = [answer_of(row) for row in batch]
        texts = [text_of(row) for row in batch] if max_chars or max_tokens else answers
        answer_tokens = _token_counts(tokenizer, answers) if min_tokens else [0] * len(batch)
        text_tokens = _token_counts(tokenizer, texts) if max_tokens else [0] * len(batch)
        kept = []
        for row, answer, text, few, many in zip(batch, answers, texts, answer_tokens, text_tokens, strict=True):
            chars = len("".join(answer.split()))
            if chars < min_chars:
                report.drop(row, "answer too short", f"{chars} characters, fewer than {min_chars}")
            elif max_chars and len(text) > max_chars:
                report.drop(row, "too long", f"{len(text):,} characters, more than {max_chars:,}")
            elif min_tokens and few < min_tokens:
                report.drop(row, "answer too short", f"{few} tokens, fewer than {min_tokens}")
            elif max_tokens and many > max_tokens:
                report.drop(row, "too long", f"{many:,} tokens, more than {max_tokens:,}")
            else:
                kept.append(row)
        report.kept += len(kept)
        if kept:
            yield kept


def drop_repetitive(
    rows: Iterable[list[Row]], report: StepReport, max_repeated: float = 0.5, max_lines: float = 0.5
) -> Iterator[list[Row]]:
    """Drop rows whose answer repeats itself.

    max_repeated: share of 5-word (8-character) shingles that are repeats, in answers of 40 shingles and more.
    max_lines: share of repeated lines among eight or more lines of 8 characters and more. A single character 60 times in a row
    counts too, unless it draws a rule. The rules follow Gopher's (Rae et al. 2021, https://arxiv.org/abs/2112.11446,
    table A1), loosened: instruction data holds tables, code and verse.
    """
    for batch in rows:
        report.seen += len(batch)
        answers = [answer_of(row) for row in batch]
        shares = repeated_shares(answers)
        kept = []
        for row, answer, share in zip(batch, answers, shares.tolist(), strict=True):
            lines = [line for raw in answer.splitlines() if len(line := raw.strip()) >= 8]
            if share > max_repeated:
                report.drop(row, "repetitive", f"{share:.0%} of its 5-word shingles are repeats")
            elif len(lines) >= 8 and (again := 1 - len(set(lines)) / len(lines)) > max_lines:
                report.drop(row, "repetitive", f"{again:.0%} of its lines are repeats")
            elif run := RUN.search(answer):
                report.drop(row, "repetitive", f"{run.group(1)!r} {len(run.group())} times in a row")
            else:
                kept.append(row)
        report.kept += len(kept)
        if kept:
            yield kept


RUN = re.compile(r"([^\s\-=_.*#~+|/\\])\1{59,}")


def repeated_shares(texts: list[str], least: int = 40) -> np.ndarray:
    """Share of the shingles of every text that occurred before in it, float64 (texts,); 0 for fewer than `least`."""
    flat, offsets = shingles(texts, words=5, chars=8, symbols=False)  # a ruled table is no repetition
    sizes = np.diff(offsets)
    place = np.repeat(np.arange(len(texts), dtype=np.uint64), sizes)
    keys = np.sort(place << np.uint64(40) | flat >> np.uint64(24))
    again = keys[1:][keys[1:] == keys[:-1]] >> np.uint64(40)
    repeats = np.bincount(again.astype(np.int64), minlength=len(texts))
    return np.where(sizes >= least, repeats / np.maximum(sizes, 1), 0.0)


def drop_gibberish(rows: Iterable[list[Row]], report: StepReport) -> Iterator[list[Row]]:
    """Drop rows whose conversation holds text that nobody wrote for a reader; `gibberish` has the rules."""
    for batch in rows:
        report.seen += len(batch)
        kept = []
        for row in batch:
            if why := gibberish(conversation(row)):
                report.drop(row, "gibberish", why)
            else:
                kept.append(row)
        report.kept += len(kept)
        if kept:
            yield kept


def gibberish(text: str) -> str:
    """Why a text is no language, or "".

    Over 1 % replacement or private-use characters (from 20 characters on); under 30 % letters and digits (from 50); a
    run of more than 500 characters without space or punctuation in a script that has spaces; Latin words without
    vowels or with six consonants in a row making up over a third of ten words or more.
    """
    solid = len(text) - sum(map(text.count, " \n\t"))
    if solid >= 20 and (bad := len(UNREADABLE.findall(text))) > solid * 0.01:
        return f"{bad} unreadable characters in {solid}"
    if solid >= 50 and (share := len(NOT_LETTERS.sub("", text)) / solid) < 0.3:
        return f"only {share:.0%} letters and digits"
    if run := BLOB.search(text):
        return f"an unbroken run of {len(run.group())} characters"
    words = LATIN_WORD.findall(text.lower())
    if len(words) >= 10:
        odd = [word for word in words if NO_VOWEL.search(word)]
        if len(odd) > len(words) / 3:
            return f"{len(odd)} of {len(words)} words cannot be spoken, such as {odd[0][:30]!r}"
    return ""


UNREADABLE = re.compile("[\ufffd\ue000-\uf8ff\ufff0-\ufff8\x00-\x08\x0e-\x1f\x80-\x9f\U000f0000-\U0010ffff]")
NOT_LETTERS = re.compile(r"[\W_]+")
BLOB = re.compile(r"[A-Za-z0-9+/=_%]{501,}")
LATIN_WORD = re.compile(r"(?<!\w)[a-z]{4,}(?!\w)")
NO_VOWEL = re.compile(r"^[^aeiouy]+$|[bcdfghjklmnpqrstvwxz]{6,}")


def conversation(row: Row) -> str:
    """The text of a row without system prompt and tools."""
    messages = [m for m in row["messages"] if m["role"] != "system"] + row.get("chosen", []) + row.get("rejected", [])
    return "\n".join(m.get("content") or "" for m in messages)


def _token_counts(tokenizer: Any, texts: list[str]) -> list[int]:
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


@functools.cache
def _repairer() -> Any:
    import ftfy

    config = ftfy.TextFixerConfig(
        unescape_html=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        normalization="NFC",
        explain=False,
    )

    def repair(text: str) -> str:
        if text.isascii() and not CONTROL.search(text):
            return text
        return ftfy.fix_text(text, config)

    return repair


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
