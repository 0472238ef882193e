"""What training and test may not share: literals, words, wordings, queries."""

import re
from collections.abc import Iterable

from making import held_out

EVERYDAY = """
a about and any are as at be both but by can could do does for from go have how i if in is it made make me my need no
not of on once only or other others out please row see some than that the their them then there they this to two want
was we were what when where which who whole whose will with would write you 's called continents different mouths
much ranges starting
"""


def literals(sql: str) -> set[str]:
    """Strings and numbers of two digits or more in a query."""
    return set(re.findall(r"'([^']*)'", sql)) | set(re.findall(r"(?<![\w.'])\d{2,}", sql))


def words(questions: Iterable[str]) -> set[str]:
    """The words of questions, without slots and without those that any question may use."""
    found = set().union(*(re.findall(r"[a-z']+", re.sub(r"{\w+}", "", text.lower())) for text in questions))
    return found - set(EVERYDAY.split())


def wording(question: str, sql: str) -> str:
    """The question with the query's literals and all numbers taken out."""
    text = question.lower()
    for literal in sorted(literals(sql), key=len, reverse=True):
        text = text.replace(literal.lower(), "_")
    text = re.sub(r"[\d.,]*\d( million)?", "_", text)
    return re.sub(r"\W+", " ", text.replace("the _", "_")).strip()


def found(seen: list[dict], test: list[dict]) -> list[str]:
    """Sentences about everything in `test` that the rows of `seen` give away."""
    text = "\n".join([row["question"] for row in seen] + [row.get("sql") or row["chosen"] for row in seen])
    queries = {row.get("sql") or row["chosen"] for row in seen}
    wordings = {wording(row["question"], row.get("sql") or row["chosen"]) for row in seen}
    names = {
        *held_out.CONTINENTS,
        *held_out.COUNTRIES,
        *held_out.LANGUAGES,
        *held_out.CURRENCIES,
        *held_out.RIVERS,
        *held_out.SEAS,
        *held_out.RANGES,
        *held_out.LAKES,
    }
    named = {
        name
        for name in names.union(*(literals(row["sql"]) for row in test))
        if re.search(rf"(?<![\w,]){re.escape(name)}(?![\w,])", text)
    }
    told = [f"training names {name!r}, which the test asks about" for name in sorted(named)]
    for row in test:
        if row["sql"] in queries:
            told.append(f"training has the query of {row['question']!r}")
        if wording(row["question"], row["sql"]) in wordings:
            told.append(f"training has the wording of {row['question']!r}")
    questions = [row["question"].lower() for row in seen + test]
    told += [f"asked twice: {question!r}" for question in sorted({q for q in questions if questions.count(q) > 1})]
    return told
