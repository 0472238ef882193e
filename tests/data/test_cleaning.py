"""Cleaning steps: what they mend, remove and must leave alone; every removal counted with an example."""

import pytest

from helpers.data import cleaning as clean
from helpers.data.tables import StepReport
from helpers.data.turns import batches, make_row
from helpers.errors import TunebookError


def talk(question, answer="fine", system="", at=1):
    messages = [{"role": "system", "content": system}] if system else []
    return make_row(
        "sft",
        [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        file="f",
        row=at,
    )


def through(step, rows, *args, **options):
    report = StepReport(step.__name__)
    kept = [row for batch in step(batches(rows, 3), report, *args, **options) for row in batch]
    assert report.seen == len(rows) and report.kept == len(kept)
    assert sum(report.dropped.values()) == len(rows) - len(kept)
    assert set(report.dropped) <= set(report.examples)
    return kept, report


# ---------------------------------------------------------------- Unicode


@pytest.mark.parametrize(
    ("broken", "mended"),
    [
        ("schÃ¶n", "schön"),
        ("The Mona Lisa doesnâ€™t have eyebrows.", "The Mona Lisa doesn’t have eyebrows."),
        ("one\r\ntwo\rthree", "one\ntwo\nthree"),
        ("a\x00b\x07c", "abc"),
        ("cafe\u0301", "café"),
        ("lone \ud83d", "lone \ufffd"),
        ("ÐŸÑ€Ð¸Ð²ÐµÑ‚", "Привет"),
    ],
)
def test_damage_is_mended_and_counted(broken, mended):
    rows, report = through(clean.repair_unicode, [talk("hi", broken)])
    assert rows[0]["messages"][-1]["content"] == mended
    assert report.changed == 1 and "repaired characters" in report.examples


@pytest.mark.parametrize(
    "text",
    [
        "“curly” ‘quotes’ — dash",
        "ﬁne ligature",
        "Ｆｕｌｌ，１２３。",
        "&lt;b&gt; &amp;amp;",
        "  indented\n\tcode\n",
        "👩‍👩‍👧 🇩🇪",
        "हिन्दी",
        "x² ≠ ½",
        "a\u200bb",
    ],
)
def test_what_may_be_meant_is_left_alone(text):
    row = talk("hi", text)
    rows, report = through(clean.repair_unicode, [row])
    assert rows == [row] and report.changed == 0


def test_a_mended_row_has_the_id_of_its_new_content_and_all_its_parts():
    pair = make_row(
        "preference",
        [{"role": "user", "content": "q"}],
        chosen=[{"role": "assistant", "content": "schÃ¶n"}],
        rejected=[{"role": "assistant", "content": "x"}],
    )
    right = make_row(
        "preference",
        [{"role": "user", "content": "q"}],
        chosen=[{"role": "assistant", "content": "schön"}],
        rejected=[{"role": "assistant", "content": "x"}],
    )
    rows, _ = through(clean.repair_unicode, [pair, talk("q", "")])
    assert rows[0]["id"] == right["id"] != pair["id"]
    assert rows[1]["messages"][-1]["content"] == ""


# ---------------------------------------------------------------- language

TEXTS = {
    "en": "The quick brown fox jumps over the lazy dog, and nobody in the village was surprised to see it.",
    "de": "Der schnelle braune Fuchs springt über den faulen Hund, und niemand im Dorf war davon überrascht.",
    "fr": "Le renard brun saute par-dessus le chien paresseux et personne dans le village n'en fut surpris.",
    "zh": "敏捷的棕色狐狸跳过了懒狗，村子里没有人对此感到惊讶，因为这种事情每天都会发生。",
}


def test_other_languages_are_dropped_by_name():
    rows = [talk(text, text, at=i) for i, text in enumerate(TEXTS.values())]
    kept, report = through(clean.keep_languages, rows, "en, zh")
    assert [row["row"] for row in kept] == [0, 3]
    assert dict(report.dropped) == {"language de": 1, "language fr": 1}
    assert report.figures["languages"] == {"en": 1, "de": 1, "fr": 1, "zh": 1}


def test_the_system_prompt_does_not_decide_and_short_texts_are_undecided():
    rows = [talk(TEXTS["de"], TEXTS["de"], system=TEXTS["en"] * 5), talk("2 + 2", "4"), talk("Ja", "Nein")]
    kept, report = through(clean.keep_languages, rows, "en")
    assert kept == rows[1:] and report.figures["languages"]["undecided"] == 2


@pytest.mark.parametrize("languages", ["english", "", "en,xx", ","])
def test_an_unknown_language_is_refused_with_the_known_ones(languages):
    with pytest.raises(TunebookError, match=r"codes that py3langid knows.*de.*en"):
        through(clean.keep_languages, [talk("x")], languages)


# ---------------------------------------------------------------- length


def test_lengths_in_characters():
    rows = [talk("q", " \n\t ", at=1), talk("q", "ok", at=2), talk("q", "x" * 500, at=3), talk("q", "好的", at=4)]
    kept, report = through(clean.keep_lengths, rows, min_chars=2, max_chars=100)
    assert [row["row"] for row in kept] == [2, 4]
    assert dict(report.dropped) == {"answer too short": 1, "too long": 1}
    assert report.examples["too long"]["detail"] == "502 characters, more than 100"
