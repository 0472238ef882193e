"""Every shape becomes the right conversation; LLaMA-Factory's sets are read as LLaMA-Factory reads them."""

import json
import shutil

import pytest

from helpers.data import formats, sources
from helpers.data.formats import convert, named_shape
from helpers.data.sources import read
from helpers.data.tables import Rejects
from helpers.data.turns import RowError
from helpers.errors import TunebookError


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def detected(record):
    return formats.shape_of(record, None)


# ---------------------------------------------------------------- an independent reading of dataset_info.json


def reference(folder, name):
    """LLaMA-Factory's documented reading, written down plainly: [(system, turns, chosen, rejected, label)]."""
    described = json.loads((folder / "dataset_info.json").read_text())[name]
    file = folder / described["file_name"]
    text = file.read_text(encoding="utf-8")
    rows = (
        json.loads(text)
        if file.suffix == ".json"
        else [json.loads(s) for s in text.splitlines()]
        if file.suffix == ".jsonl"
        else [{"text": s} for s in text.splitlines()]
    )
    columns = described.get(
        "columns", {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
    )
    tags = described.get(
        "tags",
        {
            "role_tag": "from",
            "content_tag": "value",
            "user_tag": "human",
            "assistant_tag": "gpt",
            "observation_tag": "observation",
            "function_tag": "function_call",
            "system_tag": "system",
        },
    )
    read_as = []
    for row in rows:
        if described.get("formatting") == "sharegpt":
            said = [(turn[tags["role_tag"]], turn[tags["content_tag"]]) for turn in row[columns["messages"]]]
            system = said.pop(0)[1] if said[0][0] == "system" else ""
            name_of = {
                tags["user_tag"]: "user",
                tags["assistant_tag"]: "assistant",
                tags.get("observation_tag"): "tool",
                tags.get("function_tag"): "call",
            }
            talk = [(name_of[role], content) for role, content in said]
            pair = (
                [row[columns[side]][tags["content_tag"]] for side in ("chosen", "rejected")]
                if described.get("ranking")
                else [None, None]
            )
            read_as.append((system, talk, *pair, row.get(columns.get("kto_tag"))))
        elif "response" not in columns:
            read_as.append(("", [("text", row[columns["prompt"]])], None, None, None))
        else:
            question = "\n".join(row[columns[part]] for part in ("prompt", "query") if row.get(columns.get(part)))
            read_as.append(("", [("user", question), ("assistant", row[columns["response"]])], None, None, None))
    return read_as


def as_reference(row):
    """One of our rows in the same form."""
    messages = list(row["messages"])
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
    talk = []
    for message in messages:
        if message.get("tool_calls"):
            calls = [call["function"] for call in message["tool_calls"]]
            talk.append(("call", calls[0] if len(calls) == 1 else calls))
        else:
            talk.append((message["role"], message["content"]))
    pair = [row[side][0]["content"] if side in row else None for side in ("chosen", "rejected")]
    return (system, talk, *pair, row.get("label"))


@pytest.mark.parametrize(
    "name, count",
    [
        ("alpaca_en_demo", 999),
        ("alpaca_zh_demo", 1000),
        ("glaive_toolcall_en_demo", 300),
        ("dpo_en_demo", 300),
        ("kto_en_demo", 300),
        ("identity", 91),
        ("c4_demo", 300),
        ("wiki_demo", 30),
    ],
)
def test_every_text_set_of_the_demo_folder_loads_with_the_right_count_and_rows(demo_data, name, count):
    rejects = Rejects()
    reading = read(name, rejects, info=str(demo_data / "dataset_info.json"))
    wanted = reference(demo_data, name)
    wanted = [
        (s, [(role, json.loads(text) if role == "call" else text) for role, text in talk], *rest)
        for s, talk, *rest in wanted
    ]
    assert len(reading.table) == len(wanted) == count and not rejects.invalid
    assert [as_reference(row) for row in reading.table.rows()] == wanted


@pytest.mark.parametrize(
    "name",
    ["alpaca_en_demo.json", "glaive_toolcall_en_demo.json", "dpo_en_demo.json", "kto_en_demo.json", "c4_demo.jsonl"],
)
def test_detection_reads_a_demo_file_without_its_description_as_with_it(demo_data, tmp_path, name):
    shutil.copy(demo_data / name, tmp_path / name)
    described, detected = (read(str(folder / name), Rejects()) for folder in (demo_data, tmp_path))
    assert [row["id"] for row in described.table.rows()] == [row["id"] for row in detected.table.rows()]


def test_columns_replace_the_whole_default_mapping_and_what_is_left_out_is_named(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "q", "input": "more", "output": "a"}]))
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"a": {"file_name": "a.json", "columns": {"prompt": "instruction", "response": "output"}}})
    )
    reading = read(str(tmp_path / "a.json"), Rejects())
    assert next(reading.table.rows())["messages"] == turns(("user", "q"), ("assistant", "a"))
    assert reading.sources[0].unused == {"input": 1}


