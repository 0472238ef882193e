"""Every split through the chat template to parquet, from the cache when nothing that decides the tokens has changed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from helpers.data import cache, output
from helpers.data import lengths as labels
from helpers.data.labels import Encoder
from helpers.data.tables import Rejects, Table
from helpers.display import Html, table
from helpers.errors import TunebookError

TRAINED_SPLITS = ("train", "eval")
LOST = ".encoding.jsonl"
WATCHED_ROWS = 20_000  # about ten seconds


def encode_splits(job: Any) -> dict[str, Any]:
    """Write train, eval and test.parquet (and kto.parquet) and return what was counted; see `_encode` for the keys."""
    from helpers.model.loading import template_hash, tokenizer_hash

    p, template = job.params, job.template()
    ids = (
        f"{name} {row_id} {source}" for name in TRAINED_SPLITS for row_id, source in job.splits[name].ids_and_sources()
    )
    key = cache.key(
        ids,
        tokenizer=tokenizer_hash(job.tokenizer),
        template=template_hash(job.tokenizer),
        code=cache.code_hash(),
        train_on=p.train_on,
        max_length=p.max_length,
        over_long=p.over_long,
    )
    files = [f"{name}.parquet" for name in TRAINED_SPLITS]
    found, state = cache.get(key, job.path), "hit"
    if found is None:
        found, state = _encode(job, template), "miss"
        cache.put(key, job.path, [*files, LOST], found)
    _replay(job.path / LOST, job.rejects)
    found |= {"cache": f"{state} {key}", "data_hash": key}
    job.rejects.check()
    if not found["written"]["train"]:
        job.rejects.check_rows_left([], f"the training split of {p.dataset}")
    found["written"]["test"] = output.write_test(job.path / "test.parquet", job.splits["test"])
    if len(job.kto_rows):
        encoder = Encoder(template, "last", job.rejects)
        fitting = labels.Fitter(encoder, found["max_length"], "drop", job.rejects).fit(encoder.encode(job.kto_rows))
        found["written"]["kto"] = output.write_kto(
            job.path / "kto.parquet", ([one.row for one in batch] for batch in fitting)
        )
    return found


def _encode(job: Any, template: Any) -> dict[str, Any]:
    """Keys: splits (counts by split), lengths (of all rows), histogram (length → rows), notes, examples, written (rows by file)."""
    p = job.params
    limit = p.max_length or _proposed(job, template)
    lost = Rejects(job.path / LOST)
    result: dict[str, Any] = {"splits": {}, "written": {}, "notes": {}, "examples": {}, "max_length": limit}
    histogram, counts = Counter(), Counter()
    source_rows, source_tokens = Counter(), Counter()
    for name in TRAINED_SPLITS:
        encoder = Encoder(template, p.train_on, lost)
        fitter = labels.Fitter(encoder, limit, p.over_long, lost)
        trained = Counter()

        def counted(batches: Any, trained: Counter = trained) -> Any:
            for batch in batches:
                for one in batch:
                    source_rows[one.row["source"]] += 1
                    source_tokens[one.row["source"]] += len(one.ids)
                    trained["tokens"] += len(one.ids)
                    trained["trained_tokens"] += one.trained
                    trained["trained_turns"] += len(one.ends)
                yield batch

        fitting = fitter.fit(encoder.encode(watched(job.splits[name], f"tokenising {name}")))
        result["written"][name] = output.write_tokens(job.path / f"{name}.parquet", counted(fitting))
        result["splits"][name] = {"rows": result["written"][name], **trained}
        histogram.update(fitter.report.lengths)
        counts.update(
            {
                k: v
                for k, v in fitter.report.as_dict().items()
                if k in ("over", "lost_end", "dropped", "truncated", "split_rows", "split_into", "all_masked")
            }
        )
        result["notes"] = dict(Counter(result["notes"]) + encoder.notes)
        result["examples"] |= encoder.examples
    lost.close()
    whole = labels.LengthReport(limit, p.over_long, histogram, **counts)
    rows, tokens = max(1, source_rows.total()), max(1, source_tokens.total())
    result["mixture"] = [
        {
            "source": name,
            "rows": count,
            "tokens": source_tokens[name],
            "row_share": count / rows,
            "token_share": source_tokens[name] / tokens,
        }
        for name, count in source_rows.items()
    ]
    return result | {"lengths": whole.as_dict(), "histogram": {str(k): v for k, v in sorted(histogram.items())}}


def watched(rows: Table, label: str) -> Any:
    """The table's batches, with a progress bar where there are so many that somebody waits for them."""
    from helpers import machine
    from helpers.data.turns import BATCH_ROWS

    return machine.progress(rows, label, -(-len(rows) // BATCH_ROWS)) if len(rows) > WATCHED_ROWS else rows


def _proposed(job: Any, template: Any) -> int:
    """max_length as the rows' own lengths propose it. Costs one more tokenisation."""
    counts = Counter(
        len(one.ids)
        for name in TRAINED_SPLITS
        for batch in Encoder(template, job.params.train_on).encode(job.splits[name])
        for one in batch
    )
    return labels.propose(labels.expanded(counts)) or 16


def _replay(path: Path, rejects: Rejects) -> None:
    """Rows lost while encoding, now or when the cached files were made, counted with this job's."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            lost = json.loads(line)
            rejects.add(
                lost["file"],
                lost["row"],
                lost["reason"],
                lost["detail"],
                step=lost["step"],
                invalid=lost["step"] != "length",
            )
    path.unlink()


def encode_pairs(job: Any) -> Html:
    """Write preference.parquet and preference_eval.parquet; pairs whose longer side is over max_length are dropped and counted."""
    encoder = Encoder(job.template(), "last", job.rejects)
    limit = job.encoded["max_length"]
    over = Counter()

    def fitting(batches: Any) -> Any:
        for batch in batches:
            kept = []
            for row, chosen, rejected in batch:
                if max(len(chosen.ids), len(rejected.ids)) <= limit:
                    kept.append((row, chosen, rejected))
                else:
                    over["pairs"] += 1
                    job.rejects.add(
                        row["file"],
                        row["row"],
                        "over max_length",
                        f"{max(len(chosen.ids), len(rejected.ids)):,} tokens; max_length is {limit:,}",
                        step="length",
                        invalid=False,
                    )
            yield kept

    written = {}
    for name, file in (("train", "preference"), ("eval", "preference_eval")):
        pairs: Table = job.pair_splits[name]
        if len(job.pair_rows):
            written[file] = output.write_pairs(job.path / f"{file}.parquet", fitting(encoder.pairs(pairs)))
    job.rejects.check()
    job.encoded["written"] |= written
    if len(job.pair_rows) and not written["preference"]:
        raise TunebookError(
            f"No preference pair fits max_length = {limit}: all {over['pairs']:,} are longer; raise max_length."
        )
    lines = [(f"{file}.parquet", f"{count:,}") for file, count in written.items()] or [("no preference pairs", "")]
    return Html(
        table([*lines, ("over max_length", f"{over['pairs']:,}")], ("file", "pairs")), ", ".join(map(str, lines))
    )


def summary(encoded: dict[str, Any]) -> Html:
    """What was written, how much of it is trained, what was too long, and whether it came from the cache."""
    found = encoded["lengths"]
    rows = [
        (
            f"{name}.parquet",
            f"{part['rows']:,} rows, {part.get('tokens', 0):,} tokens, "
            f"{part.get('trained_tokens', 0) / max(1, part.get('tokens', 0)):.1%} of them trained",
        )
        for name, part in encoded["splits"].items()
    ]
    rows += [
        (f"{name}.parquet", f"{count:,} rows")
        for name, count in encoded["written"].items()
        if name not in encoded["splits"]
    ]
    rows += [
        (
            "max_length",
            f"{encoded['max_length']:,} tokens; {found['proposed_max_length']:,} would hold 99 % of the rows, "
            f"the longest has {found.get('longest', 0):,}",
        ),
        (
            "over max_length",
            f"{found['over']:,} rows ({found['over_share']:.1%}), {found['lost_end_share']:.0%} of them would have lost their end of turn; "
            f"dropped {found['dropped']:,}, cut {found['truncated']:,}, split {found['split_rows']:,} into {found['split_into']:,}",
        ),
    ]
    rows += [("note", f"{what}: {count:,} rows") for what, count in encoded["notes"].items()]
    rows.append(("cache", encoded["cache"]))
    return Html(table(rows), "\n".join(f"{a}: {b}" for a, b in rows))
