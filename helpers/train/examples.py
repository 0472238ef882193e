"""The data stage's parquet files as training examples, read in a stream, and every one that cannot be used counted."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

from helpers import cache
from helpers.display import say
from helpers.errors import TunebookError
from helpers.model.packed_attention import IGNORE
from helpers.runs import Manifest

BATCH = 8192  # rows read at once
Change = Callable[[Any], Any]
PAIR, MASKS = ("chosen_ids", "rejected_ids"), ("chosen_mask", "rejected_mask")


def read(data: Manifest, params: Any) -> tuple[Any, Any, dict[str, dict[str, Any]]]:
    """(training rows, `eval_rows` held-out rows or None, counts of both) of a stage's parameters.

    Raises TunebookError when there is nothing to train on.
    """
    files = ("train.parquet", "eval.parquet")
    if params.stage == "orpo":
        files = ("preference.parquet", "preference_eval.parquet")
        (train, counted), (held_out, more) = (pairs(data, file, params) for file in files)
        if params.loss == "kto":
            train, held_out, counted, more = answers(data, params, train, held_out, counted, more)
    else:
        (train, counted), (held_out, more) = (supervised(data, file, params.train_on) for file in files)
    if not len(train) and params.stage == "orpo":
        why = ", ".join(f"{n} {reason}" for reason, n in counted["left out"].items()) or "there is none"
        raise TunebookError(
            f"{data.path / files[0]} has no pair to train on ({why}); raise max_length, or set preference_dataset in "
            "notebook 01 and run it again."
        )
    if not len(train):
        raise TunebookError(
            f"{data.path / files[0]} has {counted['rows']} rows and every token is masked, nothing would be trained; "
            "answers are empty or cut off: check the preview of notebook 01 and max_length, or set train_on to 'all'."
        )
    held_out = held_out.select(range(min(params.eval_rows or len(held_out), len(held_out))))
    if params.stage == "orpo" and not len(held_out):
        say("No pair is held out: this run will have no held-out figure, and its last step is kept.")
    return train, held_out if len(held_out) else None, {"train": counted, "eval": more}


def _table(data: Manifest, name: str, columns: list[str], others: Sequence[str], change: Change) -> Any:
    """The rows that `change` makes of one of the data stage's files, of these columns and `others` that it has; none
    where it wrote none. In a memory-mapped file that nobody else sees: a million rows take no more memory than ten.

    change: (record batch) -> record batch.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    file = data.path / name
    if not file.is_file():
        return Dataset.from_dict({column: [] for column in columns})
    home = cache.folder()
    try:
        source = parquet.ParquetFile(file)
        wanted = [*columns, *(name for name in others if name in source.schema_arrow.names)]
        with cache.writing(home):
            home.mkdir(parents=True, exist_ok=True)
        with cache.writing(home), tempfile.TemporaryDirectory(dir=home) as folder:
            kept, sink = Path(folder) / "rows.arrow", None
            for batch in source.iter_batches(BATCH, columns=wanted):
                made = change(batch)
                sink = sink or pyarrow.ipc.new_stream(kept, made.schema)
                sink.write_batch(made)
            if sink is None:
                return Dataset.from_dict({column: [] for column in columns})
            sink.close()
            return Dataset.from_file(str(kept))
    except (pyarrow.ArrowInvalid, KeyError, ValueError) as error:
        why = str(error).splitlines()[0][:160]
        raise TunebookError(f"{file} cannot be read as rows with {', '.join(columns)} ({why}); rerun 01.") from error


def _lists(batch: Any, column: str) -> tuple[Any, Any]:
    """(all values of a column of lists, the lists' lengths) as numpy arrays."""
    lists = batch.column(column)
    return lists.flatten().to_numpy(zero_copy_only=False), lists.value_lengths().fill_null(0).to_numpy()


