"""What is asked, the held-out questions as stage 01 wrote them, and what is answered, whatever runs the model."""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from helpers.errors import TunebookError
from helpers.tasks import extraction

CLUSTERS = ("database", "db_id", "document", "doc_id", "cluster")  # columns that say what items share
CREATE_TABLE = re.compile(r"\bCREATE\s+(?:TEMP\w*\s+)?TABLE\b", re.IGNORECASE)


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn. temperature 0 is greedy, without a seed; max_new_tokens counts the end of turn."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 17

    def key(self) -> dict[str, Any]:
        """What the answers depend on, for the cache: a greedy answer has no seed."""
        return asdict(self) if self.temperature > 0 else {"max_new_tokens": self.max_new_tokens, "temperature": 0.0}


@dataclass(frozen=True)
class Answer:
    """text: without special tokens and outer blanks; tokens: how many were generated; stopped: it ended its turn;
    failed: why there is no answer (endpoints), else ""; refused: why the question could not be asked, else ""."""

    text: str
    tokens: int
    stopped: bool
    failed: str = ""
    refused: str = ""


class Asked(NamedTuple):
    """A conversation to answer: its turns (`helpers.data.turns.Turn`), and the tools as JSON text."""

    messages: list[dict[str, Any]]
    tools: str | None = None


@dataclass(frozen=True)
class Item:
    """One question. prompt: turns; reference: the right answer, "" for none, or behind no prompt a text; meta:
    its other columns; tools: as JSON text; answer: the reference's whole turn, with its calls."""

    id: str
    prompt: list[dict[str, Any]]
    reference: str
    meta: dict[str, Any] = field(default_factory=dict)
    tools: str | None = None
    answer: dict[str, Any] = field(default_factory=dict)

    @property
    def asked(self) -> Asked:
        return Asked(self.prompt, self.tools)

    @property
    def system(self) -> str:
        return next((m["content"] for m in self.prompt if m["role"] == "system"), "")

    @property
    def question(self) -> str:
        return next((m["content"] for m in reversed(self.prompt) if m["role"] == "user"), "")

    @property
    def cluster(self) -> str:
        return next((str(self.meta[c]) for c in CLUSTERS if self.meta.get(c) not in (None, "")), "")

    @property
    def schema(self) -> str:
        """The CREATE TABLE statements that the prompt or its columns hold, "" when none."""
        for value in (self.meta.get("context"), self.meta.get("schema"), self.system, self.question):
            if isinstance(value, str) and (found := CREATE_TABLE.search(value)):
                return value[found.start() :]
        return ""


def read(path: Path, limit: int = 0, seed: int = 17) -> list[Item]:
    """Items of a test.parquet, where there are none the plain texts of the eval.parquet beside it; with `limit`, a
    seeded choice of that many, in the data's order. Raises TunebookError when there are none."""
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist() or _texts(path.with_name("eval.parquet"))
    except (OSError, ValueError) as error:
        raise TunebookError(f"{path} cannot be read ({error}); run notebook 01 again with a test_dataset.") from error
    if not rows:
        raise TunebookError(f"{path} holds no test item; give notebook 01 a test_dataset with at least one.")
    if limit and limit < len(rows):
        rows = [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), limit))]
    items = []
    for row in rows:
        *prompt, answer = json.loads(row.get("messages") or "[]") or [*row["prompt"], {}]
        meta = json.loads(row["meta"] or "{}")
        items.append(Item(str(row["id"]), prompt, row["reference"] or "", meta, row.get("tools"), answer))
    return items


def _texts(path: Path) -> list[dict[str, Any]]:
    """The plain texts of an eval.parquet as rows without a prompt; a text that was cut into several rows is one."""
    import pyarrow.parquet as pq

    found = pq.read_table(path, columns=["id", "messages"]).to_pylist() if path.is_file() else []
    texts = {row["id"]: json.loads(row["messages"])[0] for row in found}
    kept = {name: turn["content"] for name, turn in texts.items() if turn["role"] == "text"}
    return [{"id": name, "prompt": [], "reference": text, "meta": None} for name, text in kept.items()]


def task_kind(items: Sequence[Item], database: Path | None) -> str:
    """ "text_to_sql" (queries, and a database or CREATE TABLE in the prompts), "references", "none", or "text" (no item
    asks anything)."""
    if not any(i.prompt for i in items):
        return "text"
    references = [i.reference for i in items if i.reference.strip()]
    queries = sum(map(extraction.is_query, references))
    if references and queries >= 0.9 * len(references) and (database is not None or any(i.schema for i in items)):
        return "text_to_sql"
    return "references" if references else "none"


def clusters(items: Sequence[Item]) -> list[str] | None:
    """The cluster of every item, or None where items share nothing (every item apart, or all in one)."""
    names = [i.cluster for i in items]
    return names if 1 < len(set(names)) < len(names) and all(names) else None


def groups(items: Sequence[Item], scores: Sequence[float | None]) -> dict[str, dict[str, dict[str, Any]]]:
    """Mean score by the columns "kind" and "origin", where the data has them."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for column in ("kind", "origin"):
        values: dict[str, list[float]] = defaultdict(list)
        for item, score in zip(items, scores, strict=True):
            if score is not None and isinstance(item.meta.get(column), (str, int)):
                values[str(item.meta[column])].append(score)
        if values:
            found[column] = {name: {"value": fmean(v), "n": len(v)} for name, v in sorted(values.items())}
    return found
