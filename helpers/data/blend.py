"""What the notebook asks of generation, mixing and the vocabulary check: parameters in, tables shown, figures kept."""

from __future__ import annotations

from typing import Any

from helpers.data import mixing
from helpers.data import vocabulary as words
from helpers.data.tables import Table
from helpers.data.turns import Row, answer_of, text_of
from helpers.display import Html, table
from helpers.errors import TunebookError

WORK = "work"  # kept out of the manifest's hashes; holds what was already asked and answered


def generate(job: Any) -> Html:
    """Turn documents into questions or preference pairs through the endpoint, and queries into pairs on the database."""
    p = job.params
    made = []
    if p.synthetic != "none":
        made.append(_synthetic(job))
    if p.sql_negatives:
        made.append(_sql_negatives(job))
    if not made:
        return Html(
            "<p>No synthetic data was asked for (<code>synthetic</code>, <code>sql_negatives</code>).</p>",
            "No synthetic data was asked for.",
        )
    return Html(table(made, ("made", "rows", "of")), "\n".join(map(str, made)))


def _synthetic(job: Any) -> tuple[str, str, str]:
    from helpers.cache import Answers
    from helpers.data import synthetic
    from helpers.llm_client import Client, Endpoint

    p = job.params
    if not p.endpoint or not p.endpoint_model:
        raise TunebookError(
            f"synthetic is {p.synthetic!r}, which needs endpoint (such as http://127.0.0.1:8080/v1) and endpoint_model."
        )
    documents = Table.collect([row for row in batch if row["kind"] == "text"] for batch in job.training.table)
    if not len(documents):
        raise TunebookError(
            f"synthetic is {p.synthetic!r}, but dataset holds no documents or plain text to make rows from; name some in dataset."
        )
    server = Endpoint(p.endpoint, p.endpoint_model, p.endpoint_key_name, price_in=p.price_in, price_out=p.price_out)
    settings = synthetic.Settings(per_document=p.pairs_per_document, seed=p.seed, max_cost=p.max_cost)
    step = job._step(f"synthetic {p.synthetic}")
    make = synthetic.question_answers if p.synthetic == "questions" else synthetic.preference_from_documents
    with Client(server, Answers(job.path / WORK, "synthetic")) as client:
        rows = Table.collect(make(documents, step, client, settings))
    others = ([row for row in batch if row["kind"] != "text"] for batch in job.training.table)
    if p.synthetic == "questions":
        job.training.table = Table.collect(batch for part in (others, rows) for batch in part)
    else:
        job.made_pairs = rows
    job.rejects.check_rows_left(rows, f"the synthetic {p.synthetic}")
    for report in job.training.reports[:1]:
        report.kinds["sft" if p.synthetic == "questions" else "preference"] += len(rows)
    return f"synthetic {p.synthetic}", f"{len(rows):,}", f"{len(documents):,} pieces of text"


def _sql_negatives(job: Any) -> tuple[str, str, str]:
    from helpers.data.sql_pairs import reject_queries

    database = job.database()
    if database is None:
        raise TunebookError("sql_negatives needs a database to run the queries on; name a SQLite file as database.")
    questions = Table.collect([row for row in batch if row["kind"] == "sft"] for batch in job.training.table)
    job.made_pairs = Table.collect(
        reject_queries(questions, job._step("pairs by running mistaken queries"), database, seed=job.params.seed)
    )
    return "pairs with a query that answers wrongly", f"{len(job.made_pairs):,}", f"{len(questions):,} questions"


def mix_sources(job: Any) -> Html:
    """Weigh, cap and interleave the sources and add the replay share; `job.rows` becomes the mixture."""
    p = job.params
    names = list(dict.fromkeys(source for _, source in job.rows.ids_and_sources()))
    weights, caps = _numbers("weights", p.weights, names), _numbers("caps", p.caps, names)
    if len(names) == 1 and not caps and not p.replay_dataset:
        return Html(f"<p>One source with {len(job.rows):,} rows; nothing to mix.</p>", "One source; nothing to mix.")
    parts = {name: Table() for name in names}
    for batch in job.rows:
        for name in names:
            parts[name].append([row for row in batch if row["source"] == name])
    sources = {
        name: mixing.Source(part.close(), weights.get(name, 0.0) if weights else None, int(caps.get(name, 0)))
        for name, part in parts.items()
    }
    if p.replay_dataset:
        rows = ([{**row, "source": f"replay: {row['source']}"} for row in batch] for batch in job.replay_rows)
        sources["replay"] = mixing.Source(Table.collect(rows), replay=True)
    step = job._step("mixture")
    job.rows = Table.collect(
        mixing.mix(sources, step, p.replay_share, p.mix_unit, lambda rows: _lengths(job.tokenizer, rows), seed=p.seed)
    )
    for reason, count in step.dropped.items():
        job.rejects.removed[reason] += count
        job.rejects.first.setdefault(
            reason, {"file": "", "row": 0, "detail": "left out by weights, caps or replay_share"}
        )
    mixture = step.figures["mixture"]
    lines = [
        (
            name,
            f"{m['available']:,}",
            f"{m['rows']:,}",
            f"{m['rows_share']:.1%}",
            f"{m.get('tokens', 0):,}",
            f"{m.get('tokens_share', 0):.1%}",
        )
        for name, m in mixture.items()
    ]
    return Html(
        table(lines, ("source", "available", "rows taken", "of rows", "tokens", "of tokens")),
        "\n".join(map(str, lines)),
    )


def _numbers(parameter: str, text: str, names: list[str]) -> dict[str, float]:
    """ "name=2,other=1" as numbers by source. Raises TunebookError for an unknown source or what is no number."""
    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = (piece.strip() for piece in part.rpartition("="))
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if name not in names or not 0 <= number < float("inf"):
            raise TunebookError(
                f"{parameter} has {part!r}; it takes source=number pairs separated by commas, with the sources {', '.join(names)}."
            )
        found[name] = number
    return found


def _lengths(tokenizer: Any, rows: list[Row]) -> list[int]:
    return [
        len(one.ids)
        for one in tokenizer.backend_tokenizer.encode_batch_fast(
            [text_of(row) for row in rows], add_special_tokens=False
        )
    ]


def vocabulary(job: Any) -> Html:
    """Measure the answers and questions under the tokenizer and, if asked, a second one."""
    other = None
    if job.params.compare_tokenizer:
        from helpers.model.loading import load_tokenizer, resolve_model

        other = load_tokenizer(resolve_model(job.params.compare_tokenizer))
    found = words.report(
        job.tokenizer,
        (
            "\n".join((row["messages"][-2]["content"] if len(row["messages"]) > 1 else "", answer_of(row)))
            for row in job.rows.rows()
        ),
        other,
    )
    found["this"]["name"] = job.params.model
    if found["other"]:
        found["other"]["name"] = job.params.compare_tokenizer
    job.figures["vocabulary"] = found
    header, rows = words.table(found)
    return Html(table(rows, header), "\n".join(map(str, rows)))
