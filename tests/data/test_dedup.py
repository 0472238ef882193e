"""Shingles, exact and near-duplicates: what is planted is found, what only looks alike is kept."""

import random

import pytest

from helpers.data import dedup, shingles
from helpers.data.tables import StepReport, Table
from helpers.data.turns import batches, make_row

WORDS = ["".join(random.Random(i).choices("abcdefghijklmnopqrstuvwxyz", k=3 + i % 7)) for i in range(5_000)]
HAN = [chr(code) for code in range(0x4E00, 0x5A00)]


def talk(question, answer, system="", at=1, **more):
    messages = [{"role": "system", "content": system}] if system else []
    return make_row(
        "sft",
        [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        file="f",
        row=at,
        **more,
    )


def text(content, at=1):
    return make_row("text", [{"role": "text", "content": content}], file="f", row=at)


def near(rows, threshold=0.8):
    """(rows that stay, report)"""
    report = StepReport("near")
    return [row for batch in dedup.near_duplicates(batches(rows, 64), report, threshold) for row in batch], report


def word_sets(content, size=3):
    words = content.split()
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


# ---------------------------------------------------------------- shingles


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The quick, brown fox jumps", "the QUICK,\n\n  brown\tfox jumps  "),
        ("我喜欢 吃苹果", "我喜欢吃苹果"),
        ("naïve café", "NAÏVE CAFÉ"),
    ],
)
def test_case_and_white_space_do_not_count(one, other):
    flat, offsets = shingles.shingles([one, other])
    assert flat[: offsets[1]].tolist() == flat[offsets[1] :].tolist() and offsets[1] > 0


def test_a_text_has_the_same_shingles_in_whatever_company():
    texts = [
        "",
        "one",
        "one two",
        "one two three",
        "a b c d e f",
        "我喜欢吃苹果和香蕉。",
        "mixed 中文 and English",
        "😀!?",
        " \n ",
        "\x00\ud800 odd",
    ]
    alone = [shingles.shingles([t])[0].tolist() for t in texts]
    flat, offsets = shingles.shingles(texts * 50)
    together = [flat[offsets[i] : offsets[i + 1]].tolist() for i in range(len(texts) * 50)]
    assert together == alone * 50
    assert alone[0] == [] and len(alone[1]) == len(alone[2]) == len(alone[3]) == 1
    assert len({tuple(a) for a in alone[1:8]}) == 7


def test_words_that_differ_in_one_letter_or_order_differ():
    hashes = shingles.tokens(["abc acb bca ab bc a b c aa aab baa 1 11 111 é e"])[0]
    assert len(set(hashes.tolist())) == len(hashes) == 16


def test_chinese_is_cut_into_characters_and_symbols_count_on_request():
    assert len(shingles.tokens(["我爱北京 hello"])[0]) == 5
    assert shingles.tokens(["我a"])[2].tolist() == [True, False]
    assert len(shingles.tokens(["a > b"])[0]) == 3
    assert len(shingles.tokens(["a > b"], symbols=False)[0]) == 2
    assert shingles.tokens(["a > b"])[0].tolist() != shingles.tokens(["a < b"])[0].tolist()


def test_devanagari_vowel_signs_do_not_cut_words():
    assert len(shingles.tokens(["हिन्दी भाषा"])[0]) == 2


def test_a_ten_megabyte_line_is_one_text():
    flat, offsets = shingles.shingles(["word " * 2_000_000, "word word word word"])
    assert offsets.tolist() == [0, 1_999_998, 2_000_000]
    assert set(flat.tolist()) == {int(flat[0])}


# ---------------------------------------------------------------- exact duplicates


def test_exact_duplicates_compare_the_whole_example():
    rows = [
        talk("q", "a", at=1),
        talk("q", "b", at=2),
        talk("q", "a", at=3),
        talk("q", "a", system="s", at=4),
        talk("q", "a", tools="[]", at=5),
    ]
    report = StepReport("exact")
    kept = [row["row"] for batch in dedup.exact_duplicates(batches(rows, 2), report) for row in batch]
    assert kept == [1, 2, 4, 5]
    assert dict(report.dropped) == {"exact duplicate": 1} and report.seen == 5 and report.kept == 4
    assert report.examples["exact duplicate"]["row"] == 3


# ---------------------------------------------------------------- near-duplicates


@pytest.fixture(scope="module")
def planted():
    """4,000 texts of 150 words, and for 400 a copy with two words changed: Jaccard about 0.92, never below 0.9."""
    rng = random.Random(5)
    texts = [" ".join(rng.choices(WORDS, k=150)) for _ in range(4_000)]
    copies = {}
    for i in range(400):
        words = texts[i].split()
        for at in rng.sample(range(150), 2):
            words[at] = rng.choice(WORDS)
        copies[len(texts)] = i
        texts.append(" ".join(words))
    return texts, copies


