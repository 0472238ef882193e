"""Files of the data stage as training examples: what is left out is counted, and nothing is held in memory."""

from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers import runs
from helpers.errors import TunebookError
from helpers.train import examples


def data_stage(folder, name, rows):
    pq.write_table(pa.Table.from_pylist([{"id": f"r{i}", **row} for i, row in enumerate(rows)]), folder / name)
    return runs.Manifest(folder, {"params": {}})


def test_pairs_that_cannot_be_trained_are_left_out_with_their_reason_and_long_prompts_are_cut(tmp_path):
    kinds = [
        {"prompt_ids": [1] * 9, "chosen_ids": [2], "rejected_ids": [3]},
        {"prompt_ids": [1], "chosen_ids": [], "rejected_ids": [3]},
        {"prompt_ids": [1], "chosen_ids": [2, 4], "rejected_ids": [2, 4]},
        {"prompt_ids": [1, 5], "chosen_ids": [2, 4], "rejected_ids": [3, 4]},
    ]
    rows = [kinds[i % 4] for i in range(4 * examples.BATCH // 2)]  # two batches
    data = data_stage(tmp_path, "preference.parquet", rows)
    found, counts = examples.pairs(data, "preference.parquet", SimpleNamespace(max_length=8, max_prompt_length=0))
    each = len(rows) // 4
    reasons = ("over 8 tokens", "chosen is empty", "chosen equals rejected")
    assert counts["left out"] == dict.fromkeys(reasons, each) and counts["pairs"] == len(rows) and len(found) == each
    assert counts["left out ids"][:4] == ["r0", "r1", "r2", "r4"] and len(counts["left out ids"]) == 50
    assert found[0] == {"id": "r3", **kinds[3]} and found[each - 1]["id"] == f"r{len(rows) - 1}"
    assert examples.lengths_of(found) == [8] * each and examples.lengths_of(found, padded=True) == [8] * each
    found, counts = examples.pairs(data, "preference.parquet", SimpleNamespace(max_length=8, max_prompt_length=1))
    assert counts["prompts cut"] == 2 * each and [row["prompt_ids"] for row in found.select(range(4))] == [[1], [5]] * 2


def test_masks_of_answers_are_kept_only_where_one_leaves_something_out(tmp_path):
    pair = {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4], "rejected_mask": [1]}
    for mask, kept in (([1, 1], False), ([1, 0], True)):
        data = data_stage(tmp_path, "preference.parquet", [pair | {"chosen_mask": mask}])
        found, _ = examples.pairs(data, "preference.parquet", SimpleNamespace(max_length=8, max_prompt_length=0))
        assert ("chosen_mask" in found.column_names) == kept and len(found) == 1


def test_examples_without_a_trained_token_are_left_out_and_the_rest_labelled(tmp_path):
    ids = [[5, 6, 7], [5, 6], [8], [5, 6, 7, 8]]
    masks = [[0, 1, 1], [1, 0], [1], [0, 0, 0, 1]]
    data = data_stage(
        tmp_path,
        "train.parquet",
        [{"input_ids": i, "completion_mask": m} for i, m in zip(ids, masks, strict=True)],
    )
    found, counts = examples.supervised(data, "train.parquet")
    assert counts == {"rows": 4, "without trained tokens": 2}
    assert [row["labels"] for row in found] == [[-100, 6, 7], [-100, -100, -100, 8]] and found[1]["id"] == "r3"
    every, counts = examples.supervised(data, "train.parquet", "all")
    assert [row["labels"] for row in every] == [ids[0], ids[1], ids[3]] and counts["without trained tokens"] == 1
    assert examples.lengths_of(every) == [3, 2, 4] and examples.supervised(data, "none.parquet")[0].num_rows == 0
    assert examples.lengths_of(every.select([2, 0])) == [4, 3]
    data = data_stage(tmp_path, "train.parquet", [{"input_ids": [1, 2], "completion_mask": [1]}])
    with pytest.raises(TunebookError, match=r"differ in length.*rerun 01"):
        examples.supervised(data, "train.parquet")
