"""Notebook 01 whole on each of the small inputs in cases/, against each file's right value."""

import json

import pyarrow.parquet as pq
import pytest

from helpers import params
from helpers.data import prepare
from helpers.errors import TunebookError
from tests.data.test_reading_cases import CASES
from tests.data.test_rendering import GEMMA, HERMES, QWEN3, Asking

DATED = "{{ strftime_now('%d %B %Y') }}\n" + HERMES
FILES = ("train", "eval", "test", "preference", "preference_eval", "kto")


class Done:
    """What a job wrote: rows by file; trained: the texts that are trained, by row; whole: with prompts; lost."""

    def __init__(self, name, model, **given):
        given = {"dataset": str(CASES / name), "run": "case", "reject_limit": 1.0, "loss_limit": 1.0, **given}
        given["model"] = str(model)
        self.job = prepare.open(params.resolve("data", given))
        for step in ("read", "generate", "clean", "mix", "split", "encode", "pairs"):
            getattr(self.job, step)()
        self.facts = dict(self.job.template().facts())
        self.job.finish()
        files = {name: self.job.path / f"{name}.parquet" for name in FILES}
        self.rows = {name: pq.read_table(file).to_pylist() for name, file in files.items() if file.exists()}
        tokenizer = self.job.tokenizer
        self.trained = [
            tokenizer.decode([t for t, m in zip(row["input_ids"], row["completion_mask"], strict=True) if m])
            for name in ("train", "eval")
            for row in self.rows[name]
        ]
        self.whole = [tokenizer.decode(row["input_ids"]) for name in ("train", "eval") for row in self.rows[name]]
        self.lost = [json.loads(line) for line in (self.job.path / "rejected.jsonl").read_text().splitlines()]

    def count(self, *names):
        return sum(len(self.rows.get(name, ())) for name in names or ("train", "eval", "test"))

    def answers(self):
        """What is given of an example, by pairs."""
        return [(row["prompt"], row["chosen"], row["rejected"]) for row in self.rows["preference"]]


def prompts_are_trained_ones(done):
    """The prompt that 05 asks is the one that the same conversation is trained behind."""
    from helpers.data.labels import Encoder
    from helpers.data.turns import make_row

    asking = Asking(done.job.tokenizer)
    for row in done.rows["test"]:
        messages = json.loads(row["messages"])
        whole = make_row("sft", messages, tools=row["tools"])
        ((one,),) = Encoder(done.job.template()).encode([[whole]])
        if asking.encode(messages[:-1], row["tools"]) != one.ids[: one.prompt].tolist():
            return False
    return len(done.rows["test"]) > 0 and all(row["tools"] for row in done.rows["test"])


def by_question(done):
    """The questions of each split."""
    return [
        {json.loads(row["messages"])[0]["content"] for row in done.rows[name]} for name in ("train", "eval", "test")
    ]


