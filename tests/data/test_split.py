"""A row's split follows from its content alone; near-duplicates and groups are never parted."""

import random

import pytest

from helpers.data.dedup import NearIndex, near_pairs
from helpers.data.split import SPLITS, asks, smallest_linked, split, split_of
from helpers.data.tables import Table
from helpers.data.turns import make_row
from helpers.errors import TunebookError

GOLDEN = ["train", "train", "train", "test", "train", "train", "test", "train", "train", "train"]


def rows(count, group=lambda i: None, start=0):
    made = []
    for i in range(start, start + count):
        meta = {"topic": group(i)} if group(i) is not None else {}
        made.append(
            make_row(
                "sft",
                [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i * i}"}],
                row=i,
                meta=meta,
            )
        )
    return made


def where(tables):
    return {row["id"]: name for name, table in tables.items() for row in table.rows()}


def test_a_row_lands_in_the_same_split_whatever_stands_beside_it():
    few, many = rows(500), rows(3000)
    random.Random(0).shuffle(many)
    first, second = where(split([few], 0.1, 0.2)), where(split([many], 0.1, 0.2))
    assert all(second[key] == name for key, name in first.items()) and len(first) == 500


def test_the_places_of_known_rows_never_change():
    """Golden: these would move only if the splits of every earlier run moved with them."""
    found = [split_of(key, 0.1, 0.1) for key in ("0123456789abcdef", "a", "b", "c", "d", "e", "f", "g", "h", "i")]
    assert found == GOLDEN


def test_shares_are_met_and_growing_one_moves_rows_only_into_it():
    sample = rows(4000)
    tables = split([sample], 0.05, 0.10)
    assert abs(len(tables["eval"]) / 4000 - 0.05) < 0.015 and abs(len(tables["test"]) / 4000 - 0.10) < 0.02
    before, after = where(tables), where(split([sample], 0.05, 0.20))
    assert all(after[key] == name or after[key] == "test" for key, name in before.items())


def test_rows_of_one_group_never_straddle_and_keep_their_place_when_more_join():
    few, more = rows(300, lambda i: i % 40), rows(900, lambda i: i % 40)
    tables = split([more], 0.2, 0.2, group_by="topic")
    topics = {name: {row["meta"]["topic"] for row in table.rows()} for name, table in tables.items()}
    assert sum(len(part) for part in topics.values()) == 40 and all(topics[name] for name in SPLITS)
    old, new = where(split([few], 0.2, 0.2, group_by="topic")), where(tables)
    assert all(new[key] == name for key, name in old.items())


def test_an_unknown_group_column_names_the_columns_there_are():
    with pytest.raises(TunebookError, match=r"'subject' that group_by names; the other columns are topic"):
        split([rows(5, lambda i: i)], group_by="subject")


def test_near_duplicates_never_straddle_even_in_chains_and_across_groups():
    rng, made = random.Random(1), []
    for i in range(60):
        names = ["river", "lake", "mountain", "city", "border", "people", "north", "south", "large", "small"]
        words = [rng.choice(names) + str(rng.randrange(90)) for _ in range(60)]
        for copy in range(4):
            text = " ".join([*words[:-1], f"tail{copy}"])
            made.append(
                make_row(
                    "sft",
                    [{"role": "user", "content": "Say."}, {"role": "assistant", "content": text}],
                    row=len(made),
                    meta={"family": i},
                )
            )
    table = Table.collect([made])
    ids = [row["id"] for row in made]
    together = near_pairs(table)
    assert len(together) == 180 and together == near_pairs(table, NearIndex([*made[:9], *made])), "whichever index"
    assert near_pairs(table, NearIndex(made[:100])) == together, "an index of other rows is not taken"
    places = where(split(table, 0.3, 0.3, together=together))
    assert all(len({places[ids[4 * i + copy]] for copy in range(4)}) == 1 for i in range(60)) and set(
        places.values()
    ) == set(SPLITS)
    joined = split(table, 0.3, 0.3, "family", [(ids[0], ids[5]), (ids[6], ids[9])])
    places = where(joined)
    assert len({places[key] for key in ids[:12]}) == 1  # three families, chained by two near-duplicates


def test_groups_are_joined_across_chains():
    keys = smallest_linked([("d", "c"), ("b", "a"), ("c", "b"), ("x", "y")])
    assert keys == {**dict.fromkeys("abcd", "a"), "x": "x", "y": "x"} and smallest_linked([]) == {}


def test_plain_text_asks_no_question_and_is_never_held_out_for_the_test():
    texts = [make_row("text", [{"role": "text", "content": f"text {i}"}], row=i) for i in range(300)]
    assert len(split([texts], 0.1, 0.5)["test"]) == 0


# ---------------------------------------------------------------- rows that share a question


