"""Every split through the chat template to the parquet files that trainers take.

train.parquet, eval.parquet          id, source, messages (JSON), tools, input_ids, completion_mask (1 = trained)
test.parquet                         id, prompt, reference, meta (JSON); of plain text alone: no prompt, the text
                                     messages: the whole conversation, its reference last, and tools (JSON)
preference.parquet, preference_eval  id, prompt, chosen, rejected, prompt_ids, chosen_ids, rejected_ids, masks of the
                                     answers; messages, chosen_messages, rejected_messages: whole, and tools (JSON)
kto.parquet                          id, prompt, completion, label, prompt_ids, completion_ids, messages, tools

Nothing is cut to max_length without being counted: how many rows were over, what was done, and how many of them would
have lost their end of turn if they had simply been cut (a model trained on such rows does not learn to stop).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from helpers import cache, machine
from helpers.cache import writing
from helpers.data.chat_template import Template
from helpers.data.labels import Encoded, Encoder
from helpers.data.rendering import spelt_out, thoughts_of
from helpers.data.tables import Rejects, Table
from helpers.data.turns import BATCH_ROWS, PLACE, Row, make_row
from helpers.display import Html, percent, shown
from helpers.errors import TunebookError
from helpers.params import DataParams

TRAINED = ("train", "eval")
COVERED = 0.99  # share of the rows that the proposed length holds whole
QUANTILES = {"shortest": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "longest": 1.0}
CANDIDATES = (128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768)
WATCHED_ROWS = 20_000  # about ten seconds: with a progress bar


def splits(
    tables: Mapping[str, Table],
    kto: Table,
    template: Template,
    p: DataParams,
    folder: Path,
    rejects: Rejects,
    model: Path,
) -> dict[str, Any]:
    """Write train, eval and test.parquet, and kto.parquet where there are rows, and return what was counted.
    model: the base's folder.

    Keys: splits (counts by split), lengths (of all rows), histogram (length → rows), mixture, notes of what the
    template cannot show, written (rows by file), max_length, data_hash.
    """
    limit = p.max_length or _proposed(tables, template, p)
    encoder = Encoder(template, p.train_on, rejects, p.control_tokens)
    fitter = Fitter(encoder, limit, p.over_long, rejects)
    rows: Counter[str] = Counter()  # by source, as are the tokens
    tokens: Counter[str] = Counter()
    written: dict[str, int] = {}
    found: dict[str, Any] = {"splits": {}, "written": written, "max_length": limit}
    for name in TRAINED:
        trained: Counter[str] = Counter()
        table: Iterable[list[Row]] = tables[name]
        if len(tables[name]) > WATCHED_ROWS:
            table = machine.progress(table, f"tokenising {name}", -(-len(tables[name]) // BATCH_ROWS))

        def columns(batch: list[Encoded], trained: Counter[str] = trained) -> dict[str, Any]:
            for one in batch:
                rows[one.row["source"]] += 1
                tokens[one.row["source"]] += len(one.ids)
                trained.update(tokens=len(one.ids), trained_tokens=one.trained, trained_turns=len(one.ends))
            return _token_columns(batch)

        written[name] = write(folder / f"{name}.parquet", "tokens", map(columns, fitter.fit(encoder.encode(table))))
        found["splits"][name] = {"rows": written[name], **trained}
    rejects.check()
    if not written["train"]:
        rejects.check_rows_left([], f"the training split of {p.dataset}")
    talk = any(row["kind"] != "text" for row in tables["test"].rows())  # without it the texts are what is held out
    tests = Encoder(template, "last", rejects, p.control_tokens)
    rows_asked = ([row for row in batch if row["kind"] != "text" or not talk] for batch in tables["test"])
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    window = (config.get("text_config") or config).get("max_position_embeddings") or 0  # 0: it does not say
    asked = _askable(tests.questions(rows_asked), limit, window, rejects, encoder.notes)
    written["test"] = write(folder / "test.parquet", "test", asked)
    rejects.check()
    if len(tables["test"]) and not written["test"]:
        rejects.check_rows_left([], "the test set")
    if len(kto):
        marking = Encoder(template, "last", rejects, p.control_tokens)
        fitting = Fitter(marking, limit, "drop", rejects).fit(marking.encode(kto))
        marked = ([_kto_row(one) for one in batch] for batch in fitting)
        written["kto"] = write(folder / "kto.parquet", "kto", marked)
    mixture = [
        {"source": name, "rows": count, "tokens": tokens[name]}
        | {"row_share": count / rows.total(), "token_share": tokens[name] / tokens.total()}
        for name, count in rows.items()
    ]
    histogram = {str(length): count for length, count in sorted(fitter.lengths.items())}
    notes = {**encoder.notes, **{f"{what} (test questions)": count for what, count in tests.notes.items()}}
    found |= {"mixture": mixture, "lengths": fitter.report(), "histogram": histogram, "notes": notes}
    return found | {"data_hash": cache.key(*(cache.sha256_file(folder / f"{name}.parquet") for name in TRAINED))}


def _askable(
    asked: Iterable[list[tuple[Row, int]]], limit: int, window: int, rejects: Rejects, notes: Counter[str]
) -> Iterator[list[dict[str, Any]]]:
    """Test rows whose question the model can read; the others are rejected."""
    for batch in asked:
        kept = []
        for row, tokens in batch:
            if window and tokens >= window:
                detail = f"its question has {tokens:,} tokens and the model reads {window:,}"
                rejects.add(row["file"], row["row"], "question too long", detail, step="length")
                continue
            if tokens > limit:
                notes["test questions longer than max_length, which training never shows"] += 1
            rejects.keep([row])
            kept.append(_test_row(row))
        yield kept


def _proposed(tables: Mapping[str, Table], template: Template, p: DataParams) -> int:
    """max_length as the rows' own lengths propose it. Costs one more tokenisation."""
    counts: Counter[int] = Counter()
    for name in TRAINED:
        for batch in Encoder(template, p.train_on, None, p.control_tokens).encode(tables[name]):
            counts.update(len(one.ids) for one in batch)
    return propose(expanded(counts)) or 16


