"""Evaluation questions are found in training rows however they are wrapped; rows that share a prompt are kept."""

import random

import pytest

from helpers.data import decontamination as d
from helpers.data import shingles
from helpers.data.tables import StepReport
from helpers.data.turns import batches, make_row

WORDS = ["".join(random.Random(i).choices("abcdefghijklmnopqrstuvwxyz", k=3 + i % 7)) for i in range(3_000)]
HAN = [chr(code) for code in range(0x4E00, 0x5A00)]


def talk(question, answer="yes", system="", at=1, file="train"):
    messages = [{"role": "system", "content": system}] if system else []
    return make_row(
        "sft",
        [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        file=file,
        row=at,
    )


def run(rows, evaluation, share=d.SHARE):
    report = StepReport("decontamination")
    kept = [row for batch in d.decontaminate(batches(rows, 7), report, [evaluation], share) for row in batch]
    return kept, report


@pytest.fixture(scope="module")
def carriers():
    rng = random.Random(1)
    return [talk(" ".join(rng.choices(WORDS, k=120)), " ".join(rng.choices(WORDS, k=60)), at=i) for i in range(300)]


def planted(questions, carriers, rng):
    """Rows that hold a question each: wrapped anew, in other case, its punctuation changed, inside a carrier's text.

    A question too short for 8-grams is looked for as a whole message, so that is how it is planted.
    """
    made = []
    for row in questions:
        question, carrier = (one["messages"][0]["content"] for one in (row, rng.choice(carriers)))
        words, width, at = question.split(), rng.randint(3, 12), rng.randint(0, len(carrier))
        lines = (" ".join(words[i : i + width]) for i in range(0, len(words), width))
        text = "\n  ".join(lines).replace("?", " ?").replace(",", " ,")
        text = rng.choice([text, text.upper(), text.rstrip("?!. ")])
        long = len(shingles.tokens([question], symbols=False)[0]) >= d.GRAM
        made.append(talk(f"{carrier[:at]}\n{text}\n{carrier[at:]}" if long else text))
    return made


def test_planted_questions_are_all_found(carriers):
    rng = random.Random(2)
    questions = [talk(" ".join(rng.choices(WORDS, k=rng.randint(1, 60))) + "?", file="eval", at=i) for i in range(400)]
    assert run(planted(questions, carriers, rng), questions)[0] == []


def test_planted_chinese_questions_are_all_found(carriers):
    rng = random.Random(3)
    questions = [talk("".join(rng.choices(HAN, k=rng.randint(2, 60))) + "？", file="eval", at=i) for i in range(400)]
    chinese = [talk("".join(rng.choices(HAN, k=200)), at=i) for i in range(100)]
    for around in (carriers, chinese):
        assert run(planted(questions, around, rng), questions)[0] == []


def test_unrelated_rows_are_kept(carriers):
    rng = random.Random(4)
    questions = [talk(" ".join(rng.choices(WORDS, k=20)), file="eval", at=i) for i in range(500)]
    kept, report = run(carriers, questions)
    assert len(kept) == len(carriers) and not report.dropped
    assert report.figures["items"] == 500 and report.figures["items_found"] == 0


def test_the_reason_names_the_question_and_the_row_is_counted(carriers):
    question = "How many rivers longer than two thousand kilometres flow into the Black Sea in total?"
    planted = talk("Please answer.\n" + question.replace(" ", "\n").upper(), at=77)
    kept, report = run([*carriers, planted], [talk(question, file="eval.jsonl", at=12)])
    assert planted not in kept and len(kept) == len(carriers)
    assert dict(report.dropped) == {"holds an evaluation question": 1}
    assert report.examples["holds an evaluation question"]["row"] == 77
    assert "eval.jsonl row 12: How many rivers" in report.examples["holds an evaluation question"]["detail"]


def test_a_shared_system_prompt_is_no_contamination():
    schema = " ".join(WORDS[:200])
    training = [
        talk(f"List the {a} of {b} please", f"SELECT {a} FROM {b}", system=schema, at=i)
        for i, (a, b) in enumerate(zip(WORDS[300:350], WORDS[400:450], strict=True))
    ]
    evaluation = [
        talk(f"Count the {a} there", f"SELECT count(*) FROM {a}", system=schema, file="eval") for a in WORDS[500:550]
    ]
    assert len(run(training, evaluation)[0]) == len(training)


def test_a_question_in_the_answer_or_in_a_pretraining_text_is_found(carriers):
    question = " ".join(WORDS[2_000:2_020])
    in_answer = talk("Repeat it.", f"It was: {question}. Done.", at=1)
    in_text = make_row("text", [{"role": "text", "content": f"chapter one {question} and more"}], file="train", row=2)
    in_rejected = make_row(
        "preference",
        [{"role": "user", "content": "hm"}],
        file="train",
        row=3,
        chosen=[{"role": "assistant", "content": "a"}],
        rejected=[{"role": "assistant", "content": question}],
    )
    kept, _ = run([in_answer, in_text, in_rejected], [talk(question, file="eval")])
    assert kept == []


def test_a_short_question_is_compared_as_a_whole_message():
    kept, report = run(
        [talk("Capital of France?"), talk("What is the capital of France and of Spain, and of every other country?")],
        [talk("capital of france")],
    )
    assert len(kept) == 1 and report.figures["items_too_short"] == 1


def test_half_a_question_is_enough_and_a_third_is_not():
    words = WORDS[1_000:1_047]  # forty 8-grams
    evaluation = [talk(" ".join(words))]
    other = " ".join(WORDS[2_500:2_520])
    for held, found in ((20 + 7, True), (13 + 7, False)):
        kept, _ = run([talk(f"{other} {' '.join(words[:held])} {other}")], evaluation)
        assert (kept == []) is found, held


def test_grams_shared_by_several_questions_count_for_each():
    common = " ".join(WORDS[100:112])
    evaluation = [talk(f"{common} {' '.join(WORDS[i : i + 3])}", at=i, file="eval") for i in range(200, 260, 3)]
    kept, report = run([talk(f"{common} {' '.join(WORDS[230:233])}")], evaluation)
    assert kept == [] and report.figures["items_found"] == 1


def test_an_empty_evaluation_set_drops_nothing(carriers):
    assert len(run(carriers, [])[0]) == len(carriers)
    assert len(run(carriers, [talk("")])[0]) == len(carriers)


# ---------------------------------------------------------------- what many rows share

SHARED = {"instruction": " ".join(WORDS[:60]), "schema": " ".join(WORDS[:200]), "nothing": ""}


def asking(count, seed, shared, **more):
    rng = random.Random(seed)
    return [talk(f"{shared}\n\n{' '.join(rng.choices(WORDS, k=rng.randint(12, 40)))}?", **more) for _ in range(count)]


@pytest.mark.parametrize("shared", ["instruction", "schema"])
@pytest.mark.parametrize(("count", "tests"), [(2, 2), (3, 1), (9, 3), (300, 12), (300, 1)])
def test_what_all_questions_share_is_no_contamination(shared, count, tests):
    rows, evaluation = asking(count, 1, SHARED[shared]), asking(tests, 2, SHARED[shared])
    assert len(run(rows, evaluation)[0]) == count
    if count > 3:
        assert len(run(rows + asking(200, 3, ""), evaluation)[0]) == count + 200, "nor where others do not share it"


def test_a_number_makes_another_question_beside_a_shared_schema():
    rows = [talk(f"{SHARED['schema']}\nHow many people in it earn more than {i}?", at=i) for i in range(60)]
    asked = [talk(f"{SHARED['schema']}\nHow many people in it earn more than {i}?") for i in range(100, 140)]
    assert len(run(rows, asked)[0]) == 60
    copy = talk(said(asked[7]), "no", at=99)
    assert [row["row"] for row in run([*rows, copy], asked)[0]] == list(range(60))


def said(row):
    return row["messages"][-2]["content"]


@pytest.mark.parametrize("shared", SHARED)
def test_copied_questions_are_found_beside_what_all_share(shared):
    """Copies with another answer: all verbatim ones, inside other text too; of one word edited four of five."""
    rng, evaluation = random.Random(5), asking(200, 4, SHARED[shared])
    clean = asking(400, 6, SHARED[shared])

    def recall(copies):
        return 1 - (len(run(clean + copies, evaluation)[0]) - len(clean)) / len(copies)

    def edited(row):
        words = said(row).split()
        words[rng.randrange(len(SHARED[shared].split()), len(words))] = rng.choice(WORDS)
        return " ".join(words)

    assert recall([talk(said(row), f"no {i}") for row in evaluation for i in range(3)]) == 1
    assert recall([talk(f"Well {i}: {said(row)} Thanks {i}!", "no") for row in evaluation for i in range(15)]) == 1
    assert recall([talk(edited(row), "no") for row in evaluation]) >= 0.8
    assert recall([talk(edited(row), "no") for row in evaluation for _ in range(12)]) >= 0.8


def test_rows_that_fill_in_one_form_are_not_each_others_copies():
    """Each name and each gift stands in many questions, and no row has both of a test question."""

    def letter(name, gift):
        return talk(
            f"Write to {name} about {SHARED['instruction']} and thank them for {gift}. {' '.join(WORDS[90:110])}"
        )

    every = [(name, gift, letter(name, gift)) for name in WORDS[200:230] for gift in WORDS[300:330]]
    held = random.Random(1).sample(every, 90)
    rows = [one[2] for one in every if one not in held]
    assert len(run(rows, [one[2] for one in held])[0]) == len(rows) == 810


def test_a_greeting_that_many_conversations_begin_with_is_not_looked_for_in_them():
    def conversation(second, at):
        turns = [("user", "Hi!"), ("assistant", "Hello!"), ("user", second), ("assistant", "yes")]
        return make_row("sft", [{"role": r, "content": c} for r, c in turns], file="train", row=at)

    rows = [conversation(" ".join(WORDS[i : i + 10]), i) for i in range(0, 500, 10)]
    kept, _ = run([*rows, talk("hi", at=999)], [talk("Hi!")])
    assert [row["row"] for row in kept] == [row["row"] for row in rows]