SEARCH = {"test_share": 0.2, "eval_share": 0.1}
RIGHT = {
    "half-calls.jsonl": ({}, lambda d: d.count() == 60 and sum('"find"' in text for text in d.trained) > 20),
    "heldout-qwen.jsonl": ({"chat_template": QWEN3, **SEARCH}, prompts_are_trained_ones),
    "pairs-tools.jsonl": (
        {"preference_eval_share": 0.3},
        lambda d: (
            len(d.rows["preference"]) + len(d.rows["preference_eval"]) == 20 - len(d.rows["test"])
            and all(row["tools"] for name in ("preference", "preference_eval") for row in d.rows[name])
        ),
    ),
    "reasoning-field-qwen3.jsonl": (
        {"chat_template": QWEN3},
        lambda d: (
            d.trained == [f"<think>\n{n} doubled makes {2 * n}.\n</think>\n\n{2 * n}<|im_end|>" for n in (0, 1, 2)]
        ),
    ),
    "weight-openai.jsonl": ({"train_on": "all"}, lambda d: d.trained == ["No: Lima<|im_end|>"]),
    "train-axolotl.jsonl": ({"train_on": "all"}, lambda d: d.trained == ["No: Lima<|im_end|>"]),
    "special-tags.jsonl": (
        {"chat_template": HERMES},
        lambda d: d.trained[0].count('"find"') == 2 and d.trained[0].endswith("<|im_end|>"),
    ),
    "null-json.jsonl": (
        {},
        lambda d: '"before": null' in d.trained[0] and '"default": null' in d.rows["train"][0]["tools"],
    ),
    "toolargs-types.parquet": ({}, lambda d: "2024-05-01T09:00:00" in d.trained[0] and not d.lost),
    "pref-multiturn.jsonl": (
        {"test_share": 0.0, "preference_eval_share": 0.0},
        lambda d: (
            all(
                [t["content"] for t in row["prompt"]] == [f"Plan trip {n}."]
                and "The sea"
                not in d.job.tokenizer.decode(
                    [i for i, m in zip(row["chosen_ids"], row["chosen_mask"], strict=True) if m]
                )
                for n, row in enumerate(sorted(d.rows["preference"], key=lambda row: row["messages"]))
            )
            and len(d.rows["preference"]) == 4
        ),
    ),
    "trim-pairs.jsonl": (
        {"chat_template": GEMMA, "test_share": 0.0, "preference_eval_share": 0.0},
        lambda d: len(d.rows["preference"]) == 4 == sum(one["reason"] == "same answer twice" for one in d.lost),
    ),
    "pref-embedded-strings.jsonl": (
        {"preference_eval_share": 0.0},
        lambda d: [pair[1][0]["content"] for pair in d.answers()] == ["Try oolong."],
    ),
    "decon-sqlcontext-mixed.jsonl": (
        {"test_dataset": str(CASES / "decon-sqlcontext-test.jsonl")},
        lambda d: d.count("train", "eval") == 120 and d.count("test") == 40,
    ),
    "dedup-tiny-difference.jsonl": ({}, lambda d: d.count() == 60),
    "leak-answers.jsonl": (
        SEARCH,
        lambda d: d.count() == 240 and sum(map(len, by_question(d))) == 60 and all(by_question(d)),
    ),
    "kto-strings.jsonl": (
        {"test_share": 0.0},
        lambda d: (
            sorted(row["label"] for row in d.rows["kto"]) == [False] * 3 + [True] * 3
            and not any("Get lost" in text for text in d.trained)
        ),
    ),
    "kto.csv": ({"test_share": 0.0}, lambda d: sorted(r["label"] for r in d.rows["kto"]) == [False] * 3 + [True] * 3),
    "dolly.jsonl": ({"test_share": 0.0}, lambda d: any("1911 and carries" in text for text in d.whole)),
    "mmlu.jsonl": (
        {"test_share": 0.0},
        lambda d: d.count() == 3 and all("D. 9" in text for text in d.whole) and all("B" in t for t in d.trained),
    ),
    "columns-sql-create-context.jsonl": (
        {},
        lambda d: d.count() == 1 and [one["reason"] for one in d.lost] == ["no answer"] * 2,
    ),
    "columns-messages-string.jsonl": ({}, lambda d: d.trained == ["Hello<|im_end|>"]),
    "nan.parquet": ({}, lambda d: d.count() == 6 and not any("nan" in text.lower() for text in d.whole)),
    "unclosed-quote.csv": ({}, lambda d: d.count() == 300 and d.job.rejects.invalid["malformed csv"] == 100),
    "lines-2028.json": ({}, lambda d: d.count() == 6 and not d.lost),
    "array-pretty.jsonl": ({}, lambda d: d.count() == 6 and not d.lost),
    "tiny-1-unlucky.jsonl": ({}, lambda d: d.count("train") == 1),
    "e-special-test.jsonl": (
        {"dataset": str(CASES / "dolly.jsonl"), "test_dataset": str(CASES / "e-special-test.jsonl")},
        lambda d: d.count("test") == 1 and [one["reason"] for one in d.lost] == ["special token in text"],
    ),
    "dated.jsonl": ({"chat_template": DATED}, lambda d: "template_arguments" in d.facts["writes the date"]),
}
REFUSED = {
    "bool-label.jsonl": ({}, "two readings.*format=kto.*columns=prompt=question,response=answer"),
    "control.jsonl": ({}, "special token in text.*control_tokens to 'text'"),
    "e-gemma-test.jsonl": (
        {
            "dataset": str(CASES / "dolly.jsonl"),
            "test_dataset": str(CASES / "e-gemma-test.jsonl"),
            "chat_template": GEMMA,
        },
        "No row of the test set can be used.*System role not supported",
    ),
}


@pytest.fixture
def done(runs_root, tmp_path, monkeypatch, smollm2):
    monkeypatch.setenv("TUNEBOOK_CACHE", str(tmp_path / "cache"))
    return lambda name, **given: Done(name, smollm2.path, **given)


@pytest.mark.parametrize("name", RIGHT)
def test_a_job_on_each_case_writes_what_is_right(name, done):
    given, right = RIGHT[name]
    assert right(done(name, **given))


@pytest.mark.parametrize("name", REFUSED)
def test_a_job_on_a_case_that_cannot_be_used_stops_with_its_reason(name, done):
    given, said = REFUSED[name]
    with pytest.raises(TunebookError, match=said):
        done(name, **given)


def test_every_case_has_its_job():
    if CASES.is_dir():
        others = {"decon-sqlcontext-test.jsonl", "shop.sqlite", "sql-answers.json", "text-answers.json"}
        assert {file.name for file in CASES.iterdir()} - others <= {*RIGHT, *REFUSED}