def test_tags_and_columns_of_a_described_set_are_obeyed_and_the_rest_is_not_guessed(tmp_path):
    row = {"talk": [{"who": "H", "what": "q"}, {"who": "A", "what": "a"}], "sys": "be brief", "tools": "[]"}
    (tmp_path / "a.json").write_text(
        json.dumps([row, {"messages": turns(("user", "q"), ("assistant", "a"))}] * 1 + [row] * 30)
    )
    tags = {"role_tag": "who", "content_tag": "what", "user_tag": "H", "assistant_tag": "A"}
    (tmp_path / "dataset_info.json").write_text(
        json.dumps(
            {
                "a": {
                    "file_name": "a.json",
                    "formatting": "sharegpt",
                    "columns": {"messages": "talk", "system": "sys"},
                    "tags": tags,
                }
            }
        )
    )
    rejects = Rejects()
    reading = read(str(tmp_path / "a.json"), rejects)
    assert next(reading.table.rows())["messages"] == turns(("system", "be brief"), ("user", "q"), ("assistant", "a"))
    assert (
        len(reading.table) == 31
        and "column 'talk' is not there; sharegpt wants 'talk'; columns seen: 'messages'"
        in rejects.first["wrong columns"]["detail"]
    )


def test_num_samples_folders_and_hub_entries_are_taken_over_and_media_sets_are_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": f"q{i}", "output": "a"} for i in range(9)]))
    (tmp_path / "parts").mkdir()
    for part in "12":
        (tmp_path / "parts" / f"{part}.jsonl").write_text(json.dumps({"frage": f"q{part}", "antwort": "a"}) + "\n")
    columns = {"prompt": "frage", "response": "antwort"}
    info = {
        "a": {"file_name": "a.json", "num_samples": 4},
        "b": {"hf_hub_url": "x/y", "subset": "en", "split": "full", "folder": "sub"},
        "c": {"file_name": "c.json", "columns": {"messages": "m", "images": "images"}},
        "d": {"script_url": "d.py"},
        "e": {"file_name": "parts", "columns": columns},
        "f": {"file_name": "a.json", "columns": "instruction"},
        "g": {"file_name": "parts", "columns": columns, "num_samples": 1},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))

    def rows(name):
        return read(name, Rejects(), info=str(tmp_path)).table

    assert len(rows("a")) == 4
    (hub,) = sources.find("b", str(tmp_path))
    assert hub.hub == {"path": "x/y", "name": "en", "split": "full", "data_dir": "sub"}
    assert [row["messages"][0]["content"] for row in rows("e").rows()] == ["q1", "q2"]
    said = {
        "c": "pictures, videos or sounds",
        "d": "would have to run code",
        "f": "in another way than LLaMA-Factory",
        "g": "a folder of 2 files",
    }
    for name, sentence in said.items():
        with pytest.raises(TunebookError, match=sentence):
            rows(name)


# ---------------------------------------------------------------- shapes

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
SHAPES = [
    ({"instruction": "q", "input": "i", "output": "a"}, "sft", turns(("user", "q\ni"), ("assistant", "a"))),
    (
        {"instruction": "q", "input": "", "output": "a", "system": "s", "history": [["q0", "a0"]]},
        "sft",
        turns(("system", "s"), ("user", "q0"), ("assistant", "a0"), ("user", "q"), ("assistant", "a")),
    ),
    (
        {"question": "q", "sql": "SELECT 1", "system": "s"},
        "sft",
        turns(("system", "s"), ("user", "q"), ("assistant", "SELECT 1")),
    ),
    ({"question": "q", "answer": 42}, "sft", turns(("user", "q"), ("assistant", "42"))),
    ({"prompt": "q", "completion": "a"}, "sft", turns(("user", "q"), ("assistant", "a"))),
    (
        {"prompt": turns(("user", "q")), "completion": turns(("assistant", "a"))},
        "sft",
        turns(("user", "q"), ("assistant", "a")),
    ),
    (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "a"},
            ]
        },
        "sft",
        turns(("system", "s"), ("user", "q"), ("assistant", "a")),
    ),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "!"}]},
                {"role": "assistant", "content": "a"},
            ]
        },
        "sft",
        turns(("user", "q!"), ("assistant", "a")),
    ),
    (
        {
            "messages": [
                {"role": "user", "content": "q"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "1",
                            "type": "function",
                            "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
                        }
                    ],
                },
                {"role": "tool", "name": "weather", "content": "rain"},
                {"role": "assistant", "content": "a"},
            ]
        },
        "sft",
        [
            *turns(("user", "q")),
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "rain", "name": "weather"},
            *turns(("assistant", "a")),
        ],
    ),
    (
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
                {"from": "observation", "value": "rain"},
                {"from": "gpt", "value": "a"},
            ]
        },
        "sft",
        [
            *turns(("user", "q")),
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            *turns(("tool", "rain"), ("assistant", "a")),
        ],
    ),
    ({"text": "words"}, "text", turns(("text", "words"))),
]


