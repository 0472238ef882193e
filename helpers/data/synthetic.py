"""Training data written by a model: question-answer pairs from documents, preference pairs by rejection sampling.

The documents are text rows, already cut into pieces. Answers are held to a JSON schema. How many questions there are,
and what they could cost, is said before the first; what is not good enough goes to the rejects with its reason.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from helpers.cache import Answers
from helpers.data.shingles import tokens
from helpers.data.tables import StepReport, Table
from helpers.data.turns import BATCH_ROWS, PLACE, Row, answer_of, batches, make_row, text_of
from helpers.display import say
from helpers.errors import TunebookError
from helpers.llm_client import Client, Endpoint, Reply, Request
from helpers.params import DataParams
from helpers.tasks.text_metrics import f1

ASK_PAIRS = (
    "Write {count} question-answer pairs about the document below, in its language. Each question must be "
    "understandable without the document and have one answer that the document states. Answer in full sentences.\n\n"
    "Document:\n{text}"
)
ALSO_SUMMARY = "\n\nThen summarise what it states in a few sentences, without speaking of the document."
SUMMARISE = "Summarise the following in a few sentences.\n\n{text}"
MENTIONS_DOCUMENT = re.compile(
    r"\b(the|this|that|above|given|provided)\s+(text|passage|document|excerpt|article|paragraph)\b"
    r"|本文|上文|文中|该文|这篇文章",
    re.IGNORECASE,
)
GROUNDED = 0.5  # share of an answer's words that the document must hold
SAMPLES = 4  # answers drawn for each question of a preference pair
MARGIN, GOOD = 0.2, 0.4  # how far apart chosen and rejected must be scored, and the lowest score of a chosen answer
TEXT = {"type": "string"}


def object_of(**properties: dict) -> dict:
    """JSON schema of an object that has these properties and no others."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def generate(p: DataParams, documents: Table, report: StepReport, answers: Answers) -> Table:
    """The rows that the parameter `synthetic` asks for. answers: keeps what the endpoint said.

    Raises TunebookError where the endpoint, the documents or the prices are missing.
    """
    if not p.endpoint or not p.endpoint_model:
        raise TunebookError(
            f"synthetic is {p.synthetic!r}, which needs endpoint (http://host:8080/v1) and endpoint_model."
        )
    if p.max_cost and not (p.price_in or p.price_out):
        raise TunebookError(f"max_cost is {p.max_cost:g}, which needs price_in and price_out, for a million tokens.")
    if not len(documents):
        raise TunebookError(f"synthetic is {p.synthetic!r}, but dataset holds no documents or plain text.")
    with Client(Endpoint(p.endpoint, p.endpoint_model, p.endpoint_key_name), answers) as client:
        rows = Table.collect(question_answers(documents, report, client, p))
        return rows if p.synthetic.startswith("questions") else Table.collect(preference_pairs(rows, report, client, p))


def question_answers(
    documents: Iterable[list[Row]],
    report: StepReport,
    client: Client,
    p: DataParams,
    max_tokens: int = 768,
    temperature: float = 0.8,
) -> Iterator[list[Row]]:
    """Question-answer rows from text rows, which are read twice; with `questions_summaries` a summary of each, too.

    Dropped with a reason: answers that break the schema, empty ones, questions asked before, pairs that speak of "the
    document", answers of which less than half the words are in the document. Raises TunebookError when the job could
    exceed `max_cost`, and when the endpoint fails.
    """
    count, seen = p.pairs_per_document, set[str]()
    pairs = {"type": "array", "items": object_of(question=TEXT, answer=TEXT), "minItems": count, "maxItems": count}
    summaries = p.synthetic == "questions_summaries"
    shape = object_of(pairs=pairs, summary=TEXT) if summaries else object_of(pairs=pairs)

    def request(document: Row, sample: int) -> Request:
        if document["kind"] != "text":
            found = f"Row {document['row']} of {document['file']} is a {document['kind']} row"
            raise TunebookError(f"{found}; questions are made from documents (format 'text').")
        text = ASK_PAIRS.format(count=count, text=text_of(document)) + ALSO_SUMMARY * summaries
        return Request(
            [{"role": "user", "content": text}], shape, max_tokens, temperature, p.seed + sample, tag=document
        )

    def made(document: Row, replies: list[Reply]) -> Iterator[Row]:
        if replies[0].error:
            report.drop(document, "answer unusable", replies[0].error)
            return
        value, text = replies[0].value, text_of(document)
        found = [(pair["question"].strip(), pair["answer"].strip()) for pair in value["pairs"]]
        found += [(SUMMARISE.format(text=text), value["summary"].strip())] if summaries else []
        for place, (question, answer) in enumerate(found):
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            meta = {"document": document["id"], "origin": f"synthetic: {client.model}"}
            row = make_row("sft", messages, **{name: document[name] for name in PLACE}, meta=meta)
            asked = question if place < len(value["pairs"]) else document["id"]  # its own words speak of what follows
            if why := pair_fault(asked, answer, text, seen):
                report.drop(row, why, question)
            else:
                yield row

    return _asked(documents, report, client, p, 1, request, made)


