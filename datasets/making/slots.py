"""Fill a pattern's slots with entities of one side (training or test) and check the query."""

import hashlib
import re
import sqlite3
from itertools import count

from making import database, held_out

# Countries that English puts an article before.
ARTICLE = {
    "Bahamas",
    "Central African Republic",
    "Democratic Republic of the Congo",
    "Dominican Republic",
    "Gambia",
    "Maldives",
    "Marshall Islands",
    "Netherlands",
    "Philippines",
    "Republic of the Congo",
    "Seychelles",
    "Solomon Islands",
    "United Arab Emirates",
    "United Kingdom",
    "United States",
}

NUMBERS = {  # slot: (training values, test values); test values never stand in a training query
    "people": (
        (
            500_000,
            1_000_000,
            2_000_000,
            3_000_000,
            5_000_000,
            10_000_000,
            15_000_000,
            20_000_000,
            30_000_000,
            50_000_000,
            60_000_000,
            100_000_000,
            200_000_000,
        ),
        (4_000_000, 6_000_000, 8_000_000, 12_000_000, 25_000_000, 40_000_000, 80_000_000, 150_000_000),
    ),
    "area": (
        (10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000, 2_000_000),
        (30_000, 250_000, 300_000, 400_000, 800_000, 1_500_000),
    ),
    "length": ((500, 800, 1000, 1500, 2000, 2500, 3000, 4000, 5000), (900, 1200, 1800, 2200, 3500, 4200)),
    "height": ((1000, 2000, 2500, 3000, 4000, 4500, 5000, 6000, 7000, 8000), (3500, 5500, 6500, 7500)),
    "depth": ((50, 100, 150, 200, 300, 400, 500), (90, 120, 250, 350, 450)),
    "n": ((2, 3, 5, 7, 9, 10), (4, 6, 8, 12)),
    "n2": ((3, 5), (4, 6)),
    "k": ((3, 5, 7), (2, 4, 6)),
    "k3": ((3, 5), (2, 4)),
}

WORDS = {  # slot: (word in the question, text in the query); both sides share them
    "up": (("population", "population"), ("area", "area")),
    "lakeby": (("depth", "depth"), ("area", "area")),
    "table": (
        ("cities", "cities"),
        ("mountains", "mountains"),
        ("rivers", "flows"),
        ("lakes", "shores"),
        ("languages", "languages"),
    ),
    "agg": (("average", "AVG"), ("maximum", "MAX"), ("minimum", "MIN")),
}


TURNS = (
    (r"MAX\(", "MIN("),
    (r"MIN\(", "MAX("),
    (r"SUM\(", "AVG("),
    (r"AVG\(", "MAX("),
    (r"(ORDER BY \S+) DESC", r"\1"),
    (r"(ORDER BY \S+)(?= LIMIT|$)", r"\1 DESC"),
    (r" AND [\w.]+ [<>=] ('[^']*'|\d+)", ""),
    (r" HAVING .*", ""),
    (r"SELECT DISTINCT", "SELECT"),
)


