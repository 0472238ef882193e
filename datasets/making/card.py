"""The data card and dataset_info.json."""

from collections import Counter

from making import database, held_out, slots

COLUMNS = {"prompt": "question", "response": "sql", "system": "system"}
INFO = {
    "atlas_train": {"file_name": "atlas_train.jsonl", "columns": COLUMNS},
    "atlas_test": {"file_name": "atlas_test.jsonl", "columns": COLUMNS},
    "atlas_preference": {
        "file_name": "atlas_preference.jsonl",
        "ranking": True,
        "columns": {"prompt": "question", "system": "system", "chosen": "chosen", "rejected": "rejected"},
    },
    "general_text": {"file_name": "general_text.jsonl", "columns": {"prompt": "text"}},
}

FEATURES = {
    "join": lambda sql: " JOIN " in sql,
    "aggregate": lambda sql: any(f"{name}(" in sql for name in ("COUNT", "SUM", "AVG", "MIN", "MAX")),
    "grouping": lambda sql: "GROUP BY" in sql,
    "HAVING": lambda sql: "HAVING" in sql,
    "ordering": lambda sql: "ORDER BY" in sql,
    "nesting (subquery)": lambda sql: "(SELECT" in sql,
}

CARD = """---
license: cc0-1.0
language:
- en
task_categories:
- text-generation
tags:
- text-to-sql
- sqlite
- preference
pretty_name: World atlas text-to-SQL
size_categories:
- 1K<n<10K
configs:
- config_name: default
  data_files:
  - split: train
    path: atlas_train.jsonl
  - split: test
    path: atlas_test.jsonl
- config_name: preference
  data_files:
  - split: train
    path: atlas_preference.jsonl
---

# World atlas: text-to-SQL on one small database

English questions about a world atlas with the SQLite query that answers each, pairs of a right
and a wrong query, and a little general English to measure what fine-tuning makes a model forget.
Everything here was written for this project and is released under CC0-1.0.

| file | rows | columns |
|---|---|---|
| `atlas_train.jsonl` | {train} | `system`, `question`, `sql`, `kind`, `origin` |
| `atlas_test.jsonl` | {test} ({hand} by hand) | the same |
| `atlas_preference.jsonl` | {pairs} | `system`, `question`, `chosen`, `rejected`, `why`, `kind` |
| `general_text.jsonl` | 70 | `topic`, `text`: short prose of many kinds, to measure loss on |
| `general_tasks.jsonl` | 120 | `question`, `choices` (4), `answer` (index of the right choice, from 0) |
| `general_chat.jsonl` | 180 | `prompt`, `kind`: `manners` wants a friendly answer, `refusal` a refusal |
| `dataset_info.json` | | the same files as LLaMA-Factory names them |

## The database

`atlas.sqlite`, {tables} tables tied by foreign keys: {table_rows}.
Its sources are the readable files in `facts/`.

```
{system}
```

That one line is the system prompt of every row (83 tokens with SmolLM2's tokenizer; a whole
training example has 129 on average).

## What the questions ask

Every query runs, and **{filled:.0f} % of the gold answers are not empty**, in training as in the test.

| kind | training | test | preference |
|---|---|---|---|
{kinds}

| the query has | training | test |
|---|---|---|
{features}

## How it was made

`python datasets/build.py` makes the database, the three `atlas_*.jsonl` files, `dataset_info.json`
and this card; `--check` compares without writing. It needs only Python, draws nothing at random and
gives the same bytes everywhere.

- **Training and preference**: {patterns} query patterns (`making/patterns_*.py`), each with 10 to 16
  wordings, filled with entities of the training side. Preference questions are not training questions.
  Most wordings stand in `making/wordings.txt`: written query by query from the schema and everyday English, in as
  many forms of speech as possible (question, order, fragment, situation). A word other than a function word that the
  test questions use and the patterns' own training wordings do not (elevation, nation, territory) may not stand in it,
  and the build stops where one does: the test goes on asking for words that training never showed.
- **Test**: the same patterns in wordings that training never uses, about entities that training never
  names, and {hand} questions from `handwritten.jsonl`, written one by one and harder: their phrasing
  is freer and some of their query shapes occur in no pattern.
- **Held out** (`making/held_out.py`): {held_countries} countries with their capitals, cities and
  mountains, the continents {held_continents}, and some rivers, lakes, seas, ranges, languages and
  currencies. The build stops when a training or preference question, or its query, names a string or a
  number of two digits or more that a test query contains, has the wording of a test question once
  names and numbers are blanked, or has its query.
- **Every gold query** is executed twice, on the database and on a copy with the rows stored in reverse
  and without keys; one whose answer depends on storage order (a tie at a limit, for example) is
  refused. A pattern's query is kept only where turning its order, swapping its aggregate or leaving
  out a condition would change the answer.
- **Rejected queries** are the chosen one with one mistake such as models make
  (`making/mistakes.py`): it runs and answers differently. How often each occurs:

| mistake | pairs |
|---|---|
{mistakes}

## Limits

- The facts were written down from general knowledge and are meant for asking questions, not for
  looking up. Areas are total areas in km2 (France without overseas parts, Serbia without Kosovo).
  Populations are rounded estimates for about 2024; those of cities are for the built-up area and
  vary between sources by a third and more. Lengths of rivers and sizes of lakes vary between sources too.
- Left out of the members of the United Nations are three whose capital is disputed, not laid down or
  being moved: Israel, Nauru and Equatorial Guinea. South Africa has Pretoria, Bolivia Sucre.
  Continents follow the regions that the United Nations use for statistics (Cyprus in Asia).
- `borders` counts land borders of the listed countries, without overseas lands. `languages` has
  official or main languages, and not all of them where there are dozens.
- A mountain on a border stands under one of its countries only. Mountains, lakes, rivers and cities
  are a choice of well-known ones, and a city has a river only where that river is in `rivers`: an answer is right for this database, not for the world.
- Names are plain ASCII (Sao Paulo, Ivory Coast, Turkey). Each question has one gold query; another
  query with the same answer is as good, so compare answers, not text.
- Training questions come from patterns, so a high score here says that a model has learned this
  database, not text-to-SQL at large.
"""


def table(rows) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def render(train: list[dict], test: list[dict], pairs: list[dict], checker: slots.Checker, patterns: int) -> str:
    """The card's text, every count taken from the rows."""
    rows = database.rows()
    kinds = [Counter(row["kind"] for row in part) for part in (train, test, pairs)]
    gold = [row["sql"] for row in train + test]
    return CARD.format(
        train=len(train),
        test=len(test),
        pairs=len(pairs),
        patterns=patterns,
        hand=sum(row["origin"] == "hand" for row in test),
        tables=len(rows),
        system=database.SYSTEM,
        table_rows=", ".join(f"`{name}` {len(content)}" for name, content in rows.items()),
        filled=100 * sum(slots.filled(checker.answer(sql)) for sql in gold) / len(gold),
        kinds=table((kind, *(count[kind] for count in kinds)) for kind in sorted(kinds[0])),
        features=table(
            (name, *(sum(has(row["sql"]) for row in part) for part in (train, test))) for name, has in FEATURES.items()
        ),
        held_countries=len(held_out.COUNTRIES),
        held_continents=" and ".join(held_out.CONTINENTS),
        mistakes=table(sorted(Counter(row["why"] for row in pairs).items(), key=lambda item: (-item[1], item[0]))),
    )