def test_planted_near_duplicates_are_found_and_nothing_else(planted):
    texts, copies = planted
    similarity = [
        len(word_sets(texts[a]) & word_sets(texts[b])) / len(word_sets(texts[a]) | word_sets(texts[b]))
        for a, b in copies.items()
    ]
    assert min(similarity) >= 0.9 and sum(similarity) / len(similarity) < 0.94, (
        "the planted pairs must be as hard as they claim"
    )
    kept, report = near([text(t, i) for i, t in enumerate(texts)])
    gone = set(range(len(texts))) - {row["row"] for row in kept}
    assert len(gone & set(copies)) >= 0.99 * len(copies)
    assert len(gone - set(copies)) <= len(texts) / 1_000
    assert report.seen == len(texts) and report.kept == len(kept) and report.dropped["near duplicate"] == len(gone)
    example = report.examples["near duplicate"]
    assert example["detail"].startswith("of kept row 1: ") and texts[0][:50] in example["detail"]


def test_groups_link_each_copy_to_its_original(planted):
    texts, copies = planted
    rows = [text(t) for t in texts]
    pairs = set(dedup.near_pairs(Table.collect(batches(rows, 500))))
    wanted = {(rows[original]["id"], rows[copy]["id"]) for copy, original in copies.items()}
    assert len(pairs & wanted) >= 0.99 * len(wanted) and len(pairs - wanted) <= 4


def test_chinese_near_duplicates_are_found():
    rng = random.Random(9)
    texts = ["".join(rng.choices(HAN, k=300)) for _ in range(300)]
    for i in range(50):
        changed = list(texts[i])
        changed[rng.randrange(300)] = "一"
        texts.append("".join(changed))
    kept, _ = near([text(t, i) for i, t in enumerate(texts)])
    gone = set(range(len(texts))) - {row["row"] for row in kept}
    assert gone <= set(range(300, 350)) and len(gone) >= 49


def test_a_shared_system_prompt_or_context_makes_no_duplicates():
    schema = " ".join(WORDS[:400])
    rows = [
        talk(f"How many {a} are there?", f"SELECT count(*) FROM {a}", system=schema, at=i)
        for i, a in enumerate(WORDS[:100])
    ]
    rows += [
        talk(f"{schema}\n\nHow many {a} are there?", f"SELECT count(*) FROM {a}", at=100 + i)
        for i, a in enumerate(WORDS[:100])
    ]
    kept, report = near(rows)
    assert len(kept) == 200, report.examples


def test_the_same_talk_under_another_system_prompt_is_another_example():
    question, answer = " ".join(WORDS[:50]), " ".join(WORDS[50:120])
    kept, _ = near(
        [
            talk(question, answer, system="one"),
            talk(question, answer, system="two"),
            talk(question + " x", answer, system="one"),
        ]
    )
    assert len(kept) == 2


def test_another_short_answer_to_the_same_long_question_is_another_example():
    question = " ".join(WORDS[:200])
    kept, _ = near([talk(question, "Paris"), talk(question, "London"), talk(question + " please", "Paris")])
    assert [row["messages"][-1]["content"] for row in kept] == ["Paris", "London"]


def test_a_chain_of_small_changes_does_not_vanish_whole():
    words = list(WORDS[:100])
    rows = []
    for step in range(20):  # each is close to the one before, the last has nothing in common with the first
        for i in range(5):
            words[(step * 5 + i) % 100] = WORDS[1_000 + step * 5 + i]
        rows.append(text(" ".join(words), step))
    kept, _ = near(rows, 0.8)
    assert 5 <= len(kept) < 20
    for i, one in enumerate(kept):
        for other in kept[i + 1 :]:
            a, b = (word_sets(r["messages"][0]["content"]) for r in (one, other))
            assert len(a & b) / len(a | b) < 0.8
    pairs = dedup.near_pairs(Table.collect([rows]))
    assert pairs == [(rows[0]["id"], row["id"]) for row in rows[1:]], "for a split the chain hangs together"


def test_a_thousand_copies_leave_one_and_empty_rows_stay():
    base = WORDS[:120]
    rows = [text(" ".join([*base, WORDS[1_000 + i]]), i) for i in range(1_000)] + [
        text("", 1_000),
        text("", 1_001),
        text("hi", 1_002),
    ]
    kept, _ = near(rows)
    assert [row["row"] for row in kept] == [0, 1_000, 1_001, 1_002]


