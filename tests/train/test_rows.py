"""Packing leaves the optimizer's batch as asked, whatever the rows, the accumulation or the number of GPUs."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import params
from helpers.errors import TunebookError
from helpers.model import packed_attention
from helpers.planner import row_plan
from helpers.train import config
from helpers.train import rows as training_rows


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(100, 300))
def test_best_fit_places_every_example_once_within_the_budget(lengths, budget):
    rows = row_plan.best_fit(lengths, budget)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= budget for row in rows)
    assert len(rows) <= 1 + 2 * sum(lengths) // budget


def test_best_fit_fills_rows_that_first_come_first_served_would_not():
    assert len(row_plan.best_fit([6, 5, 4, 3, 2], 10)) == 2


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_optimizer_step_sees_the_same_examples_on_any_number_of_gpus(world_size):
    draw = random.Random(0)
    examples = [{"input_ids": [n] * draw.randint(5, 90)} for n in range(50)]
    lengths = [len(e["input_ids"]) for e in examples]
    epochs = [row_plan.Batches(8).epoch(lengths, 3, epoch) for epoch in (0, 1)]
    layout = row_plan.lay_out(lengths, row_plan.heaviest(lengths, epochs), 200, world_size)
    rows = training_rows.PackedRows(
        examples,
        batches=row_plan.Batches(8),
        accumulation=layout.accumulation,
        world_size=world_size,
        seed=3,
        budget=200,
    )
    per_step = layout.accumulation * world_size
    for epoch in range(2):
        rows.set_epoch(epoch)
        assert len(rows) == per_step * math.ceil(50 / 8)
        expected = row_plan.Batches(8).epoch(lengths, 3, epoch)
        for step, batch in enumerate(expected):
            mine = [rows[step * per_step + r] for r in range(per_step)]
            assert sorted(e["input_ids"][0] for row in mine for e in row) == sorted(batch)
            assert all(sum(len(e["input_ids"]) for e in row) <= 200 for row in mine)


def test_the_order_depends_on_seed_and_epoch_alone():
    assert row_plan.Batches(4).epoch([1] * 20, 1, 0) == row_plan.Batches(4).epoch([1] * 20, 1, 0)
    assert (
        row_plan.Batches(4).epoch([1] * 20, 1, 0)
        != row_plan.Batches(4).epoch([1] * 20, 1, 1)
        != row_plan.Batches(4).epoch([1] * 20, 2, 1)
    )


def test_a_row_restarts_positions_and_never_predicts_across_documents():
    row = packed_attention.row_tensors([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9], "completion_mask": [0, 1]}])
    assert row["position_ids"].tolist() == [[0, 1, 2, 0, 1]] and row["labels"].tolist() == [[-100, 6, 7, -100, 9]]
    assert row["cu_seq_lens_q"].tolist() == [0, 3, 5] and row["max_length_q"] == 3 and row["document_lengths"] == (3, 2)


def test_an_empty_row_trains_nothing():
    for layout in ("packed", "padded"):
        batch = training_rows.RowCollator(0, layout)([[]])
        assert (batch["labels"] == -100).all() and batch["input_ids"].numel() == 1


def test_pairs_come_as_all_chosen_and_then_all_rejected():
    pair = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}
    batch = training_rows.PairCollator(0)([[pair, pair]])
    assert batch["document_lengths"] == (3, 3, 4, 4) and batch["pair_count"] == 2
    assert batch["completion_mask"].tolist() == [[0, 0, 1, 0, 0, 1, 0, 0, 1, 1, 0, 0, 1, 1]]
    padded = training_rows.PairCollator(0, "padded")([[pair]])
    assert padded["completion_mask"].tolist() == [[0, 0, 1, 0], [0, 0, 1, 1]] and padded["attention_mask"].sum() == 7


def test_the_users_turns_between_several_answers_of_a_pair_are_in_no_loss():
    pair = {"prompt_ids": [1, 2], "chosen_ids": [3, 9, 4], "rejected_ids": [5], "id": "p"}
    pair |= {"chosen_mask": [1, 0, 1], "rejected_mask": [1]}
    wanted = [[0, 0, 1, 0, 1], [0, 0, 1, 0, 0]]
    batch = training_rows.PairCollator(0, "padded")([[pair]])
    assert batch["completion_mask"].tolist() == wanted and batch["nll_tokens"] == 3
    assert batch["labels"][0].tolist() == [-100, 2, 3, -100, 4]
    packed = training_rows.PairCollator(0)([[pair]])
    assert packed["completion_mask"].tolist() == [[0, 0, 1, 0, 1, 0, 0, 1]]
    answers = [
        {"prompt_ids": [1, 2], "completion_ids": pair[f"{side}_ids"], "label": side == "chosen", "id": side}
        | {"completion_mask": pair[f"{side}_mask"]}
        for side in ("chosen", "rejected")
    ]
    kto = training_rows.PackedRows(answers, row_plan.Batches(2), 1, shuffle=False, lengths=[5, 3], partners=True)
    batch = training_rows.PairCollator(0, "padded", nll=False)([kto[0]])
    assert batch["completion_mask"].tolist() == wanted and batch["kl"]["completion_mask"].tolist() == wanted[::-1]
    assert batch["labels"].tolist() == [[-100, -100, 3, -100, 4], [-100, -100, 5, -100, -100]] and batch["good"] == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(100, 300), st.integers(1, 12))
def test_padded_rows_count_their_padding(lengths, budget, rows):
    fitted = row_plan.padded_fit(lengths, budget)
    assert sorted(i for row in fitted for i in row) == list(range(len(lengths)))
    assert all(row_plan.cost([lengths[i] for i in row], padded=True) <= budget for row in fitted)
    even = row_plan.spread(lengths, rows, padded=True)
    assert len(even) == rows and sorted(i for row in even for i in row) == list(range(len(lengths)))
    if len(fitted) <= rows:
        assert max(row_plan.cost([lengths[i] for i in row], padded=True) for row in even) <= budget


def test_padded_rows_put_like_lengths_together():
    lengths = [10, 1000, 12, 990, 11, 980, 9, 1000]
    epoch = row_plan.Batches(8).epoch(lengths, 1, 0)
    layout = row_plan.lay_out(lengths, row_plan.heaviest(lengths, [epoch]), 4000, 1, padded=True)
    rows = training_rows.PackedRows(
        [{"input_ids": [0] * n} for n in lengths],
        batches=row_plan.Batches(8),
        accumulation=layout.accumulation,
        padded=True,
        seed=1,
    )
    assert layout.accumulation == 2 and max(rows.costs()) == layout.max_row_tokens == 4000
    assert sum(rows.costs()) < 1.02 * sum(lengths)


LENGTHS = [5 + (n * 37) % 90 for n in range(200)]


@pytest.mark.parametrize(
    "batches",
    [row_plan.Batches(4, "packed", 128), row_plan.Batches(300, "tokens"), row_plan.Batches(8, by_length=True)],
    ids=["packed", "tokens", "by length"],
)
def test_every_unit_shows_each_example_once_an_epoch_in_as_many_steps(batches):
    for epoch in (0, 1):
        steps = batches.epoch(LENGTHS, 3, epoch)
        assert sorted(i for step in steps for i in step) == list(range(200)) and len(steps) == len(
            batches.epoch(LENGTHS, 3, 0)
        )
        assert steps == batches.epoch(LENGTHS, 3, epoch) != batches.epoch(LENGTHS, 4, epoch)
        tokens = [sum(LENGTHS[i] for i in step) for step in steps]
        if batches.unit == "packed":  # four sequences of at most 128 tokens, nearly full
            assert max(tokens) <= 512 and sum(tokens) > 0.9 * 512 * (len(steps) - 1)
            assert all(len(row_plan.best_fit([LENGTHS[i] for i in step], 128)) <= 4 for step in steps)
        if batches.unit == "tokens":
            assert max(tokens) <= 300 and sum(tokens) > 0.9 * 300 * (len(steps) - 1)
        if batches.by_length:
            spread = [max(LENGTHS[i] for i in step) - min(LENGTHS[i] for i in step) for step in steps]
            assert sum(spread) < 0.2 * 90 * len(steps)


@pytest.mark.parametrize(
    ("given", "world", "size", "accumulation"),
    [
        ({}, 2, 8, 0),
        ({"micro_batch": 2, "accumulation": 4}, 1, 8, 4),
        ({"micro_batch": 6, "accumulation": 4}, 2, 48, 4),
        ({"micro_batch": 2, "batch_size": 16}, 2, 16, 4),
        ({"accumulation": 2, "batch_size": 16}, 4, 16, 2),
        ({"micro_batch": 3, "accumulation": 2, "batch_size": 12}, 2, 12, 2),
    ],
)
def test_micro_batch_times_accumulation_times_gpus_is_the_batch(given, world, size, accumulation):
    found = row_plan.batches_of(params.resolve("sft", given), world)
    assert (found.size, found.accumulation) == (size, accumulation)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"micro_batch": 2, "accumulation": 4, "batch_size": 16},
            "batch_size is 16, and micro_batch 2 × accumulation 4",
        ),
        ({"micro_batch": 3, "batch_size": 16}, "no multiple of micro_batch 3 × 1 GPU"),
        ({"accumulation": 5}, "no multiple of accumulation 5"),
    ],
)
def test_batch_settings_that_contradict_each_other_are_refused(given, said):
    with pytest.raises(TunebookError, match=said):
        row_plan.batches_of(params.resolve("sft", given), 1)


@pytest.mark.parametrize(
    "given", [{"batch_unit": "packed", "packing": False}, {"batch_unit": "packed", "stage": "orpo"}], ids=str
)
def test_a_batch_unit_that_has_nothing_to_count_is_refused(given):
    with pytest.raises(TunebookError, match="set batch_unit to"):
        config.check(params.resolve(given.pop("stage", "sft"), given))