def talk(*turns, kind="sft", at=0, **more):
    """A row of alternating user and assistant turns."""
    roles = ("user", "assistant") * len(turns)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    if kind == "preference":
        more |= {side: [{"role": "assistant", "content": text}] for side, text in more.items()}
    return make_row(kind, messages, file="f", row=at, **more)


def sides(tables, of):
    """{group: the splits that it is in}"""
    found = {}
    for name, table in tables.items():
        for row in table.rows():
            found.setdefault(of(row), set()).add(name)
    return found


def first(row):
    return row["messages"][0]["content"].lower().split()[-1]


def test_a_question_with_other_answers_lands_on_one_side_and_keeps_its_place_when_more_join():
    made = [talk(f"{'Who' if j else 'who  '} is number {i}", f"answer {i} {j}") for i in range(200) for j in range(4)]
    tables = split([made], 0.2, 0.2)
    assert all(len(places) == 1 for places in sides(tables, first).values())
    assert all(len(table) > 100 for table in tables.values())
    more = sides(split([[*made, *(talk(f"who is number {i}", f"answer {i} 9") for i in range(200))]], 0.2, 0.2), first)
    assert more == sides(tables, first)
    pairs = [
        talk(f"who is number {i}", kind="preference", chosen=f"a {j}", rejected="b") for i in range(90) for j in "xyz"
    ]
    assert all(len(places) == 1 for places in sides(split([pairs], 0.3), first).values())


@pytest.mark.parametrize("opener", ["Hi", "Tell me about {}", "You are an agent that has tools. Begin."])
def test_conversations_expanded_turn_by_turn_land_on_one_side(opener):
    made = []
    for i in range(100):
        turns = [text for j in range(5) for text in (f"question {i} {j}", f"answer {i} {j}")]
        turns[0] = f"{opener.format(i)} {i}" if "{}" in opener else opener
        made += [talk(*turns[: 2 * length], at=i) for length in range(2 if "{}" not in opener else 1, 6)]
    tables = split([made], 0.2, 0.2)
    assert all(len(places) == 1 for places in sides(tables, lambda row: row["row"]).values())
    assert all(len(table) > 30 for table in tables.values())


def test_a_prompt_that_all_rows_share_parts_nothing_and_joins_nothing():
    tables = split([[talk("Write a haiku.", f"haiku {i}") for i in range(400)]], 0.2, 0.2)
    assert all(len(table) > 40 for table in tables.values())


def test_a_question_that_stands_in_two_groups_holds_them_together():
    made = [talk(f"question {i % 150}", f"answer {i}", meta={"topic": i % 60 // 2}) for i in range(300)]
    tables = split([made], 0.3, 0.3, group_by="topic")
    assert all(len(places) == 1 for places in sides(tables, lambda row: row["meta"]["topic"]).values())
    assert all(len(places) == 1 for places in sides(tables, lambda row: row["messages"][0]["content"]).values())


def test_pieces_of_a_document_stay_together_and_eval_gets_one_where_there_are_many():
    for documents in (1, 2, 25, 80):
        made = [
            make_row(
                "text", [{"role": "text", "content": f"{i} {j}"}], file=f"{i}.md", meta={"document": "a", "piece": j}
            )
            for i in range(documents)
            for j in range(10)
        ]
        tables = split([made], 0.05)
        assert all(len(places) == 1 for places in sides(tables, lambda row: row["file"]).values())
        assert len(tables["train"]) >= 10 and bool(len(tables["eval"])) == (documents > 10)


def test_small_sets_never_lose_their_training_rows_and_hold_out_what_a_share_makes_room_for():
    for start in range(0, 600, 20):
        for count in range(1, 21):
            tables = split([rows(count, start=start)], 0.05, 0.1)
            assert len(tables["train"]) >= max(1, count - 8)
            assert len(tables["test"]) or (count < 10 and len(tables["train"]) + len(tables["eval"]) == count)
            assert len(tables["eval"]) or count < 20
    single = split([[talk("the one question", f"answer {i}") for i in range(20)]], 0.05, 0.1)
    assert len(single["train"]) == 20


def test_a_row_asks_a_test_question_when_it_begins_with_one_or_one_begins_with_it():
    tests = Table.collect([[talk("How deep?", "a"), talk("Hi", "b", "How far?", "c")]])
    asking = [
        talk("how  deep?", "z"),
        talk("How deep?", "x", "And now?", "y"),
        talk("Hi", "b"),
        talk("Hi", "q", "How far?", "r"),
    ]
    other = [
        talk("How wide?", "a"),
        talk("Hi", "b", "How wide?", "c"),
        make_row("text", [{"role": "text", "content": "Hi"}]),
    ]
    assert [asks(tests)(row) for row in asking + other] == [True] * 4 + [False] * 3
