"""Rows in the shapes of public sets are read as their makers meant them, or stop with two settings that work."""

import json
import re

import pytest

from helpers.data.sources import read
from helpers.data.tables import Rejects
from helpers.errors import TunebookError


def said(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def rows(folder, records, name="rows.jsonl", limit=0.05, **options):
    text = records if isinstance(records, str) else "".join(json.dumps(record) + "\n" for record in records)
    (folder / name).write_text(text, encoding="utf-8")
    rejects = Rejects(limit=limit)
    return list(read(str(folder / name), rejects, **options).table.rows()), rejects


def sft(row):
    assert row["kind"] == "sft"
    return [(turn["role"], turn["content"]) for turn in row["messages"]]


TEA = "A. cold\nB. hot"
V1 = [
    {"role": "user", "content": [{"type": "text", "value": "q"}], "loss_weight": 0.0},
    {"role": "assistant", "content": [{"type": "text", "value": "a"}], "loss_weight": 1.0},
]

READ = {  # set → (row, its question, its answer)
    "Dolly": (
        {"instruction": "When?", "context": "Since 1911.", "response": "1911", "category": "qa"},
        "Since 1911.\n\nWhen?",
        "1911",
    ),
    "Dolly without context": (
        {"instruction": "Name a fruit.", "context": "", "response": "Pear", "category": "qa"},
        "Name a fruit.",
        "Pear",
    ),
    "MMLU": (
        {"question": "Tea is?", "subject": "x", "choices": ["cold", "hot"], "answer": 1},
        f"Tea is?\n{TEA}",
        "B. hot",
    ),
    "MMLU letter": ({"question": "Tea is?", "choices": ["cold", "hot"], "answer": "A"}, f"Tea is?\n{TEA}", "A. cold"),
    "MMLU-Pro": (
        {"question": "Tea is?", "options": ["cold", "hot"], "answer": "B", "answer_index": 1, "cot_content": ""},
        f"Tea is?\n{TEA}",
        "B. hot",
    ),
    "MedQA dict": (
        {"question": "Tea is?", "options": {"A": "cold", "B": "hot"}, "answer": "hot", "answer_idx": "B"},
        f"Tea is?\n{TEA}",
        "B. hot",
    ),
    "MedQA list": (
        {
            "question": "Tea is?",
            "options": [{"key": "A", "value": "cold"}, {"key": "B", "value": "hot"}],
            "answer": "hot",
            "answer_idx": "B",
            "meta_info": "step1",
        },
        f"Tea is?\n{TEA}",
        "B. hot",
    ),
    "MedMCQA": (
        {"question": "Tea is?", "opa": "cold", "opb": "hot", "cop": 1, "exp": "It is made with boiling water."},
        f"Tea is?\n{TEA}",
        "B. hot",
    ),
    "ARC": (
        {"id": "1", "question": "Tea is?", "choices": {"text": ["cold", "hot"], "label": ["A", "B"]}, "answerKey": "B"},
        f"Tea is?\n{TEA}",
        "B. hot",
    ),
    "ARC with digits": (
        {"question": "Tea is?", "choices": {"text": ["cold", "hot"], "label": ["1", "2"]}, "answerKey": "1"},
        "Tea is?\n1. cold\n2. hot",
        "1. cold",
    ),
    "OpenBookQA": (
        {"question_stem": "Tea is", "choices": {"text": ["cold", "hot"], "label": ["A", "B"]}, "answerKey": "B"},
        f"Tea is\n{TEA}",
        "B. hot",
    ),
    "AQuA": (
        {"question": "Tea is?", "options": ["A)cold", "B)hot"], "rationale": "It steams.", "correct": "B"},
        f"Tea is?\n{TEA}",
        "B. hot",
    ),
    "RACE": (
        {"article": "Tea steams.", "question": "Tea is?", "options": ["cold", "hot"], "answer": "B", "example_id": "h"},
        f"Tea steams.\n\nTea is?\n{TEA}",
        "B. hot",
    ),
    "HellaSwag": ({"ctx": "She pours", "endings": ["cold", "hot"], "label": "1"}, f"She pours\n{TEA}", "B. hot"),
    "PIQA": ({"goal": "Make tea", "sol1": "cold", "sol2": "hot", "label": 1}, "Make tea\n1. cold\n2. hot", "2. hot"),
    "COPA": (
        {"premise": "It steams.", "question": "cause", "choice1": "cold", "choice2": "hot", "label": 1},
        "It steams.\n\ncause\n1. cold\n2. hot",
        "2. hot",
    ),
    "WinoGrande": (
        {"sentence": "The _ steams.", "option1": "ice", "option2": "tea", "answer": "2"},
        "The _ steams.\n1. ice\n2. tea",
        "2. tea",
    ),
    "sql-create-context": (
        {"question": "How many?", "context": "CREATE TABLE t (a INT)", "answer": "SELECT COUNT(*) FROM t"},
        "CREATE TABLE t (a INT)\n\nHow many?",
        "SELECT COUNT(*) FROM t",
    ),
    "synthetic_text_to_sql": (
        {
            "sql_prompt": "How many?",
            "sql_context": "CREATE TABLE t (a INT)",
            "sql": "SELECT 1",
            "domain": "x",
            "sql_explanation": "It counts.",
        },
        "CREATE TABLE t (a INT)\n\nHow many?",
        "SELECT 1",
    ),
    "question, schema, sql": (
        {"question": "How many?", "schema": "t(a)", "sql": "SELECT 1"},
        "t(a)\n\nHow many?",
        "SELECT 1",
    ),
    "Spider": (
        {"db_id": "d", "question": "How many?", "query": "SELECT 1", "sql": {"select": []}},
        "How many?",
        "SELECT 1",
    ),
    "GSM8K": ({"question": "2+2?", "answer": "2+2=4\n#### 4"}, "2+2?", "2+2=4\n#### 4"),
    "SQuAD": (
        {"id": "1", "title": "T", "context": "C", "question": "q", "answers": {"text": ["a"], "answer_start": [1]}},
        "C\n\nq",
        "a",
    ),
    "BoolQ": ({"question": "is it", "passage": "It is.", "answer": True}, "It is.\n\nis it", "true"),
    "XSum": ({"document": "Long text.", "summary": "Short.", "id": "1"}, "Long text.", "Short."),
    "CNN": ({"article": "Long text.", "highlights": "Short.", "id": "1"}, "Long text.", "Short."),
    "SAMSum": ({"id": "1", "dialogue": "A: hi\nB: ho", "summary": "They greet."}, "A: hi\nB: ho", "They greet."),
    "BillSum": ({"text": "Long text.", "summary": "Short.", "title": "T"}, "Long text.", "Short."),
    "MetaMath": ({"query": "q", "response": "a", "original_question": "o", "type": "t"}, "q", "a"),
    "tatsu-lab/alpaca": (
        {
            "instruction": "q",
            "input": "i",
            "output": "a",
            "text": "### Instruction:\nq\n### Input:\ni\n### Response:\na",
        },
        "q\ni",
        "a",
    ),
    "natural instructions": ({"definition": "Translate.", "inputs": "oui", "targets": "yes"}, "Translate.\noui", "yes"),
    "Capital letters": ({"Instruction": "q", "Input": "i", "Output": "a"}, "q\ni", "a"),
    "MBPP": ({"task_id": 1, "text": "Add.", "code": "a+b", "test_list": []}, "Add.", "a+b"),
    "TriviaQA": (
        {"question": "q", "question_id": "1", "answer": {"value": "a", "aliases": ["A"], "normalized_value": "a"}},
        "q",
        "a",
    ),
    "nothing as text": ({"instruction": "q", "input": "None", "system": "null", "output": "None"}, "q", "None"),
    "HumanEval": (
        {"task_id": "1", "prompt": "def f():", "canonical_solution": " pass", "test": "", "entry_point": "f"},
        "def f():",
        " pass",
    ),
    "TruthfulQA": (
        {"question": "q", "best_answer": "a", "correct_answers": ["a"], "incorrect_answers": ["b"]},
        "q",
        "a",
    ),
    "SciQ": (
        {"question": "q", "correct_answer": "a", "distractor1": "b", "distractor2": "c", "support": "S"},
        "S\n\nq",
        "a",
    ),
}
TALKS = {  # conversations in every form: user q, assistant a
    "guanaco": {"text": "### Human: q### Assistant: a"},
    "HH": {"prompt": "\n\nHuman: q\n\nAssistant:", "completion": "a"},
    "JSON text": {"conversations": json.dumps([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}])},
    "Python text": {"messages": str(said("q", "a"))},
    "JSON text with blanks": {"messages": "  " + json.dumps(said("q", "a"), indent=1)},
    "numpy's text": {"messages": str(said("q", "a")).replace("}, {", "}\n {")},
    "LIMA": {"conversations": ["q", "a"], "source": "x"},
    "UltraChat": {"id": "1", "data": ["q", "a"]},
    "Capybara": {"source": "x", "conversation": [{"input": "q", "output": "a"}]},
    "UltraChat 200k": {"prompt": "q", "prompt_id": "1", "messages": said("q", "a")},
    "NuminaMath": {"problem": "q", "solution": "a", "messages": said("q", "a")},
    "v1": {"messages": V1},
}
PAIRS = {  # user q; good is better than bad
    "HH": {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
    "UltraFeedback binarized": {
        "prompt": "q",
        "prompt_id": "1",
        "chosen": said("q", "good"),
        "rejected": said("q", "bad"),
        "messages": said("q", "good"),
        "score_chosen": 9.0,
        "score_rejected": 2.0,
    },
    "UltraFeedback": {
        "source": "x",
        "instruction": "q",
        "models": [],
        "completions": [
            {"response": "bad", "overall_score": 2.0},
            {"response": "fair", "overall_score": 5.0},
            {"response": "good", "overall_score": 9.0},
        ],
        "correct_answers": [],
        "incorrect_answers": [],
    },
    "JSON text": {"prompt": "q", "chosen": json.dumps(said("q", "good")), "rejected": json.dumps(said("q", "bad"))},
    "Python text": {"prompt": "q", "chosen": str(said("", "good")[1:]), "rejected": str(said("", "bad")[1:])},
    "SHP": {"history": "q", "human_ref_A": "bad", "human_ref_B": "good", "labels": 0, "score_A": 1, "score_B": 9},
    "Nectar": {
        "prompt": "\n\nHuman: q\n\nAssistant: ",
        "num_responses": 2,
        "answers": [{"answer": "bad", "rank": 2.0}, {"answer": "good", "rank": 1.0}],
    },
    "PKU-SafeRLHF": {"prompt": "q", "response_0": "bad", "response_1": "good", "better_response_id": 1},
    "AlpacaFarm": {"instruction": "q", "input": "", "output_1": "bad", "output_2": "good", "preference": 2},
    "Stack Exchange": {"qid": 1, "question": "q", "response_j": "good", "response_k": "bad"},
    "WebGPT": {"question": {"full_text": "q"}, "answer_0": "bad", "answer_1": "good", "score_0": -0.5, "score_1": 0.5},
    "summaries": {"info": {"post": "q"}, "summaries": [{"text": "bad"}, {"text": "good"}], "choice": 1},
    "arena": {"conversation_a": said("q", "bad"), "conversation_b": said("q", "good"), "winner": "model_b"},
    "distilabel": {"system": "", "input": "q", "chosen": "good", "rejected": "bad"},
    "v1": {
        "chosen_messages": [V1[0], {"role": "assistant", "content": [{"type": "text", "value": "good"}]}],
        "rejected_messages": [V1[0], {"role": "assistant", "content": [{"type": "text", "value": "bad"}]}],
    },
}


@pytest.mark.parametrize("name", READ)
def test_a_public_set_is_read_whole(tmp_path, name):
    record, question, answer = READ[name]
    (row,), rejects = rows(tmp_path, [record])
    assert sft(row) == [("user", question), ("assistant", answer)] and not rejects.invalid


@pytest.mark.parametrize("name", TALKS)
def test_a_conversation_is_read_in_whatever_form_it_stands(tmp_path, name):
    (row,), _ = rows(tmp_path, [TALKS[name]])
    assert sft(row) == [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_read_in_whatever_form_it_stands(tmp_path, name):
    (row,), _ = rows(tmp_path, [PAIRS[name]])
    assert [turn["content"] for turn in row["messages"] + row["chosen"] + row["rejected"]] == ["q", "good", "bad"]


# ---------------------------------------------------------------- KTO


@pytest.mark.parametrize("column", ["reasoning", "thinking", "Complex_CoT", "cot", "reasoning_content"])
def test_a_column_of_thoughts_is_the_answers_reasoning_unless_the_user_maps_others(tmp_path, column):
    record = {"question": "q", column: "hm", "answer": "a"}
    (row,), rejects = rows(tmp_path, [record])
    assert row["messages"][1] == {"role": "assistant", "content": "a", "reasoning": "hm"} and row["meta"] == {}
    (row,), _ = rows(tmp_path, [record], columns="prompt=question,response=answer")
    assert row["messages"][1] == {"role": "assistant", "content": "a"} and row["meta"] == {column: "hm"}
    for nothing in (None, "", float("nan")):
        (row,), _ = rows(tmp_path, [{**record, column: nothing}])
        assert "reasoning" not in row["messages"][1] and not rejects.invalid


@pytest.mark.parametrize("good, bad", [(True, False), ("True", "False"), (1, 0), ("yes", "no"), (1.0, 0.0)])
def test_labels_of_any_spelling_make_kto_rows(tmp_path, good, bad):
    records = [{"prompt": f"q{i}", "completion": f"a{i}", "label": (good, bad)[i % 2]} for i in range(4)]
    found, _ = rows(tmp_path, records)
    assert [(row["kind"], row["label"]) for row in found] == [("kto", True), ("kto", False)] * 2


@pytest.mark.parametrize("format", ["auto", "kto"])
def test_a_csv_may_hold_kto_rows(tmp_path, format):
    text = "prompt,completion,label\nGreet 0,Good day.,True\nGreet 1,Get lost.,False\n"
    found, _ = rows(tmp_path, text, "rows.csv", format=format)
    assert [(row["kind"], row["label"]) for row in found] == [("kto", True), ("kto", False)]


def test_a_kto_row_without_its_label_is_no_sft_row(tmp_path):
    labels = (True, None, "", "nan")
    found, rejects = rows(tmp_path, [{"prompt": "q", "completion": "a", "label": one} for one in labels], limit=1.0)
    assert [row["kind"] for row in found] == ["kto"] and rejects.invalid == {"no label": 3}
    text = "prompt,completion,label\nGreet 0,Good day.,True\nGreet 1,Get lost.,\n"
    assert len(rows(tmp_path, text, "rows.csv", limit=1.0)[0]) == 1


@pytest.mark.parametrize("value", ["nan", "NaN", "<NA>"])
def test_a_missing_answer_that_pandas_wrote_as_text_is_none(tmp_path, value):
    found, rejects = rows(tmp_path, [{"instruction": "q", "output": one} for one in ("a", value)], limit=1.0)
    assert len(found) == 1 and rejects.invalid == {"no answer": 1}


# ---------------------------------------------------------------- two readings

NLI = {"premise": "It rains.", "hypothesis": "It is wet.", "label": 0}
TWO = {  # set → (row, what the first advised setting trains, what the second does); a kind or question and answer
    "bool label": ({"question": "Spam?", "answer": "yes", "label": True}, "kto", ("Spam?", "yes")),
    "text label": ({"question": "Spam?", "answer": "yes", "label": "False"}, "kto", ("Spam?", "yes")),
    "label of a conversation": ({"messages": said("q", "a"), "label": "1"}, "kto", ("q", "a")),
    "classes": ({"text": "I liked it.", "label": 1}, ("I liked it.", "1"), "text"),
    "named classes": ({"text": "I liked it.", "label": "pos"}, ("I liked it.", "pos"), "text"),
    "true or false": ({"text": "Buy now", "label": True}, ("Buy now", "true"), "text"),
    "answer beside text": ({"text": "2+2?", "target": "4"}, ("2+2?", "4"), "text"),
    "two questions": (
        {"instruction": "Answer as a doctor.", "question": "Flu?", "answer": "Rest."},
        ("Answer as a doctor.\nFlu?", "Rest."),
        ("Answer as a doctor.", "Rest."),
    ),
    "two answers": ({"problem": "q", "solution": "because", "answer": "4"}, ("q", "because"), ("q", "4")),
    "evidence": (
        {"question": "q", "evidence": "E", "SQL": "SELECT 1", "db_id": "d"},
        ("E\n\nq", "SELECT 1"),
        ("q", "SELECT 1"),
    ),
    "Spider with a schema": (
        {"db_id": "d", "question": "q", "query": "SELECT 1", "schema": "S"},
        ("S\n\nq", "SELECT 1"),
        ("q", "SELECT 1"),
    ),
    "context and evidence": (
        {"question": "q", "schema": "S", "evidence": "E", "sql": "SELECT 1"},
        ("S\nE\n\nq", "SELECT 1"),
        ("S\n\nq", "SELECT 1"),
    ),
    "input": ({"prompt": "q", "input": "i", "completion": "a"}, ("q\ni", "a"), ("q", "a")),
    "a text beside": ({"text": "A passage.", "question": "q", "answer": "a"}, ("A passage.\n\nq", "a"), ("q", "a")),
    "options without a key": (
        {"question": "q", "options": ["a", "b"], "response": "a"},
        ("q\nA. a\nB. b", "A. a"),
        ("q", "a"),
    ),
    "rejected alone": ({"prompt": "q", "completion": "a", "rejected": "b"}, "preference", ("q", "a")),
    "a pair with its own answer": (
        {"prompt": "q", "chosen": "a", "rejected": "b", "response": "c"},
        ("q", "c"),
        "preference",
    ),
    "context of a conversation": ({"messages": said("q", "a"), "context": "C"}, ("q", "a"), ("q", "a")),
    "another conversation": ({"instruction": "q", "output": "a", "messages": said("x", "y")}, ("q", "a"), ("x", "y")),
}


def outcome(row):
    contents = [turn["content"] for turn in row["messages"] if turn["role"] != "system"]
    return tuple(contents) if row["kind"] == "sft" else row["kind"]


@pytest.mark.parametrize("name", TWO)
def test_a_column_with_a_known_meaning_is_not_put_aside_and_both_advised_settings_work(tmp_path, name):
    record, *wanted = TWO[name]
    with pytest.raises(TunebookError, match="two readings") as stop:
        rows(tmp_path, [record] * 3)
    advised = re.findall(r"(format|columns)=(\S+?)[.)]+ ", str(stop.value) + " ")
    assert len(advised) == 2
    for (parameter, value), one in zip(advised, wanted, strict=True):
        found, _ = rows(tmp_path, [record] * 3, **{parameter: value})
        assert [outcome(row) for row in found] == [one] * 3


@pytest.mark.parametrize(
    "record",
    [
        {"question": "q", "answer": "a", "label": "geography"},
        {"question": "q", "answer": "a", "label": 7},
        {"instruction": "q", "output": "a", "context": ""},
        {"instruction": "q", "input": float("nan"), "output": "a"},
        {"prompt": "q", "response": "a b", "answer": "a b"},
        {"text": "Words.", "label": None, "target": ""},
        {"prompt": "q", "chosen": "a", "rejected": "b", "label": 1},
    ],
)
def test_what_says_nothing_new_stops_nothing(tmp_path, record):
    assert len(rows(tmp_path, [record])[0]) == 1


@pytest.mark.parametrize("begin", ["<s>[INST] q [/INST] a </s>", "<|im_start|>user\nq<|im_end|>"])
def test_a_conversation_that_a_template_rendered_is_a_text_only_when_format_says_so(tmp_path, begin):
    with pytest.raises(TunebookError, match="a chat template rendered; format=text"):
        rows(tmp_path, [{"text": begin}])
    assert rows(tmp_path, [{"text": begin}], format="text")[0][0]["kind"] == "text"


# ---------------------------------------------------------------- trees, empty answers, prompts within answers, tables


def test_messages_of_trees_are_stitched_into_conversations_that_hold_every_answer(tmp_path):
    told = [
        ("1", None, "prompter", "q"),
        ("2", "1", "assistant", "a"),
        ("3", "1", "assistant", "b"),
        ("4", "2", "prompter", "q2"),
        ("5", "4", "assistant", "a2"),
        ("6", "3", "prompter", "thanks"),
        ("7", "0", "assistant", "lost"),
    ]
    messages = [{"message_id": i, "parent_id": p, "role": r, "text": t, "lang": "en", "rank": 0} for i, p, r, t in told]
    found, rejects = rows(tmp_path, messages, limit=1.0)
    talks = [[text for _, text in sft(row)] for row in found]
    assert sorted(talks) == [["q", "a", "q2", "a2"], ["q", "b"]] and rejects.invalid.total() == 1


def test_an_empty_answer_beside_a_context_is_no_answer(tmp_path):
    records = [{"question": "q", "context": "CREATE TABLE t (a INT)", "answer": a} for a in ("SELECT 1", "", None)]
    found, rejects = rows(tmp_path, records, limit=1.0)
    assert len(found) == 1 and rejects.invalid == {"no answer": 2}


@pytest.mark.parametrize(
    "prompt, chosen, rejected, kept",
    [
        ("Suggest a tea.", "Suggest a tea.\nTry oolong.", "Suggest a tea.\nNo.", ["Try oolong.", "No."]),
        ("Suggest a tea.", "Suggest a tea. Try oolong.", "Suggest a tea. No.", ["Try oolong.", "No."]),
        ("Hi", "Hi there", "Hi you", ["Hi there", "Hi you"]),
        ("Suggest a tea.", "Suggest a tea.\nYes.", "No.", ["Suggest a tea.\nYes.", "No."]),
    ],
)
def test_answers_that_both_begin_with_the_prompt_lose_it(tmp_path, prompt, chosen, rejected, kept):
    (row,), _ = rows(tmp_path, [{"prompt": prompt, "chosen": chosen, "rejected": rejected}])
    assert [row["chosen"][0]["content"], row["rejected"][0]["content"]] == kept


def test_a_csv_with_semicolons_and_missing_values_of_pandas_is_read(tmp_path):
    text = "instruction;input;output\nSay 1;NaN;one\nSay 2;<NA>;two, three\n"
    found, _ = rows(tmp_path, text, "rows.csv")
    assert [sft(row) for row in found] == [
        [("user", "Say 1"), ("assistant", "one")],
        [("user", "Say 2"), ("assistant", "two, three")],
    ]


def test_an_open_quotation_mark_counts_what_it_swallows_and_legal_lines_stay_whole(tmp_path):
    lines = ["question,answer", '"a ""quoted"" q","two\nlines"', *(f"Say {i},Number {i}" for i in range(40))]
    lines[22] = 'Say 20,"Number 20'
    found, rejects = rows(tmp_path, "\n".join(lines) + "\n", "rows.csv", limit=1.0)
    assert len(found) == 21 and rejects.invalid == {"malformed csv": 20}
    assert "quotation mark that is not closed" in rejects.first["malformed csv"]["detail"]


def test_a_csv_in_another_encoding_says_how_to_convert_it(tmp_path):
    (tmp_path / "rows.csv").write_bytes("question,answer\ncafé,thé\n".encode("cp1252"))
    with pytest.raises(TunebookError, match=r"not UTF-8.*CSV UTF-8.*iconv"):
        read(str(tmp_path / "rows.csv"), Rejects())


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_line_separators_within_texts_and_marks_of_joined_files_split_nothing(tmp_path, name):
    one = {"question": "q", "answer": "a\u2028b\u2029c\x85d"}
    text = "\ufeff" + json.dumps(one, ensure_ascii=False) + "\n\ufeff" + json.dumps(one, ensure_ascii=False)
    assert [sft(row)[1][1] for row in rows(tmp_path, text, name)[0]] == [one["answer"]] * 2
    assert len(rows(tmp_path, json.dumps([one, one], indent=2), name)[0]) == 2