@pytest.mark.parametrize("record, kind, messages", SHAPES)
def test_each_shape_is_recognised_and_becomes_its_conversation(record, kind, messages):
    (part,) = convert(record, detected(record))
    assert (part["kind"], part["messages"]) == (kind, messages)


PROMPT, GOOD, BAD = turns(("user", "q")), turns(("assistant", "good")), turns(("assistant", "bad"))


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
        {"prompt": PROMPT, "chosen": GOOD, "rejected": BAD},
        {"prompt": "q", "chosen": PROMPT + GOOD, "rejected": PROMPT + BAD},
        {"chosen": PROMPT + GOOD, "rejected": PROMPT + BAD},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        {"messages": PROMPT, "chosen": GOOD[0], "rejected": BAD[0]},
    ],
)
def test_every_form_of_a_preference_pair_gives_the_same_row(record):
    (part,) = convert(record, detected(record))
    assert (part["messages"], part["chosen"], part["rejected"]) == (PROMPT, GOOD, BAD)


def test_pairs_of_longer_conversations_are_cut_where_they_part_ways():
    shared = turns(("system", "s"), ("user", "q0"), ("assistant", "a0"), ("user", "q"))
    (part,) = convert({"chosen": shared + GOOD, "rejected": shared + BAD}, named_shape("preference"))
    assert (part["messages"], part["chosen"], part["rejected"]) == (shared, GOOD, BAD)
    with pytest.raises(RowError, match="same answer twice"):
        convert({"prompt": "q", "chosen": "a", "rejected": "a"}, named_shape("preference"))
    with pytest.raises(RowError, match="no question"):
        convert(
            {"chosen": turns(("user", "x")) + GOOD, "rejected": turns(("user", "y")) + BAD},
            named_shape("preference"),
        )


def test_kto_rows_keep_their_label_and_a_missing_one_is_rejected():
    (part,) = convert(
        {"prompt": "q", "completion": "a", "label": False}, detected({"prompt": "q", "completion": "a", "label": False})
    )
    assert part["kind"] == "kto" and part["label"] is False
    with pytest.raises(RowError, match="no label"):
        convert({"prompt": "q", "completion": "a", "label": "perhaps"}, named_shape("kto"))


def test_context_questions_may_have_no_answer_in_their_text():
    def asked(record):
        shape = formats.shape_of(record, named_shape("context_qa"))
        return [
            (part["messages"][-2]["content"], part["messages"][-1]["content"])
            for part in convert(record, shape, unanswerable="Not in the text.")
        ]

    assert asked({"context": "C", "question": "q", "answer": "a"}) == [("C\n\nq", "a")]
    assert asked({"article": "C", "question": "q", "answer": "a", "unanswerable_question": "u"}) == [
        ("C\n\nq", "a"),
        ("C\n\nu", "Not in the text."),
    ]
    assert (
        asked({"context": "C", "question": "q", "answers": {"text": ["a", "b"], "answer_start": [1, 2]}})[0][1] == "a"
    )
    assert (
        asked({"context": "C", "question": "q", "answers": {"text": [], "answer_start": []}})[0][1]
        == "Not in the text."
    )
    assert asked({"context": "C", "question": "q", "answer": "a", "is_impossible": True})[0][1] == "Not in the text."
    with pytest.raises(RowError, match="no answer"):
        asked({"context": "C", "question": "q"})
    assert detected({"context": "C", "question": "q", "answer": "a"}).format == "context_qa"


def test_a_wrong_mapping_says_which_columns_were_seen_and_which_were_wanted(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"frage": "q", "antwort": "a"}))
    with pytest.raises(TunebookError, match="wants 'instruction', 'output'; columns seen: 'frage', 'antwort'"):
        read(str(tmp_path / "a.jsonl"), Rejects(), format="alpaca")
    reading = read(str(tmp_path / "a.jsonl"), Rejects(), columns="prompt=frage, response=antwort")
    assert next(reading.table.rows())["messages"] == turns(("user", "q"), ("assistant", "a"))
    with pytest.raises(TunebookError, match="part=column pairs"):
        read(str(tmp_path / "a.jsonl"), Rejects(), columns="frage")


def test_other_columns_travel_along_unused():
    record = {"instruction": "q", "output": "a", "origin": "hand", "score": 0.5}
    assert set(record) - set(detected(record).columns.values()) == {"origin", "score"}
