"""Rows and tokens to the parquet files that the trainers take, written a batch at a time and put in place whole.

train.parquet, eval.parquet          id, source, messages (JSON), input_ids, completion_mask (1 = trained)
test.parquet                         id, prompt, reference, meta (JSON)
preference.parquet, preference_eval  id, prompt, chosen, rejected, prompt_ids, chosen_ids, rejected_ids
kto.parquet                          id, prompt, completion, label
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from helpers.data.labels import Encoded
from helpers.data.tables import Table
from helpers.data.turns import Row


def _turn() -> Any:
    import pyarrow as pa

    return pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def schema(kind: str) -> Any:
    """The pyarrow schema of "tokens", "test", "preference" or "kto"."""
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    return pa.schema(
        {
            "tokens": [
                ("id", pa.string()),
                ("source", pa.string()),
                ("messages", pa.string()),
                ("input_ids", ids),
                ("completion_mask", pa.list_(pa.int8())),
            ],
            "test": [("id", pa.string()), ("prompt", _turn()), ("reference", pa.string()), ("meta", pa.string())],
            "preference": [
                ("id", pa.string()),
                ("prompt", _turn()),
                ("chosen", _turn()),
                ("rejected", _turn()),
                ("prompt_ids", ids),
                ("chosen_ids", ids),
                ("rejected_ids", ids),
            ],
            "kto": [("id", pa.string()), ("prompt", _turn()), ("completion", _turn()), ("label", pa.bool_())],
        }[kind]
    )


class Writer:
    """A parquet file that grows by batches under a partial name and gets its own name when it is closed."""

    def __init__(self, path: Path, kind: str):
        import pyarrow.parquet as pq

        self.path, self.schema, self.rows = path, schema(kind), 0
        self._partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        self._writer = pq.ParquetWriter(self._partial, self.schema, compression="zstd")

    def write(self, columns: dict[str, Any]) -> None:
        import pyarrow as pa

        from helpers.storage import disk_error

        table = pa.table(
            [
                columns[name]
                if isinstance(columns[name], pa.Array)
                else pa.array(columns[name], self.schema.field(name).type)
                for name in self.schema.names
            ],
            schema=self.schema,
        )
        try:
            self._writer.write_table(table)
        except OSError as error:
            raise disk_error(error, self.path) from error
        self.rows += len(table)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._writer.close()
        if kind is None:
            os.replace(self._partial, self.path)
        else:
            self._partial.unlink(missing_ok=True)


def token_columns(batch: list[Encoded]) -> dict[str, Any]:
    """One batch of encoded rows as columns; token lists go to Arrow as one flat array and its offsets."""
    import numpy as np
    import pyarrow as pa

    offsets = pa.array(np.concatenate([[0], np.cumsum([len(one.ids) for one in batch])]).astype(np.int32))
    flat = {name: np.concatenate([getattr(one, name) for one in batch]) if batch else [] for name in ("ids", "mask")}
    return {
        "id": [one.row["id"] for one in batch],
        "source": [one.row["source"] for one in batch],
        "messages": [json.dumps(one.row["messages"], ensure_ascii=False) for one in batch],
        "input_ids": pa.ListArray.from_arrays(offsets, pa.array(flat["ids"], pa.int32())),
        "completion_mask": pa.ListArray.from_arrays(offsets, pa.array(flat["mask"], pa.int8())),
    }


def write_tokens(path: Path, encoded: Iterable[list[Encoded]]) -> int:
    """train.parquet or eval.parquet; returns the rows written."""
    with Writer(path, "tokens") as writer:
        for batch in encoded:
            if batch:
                writer.write(token_columns(batch))
        return writer.rows


def write_test(path: Path, table: Table) -> int:
    """test.parquet: prompts without their answer, the answer as reference. Preference rows give their chosen answer."""
    with Writer(path, "test") as writer:
        for batch in table:
            batch = [row for row in batch if row["kind"] != "text"]
            prompts = [row["messages"] if row["kind"] == "preference" else row["messages"][:-1] for row in batch]
            answers = [row["chosen"][-1] if row["kind"] == "preference" else row["messages"][-1] for row in batch]
            writer.write(
                {
                    "id": [row["id"] for row in batch],
                    "prompt": [plain_turns(prompt) for prompt in prompts],
                    "reference": [plain_turns([answer])[0]["content"] for answer in answers],
                    "meta": [
                        json.dumps(
                            {"source": row["source"], "file": row["file"], "row": row["row"], **row["meta"]},
                            ensure_ascii=False,
                        )
                        for row in batch
                    ],
                }
            )
        return writer.rows


def write_pairs(path: Path, pairs: Iterable[list[tuple[Row, Encoded, Encoded]]]) -> int:
    """preference.parquet: conversational columns for TRL, and the same as token ids, each answer with its one end of turn."""
    with Writer(path, "preference") as writer:
        for batch in pairs:
            if batch:
                writer.write(
                    {
                        "id": [row["id"] for row, _, _ in batch],
                        "prompt": [plain_turns(row["messages"]) for row, _, _ in batch],
                        "chosen": [plain_turns(row["chosen"]) for row, _, _ in batch],
                        "rejected": [plain_turns(row["rejected"]) for row, _, _ in batch],
                        "prompt_ids": [chosen.ids[: chosen.prompt] for _, chosen, _ in batch],
                        "chosen_ids": [chosen.ids[chosen.prompt : chosen.ends[-1] + 1] for _, chosen, _ in batch],
                        "rejected_ids": [
                            rejected.ids[rejected.prompt : rejected.ends[-1] + 1] for _, _, rejected in batch
                        ],
                    }
                )
        return writer.rows


def write_kto(path: Path, table: Iterable[list[Row]]) -> int:
    """kto.parquet: prompt, completion and label, as TRL's KTOTrainer takes them."""
    with Writer(path, "kto") as writer:
        for batch in table:
            writer.write(
                {
                    "id": [row["id"] for row in batch],
                    "prompt": [plain_turns(row["messages"][:-1]) for row in batch],
                    "completion": [plain_turns(row["messages"][-1:]) for row in batch],
                    "label": [row["label"] for row in batch],
                }
            )
        return writer.rows


def plain_turns(messages: list[dict]) -> list[dict]:
    """Turns of role and content alone; a tool call becomes its JSON text."""
    from helpers.data.labels import spelt_out

    return [{"role": turn["role"], "content": turn["content"]} for turn in map(spelt_out, messages)]
