"""Cleaning steps: what they mend, remove and must leave alone; every removal counted with an example."""

import json

import pytest

from helpers.data import cleaning as clean
from helpers.data.tables import StepReport
from helpers.data.turns import answer_of, batches, make_row
from helpers.errors import TunebookError
from helpers.params import DataParams


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


@pytest.mark.parametrize(
    "text",
    [
        "Write `schÃ¶n`, or\n```py\ns = 'schÃ¶n'\r\n```",
        "s.replace('â€™', \"'\")",
        "UTF-8 read as Latin-1 turns schön into schÃ¶n.",
        "\x1b[31mred\x1b[0m",
        "├── src\n└── Ã¶",
        "def broken():\n    return 'schÃ¶n'",
        "SELECT name FROM t WHERE name = 'schÃ¶n';",
        "What encoding makes â€œ of a quotation mark?",
        'console.log("schÃ¶n")',
        "printf('schÃ¶n');",
        'name = "schÃ¶n"',
        '{"name": "schÃ¶n"}',
        'echo "schÃ¶n"',
        "$ ls schÃ¶n",
        "if ok {\n  say schÃ¶n\n}",
        "x <- c('schÃ¶n')",
        "std::cout << schÃ¶n",
        "WHERE a\nputs 'schÃ¶n'",
    ],
)
def test_code_terminal_output_and_text_about_encodings_are_left_alone(text):
    rows, report = through(clean.repair_unicode, [talk("hi", text)])
    assert rows[0]["messages"][-1]["content"] == text and report.changed == 0


@pytest.mark.parametrize(
    "text",
    [
        "# Title\n\nIt is schÃ¶n; it is (â€œgoodâ€\x9d) too.\n",
        "> He said: <b>schÃ¶n</b>!",
        "- schÃ¶n\n- gut",
        "Prices: 5 = schÃ¶n, see f(x).",
        'The word "schÃ¶n" (German)',
        "1. schÃ¶n & gut -> so it is | not",
    ],
)
def test_prose_with_a_few_signs_is_mended(text):
    rows, report = through(clean.repair_unicode, [talk("hi", text)])
    assert "schön" in rows[0]["messages"][-1]["content"] and report.changed == 1


def test_prose_beside_code_is_mended_and_the_example_shows_both(tmp_path):
    rows, report = through(clean.repair_unicode, [talk("hi", "x" * 300 + " schÃ¶n, but `schÃ¶n`")])
    assert rows[0]["messages"][-1]["content"].endswith("schön, but `schÃ¶n`")
    example = report.examples["repaired characters"]
    assert "schÃ¶n" in example["before"] and "schön" in example["after"] and len(example["before"]) <= 60


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
    p = DataParams(min_chars=2, max_chars=100)
    kept, report = through(clean.drop, rows, lambda row: clean.wrong_length(row, p, lambda: None))
    assert [row["row"] for row in kept] == [2, 4]
    assert dict(report.dropped) == {"answer too short": 1, "too long": 1}
    assert report.examples["too long"]["detail"] == "502 characters, more than 100"


def test_lengths_in_tokens(tokenizer):
    rows = [talk("q", "yes", at=1), talk("q", "one two three four five", at=2)]
    p = DataParams(min_tokens=3)
    kept, report = through(clean.drop, rows, lambda row: clean.wrong_length(row, p, lambda: tokenizer))
    assert [row["row"] for row in kept] == [2]
    assert "1 tokens, fewer than 3" in report.examples["answer too short"]["detail"]


# ---------------------------------------------------------------- repetition

