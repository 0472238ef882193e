"""Training data written by a model: question-answer pairs from documents, and preference pairs by rejection sampling.

The documents are text rows, already cut into pieces. Any OpenAI-compatible endpoint serves; answers are held to a JSON
schema. The estimate comes before the first question, every question is asked once even over a kill, and what is not
good enough goes to the rejects with its reason.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from helpers.data.shingles import SeenHashes, shingles, text_hash, tokens
from helpers.data.tables import BATCH_ROWS, Row, StepReport, Table, answer_of, batches, make_row, text_of
from helpers.errors import TunebookError
from helpers.llm_client import Endpoint, Estimate, Journal, Reply, Request, ask_all, estimate

ASK_PAIRS = (
    "Write {count} question-answer pairs about the document below, in its language. Each question must be understandable "
    "without the document and have one answer that the document states. Answer in full sentences.\n\nDocument:\n{text}"
)
ASK_JUDGE = (
    "Question:\n{question}\n\nReference answer:\n{reference}\n\nAnswer to judge:\n{answer}\n\n"
    "How correct and complete is the answer, from 1 (wrong) to 10 (as good as the reference)?"
)
JUDGE_SCHEMA = {
    "type": "object",
    "properties": {"score": {"type": "integer", "enum": list(range(1, 11))}},
    "required": ["score"],
}
ANSWER_SCHEMA = {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}
MENTIONS_DOCUMENT = re.compile(
    r"\b(the|this|that|above|given|provided)\s+(text|passage|document|excerpt|article|paragraph)\b|本文|上文|文中|该文|这篇文章",
    re.IGNORECASE,
)
GROUNDED = 0.5  # share of an answer's words that the document must hold

Judge = Callable[[str, str, str], float]  # (question, reference, answer) → 0 to 1


@dataclass(frozen=True)
class Settings:
    """per_document: question-answer pairs asked of each document. samples: answers drawn for each question of a preference
    pair. margin: how far apart, on a scale of 0 to 1, the chosen and the rejected answer must be scored; good: the least
    score of a chosen one. max_cost: a job that could cost more is refused; 0: no limit.
    """

    per_document: int = 3
    samples: int = 4
    max_tokens: int = 768
    temperature: float = 0.8
    seed: int = 17
    margin: float = 0.2
    good: float = 0.3
    max_cost: float = 0.0


def question_answers(
    documents: Iterable[list[Row]],
    report: StepReport,
    endpoint: Endpoint,
    journal: str | Path,
    settings: Settings = Settings(),
) -> Iterator[list[Row]]:
    """Question-answer rows from text rows. `journal`: a file that keeps the answers; the same file resumes the job.

    Dropped with a reason: answers that break the schema, empty ones, questions asked before, pairs that speak of "the
    document", answers of which less than half the words are in the document. Raises TunebookError when the estimate
    exceeds `max_cost`, and when the endpoint fails.
    """
    table = documents if isinstance(documents, Table) else Table.collect(documents)
    with contextlib.closing(Journal(journal)) as book:
        _announce(report, estimate(endpoint, _pair_requests(table, settings), book), settings)
        yield from batches(_pairs(table, report, endpoint, book, settings), BATCH_ROWS)


def preference_pairs(
    questions: Iterable[list[Row]],
    report: StepReport,
    endpoint: Endpoint,
    journal: str | Path,
    settings: Settings = Settings(),
    judge: Judge | Endpoint | None = None,
) -> Iterator[list[Row]]:
    """Preference rows by rejection sampling: `samples` answers to each question, the best chosen, the worst rejected.

    questions: sft rows whose last turn is the reference answer. judge: a function (question, reference, answer) → 0 to 1,
    an Endpoint that is asked for a mark, or None for `overlap` with the reference. Questions without a clear winner go
    to the rejects.
    """
    table = questions if isinstance(questions, Table) else Table.collect(questions)
    with contextlib.closing(Journal(journal)) as book:
        planned = estimate(endpoint, _sample_requests(table, settings), book)
        if isinstance(judge, Endpoint):
            planned = _with_judging(planned, judge, table, settings)
        _announce(report, planned, settings)
        yield from batches(_preferences(table, report, endpoint, book, settings, judge or overlap), BATCH_ROWS)


def preference_from_documents(
    documents: Iterable[list[Row]],
    report: StepReport,
    endpoint: Endpoint,
    journal: str | Path,
    settings: Settings = Settings(),
    judge: Judge | Endpoint | None = None,
) -> Iterator[list[Row]]:
    """Preference rows from text rows: first questions with reference answers, then answers without the document."""
    asked = Table.collect(question_answers(documents, report, endpoint, journal, settings))
    yield from preference_pairs(asked, report, endpoint, journal, settings, judge)


def overlap(question: str, reference: str, answer: str) -> float:
    """F1 of the answer's words and word pairs (characters, in scripts without spaces) against the reference's, 0 to 1."""
    scores = []
    for size in (1, 2):
        flat, offsets = shingles([reference, answer], words=size, chars=size, symbols=False)
        one, two = Counter(flat[: offsets[1]].tolist()), Counter(flat[offsets[1] :].tolist())
        shared = sum((one & two).values())
        scores.append(2 * shared / max(1, sum(one.values()) + sum(two.values())))
    return sum(scores) / 2


def _pair_requests(documents: Iterable[list[Row]], settings: Settings) -> Iterator[Request]:
    item = {
        "type": "object",
        "properties": {"question": {"type": "string"}, "answer": {"type": "string"}},
        "required": ["question", "answer"],
    }
    count = settings.per_document
    pairs = {"type": "array", "items": item, "minItems": count, "maxItems": count}
    schema = {"type": "object", "properties": {"pairs": pairs}, "required": ["pairs"]}
    for batch in documents:
        for row in batch:
            if row["kind"] != "text":
                raise TunebookError(
                    f"Row {row['row']} of {row['file']} is a {row['kind']} row; questions are made from documents (format 'text')."
                )
            content = ASK_PAIRS.format(count=count, text=text_of(row))
            yield Request(
                [{"role": "user", "content": content}],
                schema,
                settings.max_tokens,
                settings.temperature,
                settings.seed,
                tag=row,
            )


def _pairs(table: Table, report: StepReport, endpoint: Endpoint, book: Journal, settings: Settings) -> Iterator[Row]:
    seen = SeenHashes()
    for reply in _counted(ask_all(endpoint, _pair_requests(table, settings), book), report):
        document = reply.request.tag
        report.seen += 1
        if reply.error:
            report.drop(document, "answer unusable", reply.error)
            continue
        for pair in reply.value["pairs"]:
            question, answer = pair["question"].strip(), pair["answer"].strip()
            row = make_row(
                "sft",
                [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
                source=document["source"],
                file=document["file"],
                row=document["row"],
                meta={"document": document["id"], "origin": f"synthetic: {endpoint.model}"},
            )
            if why := _pair_fault(question, answer, text_of(document), seen):
                report.drop(row, why, question)
            else:
                report.kept += 1
                yield row


def _pair_fault(question: str, answer: str, document: str, seen: SeenHashes) -> str:
    if not question or not answer:
        return "question or answer empty"
    if MENTIONS_DOCUMENT.search(f"{question}\n{answer}"):
        return "speaks of the document"
    flat, offsets, _ = tokens([answer, document], symbols=False)
    words = flat[: offsets[1]]
    if not len(words) or np.isin(words, flat[offsets[1] :]).mean() < GROUNDED:
        return "answer is not in the document"
    if not seen.add(np.array([text_hash(" ".join(question.lower().split()))], np.uint64))[0]:
        return "question asked before"
    return ""


def _sample_requests(questions: Iterable[list[Row]], settings: Settings) -> Iterator[Request]:
    for batch in questions:
        for row in batch:
            prompt = [{"role": m["role"], "content": m.get("content") or ""} for m in row["messages"][:-1]]
            for sample in range(settings.samples):
                yield Request(
                    prompt,
                    ANSWER_SCHEMA,
                    settings.max_tokens,
                    max(settings.temperature, 0.7),
                    settings.seed + sample,
                    tag=row,
                )


def _preferences(
    table: Table, report: StepReport, endpoint: Endpoint, book: Journal, settings: Settings, judge: Judge | Endpoint
) -> Iterator[Row]:
    drawn: list[Reply] = []
    for reply in _counted(ask_all(endpoint, _sample_requests(table, settings), book), report):
        drawn.append(reply)
        if len(drawn) < settings.samples:
            continue
        row, drawn_now, drawn = reply.request.tag, drawn, []
        report.seen += 1
        answers = list(
            dict.fromkeys(r.value["answer"].strip() for r in drawn_now if not r.error and r.value["answer"].strip())
        )
        if len(answers) < 2:
            errors = Counter(r.error for r in drawn_now if r.error)
            report.drop(row, "fewer than two different answers", next(iter(errors), ""))
            continue
        scores = _scores(row, answers, judge, book, report)
        best, worst = max(range(len(answers)), key=scores.__getitem__), min(range(len(answers)), key=scores.__getitem__)
        detail = f"best {scores[best]:.2f}, worst {scores[worst]:.2f} of {len(answers)}"
        if scores[best] < settings.good:
            report.drop(row, "no good answer", detail)
        elif scores[best] - scores[worst] < settings.margin:
            report.drop(row, "no clear winner", detail)
        else:
            report.kept += 1
            yield make_row(
                "preference",
                row["messages"][:-1],
                source=row["source"],
                file=row["file"],
                row=row["row"],
                chosen=[{"role": "assistant", "content": answers[best]}],
                rejected=[{"role": "assistant", "content": answers[worst]}],
                meta={
                    "scores": [round(scores[best], 3), round(scores[worst], 3)],
                    "origin": f"synthetic: {endpoint.model}",
                },
            )


def _scores(row: Row, answers: list[str], judge: Judge | Endpoint, book: Journal, report: StepReport) -> list[float]:
    question = "\n".join(m.get("content") or "" for m in row["messages"][:-1] if m["role"] != "system")
    reference = answer_of(row)
    if not isinstance(judge, Endpoint):
        return [float(judge(question, reference, answer)) for answer in answers]
    asked = [
        Request(
            [{"role": "user", "content": ASK_JUDGE.format(question=question, reference=reference, answer=answer)}],
            JUDGE_SCHEMA,
            32,
            0.0,
        )
        for answer in answers
    ]
    replies = list(_counted(ask_all(judge, asked, book), report))
    return [0.0 if reply.error else (reply.value["score"] - 1) / 9 for reply in replies]


def _with_judging(planned: Estimate, judge: Endpoint, table: Table, settings: Settings) -> Estimate:
    """The estimate with one mark asked for each sample; the answers to come are taken at their longest."""
    sample = "x" * int(settings.max_tokens * 3.5)
    texts = (
        ASK_JUDGE.format(question=text_of(row), reference="", answer=sample)
        for row in table.rows()
        for _ in range(settings.samples)
    )
    more = estimate(judge, (Request([{"role": "user", "content": text}], JUDGE_SCHEMA, 32, 0.0) for text in texts))
    return Estimate(
        planned.requests + more.requests,
        planned.in_journal,
        planned.prompt_tokens + more.prompt_tokens,
        planned.completion_tokens + more.completion_tokens,
        planned.cost + more.cost,
    )


def _announce(report: StepReport, planned: Estimate, settings: Settings) -> None:
    """Put the estimate into the report and before the person, and stop a job that could cost too much."""
    report.figures.setdefault("estimate", []).append(str(planned))
    print(planned, flush=True)
    if settings.max_cost and planned.cost > settings.max_cost:
        raise TunebookError(
            f"The job could cost {planned.cost:,.2f}, more than max_cost = {settings.max_cost:,.2f}; nothing was asked. "
            "Take fewer documents or pairs, or raise max_cost."
        )


def _counted(replies: Iterable[Reply], report: StepReport) -> Iterator[Reply]:
    figures: dict[str, Any] = report.figures
    for name in ("asked", "from_journal", "prompt_tokens", "completion_tokens"):
        figures.setdefault(name, 0)
    for reply in replies:
        figures["from_journal" if reply.from_journal else "asked"] += 1
        if not reply.from_journal:
            figures["prompt_tokens"] += reply.prompt_tokens
            figures["completion_tokens"] += reply.completion_tokens
        yield reply
