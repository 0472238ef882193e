"""The world atlas as one SQLite file, built from the CSV files in ../facts."""

import csv
import sqlite3
from pathlib import Path

FACTS = Path(__file__).resolve().parents[1] / "facts"

SCHEMA = """
CREATE TABLE countries (
  name TEXT PRIMARY KEY,
  capital TEXT NOT NULL,
  continent TEXT NOT NULL,
  area INTEGER NOT NULL,        -- km2
  population INTEGER NOT NULL,  -- people, about 2024
  currency TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE rivers (
  name TEXT PRIMARY KEY,
  length INTEGER NOT NULL,      -- km
  mouth TEXT NOT NULL           -- sea, lake or river it ends in
) WITHOUT ROWID;
CREATE TABLE cities (
  name TEXT PRIMARY KEY,
  country TEXT NOT NULL REFERENCES countries(name),
  population INTEGER NOT NULL,  -- people in the built-up area
  river TEXT REFERENCES rivers(name)
) WITHOUT ROWID;
CREATE TABLE flows (
  river TEXT NOT NULL REFERENCES rivers(name),
  country TEXT NOT NULL REFERENCES countries(name),
  PRIMARY KEY (river, country)
) WITHOUT ROWID;
CREATE TABLE mountains (
  name TEXT PRIMARY KEY,
  country TEXT NOT NULL REFERENCES countries(name),
  height INTEGER NOT NULL,      -- m
  range TEXT
) WITHOUT ROWID;
CREATE TABLE lakes (
  name TEXT PRIMARY KEY,
  area INTEGER NOT NULL,        -- km2
  depth INTEGER NOT NULL        -- greatest depth, m
) WITHOUT ROWID;
CREATE TABLE shores (
  lake TEXT NOT NULL REFERENCES lakes(name),
  country TEXT NOT NULL REFERENCES countries(name),
  PRIMARY KEY (lake, country)
) WITHOUT ROWID;
CREATE TABLE borders (
  country TEXT NOT NULL REFERENCES countries(name),
  neighbor TEXT NOT NULL REFERENCES countries(name),
  PRIMARY KEY (country, neighbor)
) WITHOUT ROWID;
CREATE TABLE languages (
  country TEXT NOT NULL REFERENCES countries(name),
  language TEXT NOT NULL,
  PRIMARY KEY (country, language)
) WITHOUT ROWID;
"""

COLUMNS = {
    "countries": "countries(name, capital, continent, area, population, currency)",
    "cities": "cities(name, country, population, river)",
    "rivers": "rivers(name, length, mouth)",
    "flows": "flows(river, country)",
    "mountains": "mountains(name, country, height, range)",
    "lakes": "lakes(name, area, depth)",
    "shores": "shores(lake, country)",
    "borders": "borders(country, neighbor)",
    "languages": "languages(country, language)",
}
SYSTEM = f"Answer with one SQLite query. Tables: {', '.join(COLUMNS.values())}"


def read(name: str) -> list[dict[str, str]]:
    with open(FACTS / f"{name}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def rows() -> dict[str, list[tuple]]:
    """Every table's rows, in the order they are inserted (by key, so that bytes repeat)."""
    countries, rivers, lakes = read("countries"), read("rivers"), read("lakes")
    pairs = [(row["country"], other) for row in read("borders") for other in row["neighbors"].split("|")]
    tables = {
        "countries": [
            (r["name"], r["capital"], r["continent"], int(r["area"]), int(r["population"]), r["currency"])
            for r in countries
        ],
        "rivers": [(r["name"], int(r["length"]), r["mouth"]) for r in rivers],
        "cities": [(r["name"], r["country"], int(r["population"]), r["river"] or None) for r in read("cities")],
        "flows": [(r["name"], country) for r in rivers for country in r["countries"].split("|")],
        "mountains": [(r["name"], r["country"], int(r["height"]), r["range"] or None) for r in read("mountains")],
        "lakes": [(r["name"], int(r["area"]), int(r["depth"])) for r in lakes],
        "shores": [(r["name"], country) for r in lakes for country in r["countries"].split("|")],
        "borders": pairs + [(b, a) for a, b in pairs],
        "languages": [(r["name"], language) for r in countries for language in r["languages"].split("|")],
    }
    return {name: sorted(table, key=lambda row: row[:2]) for name, table in tables.items()}


def fill(connection: sqlite3.Connection, reverse: bool = False) -> None:
    """Create and fill all tables. With `reverse` they have no keys and their rows stand the
    other way round, so that an answer which depends on storage order can be told."""
    if not reverse:
        connection.executescript(SCHEMA)
    for name, table in rows().items():
        if reverse:
            connection.execute(f"CREATE TABLE {COLUMNS[name]}")
        marks = ", ".join("?" * len(table[0]))
        connection.executemany(f"INSERT INTO {name} VALUES ({marks})", table[::-1] if reverse else table)
    connection.commit()


def write(path: Path) -> None:
    """Write the database to `path`, the same bytes on every machine and SQLite version."""
    path.unlink(missing_ok=True)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA page_size = 4096")
    connection.execute("PRAGMA auto_vacuum = NONE")
    connection.execute("PRAGMA journal_mode = DELETE")
    fill(connection)
    broken = connection.execute("PRAGMA foreign_key_check").fetchall()
    if broken:
        raise SystemExit(f"facts/*.csv name things that no other file knows: {broken[:5]}")
    connection.execute("VACUUM")
    connection.close()
    content = bytearray(path.read_bytes())
    # Header fields that only say which library wrote the file, and how often: change
    # counter, version-valid-for and the library's version number (sqlite.org/fileformat2).
    content[24:28] = content[92:96] = (1).to_bytes(4, "big")
    content[96:100] = (3_040_000).to_bytes(4, "big")
    path.write_bytes(bytes(content))
