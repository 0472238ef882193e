"""Mixing: shares are met, nothing is taken twice, every part of the stream holds the mixture."""

import random

import pytest

from helpers.data.mixing import Source, mix, numbers
from helpers.data.tables import StepReport, Table
from helpers.data.turns import batches, make_row
from helpers.errors import TunebookError


def table(name, rows, words=5):
    rng = random.Random(name)
    made = (
        make_row(
            "text",
            [{"role": "text", "content": " ".join(rng.choices("abcdefgh", k=words)) + f" {i}"}],
            source=name,
            row=i,
        )
        for i in range(rows)
    )
    return Table.collect(batches(made, 300), spill_rows=500)


def run(sources, **options):
    report = StepReport("mix")
    options = {"replay_share": 0.0, "lengths": words_of, **options}
    rows = [row for batch in mix(sources, report, **options) for row in batch]
    assert report.kept == len(rows)
    assert len({(r["source"], r["row"]) for r in rows}) == len(rows), "no row is taken twice"
    return rows, report


def share(rows, name):
    return sum(r["source"] == name for r in rows) / len(rows)


def words_of(batch):
    return [len(row["messages"][0]["content"].split()) for row in batch]


@pytest.fixture(scope="module")
def tables():
    return {"a": table("a", 3_000), "b": table("b", 1_000), "general": table("general", 800, words=20)}


def test_without_weights_every_row_is_taken_once(tables):
    rows, report = run({"a": Source(tables["a"]), "b": Source(tables["b"])})
    assert len(rows) == 4_000 and report.seen == 4_000 and not report.dropped
    mixture = report.figures["mixture"]["a"]
    assert (mixture["rows"], mixture["rows_share"], mixture["available"]) == (3_000, 0.75, 3_000)
    assert mixture["weight"] is None and not mixture["replay"] and mixture["tokens_share"] == 0.75


def test_weights_are_shares_of_rows(tables):
    rows, report = run({"a": Source(tables["a"], weight=1), "b": Source(tables["b"], weight=3)})
    assert share(rows, "b") == pytest.approx(0.75, abs=0.001) and sum(r["source"] == "b" for r in rows) == 1_000, (
        "the scarce source is used up"
    )
    assert report.dropped == {"not needed for the mixture: a": 2_667}


def test_caps_hold(tables):
    rows, _ = run({"a": Source(tables["a"], cap=100), "b": Source(tables["b"])})
    assert sum(r["source"] == "a" for r in rows) == 100 and len(rows) == 1_100


def test_replay_is_its_share_of_the_whole(tables):
    rows, report = run({"a": Source(tables["a"]), "general": Source(tables["general"], replay=True)}, replay_share=0.1)
    assert share(rows, "general") == pytest.approx(0.1, abs=0.001) and sum(r["source"] == "a" for r in rows) == 3_000
    assert report.figures["mixture"]["general"]["replay"] is True


def test_too_little_replay_data_shrinks_the_rest_and_not_the_share(tables):
    rows, report = run({"a": Source(tables["a"]), "general": Source(tables["general"], replay=True)}, replay_share=0.4)
    assert (
        share(rows, "general") == pytest.approx(0.4, abs=0.001) and sum(r["source"] == "general" for r in rows) == 800
    )
    assert report.dropped == {"not needed for the mixture: a": 1_800}


def test_replay_data_is_left_out_without_a_share(tables):
    rows, _ = run({"a": Source(tables["a"]), "general": Source(tables["general"], replay=True)})
    assert share(rows, "general") == 0


def test_every_stretch_holds_the_mixture(tables):
    rows, _ = run({"a": Source(tables["a"], weight=0.8), "b": Source(tables["b"], weight=0.2)})
    for at in range(0, len(rows) - 50, 50):
        assert abs(share(rows[at : at + 50], "b") - 0.2) <= 0.02
    for name in ("a", "b"):
        places = [r["row"] for r in rows if r["source"] == name]
        assert places == sorted(places)


def test_the_choice_depends_on_content_and_seed_alone(tables):
    sources = {"a": Source(tables["a"], cap=200)}
    once, again, other = run(sources)[0], run(sources)[0], run(sources, seed=18)[0]
    assert [r["id"] for r in once] == [r["id"] for r in again] != [r["id"] for r in other]
    more = Table.collect(iter([*tables["a"], *table("z", 300)]))
    kept = {r["id"] for r in run({"a": Source(more, cap=220)})[0]}
    assert len(kept & {r["id"] for r in once}) > 180, "more data elsewhere leaves most of the choice as it was"


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ({"a": 1, "b": None}, {}, "gives b no weight"),
        ({"a": 0, "b": 0}, {}, "every weight is 0"),
        ({"a": 1, "empty": 1}, {}, "empty has no row left"),
        ({"empty": None}, {}, "There is no row to mix"),
        ({"a": 1}, {"replay_share": 0.2}, "no replay data"),
    ],
)
def test_what_cannot_be_mixed_is_refused(tables, weights, options, message):
    everything = tables | {"empty": table("empty", 0)}
    with pytest.raises(TunebookError, match=message):
        run({name: Source(everything[name], weight=weight) for name, weight in weights.items()}, **options)


@pytest.mark.parametrize("text", ["a=-1", "a=nan", "a=inf", "c=1", "a=much", "a"])
def test_weights_that_are_no_numbers_of_a_source_are_refused(text):
    with pytest.raises(TunebookError, match=r"weights has '.*source=number pairs.*a, b"):
        numbers("weights", text, ["a", "b"])
