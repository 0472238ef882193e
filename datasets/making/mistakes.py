"""Rejected queries: each is the chosen query with one mistake a text-to-SQL model makes.

A mistake is (why, pattern, replacement). It is kept only where the query it makes runs and
answers differently.
"""

import re
import sqlite3

from making.slots import Checker, filled, rank

MISTAKES = [
    ("largest and smallest are confused", r"ORDER BY (\S+) DESC", r"ORDER BY \1"),
    (
        "largest and smallest are confused",
        r"ORDER BY ((?:countries\.|cities\.)?(?:population|area)) LIMIT",
        r"ORDER BY \1 DESC LIMIT",
    ),
    ("the limit is missing", r" LIMIT \d+$", ""),
    ("the limit is another number", r" LIMIT (\d)$", lambda m: f" LIMIT {int(m[1]) + 1}"),
    ("the order is missing", r" ORDER BY \S+( DESC)?", ""),
    ("sorted by the wrong column", r"ORDER BY (\w+\.)?population", r"ORDER BY \1name"),
    ("sorted by the wrong column", r"ORDER BY (\w+\.)?area", lambda m: f"ORDER BY {m[1] or ''}name"),
    ("average instead of sum", r"SUM\(", "AVG("),
    ("sum instead of average", r"AVG\(", "SUM("),
    ("minimum instead of maximum", r"MAX\(", "MIN("),
    ("maximum instead of minimum", r"MIN\(", "MAX("),
    ("rows are listed instead of counted", r"SELECT COUNT\(\*\)", "SELECT *"),
    ("everything is counted: the filter is missing", r"(SELECT COUNT\(\*\) FROM \w+) WHERE .*$", r"\1"),
    ("a condition is missing", r" AND (?!name NOT|river IS|range IS).*?(?= GROUP| ORDER|$)", ""),
    ("the filter is missing", r" WHERE \w+ = '[^']*'(?= ORDER| GROUP)", ""),
    ("the filter is missing", r" WHERE (\w+) (=|>|<) ('[^']*'|\d+)$", ""),
    ("less and more are confused", r" > ", " < "),
    ("less and more are confused", r" < ", " > "),
    ("the column of the filter is wrong", r"WHERE neighbor = ", "WHERE country = "),
    ("the country is returned instead of its neighbor", r"SELECT neighbor", "SELECT country"),
    ("the wrong column is returned", r"^SELECT capital", "SELECT name"),
    ("the wrong column is returned", r"^SELECT population", "SELECT area"),
    ("the wrong column is returned", r"^SELECT area FROM countries", "SELECT population FROM countries"),
    ("the wrong column is returned", r"^SELECT area FROM lakes", "SELECT depth FROM lakes"),
    ("the wrong column is returned", r"^SELECT depth", "SELECT area"),
    ("the wrong column is returned", r"^SELECT currency", "SELECT capital"),
    ("the wrong column is returned", r"^SELECT continent FROM", "SELECT name FROM"),
    ("the wrong column is returned", r"^SELECT length", "SELECT mouth"),
    ("the wrong column is returned", r"^SELECT mouth FROM rivers WHERE", "SELECT length FROM rivers WHERE"),
    ("the wrong column is returned", r"^SELECT height", "SELECT range"),
    (
        "the wrong column is returned",
        r"^SELECT range FROM mountains WHERE name",
        "SELECT country FROM mountains WHERE name",
    ),
    ("the wrong column is returned", r"^SELECT countries\.capital", "SELECT countries.name"),
    ("the wrong column is returned", r"^SELECT countries\.name", "SELECT countries.capital"),
    ("the wrong column is returned", r"^SELECT countries\.currency", "SELECT countries.capital"),
    ("the wrong column is returned", r"^SELECT (cities|mountains|rivers|lakes)\.name FROM", r"SELECT * FROM"),
    ("the wrong column is returned", r"^SELECT river FROM cities", "SELECT country FROM cities"),
    (
        "the wrong column is returned",
        r"^SELECT country FROM (cities|mountains) WHERE name",
        r"SELECT name FROM \1 WHERE name",
    ),
    ("the wrong column is returned", r"^SELECT country FROM (flows|shores|languages) WHERE", r"SELECT * FROM \1 WHERE"),
    ("the wrong column is returned", r"^SELECT name FROM countries WHERE", "SELECT capital FROM countries WHERE"),
    ("the wrong column is returned", r"^SELECT name FROM (cities|mountains) WHERE", r"SELECT country FROM \1 WHERE"),
    (
        "the wrong column is returned",
        r"^SELECT name FROM (rivers|lakes|mountains|cities|countries)",
        r"SELECT * FROM \1",
    ),
    ("the wrong join column", r"ON countries\.name = borders\.neighbor", "ON countries.name = borders.country"),
    ("the join condition is missing", r" ON \S+ = \S+", ""),
    ("the groups are not counted", r" GROUP BY (\w+) HAVING COUNT\(\*\) > \d+", r" GROUP BY \1"),
    ("the grouping is missing", r" GROUP BY \S+$", ""),
    ("NOT is missing", r"NOT IN", "IN"),
    ("the wrong table is asked", r"FROM flows WHERE country", "FROM shores WHERE country"),
    ("the wrong table is asked", r"FROM rivers WHERE mouth", "FROM cities WHERE river"),
    ("the wrong table is asked", r"SELECT lake FROM shores", "SELECT river FROM flows"),
    ("the wrong table is asked", r"FROM languages WHERE country", "FROM borders WHERE country"),
    ("duplicates are kept", r"SELECT DISTINCT", "SELECT"),
]


def rejections(chosen: str, checker: Checker) -> list[tuple[str, str]]:
    """(why, query) of every mistake that fits `chosen`, runs and answers differently."""
    right, found = checker.answer(chosen), []
    for why, pattern, replacement in MISTAKES:
        wrong = re.sub(pattern, replacement, chosen, count=1)
        if wrong == chosen or any(wrong == query for _, query in found):
            continue
        try:
            answer = checker.answer(wrong)
        except sqlite3.Error:
            continue
        if sorted(answer, key=repr) != sorted(right, key=repr) or ("ORDER BY" in chosen and answer != right):
            found.append((why, wrong))
    return found


def pairs(prompts: list[dict], checker: Checker) -> list[dict]:
    """One preference row for every prompt that has a rejected query; rare mistakes go first."""
    used: dict[str, int] = {}
    made = []
    for row in prompts:
        options = rejections(row["sql"], checker)
        if not options or not filled(checker.answer(row["sql"])):
            continue
        why, rejected = min(options, key=lambda option: (used.get(option[0], 0), rank(row["question"], option[1])))
        used[why] = used.get(why, 0) + 1
        made.append(
            {
                "system": row["system"],
                "question": row["question"],
                "chosen": row["sql"],
                "rejected": rejected,
                "why": why,
                "kind": row["kind"],
            }
        )
    return made