def supervised(data: Manifest, name: str, train_on: str = "completion") -> tuple[Any, dict[str, Any]]:
    """(rows with id, input_ids, labels; counts) of train.parquet or eval.parquet in the data stage's manifest.

    A row without a trained token teaches nothing and would be a division by zero: it is left out and counted.
    """
    import numpy
    import pyarrow

    counts = {"rows": 0, "without trained tokens": 0}

    def labelled(batch: Any) -> Any:
        (ids, lengths), (mask, masked) = _lists(batch, "input_ids"), _lists(batch, "completion_mask")
        if not (lengths == masked).all():
            raise ValueError("input_ids and completion_mask differ in length")
        labels = ids if train_on == "all" else numpy.where(mask, ids, IGNORE)
        ends = numpy.concatenate([[0], lengths.cumsum()])
        starts = ends[:-1][lengths > 0]
        keep: Any = numpy.zeros(len(lengths), bool)
        trained = labels != IGNORE
        trained[starts] = False  # a document's first token is not predicted
        keep[lengths > 0] = numpy.logical_or.reduceat(trained, starts)
        counts["rows"] += len(keep)
        counts["without trained tokens"] += int((~keep).sum())
        lists = pyarrow.ListArray.from_arrays(pyarrow.array(ends, pyarrow.int32()), pyarrow.array(labels))
        columns = {"id": batch.column("id"), "input_ids": batch.column("input_ids"), "labels": lists}
        return pyarrow.record_batch(columns).filter(pyarrow.array(keep))

    return _table(data, name, ["id", "input_ids", "completion_mask"], (), labelled), counts


def pairs(data: Manifest, name: str, params: Any, sides: tuple[str, ...] = PAIR) -> tuple[Any, dict[str, Any]]:
    """(pairs with id, prompt_ids, chosen_ids, rejected_ids, the answers' masks where some token of one is not trained;
    counts with the reasons) of a preference file, or the answers with completion_ids and label of kto.parquet.

    Rows over `max_length` and those with an empty answer are left out and counted: cut answers have no end, and an
    empty one has the mean log-probability 0/0. Prompts over `max_prompt_length` lose their beginning, counted.
    """
    import numpy
    import pyarrow

    most, reasons = params.max_prompt_length, Counter[str]()
    ids: list[str] = []
    counts = {"pairs" if len(sides) > 1 else "answers": 0} | ({"prompts cut": 0} if most else {})
    whole = True  # every answer is one turn, and trained to its end

    def usable(batch: Any) -> Any:
        nonlocal whole
        counts[next(iter(counts))] += len(batch)
        prompts, lengths = _lists(batch, "prompt_ids")
        if most and (lengths > most).any():
            counts["prompts cut"] += int((lengths > most).sum())
            first: Any = numpy.repeat(lengths.cumsum() - most, lengths)
            prompts, lengths = prompts[numpy.arange(len(prompts)) >= first], numpy.minimum(lengths, most)
            ends = pyarrow.array(numpy.concatenate([[0], lengths.cumsum()]), pyarrow.int32())
            cut = pyarrow.ListArray.from_arrays(ends, pyarrow.array(prompts))
            batch = batch.set_column(batch.schema.get_field_index("prompt_ids"), "prompt_ids", cut)
        answers = [_lists(batch, side)[1] for side in sides]
        why: Any = numpy.full(len(batch), "", object)
        if sides == PAIR:
            chosen, rejected = (batch.column(side) for side in sides)
            for i in numpy.flatnonzero(answers[0] == answers[1]):
                why[i] = "chosen equals rejected" if chosen[i] == rejected[i] else ""
        why[lengths + numpy.maximum.reduce(answers) > params.max_length] = f"over {params.max_length} tokens"
        for side, found in reversed(list(zip(sides, answers, strict=True))):
            why[found == 0] = f"{side.removesuffix('_ids')} is empty"
        reasons.update(filter(None, why))
        ids.extend(batch.column("id")[int(i)].as_py() for i in numpy.flatnonzero(why != "")[: 50 - len(ids)])
        kept = batch.filter(pyarrow.array(why == ""))
        whole = whole and all(_lists(kept, mask)[0].all() for mask in MASKS if mask in kept.schema.names)
        return kept

    wanted = ["id", "prompt_ids", *sides, *(["label"] if len(sides) == 1 else [])]
    rows = _table(data, name, wanted, MASKS, usable)
    if whole:
        rows = rows.remove_columns([mask for mask in MASKS if mask in rows.column_names])
    return rows, {**counts, "left out": dict(reasons), "left out ids": ids}