PROSE = (
    "The river rises in the hills above the town and runs south for sixty miles before it meets the sea. "
    "Fishermen have worked "
    "its lower course since the Middle Ages, and a small fleet still leaves the harbour every morning. "
    "In winter the banks flood, "
    "and the lowest street is closed to traffic until the water has gone. A museum beside the old bridge "
    "tells the story of the "
    "great flood of 1872, when half of the houses were lost, and of the engineers who built the dam that followed it."
)
CHINESE = (
    "这条河发源于城镇上方的山丘，向南流淌六十英里后汇入大海。渔民自中世纪以来一直在下游捕鱼，"
    "每天早晨仍有一支小船队离开港口。冬天河岸会被淹没，最低的街道禁止通行。"
)
STRUCTURED = [
    json.dumps(
        [
            {"id": i, "name": f"user{i}", "active": True, "address": {"city": "Bonn", "zip": 53000 + i}}
            for i in range(40)
        ]
    ),
    json.dumps([{"id": i, "name": f"user{i}", "active": True, "role": None} for i in range(40)], indent=2),
    json.dumps([[0.0, 0.5, 1.0]] * 3 + [[], {}, [[], []]]),
    "\n".join(
        f"INSERT INTO orders (id, customer, city, total) VALUES ({i}, 'c{i}', 'Bonn', {i * 3});" for i in range(40)
    ),
    " UNION ALL ".join(f"SELECT name, length FROM rivers WHERE country = '{c}'" for c in "ABCDEFGHIJKLMNOP"),
    "\n".join(f"    if kind == {i}:\n        return convert(value, {i}, strict=True)" for i in range(30)),
    "movq %rsp, %rbp\nsubq $16, %rsp\nmovl $0, -4(%rbp)\ncmpl $9, -4(%rbp)\njg .L2\n" * 2,
    'INT main(void) { char *strptr = malloc(8); strncpy(strptr, src, 7); printf("%s\\n", strptr); return 0; }',
]


@pytest.mark.parametrize(
    "answer",
    [
        "I am sorry. " * 40,
        "好的，我明白了。" * 30,
        "\n".join(["- the same line again"] * 12),
        "ha" + "a" * 80,
        "no " * 100,
    ],
)
def test_answers_that_repeat_themselves_are_dropped(answer):
    kept, report = through(clean.drop, [talk("q", answer)], lambda row: clean.repetition(answer_of(row)))
    assert kept == [] and report.dropped["repetitive"] == 1


@pytest.mark.parametrize(
    "answer",
    [
        PROSE,
        CHINESE,
        "yes yes yes",
        "| a | b |\n|---|---|\n" + "\n".join(f"| {i} | {i * i} |" for i in range(40)),
        "-" * 100,
        "for i in range(10):\n" + " " * 80 + "print(i)",
        "\n".join(f"{i}. {word}" for i, word in enumerate(PROSE.split())),
        "SELECT a FROM t WHERE b = 1",
        *STRUCTURED,
    ],
)
def test_prose_tables_rules_code_and_lists_are_no_repetition(answer):
    assert clean.repetition(answer) is None


# ---------------------------------------------------------------- gibberish


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("�" * 10 + " some words that are here", "unreadable"),
        ("#$%^&*()_+{}|:<>?~`-=[];',./" * 3, "letters and digits"),
        ("image: " + "iVBORw0KGgoAAAANSUhEUg" * 30, "unbroken run"),
        ("xkcd qwrtz bnmkl sdfgh hjklm wrtzp pqrst vwxyz lkjhg mnbvc dfghj tables", "cannot be spoken"),
    ],
)
def test_gibberish_is_dropped_with_its_reason(text, why):
    kept, report = through(clean.drop, [talk("q", text)], lambda row: clean.gibberish(answer_of(row)))
    assert kept == [] and why in report.examples["gibberish"]["detail"]


@pytest.mark.parametrize(
    "text",
    [
        PROSE,
        CHINESE,
        CHINESE.replace("，", "").replace("。", "") * 10,  # 700 characters without a space or a full stop
        TEXTS["de"],
        "strč prst skrz krk",
        "SELECT t.x, COUNT(*) FROM t JOIN s ON t.id = s.id WHERE s.q <> 'b' GROUP BY t.x HAVING COUNT(*) > 3",
        "def f(x):\n    return {k: v for k, v in x.items() if v != []}\n" * 3,
        "😂😂😂👍🎉",
        "https://example.com/a/very/long/path?with=some&query=string#and-a-fragment",
        "हिन्दी भाषा में लिखा हुआ एक साधारण वाक्य जो किसी के लिए भी समझना आसान है।",
        "x = 3",
        "",
        *STRUCTURED,
    ],
)
def test_language_code_and_links_are_no_gibberish(text):
    assert clean.gibberish(text) is None