def preference_pairs(
    questions: Iterable[list[Row]],
    report: StepReport,
    client: Client,
    p: DataParams,
    judge: Callable[[str, str], float] = f1,
    *,
    samples: int = SAMPLES,
    margin: float = MARGIN,
    good: float = GOOD,
    max_tokens: int = 768,
    temperature: float = 0.8,
) -> Iterator[list[Row]]:
    """Preference rows by rejection sampling: `samples` answers to each question, the best chosen, the worst rejected.

    questions: sft rows whose last turn is the reference answer, read twice. judge: (answer, reference) → 0 to 1.
    Questions without a clear winner go to the rejects.
    """

    def request(row: Row, sample: int) -> Request:
        prompt = [{"role": m["role"], "content": m.get("content") or ""} for m in row["messages"][:-1]]
        return Request(prompt, object_of(answer=TEXT), max_tokens, temperature, p.seed + sample, tag=row)

    def made(row: Row, replies: list[Reply]) -> Iterator[Row]:
        texts = [reply.value["answer"].strip() for reply in replies if not reply.error]
        answers = list(dict.fromkeys(filter(None, texts)))
        if len(answers) < 2:
            report.drop(row, "fewer than two different answers", next((r.error for r in replies if r.error), ""))
            return
        marks = {answer: judge(answer, answer_of(row)) for answer in answers}
        best, worst = max(marks, key=marks.__getitem__), min(marks, key=marks.__getitem__)
        detail = f"best {marks[best]:.2f}, worst {marks[worst]:.2f} of {len(answers)}"
        if marks[best] < good:
            report.drop(row, "no good answer", detail)
        elif marks[best] - marks[worst] < margin:
            report.drop(row, "no clear winner", detail)
        else:
            chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in (best, worst))
            scores = [round(marks[best], 3), round(marks[worst], 3)]
            more = {name: row[name] for name in PLACE}
            more["meta"] = {"scores": scores, "origin": f"synthetic: {client.model}"}
            yield make_row("preference", row["messages"][:-1], chosen=chosen, rejected=rejected, **more)

    return _asked(questions, report, client, p, samples, request, made)


def _asked(
    rows: Iterable[list[Row]],
    report: StepReport,
    client: Client,
    p: DataParams,
    samples: int,
    request: Callable[[Row, int], Request],
    made: Callable[[Row, list[Reply]], Iterable[Row]],
) -> Iterator[list[Row]]:
    """What `made` makes of every row and its replies, all counted in the report."""
    figures = report.figures
    figures |= {n: figures.get(n, 0) for n in ("asked", "from_journal", "prompt_tokens", "completion_tokens")}

    def requests() -> Iterator[Request]:
        return (request(row, sample) for batch in rows for row in batch for sample in range(samples))

    planned = client.estimate(requests())
    cost = (planned["tokens_in"] * p.price_in + planned["tokens_out"] * p.price_out) / 1e6
    figures["cost_at_most"] = total = figures.get("cost_at_most", 0.0) + cost
    price = f"{cost:,.2f}" if p.price_in or p.price_out else "unknown, without price_in and price_out"
    say(
        f"{planned['new']:,} questions to ask ({planned['kept']:,} already answered), about {planned['tokens_in']:,} "
        f"tokens in and at most {planned['tokens_out']:,} out; cost at most {price}."
    )
    if p.max_cost and total > p.max_cost:
        found = f"The job could cost {total:,.2f}, more than max_cost = {p.max_cost:,.2f}"
        raise TunebookError(f"{found}; none of these was asked. Take fewer documents or pairs, or raise max_cost.")

    def counted() -> Iterator[Reply]:
        for reply in client.ask(requests()):
            figures["from_journal" if reply.kept else "asked"] += 1
            figures["prompt_tokens"] += 0 if reply.kept else reply.prompt_tokens
            figures["completion_tokens"] += 0 if reply.kept else reply.completion_tokens
            yield reply

    def kept() -> Iterator[Row]:
        replies = counted()
        while drawn := list(itertools.islice(replies, samples)):
            report.seen += 1
            for row in made(drawn[0].request.tag, drawn):
                report.kept += 1
                yield row

    return batches(kept(), BATCH_ROWS)


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
