"""Cleaning steps on rows, each optional: Unicode repair, language, length, loops, gibberish, toxicity; their order.

Each takes and gives batches of rows and writes what it changed or removed into its StepReport, with an example for
every reason. No rule assumes that words are separated by spaces.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from helpers.data import decontamination, dedup
from helpers.data.privacy import mask_personal_data
from helpers.data.tables import StepReport, Table
from helpers.data.turns import Row, answer_of, map_contents, spoken, text_of
from helpers.data.vocabulary import token_ids
from helpers.display import percent
from helpers.errors import TunebookError
from helpers.llm_client import shown_url
from helpers.params import DataParams

Fault = tuple[str, str] | None
Scorer = Callable[[list[str]], list[float]]  # texts → a number from 0 to 1 for each
SCORERS: dict[str, Scorer] = {}  # functions that the parameter toxicity may name
HARMLESS = ("non-toxic", "nontoxic", "not toxic", "neutral", "safe", "non-hate", "nothate", "not_toxic", "label_0")
MAX_CHARS = 4_000  # a scorer sees the start of longer texts
MIN_LETTERS_FOR_LANGUAGE = 20  # below, py3langid guesses; Chinese says in 20 characters what English says in 60
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r")
CODE = re.compile(r"(```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]+`)", re.DOTALL)
# Terminal output, code that handles characters, and text about encodings: what looks broken there may be the subject.
MEANT = re.compile(
    r"\x1b[\[\]]|[─│├└┌┐┘┤═║█▉-▏]{2}|\b(?:mojibake|ftfy|charsets?|encodings?|unicode|utf-?(?:8|16|32)|latin-?1|codepage"
    r"|iso-?8859|cp-?\d{3,4}|windows-?125\d|unicodedata)\b|\.(?:encode|decode|replace)\(|^\s*(?:def|class|import|from|#include"
    r"|SELECT|INSERT|UPDATE|const|let|var|function|public)\s.*[(;:{=*]|\.normalize\("
    # Code without marks: calls with a quoted text, assignments, closing lines, JSON, shells, operators.
    r"|[\w)\]]\([^()\n]*[\"'][^\n]*\)|(?:[{}]|[\"')\]];)\s*$|\"[\w-]+\"\s*:\s|^\s*\$ \w"
    r"|^\s*(?:echo|print|puts) ?[\"'(]|^\s*[\w.\[\]$]+ ?(?:[-+*/|&:]?=|<-) ?[\"'\[{(\w]|\w::\w|=>|&& |\|\|",
    re.IGNORECASE | re.MULTILINE,
)
LOOP = 60  # letters and digits in a row that only a loop or boilerplate holds twice
NOT_LETTERS = re.compile(r"[\W_]+")
UNREADABLE = re.compile("[\ufffd\ue000-\uf8ff]")  # replacement and private-use characters
BLOB = re.compile(r"[A-Za-z0-9+/=_%]{501,}")
LATIN_WORD = re.compile(r"(?<!\w)[a-z]{4,}(?!\w)")
UNSPEAKABLE = re.compile(r"^[^aeiouy]+$|[bcdfghjklmnpqrstvwxz]{6,}")


def run(
    rows: Table,
    p: DataParams,
    report: Callable[[str], StepReport],
    evaluation: Table | None,
    tokenizer: Callable[[], Any],
) -> Table:
    """Rows through every step that is switched on, in a fixed order: repair, judge, deduplicate, decontaminate.

    report: gives a step of this name its account. evaluation: rows that must not be trained on. tokenizer: loads it.
    """
    found: Iterable[list[Row]] = rows
    if not len(rows):
        return rows
    if p.repair_unicode:
        found = repair_unicode(found, report("Unicode repair"))
    if p.languages:
        found = keep_languages(found, report("language"), p.languages)
    if p.min_chars or p.max_chars or p.min_tokens:
        found = drop(found, report("length"), lambda row: wrong_length(row, p, tokenizer))
    if p.drop_repetitive:
        found = drop(found, report("repetition"), lambda row: repetition(answer_of(row)))
    if p.drop_gibberish:
        found = drop(found, report("gibberish"), lambda row: gibberish("\n".join(spoken(row))))
    if p.personal_data != "off":
        found = mask_personal_data(found, report("personal data"), action=p.personal_data)
    if p.toxicity != "none":
        found = drop_toxic(found, report("toxicity"), p.toxicity, p.toxicity_threshold)
    if p.exact_duplicates:
        found = dedup.exact_duplicates(found, report("exact duplicates"))
    if p.near_duplicates:
        found = dedup.near_duplicates(found, report("near-duplicates"), p.near_duplicates)
    if evaluation is not None and p.decontaminate:
        found = decontamination.decontaminate(found, report("decontamination"), evaluation, p.decontaminate, rows)
    return found if isinstance(found, Table) else Table.collect(found)


def repair_unicode(rows: Iterable[list[Row]], report: StepReport) -> Iterator[list[Row]]:
    """Mend mojibake, control characters, lone surrogates and line ends with ftfy, and normalise to NFC.

    What may be meant is left alone: HTML entities, curly quotes, full-width forms, ligatures, white space; code in
    marks, and rows that show terminal output, code that handles characters, or are about encodings.
    """
    import ftfy

    kept_as_it_is = ("unescape_html", "fix_latin_ligatures", "fix_character_width", "uncurl_quotes", "explain")
    config = ftfy.TextFixerConfig(normalization="NFC", **dict.fromkeys(kept_as_it_is, False))

    def mended(text: str) -> str:
        if text.isascii() and not CONTROL.search(text):
            return text
        parts = CODE.split(text)
        return "".join(part if at % 2 else ftfy.fix_text(part, config) for at, part in enumerate(parts))

    for batch in rows:
        report.seen += len(batch)
        kept = []
        for row in batch:
            new = map_contents(row, mended)
            if new is not row and MEANT.search(before := text_of(row)):
                new = row
            elif new is not row:
                report.alter(before, text_of(new), "repaired characters")
            kept.append(new)
        report.kept += len(kept)
        yield kept


def keep_languages(rows: Iterable[list[Row]], report: StepReport, languages: str) -> Iterator[list[Row]]:
    """Keep rows whose conversation (without system prompt) is in one of `languages`: ISO 639-1 codes, "en,zh".

    py3langid decides; texts of fewer than 20 letters are kept and counted as undecided. SQL and code count as text, so
    use it on data that is mostly prose. Raises TunebookError for a code that the model does not know.
    """
    import py3langid

    wanted = {code.strip().lower() for code in languages.split(",") if code.strip()}
    known = {code for code, _ in py3langid.rank("")}
    if not wanted or wanted - known:
        takes = f"codes that py3langid knows: {', '.join(sorted(known))}"
        raise TunebookError(f"languages is {languages!r}; it takes {takes}.")
    found: Counter[str] = Counter()

    def judge(batch: list[Row]) -> Iterator[Fault]:
        for row in batch:
            text = "\n".join(spoken(row))
            decided = sum(map(str.isalpha, text[:200])) >= MIN_LETTERS_FOR_LANGUAGE
            language = py3langid.classify(text[:2_000])[0] if decided else "undecided"
            found[language] += 1
            yield None if not decided or language in wanted else (f"language {language}", "")
        report.figures["languages"] = dict(found.most_common())

    return report.sift(rows, judge)


def drop(rows: Iterable[list[Row]], report: StepReport, fault: Callable[[Row], Fault]) -> Iterator[list[Row]]:
    """Drop rows in which `fault` finds something."""
    return report.sift(rows, lambda batch: map(fault, batch))


def wrong_length(row: Row, p: DataParams, tokenizer: Callable[[], Any]) -> Fault:
    """Whether the answer has fewer than `min_chars` characters, white space aside, or `min_tokens` tokens, or the whole
    text more than `max_chars` characters; max_chars 0: any number. tokenizer: loads it."""
    answer = answer_of(row)
    if (chars := len("".join(answer.split()))) < p.min_chars:
        return "answer too short", f"{chars} characters, fewer than {p.min_chars}"
    if p.max_chars and (size := len(text_of(row))) > p.max_chars:
        return "too long", f"{size:,} characters, more than {p.max_chars:,}"
    if p.min_tokens and (count := len(token_ids(tokenizer(), [answer])[0])) < p.min_tokens:
        return "answer too short", f"{count} tokens, fewer than {p.min_tokens}"
    return None


def repetition(text: str) -> Fault:
    """Whether a text is a loop: over 60 % of its runs of 60 letters and digits, of at least 20, occurred before in
    it. Rules and empty tables have no letters; the records of JSON, SQL or code seldom share that much in a row."""
    letters = NOT_LETTERS.sub("", text)
    runs = len(letters) - LOOP + 1
    again = 1 - len({letters[i : i + LOOP] for i in range(runs)}) / runs if runs >= 20 else 0.0
    return ("repetitive", f"{percent(again, 0)} of its runs of {LOOP} letters are repeats") if again > 0.6 else None


def gibberish(text: str) -> Fault:
    """Whether a text is of no language.

    Over 1 % replacement or private-use characters, of three and more; under 30 % letters and digits, from 50 characters
    on; more than 500 characters without a break in a script that has spaces; over half of ten and more Latin words
    without a vowel, or with six consonants in a row.
    """
    solid = "".join(text.split())
    if (bad := len(UNREADABLE.findall(solid))) > max(2, len(solid) / 100):
        return "gibberish", f"{bad} unreadable characters in {len(solid)}"
    if len(solid) >= 50 and (share := len(NOT_LETTERS.sub("", solid)) / len(solid)) < 0.3:
        return "gibberish", f"only {percent(share, 0)} letters and digits"
    if blob := BLOB.search(text):
        return "gibberish", f"an unbroken run of {len(blob.group())} characters"
    words = LATIN_WORD.findall(text.lower())
    odd = [word for word in words if UNSPEAKABLE.search(word)]
    if len(words) >= 10 and len(odd) > len(words) / 2:
        return "gibberish", f"{len(odd)} of {len(words)} words cannot be spoken, such as {odd[0][:30]!r}"
    return None


def drop_toxic(
    rows: Iterable[list[Row]], report: StepReport, scorer: str | Scorer, threshold: float = 0.5
) -> Iterator[list[Row]]:
    """Drop rows whose conversation (without system prompt) scores at least `threshold`, 0 to 1.

    scorer: a function, the name of one in SCORERS, or "transformers:unitary/toxic-bert", a classifier by folder or hub
    id ("…#toxic" picks its label). None is shipped: a word list does not score, and a model is a choice. Raises
    TunebookError for a scorer that cannot be loaded, and for one that does not give every text a number from 0 to 1.
    """
    score = load_scorer(scorer) if isinstance(scorer, str) else scorer
    report.figures |= {"threshold": threshold, "highest_score": 0.0}

    def judge(batch: list[Row]) -> Iterator[Fault]:
        found = score(["\n".join(spoken(row))[:MAX_CHARS] for row in batch])
        for row, value in zip(batch, [*found, *[None] * (len(batch) - len(found))], strict=False):
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                why = f"The toxicity scorer gave {value!r} for row {row['row']} of {row['file']}"
                raise TunebookError(f"{why}; it must give one number from 0 to 1 for each text. Choose another.")
            report.figures["highest_score"] = max(report.figures["highest_score"], round(float(value), 3))
            yield ("toxic", f"score {value:.2f}, threshold {threshold:g}") if value >= threshold else None

    return report.sift(rows, judge)


def load_scorer(name: str) -> Scorer:
    """The function behind a scorer's name."""
    if name in SCORERS:
        return SCORERS[name]
    kind, _, place = name.partition(":")
    if kind != "transformers":
        known = ", ".join(SCORERS) or "there is none"
        takes = f"it takes transformers:model or a registered name ({known})"
        raise TunebookError(f"toxicity is {shown_url(name)!r}; {takes}.")
    from transformers import pipeline

    model, _, label = place.partition("#")
    try:
        classify = pipeline("text-classification", model, model_kwargs={"use_safetensors": True}, device="cpu")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        found = f"The toxicity classifier {model!r} could not be loaded ({reason})"
        raise TunebookError(f"{found}; name a local folder or a hub id.") from error
    config = classify.model.config
    labels = list(config.id2label.values())
    wanted = {have for have in labels if (have == label if label else have.lower() not in HARMLESS)}
    several = config.problem_type == "multi_label_classification"
    if not wanted or (len(wanted) == len(labels) > 1 and not several):
        found = f"It is not clear which label of {model!r} means toxic"
        raise TunebookError(f"{found}; name one of {', '.join(labels)} as 'transformers:{model}#label'.")
    longest = min(classify.tokenizer.model_max_length, getattr(config, "max_position_embeddings", 512) - 2, 512)

    def score(texts: list[str]) -> list[float]:
        found = classify(texts, top_k=None, batch_size=32, truncation=True, max_length=longest)
        marks = [[one["score"] for one in every if one["label"] in wanted] for every in found]
        return [max(one) if several else min(sum(one), 1.0) for one in marks]

    return score
