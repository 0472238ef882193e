"""A finished data stage for the training tests, made through the real tokenizer and helpers.runs."""

import json
import random

from helpers import params as parameters
from helpers.model.loading import template_hash, tokenizer_hash
from helpers.model.stop_tokens import end_of_turn
from tests.conftest import begun

SMALL = {"run": "r", "rank": 4, "alpha": 8, "precision": "fp32", "method": "lora", "export_check": False}
SMALL |= {"score_rows": 0}  # the best checkpoint by the held-out loss
SCHEMA = (
    "Write one SQLite query. Tables: city(id, name, country, population), river(id, name, length_km, country), "
    "lake(id, name, area_km2, country). Answer with SQL only."
)
PLACES = ("Norway", "Chile", "Kenya", "Japan", "Peru", "Spain", "Egypt", "India", "Italy", "Ghana", "Nepal", "Cuba")
THINGS = (("cities", "city", "population"), ("rivers", "river", "length_km"), ("lakes", "lake", "area_km2"))


def questions(count, seed=0):
    """(question, right SQL, wrong SQL) made from a few patterns."""
    draw = random.Random(seed)
    for _ in range(count):
        many, table, column = draw.choice(THINGS)
        place, n = draw.choice(PLACES), draw.randint(2, 90)
        yield draw.choice(
            (
                (
                    f"How many {many} are in {place}?",
                    f"SELECT COUNT(*) FROM {table} WHERE country = '{place}'",
                    f"SELECT COUNT(*) FROM {table}",
                ),
                (
                    f"Name the {many} in {place}.",
                    f"SELECT name FROM {table} WHERE country = '{place}'",
                    f"SELECT id FROM {table} WHERE country = '{place}'",
                ),
                (
                    f"Which {many} have {column} above {n}?",
                    f"SELECT name FROM {table} WHERE {column} > {n}",
                    f"SELECT name FROM {table} WHERE {column} < {n}",
                ),
            )
        )


def chat(question):
    return [{"role": "system", "content": SCHEMA}, {"role": "user", "content": question}]


def ids_of(tokenizer, question, answer):
    """(prompt ids, completion ids that end with exactly one end of turn)."""
    prompt = tokenizer.apply_chat_template(chat(question), add_generation_prompt=True, tokenize=True, return_dict=False)
    return prompt, [*tokenizer(answer, add_special_tokens=False)["input_ids"], end_of_turn(tokenizer)]


def sft_rows(tokenizer, count, seed=0):
    rows = []
    for number, (question, right, _) in enumerate(questions(count, seed)):
        prompt, answer = ids_of(tokenizer, question, right)
        rows.append(
            {
                "id": f"q{seed}-{number}",
                "source": "test",
                "messages": json.dumps([*chat(question), {"role": "assistant", "content": right}]),
                "input_ids": prompt + answer,
                "completion_mask": [0] * len(prompt) + [1] * len(answer),
            }
        )
    return rows


def pair_rows(tokenizer, count, seed=0):
    rows = []
    for number, (question, right, wrong) in enumerate(questions(count, seed)):
        prompt, chosen = ids_of(tokenizer, question, right)
        rows.append(
            {
                "id": f"p{seed}-{number}",
                "prompt": chat(question),
                "chosen": [{"role": "assistant", "content": right}],
                "rejected": [{"role": "assistant", "content": wrong}],
                "prompt_ids": prompt,
                "chosen_ids": chosen,
                "rejected_ids": ids_of(tokenizer, question, wrong)[1],
            }
        )
    return rows


def write_parquet(path, rows, like=None):
    """like: rows with the same columns, where there may be none."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    types = {
        "input_ids": pa.list_(pa.int32()),
        "completion_mask": pa.list_(pa.int8()),
        "prompt_ids": pa.list_(pa.int32()),
        "chosen_ids": pa.list_(pa.int32()),
        "rejected_ids": pa.list_(pa.int32()),
    }
    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    schema = pa.schema(
        [(k, types.get(k, turns if k in ("prompt", "chosen", "rejected") else pa.string())) for k in (rows or like)[0]]
    )
    parquet.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def settings(stage, **given):
    """The stage's parameters for a short training of the small model in 32 bits; `given` goes before."""
    return parameters.resolve(stage, {**SMALL, **given})


def data_stage(run, model, tokenizer, train=None, held_out=None, pairs=None, held_out_pairs=None, name=None, **given):
    """Write a finished data stage for `run`; `model` is a folder, `given` other parameters. Returns its manifest."""
    stage = begun("data", parameters.resolve("data", {"run": run, "model": str(model), **given}))
    if given:
        tokenizer.save_pretrained(stage.path / "tokenizer")
    for file, rows in (
        ("train", train or sft_rows(tokenizer, 32)),
        ("eval", held_out or sft_rows(tokenizer, 8, seed=1)),
        ("preference", pairs or pair_rows(tokenizer, 24)),
        ("preference_eval", pair_rows(tokenizer, 8, seed=1) if held_out_pairs is None else held_out_pairs),
    ):
        write_parquet(stage.path / f"{file}.parquet", rows, pair_rows(tokenizer, 1))
    return stage.finish(
        {"rows": 1},
        template_hash=template_hash(tokenizer),
        tokenizer_hash=tokenizer_hash(tokenizer),
        model={"name": name or str(model), "path": str(model), "revision": "", "origin": "folder"},
    )