def test_order_and_batches_do_not_change_the_verdict(planted):
    texts, _ = planted
    rows = [text(t, i) for i, t in enumerate(texts[3_500:4_100] + texts[:500])]
    verdicts = []
    for size in (37, 1_000):
        report = StepReport("near")
        verdicts.append([row["row"] for batch in dedup.near_duplicates(batches(rows, size), report) for row in batch])
    table = Table.collect(batches(rows, 100), spill_rows=200)
    verdicts.append([row["row"] for batch in dedup.near_duplicates(table, StepReport("near")) for row in batch])
    assert verdicts[0] == verdicts[1] == verdicts[2] and len(verdicts[0]) < len(rows)


def test_preference_rows_are_compared_with_both_answers():
    def pair(chosen, rejected, at):
        answers = {
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        return make_row("preference", [{"role": "user", "content": " ".join(WORDS[:60])}], file="f", row=at, **answers)

    good, bad = " ".join(WORDS[100:150]), " ".join(WORDS[200:250])
    kept, _ = near([pair(good, bad, 1), pair(good, bad + " x", 2), pair(good, " ".join(WORDS[300:350]), 3)])
    assert [row["row"] for row in kept] == [1, 3]


# ---------------------------------------------------------------- what many rows share


INSTRUCTION = " ".join(WORDS[4_000:4_060])


@pytest.mark.parametrize("count", [3, 7, 60, 400])
def test_an_instruction_that_all_questions_share_makes_no_duplicates_of_them(count):
    rng = random.Random(count)
    asked = [f"{INSTRUCTION}\n\nReview: {' '.join(rng.choices(WORDS, k=rng.randint(3, 15)))}." for _ in range(count)]
    kept, report = near([talk(text, rng.choice(["positive", "negative"]), at=i) for i, text in enumerate(asked)])
    assert len(kept) == count, report.examples


def test_a_number_or_a_word_makes_another_question_beside_a_shared_schema():
    numbers = [talk(f"{INSTRUCTION}\nHow many earn more than {i}?", "12", at=i) for i in range(100)]
    words = [talk(f"{INSTRUCTION}\nIs {word} there?", "yes", at=i) for i, word in enumerate(WORDS[:100])]
    others = [talk(" ".join(WORDS[i : i + 30]), "yes", at=i) for i in range(0, 900, 30)]
    assert len(near(numbers + words + others)[0]) == 230


def test_a_question_asked_again_beside_a_shared_instruction_is_still_a_duplicate():
    reviews = [" ".join(WORDS[i : i + 40]) for i in range(0, 2_000, 40)]
    rows = [talk(f"{INSTRUCTION}\n\n{text}", "negative", at=i) for i, text in enumerate(reviews)]
    again = [talk(f"{INSTRUCTION}\n\n{text} x", "negative", at=i) for i, text in enumerate(reviews, 50)]
    assert [row["row"] for row in near(rows + again)[0]] == list(range(50))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("positive", "negative"),
        ("SELECT name FROM staff WHERE pay > 200", "SELECT name FROM staff WHERE pay > 600"),
        (" ".join(WORDS[:200]), " ".join([*WORDS[:199], "otherwise"])),
        ("SELECT 'Paris'", "SELECT 'paris'"),
    ],
)
def test_rows_whose_answers_differ_are_never_dropped_but_one_of_them_asked_twice_is(one, other):
    question = " ".join(WORDS[:100])
    rows = [talk(question, one, at=1), talk(f"{question} x", other, at=2), talk(f"{question} y", f"{one}\n", at=3)]
    others = [talk(" ".join(WORDS[i : i + 20]), "yes", at=i) for i in range(1_000, 1_200, 20)]
    assert [row["row"] for row in near(rows + others)[0]] == [1, 2, *range(1_000, 1_200, 20)]


@pytest.mark.parametrize("turns", [1, 3], ids=["a talk of two answers", "of four"])
def test_talks_whose_earlier_answers_differ_are_all_kept(turns):
    def row(number, at):
        said = [talk(" ".join(WORDS[:90]), f"It is {number}.")["messages"]] * turns
        said.append(talk("Thank you, that was all for today", "You are welcome")["messages"])
        return make_row("sft", [message for part in said for message in part], file="f", row=at)

    kept, _ = near([row(12, 1), row(13, 2), row(12, 3)])
    assert [one["row"] for one in kept] == [1, 2]


def test_a_long_answer_that_many_questions_share_makes_no_duplicates_of_them():
    answer = " ".join(WORDS[:80])
    kept, _ = near([talk(f"Is {word} covered by the warranty?", answer, at=i) for i, word in enumerate(WORDS[:30])])
    assert len(kept) == 30
