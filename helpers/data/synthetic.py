"""Training data written by a model: question-answer pairs from documents, preference pairs by rejection sampling.

The documents are text rows, already cut into pieces. Answers are held to a JSON schema. The estimate comes before the
first question, and what is not good enough goes to the rejects with its reason.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from helpers.cache import Answers
from helpers.data.shingles import shingles, tokens
from helpers.data.tables import StepReport, Table
from helpers.data.turns import BATCH_ROWS, Row, answer_of, batches, make_row, text_of
from helpers.errors import TunebookError
from helpers.llm_client import Client, Endpoint, Reply, Request
from helpers.params import DataParams

ASK_PAIRS = (
    "Write {count} question-answer pairs about the document below, in its language. Each question must be "
    "understandable without the document and have one answer that the document states. Answer in full sentences.\n\n"
    "Document:\n{text}"
)
MENTIONS_DOCUMENT = re.compile(
    r"\b(the|this|that|above|given|provided)\s+(text|passage|document|excerpt|article|paragraph)\b"
    r"|本文|上文|文中|该文|这篇文章",
    re.IGNORECASE,
)
GROUNDED = 0.5  # share of an answer's words that the document must hold

Judge = Callable[[str, str, str], float]  # (question, reference, answer) → 0 to 1


def object_of(**properties: dict) -> dict:
    """JSON schema of an object that has these properties."""
    return {"type": "object", "properties": properties, "required": list(properties)}


TEXT = {"type": "string"}


@dataclass(frozen=True)
class Settings:
    """per_document: question-answer pairs asked of each document. samples: answers drawn for each question of a
    preference pair. margin: how far apart, from 0 to 1, the chosen and the rejected answer must be scored; good: the
    lowest score of a chosen one. max_cost: a job that could cost more is refused; 0: no limit.
    """

    per_document: int = 3
    samples: int = 4
    max_tokens: int = 768
    temperature: float = 0.8
    seed: int = 17
    margin: float = 0.2
    good: float = 0.3
    max_cost: float = 0.0


def generate(p: DataParams, documents: Table, report: StepReport, answers: Answers) -> Table:
    """The rows that the parameter `synthetic` asks for. answers: keeps what the endpoint said.

    Raises TunebookError where the endpoint or the documents are missing.
    """
    if not p.endpoint or not p.endpoint_model:
        raise TunebookError(
            f"synthetic is {p.synthetic!r}, which needs endpoint (such as http://127.0.0.1:8080/v1) and endpoint_model."
        )
    if not len(documents):
        raise TunebookError(f"synthetic is {p.synthetic!r}, but dataset holds no documents or plain text.")
    server = Endpoint(p.endpoint, p.endpoint_model, p.endpoint_key_name, price_in=p.price_in, price_out=p.price_out)
    settings = Settings(per_document=p.pairs_per_document, seed=p.seed, max_cost=p.max_cost)
    make = question_answers if p.synthetic == "questions" else preference_from_documents
    with Client(server, answers) as client:
        return Table.collect(make(documents, report, client, settings))


def question_answers(
    documents: Iterable[list[Row]], report: StepReport, client: Client, settings: Settings = Settings()
) -> Iterator[list[Row]]:
    """Question-answer rows from text rows.

    Dropped with a reason: answers that break the schema, empty ones, questions asked before, pairs that speak of "the
    document", answers of which less than half the words are in the document. Raises TunebookError when the estimate
    exceeds `max_cost`, and when the endpoint fails.
    """
    table = documents if isinstance(documents, Table) else Table.collect(documents)
    count = settings.per_document
    pairs = {"type": "array", "items": object_of(question=TEXT, answer=TEXT), "minItems": count, "maxItems": count}

    def requests() -> Iterator[Request]:
        for row in table.rows():
            if row["kind"] != "text":
                raise TunebookError(
                    f"Row {row['row']} of {row['file']} is a {row['kind']} row; questions are made from documents "
                    "(format 'text')."
                )
            asked = [{"role": "user", "content": ASK_PAIRS.format(count=count, text=text_of(row))}]
            yield Request(
                asked, object_of(pairs=pairs), settings.max_tokens, settings.temperature, settings.seed, tag=row
            )

    def made() -> Iterator[Row]:
        seen: set[str] = set()
        for reply in _counted(client.ask(requests()), report):
            document = reply.request.tag
            report.seen += 1
            if reply.error:
                report.drop(document, "answer unusable", reply.error)
                continue
            for pair in reply.value["pairs"]:
                question, answer = pair["question"].strip(), pair["answer"].strip()
                meta = {"document": document["id"], "origin": f"synthetic: {client.model}"}
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                row = make_row("sft", messages, **_place(document), meta=meta)
                if why := pair_fault(question, answer, text_of(document), seen):
                    report.drop(row, why, question)
                else:
                    report.kept += 1
                    yield row

    _announce(report, client, requests(), settings)
    yield from batches(made(), BATCH_ROWS)


def preference_pairs(
    questions: Iterable[list[Row]],
    report: StepReport,
    client: Client,
    settings: Settings = Settings(),
    judge: Judge | None = None,
) -> Iterator[list[Row]]:
    """Preference rows by rejection sampling: `samples` answers to each question, the best chosen, the worst rejected.

    questions: sft rows whose last turn is the reference answer. judge: a function (question, reference, answer) → 0 to
    1, by default `overlap` with the reference. Questions without a clear winner go to the rejects.
    """
    table = questions if isinstance(questions, Table) else Table.collect(questions)

    def requests() -> Iterator[Request]:
        for row in table.rows():
            prompt = [{"role": m["role"], "content": m.get("content") or ""} for m in row["messages"][:-1]]
            for sample in range(settings.samples):
                warmth, seed = max(settings.temperature, 0.7), settings.seed + sample
                yield Request(prompt, object_of(answer=TEXT), settings.max_tokens, warmth, seed, tag=row)

    def made() -> Iterator[Row]:
        drawn: list[Reply] = []
        for reply in _counted(client.ask(requests()), report):
            drawn.append(reply)
            if len(drawn) < settings.samples:
                continue
            row, usable = reply.request.tag, [one.value["answer"].strip() for one in drawn if not one.error]
            answers = list(dict.fromkeys(filter(None, usable)))
            errors, drawn = [one.error for one in drawn if one.error], []
            report.seen += 1
            if len(answers) < 2:
                report.drop(row, "fewer than two different answers", next(iter(errors), ""))
                continue
            asked = "\n".join(m.get("content") or "" for m in row["messages"][:-1] if m["role"] != "system")
            marks = [float((judge or overlap)(asked, answer_of(row), answer)) for answer in answers]
            best, worst = max(marks), min(marks)
            detail = f"best {best:.2f}, worst {worst:.2f} of {len(answers)}"
            if best < settings.good:
                report.drop(row, "no good answer", detail)
            elif best - worst < settings.margin:
                report.drop(row, "no clear winner", detail)
            else:
                report.kept += 1
                chosen, rejected = (
                    [{"role": "assistant", "content": answers[marks.index(mark)]}] for mark in (best, worst)
                )
                meta = {"scores": [round(best, 3), round(worst, 3)], "origin": f"synthetic: {client.model}"}
                yield make_row(
                    "preference",
                    row["messages"][:-1],
                    **_place(row),
                    chosen=chosen,
                    rejected=rejected,
                    meta=meta,
                )

    _announce(report, client, requests(), settings)
    yield from batches(made(), BATCH_ROWS)


def preference_from_documents(
    documents: Iterable[list[Row]], report: StepReport, client: Client, settings: Settings = Settings()
) -> Iterator[list[Row]]:
    """Preference rows from text rows: first questions with reference answers, then answers without the document."""
    asked = Table.collect(question_answers(documents, report, client, settings))
    yield from preference_pairs(asked, report, client, settings)


def overlap(question: str, reference: str, answer: str) -> float:
    """F1 of the answer's words and word pairs (characters, in scripts without spaces) with the reference's, 0 to 1."""
    found = []
    for size in (1, 2):
        flat, offsets = shingles([reference, answer], words=size, chars=size, symbols=False)
        one, two = Counter(flat[: offsets[1]].tolist()), Counter(flat[offsets[1] :].tolist())
        found.append(2 * (one & two).total() / max(1, one.total() + two.total()))
    return sum(found) / 2


def pair_fault(question: str, answer: str, document: str, seen: set[str]) -> str:
    """Why a pair made from a document is not used, or ""."""
    if not question or not answer:
        return "question or answer empty"
    if MENTIONS_DOCUMENT.search(f"{question}\n{answer}"):
        return "speaks of the document"
    flat, offsets, _ = tokens([answer, document], symbols=False)
    words = flat[: offsets[1]]
    if not len(words) or np.isin(words, flat[offsets[1] :]).mean() < GROUNDED:
        return "answer is not in the document"
    asked = " ".join(question.lower().split())
    if asked in seen:
        return "question asked before"
    seen.add(asked)
    return ""


def _place(row: Row) -> dict[str, Any]:
    return {name: row[name] for name in ("source", "file", "row")}


def _announce(report: StepReport, client: Client, requests: Iterable[Request], settings: Settings) -> None:
    """Put the estimate into the report and before the person, and stop a job that could cost too much."""
    planned = client.estimate(requests)
    report.figures.setdefault("estimate", []).append(str(planned))
    print(planned, flush=True)
    if settings.max_cost and planned.cost > settings.max_cost:
        raise TunebookError(
            f"The job could cost {planned.cost:,.2f}, more than max_cost = {settings.max_cost:,.2f}; nothing was "
            "asked. Take fewer documents or pairs, or raise max_cost."
        )


def _counted(replies: Iterable[Reply], report: StepReport) -> Iterator[Reply]:
    figures = report.figures
    figures |= {n: figures.get(n, 0) for n in ("asked", "from_journal", "prompt_tokens", "completion_tokens")}
    for reply in replies:
        figures["from_journal" if reply.kept else "asked"] += 1
        if not reply.kept:
            figures["prompt_tokens"] += reply.prompt_tokens
            figures["completion_tokens"] += reply.completion_tokens
        yield reply