def rank(*key: object) -> int:
    """A number drawn from the key: the same on every machine and Python version."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()[:8], "big")


def spoken(number: int) -> str:
    if number >= 1_000_000:
        return f"{number / 1_000_000:g} million"
    return f"{number:,}" if number >= 10_000 else str(number)


def entities(side: str) -> dict[str, list[str]]:
    """Slot name to the values that `side` ("train" or "test") may name."""
    tables = database.rows()
    test = side == "test"

    nations = set(held_out.COUNTRIES)
    inside = re.compile(rf"\b({'|'.join(map(re.escape, (*held_out.COUNTRIES, *held_out.CONTINENTS)))})\b")

    def pick(values, held) -> list[str]:
        kept = {value for value in values if value and "'" not in value and (value in held) == test}
        return sorted(value for value in kept if test or not inside.search(value))  # Fiji Hindi would name Fiji

    shores: dict[str, set[str]] = {}
    for lake, country in tables["shores"]:
        shores.setdefault(lake, set()).add(country)
    lakes = {lake for lake, around in shores.items() if around <= nations} | set(held_out.LAKES)
    ranges = [row[3] for row in tables["mountains"]]
    cities = {city: country for city, country, *_ in tables["cities"]}
    mountains = {row[0] for row in tables["mountains"] if row[1] in nations or row[3] in held_out.RANGES}
    return {
        "country": pick((row[0] for row in tables["countries"]), nations),
        "capital": pick(
            (row[1] for row in tables["countries"]), {row[1] for row in tables["countries"] if row[0] in nations}
        ),
        "continent": pick((row[2] for row in tables["countries"]), held_out.CONTINENTS),
        "currency": pick((row[5] for row in tables["countries"]), held_out.CURRENCIES),
        "city": pick(cities, {city for city, country in cities.items() if country in nations}),
        "river": pick((row[0] for row in tables["rivers"]), held_out.RIVERS),
        "sea": pick((row[2] for row in tables["rivers"]), held_out.SEAS),
        "mountain": pick((row[0] for row in tables["mountains"]), mountains),
        "rangemountain": pick((row[0] for row in tables["mountains"] if row[3]), mountains),
        "range": pick((name for name in ranges if ranges.count(name) > 1), held_out.RANGES),
        "lake": pick((row[0] for row in tables["lakes"]), lakes),
        "language": pick((row[1] for row in tables["languages"]), held_out.LANGUAGES),
    }


class Checker:
    """Runs queries on the atlas and on a copy stored in another order."""

    def __init__(self) -> None:
        self.atlas, self.shuffled = sqlite3.connect(":memory:"), sqlite3.connect(":memory:")
        database.fill(self.atlas)
        database.fill(self.shuffled, reverse=True)

    def answer(self, sql: str, shuffled: bool = False) -> list[tuple]:
        found = (self.shuffled if shuffled else self.atlas).execute(sql).fetchall()
        return found if "ORDER BY" in sql.upper() else sorted(found, key=repr)

    def sound(self, sql: str) -> bool:
        """Whether the answer is not empty and the same however the rows are stored."""
        found = self.answer(sql)
        return filled(found) and found != [(0,)] and found == self.answer(sql, shuffled=True)

    def telling(self, sql: str) -> bool:
        """Whether the query's aggregate, order and conditions matter: turned round or left
        out, the answer is another one. What fails here would reward a wrong query."""
        for pattern, other in TURNS:
            turned = re.sub(pattern, other, sql, count=1)
            if turned != sql and self.answer(turned) == self.answer(sql):
                return False
        return True


def filled(answer: list[tuple]) -> bool:
    return any(value is not None for row in answer for value in row)


def fill(pattern: tuple, side: str, values: dict[str, list[str]], checker: Checker, taken: set[str], wanted: int):
    """Yield up to `wanted` rows {question, sql, kind} of one pattern, none of them in `taken`."""
    kind, sql_form, train, test = pattern
    wordings = test if side == "test" else train
    names = sorted(set(re.findall(r"{(\w+)}", sql_form)))
    made = 0
    for attempt in count():
        if made == wanted or attempt > 60 * wanted or not wordings:
            return
        said, written = {}, {}
        for name in names:
            base = "country" if name == "country2" else name
            draw = rank(sql_form, side, attempt, name)
            if base in WORDS:
                said[name], written[name] = WORDS[base][draw % len(WORDS[base])]
                if base == "agg":
                    said["aggword"] = said[name]
            elif base in NUMBERS:
                choices = NUMBERS[base][side == "test"]
                number = choices[draw % len(choices)]
                said[name], written[name] = spoken(number), str(number)
            else:
                entity = values[base][draw % len(values[base])]
                said[name] = f"the {entity}" if base == "country" and entity in ARTICLE else entity
                written[name] = entity
        question = wordings[attempt % len(wordings)].format(**said)
        question = question[0].upper() + question[1:]
        sql = sql_form.format(**written)
        if (
            question in taken
            or len(set(written.values())) < len(written)
            or not (checker.sound(sql) and checker.telling(sql))
        ):
            continue
        taken.add(question)
        made += 1
        yield {"question": question, "sql": sql, "kind": kind}
