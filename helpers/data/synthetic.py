"""Training data written by a model: question-answer pairs from documents.

The documents are text rows, already cut into pieces. Answers are held to a JSON schema. The estimate comes before the
first question, and what is not good enough goes to the rejects with its reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import numpy as np

from helpers.cache import Answers
from helpers.data.shingles import tokens
from helpers.data.tables import StepReport, Table
from helpers.data.turns import BATCH_ROWS, PLACE, Row, batches, make_row, text_of
from helpers.errors import TunebookError
from helpers.llm_client import Client, Endpoint, Request
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
    with Client(server, answers) as client:
        return Table.collect(question_answers(documents, report, client, p))


def question_answers(
    documents: Iterable[list[Row]],
    report: StepReport,
    client: Client,
    p: DataParams,
    max_tokens: int = 768,
    temperature: float = 0.8,
) -> Iterator[list[Row]]:
    """Question-answer rows from text rows, which are read twice.

    Dropped with a reason: answers that break the schema, empty ones, questions asked before, pairs that speak of "the
    document", answers of which less than half the words are in the document. Raises TunebookError when the estimate
    exceeds `max_cost`, and when the endpoint fails.
    """
    count, text = p.pairs_per_document, {"type": "string"}
    pair = {"type": "object", "properties": {"question": text, "answer": text}, "required": ["question", "answer"]}
    pairs = {"type": "array", "items": pair, "minItems": count, "maxItems": count}
    schema = {"type": "object", "properties": {"pairs": pairs}, "required": ["pairs"]}

    def requests() -> Iterator[Request]:
        for row in (row for batch in documents for row in batch):
            if row["kind"] != "text":
                raise TunebookError(
                    f"Row {row['row']} of {row['file']} is a {row['kind']} row; questions are made from documents "
                    "(format 'text')."
                )
            asked = [{"role": "user", "content": ASK_PAIRS.format(count=count, text=text_of(row))}]
            yield Request(asked, schema, max_tokens, temperature, p.seed, tag=row)

    def made() -> Iterator[Row]:
        seen: set[str] = set()
        for reply in client.ask(requests()):
            document = reply.request.tag
            report.seen += 1
            figures["from_journal" if reply.kept else "asked"] += 1
            if not reply.kept:
                figures["prompt_tokens"] += reply.prompt_tokens
                figures["completion_tokens"] += reply.completion_tokens
            if reply.error:
                report.drop(document, "answer unusable", reply.error)
                continue
            for pair in reply.value["pairs"]:
                question, answer = pair["question"].strip(), pair["answer"].strip()
                meta = {"document": document["id"], "origin": f"synthetic: {client.model}"}
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                row = make_row("sft", messages, **{name: document[name] for name in PLACE}, meta=meta)
                if why := pair_fault(question, answer, text_of(document), seen):
                    report.drop(row, why, question)
                else:
                    report.kept += 1
                    yield row

    planned, figures = client.estimate(requests()), report.figures
    figures |= {"estimate": str(planned), "asked": 0, "from_journal": 0, "prompt_tokens": 0, "completion_tokens": 0}
    print(planned, flush=True)
    if p.max_cost and planned.cost > p.max_cost:
        raise TunebookError(
            f"The job could cost {planned.cost:,.2f}, more than max_cost = {p.max_cost:,.2f}; nothing was asked. Take "
            "fewer documents or pairs, or raise max_cost."
        )
    yield from batches(made(), BATCH_ROWS)


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