def answers(data: Manifest, params: Any, train: Any, held_out: Any, counted: Any, more: Any) -> tuple[Any, ...]:
    """KTO's rows and counts: kto.parquet's, the prompts in `preference_eval_share` of all held out; or where 01 wrote
    none, every answer of the given pairs."""
    from datasets import concatenate_datasets

    def apart(pairs: Any) -> Any:
        def side(name: str) -> Any:
            of = {name: "completion_ids", f"{name[:-4]}_mask": "completion_mask"}
            of = {column: new for column, new in of.items() if column in pairs.column_names}
            rows = pairs.select_columns(["id", "prompt_ids", *of]).rename_columns(of)
            return rows.add_column("label", [name == "chosen_ids"] * len(rows))

        return concatenate_datasets([side(name) for name in PAIR]).flatten_indices(keep_in_memory=True)

    rows, of_rows = pairs(data, "kto.parquet", params, ("completion_ids",))
    if not of_rows["answers"]:
        rows, held_out = apart(train), apart(held_out)
    else:
        share, counted = float(data.params.get("preference_eval_share", 0.1)), of_rows
        drawn = [crc32(repr(prompt).encode()) / 2**32 < share for prompt in rows["prompt_ids"]]
        rows, held_out = (rows.select([i for i, d in enumerate(drawn) if d == want]) for want in (False, True))
        more = {"answers": len(held_out), "left out": {}, "left out ids": []}
    good = sum(rows["label"])
    ratio = params.desirable_weight * good / max(params.undesirable_weight * (len(rows) - good), 1e-9)
    said = f"{good:,} good and {len(rows) - good:,} bad answers, weighted {min(ratio, 1e6):.3g} to 1"
    if not 0.99 <= ratio <= 1.34 and 0 < good < len(rows):
        said += f" (1 to 1.33 is best, KTO eq. 8: undesirable_weight {params.undesirable_weight * ratio:.3g})"
    return rows, held_out, {**counted, "balance": said}, {**more, "balance": ""}


def lengths_of(rows: Any, padded: bool = False) -> list[int]:
    """Tokens of every row; of pairs of both answers with their prompts (padded: the shorter as long as the longer)."""
    import numpy

    def lengths(column: str) -> Any:
        parts = rows.select_columns([column]).with_format("arrow").iter(BATCH)
        return numpy.concatenate([[0], *(part[column].combine_chunks().value_lengths() for part in parts)])[1:]

    if "input_ids" in rows.column_names:
        return lengths("input_ids").astype(int).tolist()
    if "completion_ids" in rows.column_names:
        return (lengths("prompt_ids") + lengths("completion_ids")).astype(int).tolist()
    prompt, chosen, rejected = (lengths(name) for name in ("prompt_ids", *PAIR))
    both = 2 * numpy.maximum(chosen, rejected) if padded else chosen + rejected
    return (2 * prompt + both).astype(int).tolist()


def token_counts(data: Manifest, params: Any) -> Any:
    """Tokens of every row: an array (rows, 2) of all and of those that `completion` trains, or of pairs (rows, 3) or
    answers (rows, 2) of prompts and answers before max_length cuts any."""
    import numpy
    from pyarrow import compute, parquet

    if params.stage == "sft":
        parts: list[Any] = [numpy.zeros((0, 2), int)]
        columns = ["input_ids", "completion_mask"]
        for batch in parquet.ParquetFile(data.path / "train.parquet").iter_batches(BATCH, columns=columns):
            (_, lengths), (mask, _) = (_lists(batch, column) for column in columns)
            ends = numpy.concatenate([[0], lengths.cumsum()])
            upto = numpy.concatenate([[0], mask.cumsum()])
            firsts = numpy.append(mask, False)[ends[:-1]] & (lengths > 0)  # a document's first token is not predicted
            parts.append(numpy.stack([lengths, upto[ends[1:]] - upto[ends[:-1]] - firsts], axis=1))
        return numpy.concatenate(parts)
    loss = params.loss if (data.path / "kto.parquet").is_file() else "orpo"
    params = replace(params, loss=loss, max_length=131072, max_prompt_length=0)
    table = read(data, params)[0].with_format("arrow")[:]
    names = [n for n in ("prompt_ids", "completion_ids", *PAIR) if n in table.column_names]
    return numpy.stack([compute.list_value_length(table[name]).to_numpy() for name in names], axis=1)


def lengths_at(counts: Any, params: Any) -> tuple[list[int], list[int]]:
    """What `lengths_of` says, plain and padded, of rows with these `token_counts` under these parameters."""
    if params.stage == "sft":
        trained = counts[:, 1] if params.train_on == "completion" else counts[:, 0] - 1
        lengths = counts[trained > 0, 0].tolist()
        return lengths, lengths
    whole = counts[:, :1].clip(max=params.max_prompt_length or None) + counts[:, 1:]
    whole = whole[whole.max(1) <= params.max_length]
    if params.loss == "kto":
        return whole.T.ravel().tolist(), whole.T.ravel().tolist()
    return whole.sum(1).tolist(), (2 * whole.max(1)).tolist()
