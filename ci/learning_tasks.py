"""The tasks of `ci/bench_learning.py`: public sets, downloaded or named, each file with a known hash."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import sqlite3
import urllib.request
from pathlib import Path
from typing import Any

from helpers import cache
from helpers.errors import TunebookError

Row = dict[str, Any]
GITHUB = "https://raw.githubusercontent.com"
ADDRESSES = {
    "geoquery": f"{GITHUB}/jkkummerfeld/text2sql-data/5050bad2309a93636ea4788d3660c9202bf11e0e/data",
    "banking77": f"{GITHUB}/PolyAI-LDN/task-specific-datasets/57ec275d8078af65b7731c2a98be812d844a6d6b/banking_data",
}
GEO_DATABASE = "geography-db.added-in-2020.sqlite"
SHA256 = {
    ("geoquery", "geography.json"): "b20ad8ed357029c9efa49aa64434729f624591850f66b1137cabcc0e45273c1b",
    ("geoquery", GEO_DATABASE): "98955372123cd9a8e761b00c2c67fbf221f1b8699927add538b53154c702dd3c",
    ("banking77", "train.csv"): "b06e26ac675513959a63135f11b94ea7786ed02da65db93a5650d8838cbc664b",
    ("banking77", "test.csv"): "d12d6e3bc4c3103966ae786dc435913c0c563dfa328f5a3646d0e62cfeeb474d",
}


def sources(task: str, folder: Path, fetch: bool) -> dict[str, str]:
    """Parameters of notebook 01 for `NAME`, `NAME=FOLDER` or `NAME=TRAIN,TEST[,DATABASE]`; a public task's files are
    converted into `folder`."""
    name, _, where = task.partition("=")
    if name == "atlas" and not where:
        return {}
    if name not in ADDRESSES:
        parts = [part.strip() for part in where.split(",")]
        if not 2 <= len(parts) <= 3:
            known = ", ".join(["atlas", *ADDRESSES])
            raise TunebookError(f"--task {task}: name one of {known}, or write NAME=TRAIN,TEST[,DATABASE].")
        return dict(zip(("dataset", "test_dataset", "database"), parts, strict=False))
    given = public_files(name, where, fetch)
    folder.mkdir(parents=True, exist_ok=True)
    train, test = (geoquery if name == "geoquery" else banking77)(*given)
    found = {"database": str(given[1])} if name == "geoquery" else {}
    for parameter, side, rows in (("dataset", "train", train), ("test_dataset", "test", test)):
        file = folder / f"{side}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        found[parameter] = str(file)
    return found


def public_files(name: str, where: str, fetch: bool) -> list[Path]:
    """A public task's files in the named folder, or in the cache after a download; each must have its known hash."""
    folder = Path(where) if where else cache.folder() / "learning" / name
    paths = {folder / file: (file, known) for (task, file), known in SHA256.items() if task == name}
    for path, (file, known) in paths.items():
        if not path.is_file() and fetch and not where:
            path.parent.mkdir(parents=True, exist_ok=True)
            with urllib.request.urlopen(f"{ADDRESSES[name]}/{file}", timeout=60) as answer:
                cache.write_atomic(path, answer.read())
        if not path.is_file():
            raise TunebookError(
                f"{path} is missing; add --fetch, or name the folder that has it: --task {name}=FOLDER."
            )
        if hashlib.sha256(path.read_bytes()).hexdigest() != known:
            raise TunebookError(f"{path} is not the file of {ADDRESSES[name]}; delete it and add --fetch.")
    return list(paths)


def geoquery(questions: Path, database: Path) -> tuple[list[Row], list[Row]]:
    """GeoQuery by its question split (Finegan-Dollak et al. 2018, arXiv:1806.09029): training and development rows to
    train on; of the test's those whose query returns something. The schema is told as the embedded data tell theirs."""
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        columns = {t: [c[1] for c in connection.execute(f"PRAGMA table_info({t})")] for t in tables}
        schema = ", ".join(f"{table}({', '.join(names)})" for table, names in columns.items())
        parts: dict[str, list[Row]] = {"train": [], "dev": [], "test": []}
        for query in json.loads(questions.read_text(encoding="utf-8")):
            for asked in query["sentences"]:
                question, sql = asked["text"], " ".join(query["sql"][0].split()).rstrip(" ;")
                for name, value in asked["variables"].items():
                    question, sql = question.replace(name, value), sql.replace(name, value)
                if asked["question-split"] == "test":
                    try:
                        answer = connection.execute(sql).fetchall()
                    except sqlite3.Error:
                        continue
                    if not any(value is not None for row in answer for value in row):
                        continue
                system = f"Answer with one SQLite query. Tables: {schema}"
                parts[asked["question-split"]].append({"system": system, "question": question, "sql": sql})
    return parts["train"] + parts["dev"], parts["test"]


def banking77(train: Path, test: Path) -> tuple[list[Row], list[Row]]:
    """BANKING77 (Casanueva et al. 2020, arXiv:2003.04807): a customer's question and which of 77 intents it has."""

    def rows(file: Path) -> list[Row]:
        with open(file, encoding="utf-8", newline="") as lines:
            read = list(csv.DictReader(lines))
        system = "Name the intent of the bank customer's message."
        return [{"system": system, "prompt": one["text"], "completion": one["category"]} for one in read]

    return rows(train), rows(test)