def pairs(
    tables: Mapping[str, Table], template: Template, p: DataParams, limit: int, folder: Path, rejects: Rejects
) -> tuple[dict[str, int], int, dict[str, int]]:
    """Write preference.parquet and preference_eval.parquet; (pairs by file, pairs over `limit` tokens, notes).

    A pair whose longer side is over the limit is dropped and counted. No file is written where there is no pair.
    """
    encoder, over = Encoder(template, p.train_on, rejects, p.control_tokens), 0

    def fitting(table: Table) -> Iterator[list[dict[str, Any]]]:
        nonlocal over
        for batch in encoder.pairs(table):
            kept = []
            for row, chosen, rejected in batch:
                longest = max(len(chosen.ids), len(rejected.ids))
                if longest <= limit:
                    rejects.keep([row])
                    kept.append(_pair_row(row, chosen, rejected))
                    continue
                over += 1
                detail = f"{longest:,} tokens; max_length is {limit:,}"
                rejects.add(row["file"], row["row"], "over max_length", detail, step="length", invalid=False)
            yield kept

    if not len(tables["train"]) + len(tables["eval"]):
        return {}, 0, {}
    files = (("preference", "train"), ("preference_eval", "eval"))
    written = {file: write(folder / f"{file}.parquet", "preference", fitting(tables[name])) for file, name in files}
    rejects.check()
    if not written["preference"]:
        raise TunebookError(f"No preference pair fits max_length = {limit}: {over:,} are longer; raise max_length.")
    return written, over, {f"{what} (pairs)": -(-count // 2) for what, count in encoder.notes.items()}  # of both sides


# ---------------------------------------------------------------- lengths


def expanded(counts: Mapping[int, int]) -> Any:
    """A histogram (length → rows) as an int64 array of every row's length."""
    import numpy as np

    return np.repeat(np.fromiter(counts, np.int64), np.fromiter(counts.values(), np.int64))


def propose(lengths: Sequence[int]) -> int:
    """The smallest usual length that holds 99 % of the rows whole; the longest row's, rounded up, when that is less."""
    import numpy as np

    if not len(lengths):
        return 0
    needed = int(np.quantile(lengths, COVERED, method="higher"))
    longest = (int(max(lengths)) + 15) // 16 * 16
    return min(next((size for size in CANDIDATES if size >= needed), (needed + 1023) // 1024 * 1024), longest)


class Fitter:
    """Makes encoded rows fit `max_length` tokens, by dropping, splitting or truncating those that do not.

    lengths: tokens of a row, before anything was cut → rows. counts: over, of them lost_end whose end of turn lies
    behind max_length; dropped, truncated, split_rows into split_into; all_masked, dropped because a cut would leave
    nothing that is trained.
    """

    def __init__(
        self, encoder: Encoder, max_length: int, over_long: str = "drop", rejects: Rejects | None = None
    ) -> None:
        self.max_length, self.over_long, self.rejects = max_length, over_long, rejects or Rejects()
        self._parts = Encoder(encoder.template, encoder.train_on, None, encoder.chat.control_tokens)
        self.lengths: Counter[int] = Counter()
        names = ("over", "lost_end", "dropped", "truncated", "split_rows", "split_into", "all_masked")
        self.counts = Counter(dict.fromkeys(names, 0))

    def report(self) -> dict[str, Any]:
        """The counts, shares and quantiles, and the proposed length."""
        import numpy as np

        lengths, rows = expanded(self.lengths), self.lengths.total()
        return {
            "max_length": self.max_length,
            "over_long": self.over_long,
            **self.counts,
            "rows": rows,
            "over_share": self.counts["over"] / max(1, rows),
            "lost_end_share": self.counts["lost_end"] / max(1, self.counts["over"]),
            "proposed_max_length": propose(lengths),
            **{name: round(float(np.quantile(lengths, share))) for name, share in QUANTILES.items() if rows},
        }

    def fit(self, encoded: Iterable[list[Encoded]]) -> Iterator[list[Encoded]]:
        """The batches with every row fitting."""
        for batch in encoded:
            self.lengths.update(len(one.ids) for one in batch)
            fitting = [part for one in batch for part in self._fitting(one)]
            self.rejects.keep(one.row for one in fitting)
            yield fitting

    def _fitting(self, one: Encoded) -> list[Encoded]:
        size, length = self.max_length, len(one.ids)
        if length <= size:
            return [one]
        self.counts.update(over=1, lost_end=int(one.ends[-1:] >= [size]))
        gone, reason, detail = "dropped", "over max_length", f"{length:,} tokens; max_length is {size:,}"
        if self.over_long == "truncate":
            if one.mask[:size].any():
                self.counts["truncated"] += 1
                return [one.part(0, size)]
            gone, reason = "all_masked", "all tokens masked"
            detail = f"cut at {size:,} of {length:,} tokens, nothing that is trained is left"
        elif self.over_long == "split" and (parts := self._split(one)):
            self.counts.update(split_rows=1, split_into=len(parts))
            return parts
        self.counts[gone] += 1
        self.rejects.add(one.row["file"], one.row["row"], reason, detail, step="length", invalid=False)
        return []

    def _split(self, one: Encoded) -> list[Encoded]:
        """Text in windows of `max_length`; a conversation in runs of exchanges that each fit, as long as they can be,
        the system message repeated. [] when one exchange is too long for itself."""
        if one.row["kind"] == "text":
            return [one.part(at, at + self.max_length) for at in range(0, len(one.ids), self.max_length)]
        messages = one.row["messages"]
        system = messages[:1] if messages[0]["role"] == "system" else []
        starts = [i for i, message in enumerate(messages) if message["role"] == "user"]
        parts: list[Encoded] = []
        run: list[dict] = []
        for begin, end in pairwise([*starts, len(messages)]):
            exchange = messages[begin:end]
            longer = self._encoded(one.row, system + run + exchange) if run else None
            if longer is not None:
                run, parts[-1] = run + exchange, longer
                continue
            alone = self._encoded(one.row, system + exchange)
            if alone is None:
                return []
            run = exchange
            parts.append(alone)
        return parts

    def _encoded(self, row: Row, messages: list[dict]) -> Encoded | None:
        """These messages of the row as tokens; None when they do not fit, or cannot be rendered."""
        kept = {name: row[name] for name in (*PLACE, "tools", "meta", "label") if name in row}
        (batch,) = self._parts.encode([[make_row(row["kind"], messages, **kept)]])
        return next((one for one in batch if len(one.ids) <= self.max_length), None)


# ---------------------------------------------------------------- files


def schema(kind: str) -> Any:
    """The pyarrow schema of "tokens", "test", "preference" or "kto"."""
    import pyarrow as pa

    text, ids, mask = pa.string(), pa.list_(pa.int32()), pa.list_(pa.int8())
    turns = pa.list_(pa.struct([("role", text), ("content", text)]))
    whole = {"messages": text, "tools": text}
    columns = {
        "tokens": {"source": text, **whole, "input_ids": ids, "completion_mask": mask},
        "test": {"prompt": turns, "reference": text, "meta": text, **whole},
        "preference": dict.fromkeys(("prompt", "chosen", "rejected"), turns)
        | dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids"), ids)
        | dict.fromkeys(("chosen_mask", "rejected_mask"), mask)
        | {**whole, "chosen_messages": text, "rejected_messages": text},
        "kto": {"prompt": turns, "completion": turns, "label": pa.bool_(), **whole}
        | dict.fromkeys(("prompt_ids", "completion_ids"), ids),
    }
    return pa.schema([("id", text), *columns[kind].items()])


def write(path: Path, kind: str, batches: Iterable[dict[str, Any] | list[dict[str, Any]]]) -> int:
    """A parquet file that grows by batches, of columns or of rows, and is put in place whole; how many rows it has."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    made, rows = schema(kind), 0
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with writing(path):
        try:
            with pq.ParquetWriter(partial, made, compression="zstd") as writer:
                for batch in batches:
                    by_rows = isinstance(batch, list)
                    table = pa.Table.from_pylist(batch, made) if by_rows else pa.table(batch, schema=made)
                    writer.write_table(table)
                    rows += len(table)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return rows


def _token_columns(batch: list[Encoded]) -> dict[str, Any]:
    """Token lists go to Arrow as one flat array and its offsets."""
    import numpy as np
    import pyarrow as pa

    offsets = pa.array(np.cumsum([0, *(len(one.ids) for one in batch)]).astype(np.int32))
    ids, mask = (np.concatenate([getattr(one, name) for one in batch]) if batch else [] for name in ("ids", "mask"))
    return {
        "id": [one.row["id"] for one in batch],
        "source": [one.row["source"] for one in batch],
        "messages": [_json(one.row["messages"]) for one in batch],
        "tools": pa.array([one.row.get("tools") for one in batch], pa.string()),
        "input_ids": pa.ListArray.from_arrays(offsets, pa.array(ids, pa.int32())),
        "completion_mask": pa.ListArray.from_arrays(offsets, pa.array(mask, pa.int8())),
    }


def _test_row(row: Row) -> dict[str, Any]:
    """A prompt without its answer, and the answer as reference. A preference row gives its chosen answer, a text itself
    behind no prompt."""
    messages = row["messages"] + row.get("chosen", [])
    reference = plain_turns([{**messages[-1], "content": thoughts_of(messages[-1])[1]}])[0]["content"]
    meta = {**{name: row[name] for name in PLACE}, **row["meta"]}
    found = {"id": row["id"], "prompt": plain_turns(messages[:-1]), "reference": reference, "meta": _json(meta)}
    return {**found, "messages": _json(messages), "tools": row.get("tools")}


def _pair_row(row: Row, chosen: Encoded, rejected: Encoded) -> dict[str, Any]:
    """Conversational columns for TRL, and the same as token ids, each answer with its one end of turn."""
    made = {"id": row["id"], "prompt": plain_turns(row["messages"]), "prompt_ids": chosen.ids[: chosen.prompt]}
    made |= {"messages": _json(row["messages"]), "tools": row.get("tools")}
    for side, one in (("chosen", chosen), ("rejected", rejected)):
        answer = slice(one.prompt, one.ends[-1] + 1)
        made |= {side: plain_turns(row[side]), f"{side}_messages": _json(row[side])}
        made |= {f"{side}_ids": one.ids[answer], f"{side}_mask": one.mask[answer]}
    return made


def _kto_row(one: Encoded) -> dict[str, Any]:
    row, answer = one.row, slice(one.prompt, one.ends[-1] + 1)
    *asked, said = plain_turns(row["messages"])
    made = {"id": row["id"], "prompt": asked, "completion": [said], "label": row["label"], "tools": row.get("tools")}
    ids = {"prompt_ids": one.ids[: one.prompt], "completion_ids": one.ids[answer]}
    return {**made, **ids, "messages": _json(row["messages"])}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def plain_turns(messages: list[dict]) -> list[dict]:
    """Turns of role and content alone; a tool call becomes its JSON text."""
    return [{"role": turn["role"], "content": turn["content"]} for turn in map(spelt_out, messages)]


def summary(encoded: dict[str, Any]) -> Html:
    """What was written, how much of it is trained, and what was too long."""
    found, rows = encoded["lengths"], []
    for name, count in encoded["written"].items():
        part = encoded["splits"].get(name, {})
        tokens = part.get("tokens", 0)
        trained = f", {tokens:,} tokens, {percent(part.get('trained_tokens', 0) / max(1, tokens))} trained"
        rows.append((f"{name}.parquet", f"{count:,} rows{trained if part else ''}"))
    whole = f"{found['proposed_max_length']:,} would hold 99 % of the rows whole"
    rows.append(
        ("max_length", f"{encoded['max_length']:,} tokens; {whole}, the longest has {found.get('longest', 0):,}")
    )
    ends = f"{percent(found['lost_end_share'], 0)} of them would have lost their end of turn"
    fate = f"dropped {found['dropped']:,}, cut {found['truncated']:,}"
    fate += f", split {found['split_rows']:,} into {found['split_into']:,}"
    rows.append(("over max_length", f"{found['over']:,} rows ({percent(found['over_share'])}), {ends}; {fate}"))
    rows += [("note", f"{what}: {count:,} rows") for what, count in encoded["notes"].items()]
    return shown(rows)
