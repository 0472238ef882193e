"""Build the embedded data set: database, training, test and preference rows.

    python datasets/build.py            write the files beside this script
    python datasets/build.py --check    build in a temporary folder and compare the bytes

Nothing but the standard library is used, nothing is drawn at random, and the bytes are the
same on every machine.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from making import card, database, leaks, mistakes, slots
from making.patterns_joined import GROUPS, JOINS, NESTED
from making.patterns_numbers import AGGREGATES, COUNTS, ORDERS
from making.patterns_plain import LISTS, LOOKUP

PER_PATTERN = {"train": 16, "preference": 3}
MADE = (
    "atlas.sqlite",
    "atlas_train.jsonl",
    "atlas_test.jsonl",
    "atlas_preference.jsonl",
    "dataset_info.json",
    "README.md",
)


def patterns() -> list[tuple]:
    """Every pattern with all its training wordings: its own, then those that wordings.txt has for its query."""
    own = LOOKUP + LISTS + COUNTS + AGGREGATES + ORDERS + GROUPS + JOINS + NESTED
    blocks = (HERE / "making" / "wordings.txt").read_text(encoding="utf-8").split("\n\n")[1:]
    more = {form: [line.strip() for line in lines] for form, *lines in map(str.splitlines, blocks)}
    hand = [json.loads(line)["question"] for line in (HERE / "handwritten.jsonl").read_text("utf-8").splitlines()]
    tested = leaks.words([*hand, *(wording for pattern in own for wording in pattern[3])])
    tested -= leaks.words(wording for pattern in own for wording in pattern[2])
    if told := sorted(tested & leaks.words(wording for wordings in more.values() for wording in wordings)):
        raise SystemExit(f"wordings.txt uses words that only the test does: {', '.join(told)}")
    if strange := set(more) - {form for _, form, *_ in own}:
        raise SystemExit(f"wordings.txt has queries of no pattern: {', '.join(strange)}")
    return [(kind, form, train + more.get(form, []), test) for kind, form, train, test in own]


PATTERNS = patterns()


def pattern_rows(side: str, wanted: int, checker: slots.Checker, taken: set[str]) -> list[dict]:
    values = slots.entities("test" if side == "test" else "train")
    made = []
    for pattern in PATTERNS:
        count = len(pattern[3]) if side == "test" else wanted
        for row in slots.fill(pattern, side, values, checker, taken, count):
            made.append({"system": database.SYSTEM, **row, "origin": "pattern"})
    return made


def hand_rows(checker: slots.Checker) -> list[dict]:
    rows = []
    for number, line in enumerate((HERE / "handwritten.jsonl").read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(line)
        if not checker.sound(row["sql"]):
            raise SystemExit(f"handwritten.jsonl line {number}: empty, or depends on storage order: {row['sql']}")
        rows.append(
            {
                "system": database.SYSTEM,
                "question": row["question"],
                "sql": row["sql"],
                "kind": row["kind"],
                "origin": "hand",
            }
        )
    return rows


def build(folder: Path) -> None:
    """Write every made file into `folder`."""
    checker = slots.Checker()
    taken: set[str] = set()
    train = pattern_rows("train", PER_PATTERN["train"], checker, taken)
    prompts = pattern_rows("preference", PER_PATTERN["preference"], checker, taken)
    test = pattern_rows("test", 0, checker, taken) + hand_rows(checker)
    pairs = mistakes.pairs(prompts, checker)
    told = leaks.found(train + pairs, test)
    if told:
        raise SystemExit("\n".join(told))
    # Mixed, so that the first rows of a file are a fair sample of it.
    for rows in (train, test, pairs):
        rows.sort(key=lambda row: slots.rank("order", row["question"]))
    database.write(folder / "atlas.sqlite")
    for name, rows in (("atlas_train", train), ("atlas_test", test), ("atlas_preference", pairs)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8", newline="\n")
    (folder / "dataset_info.json").write_text(json.dumps(card.INFO, indent=2) + "\n", encoding="utf-8", newline="\n")
    (folder / "README.md").write_text(
        card.render(train, test, pairs, checker, len(PATTERNS)), encoding="utf-8", newline="\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the files already here, write nothing")
    if not parser.parse_args().check:
        build(HERE)
        print("\n".join(f"{name}: {(HERE / name).stat().st_size:,} bytes" for name in MADE))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        different = [
            name
            for name in MADE
            if not (HERE / name).exists() or (Path(folder) / name).read_bytes() != (HERE / name).read_bytes()
        ]
    print(
        f"differs from what build.py makes: {', '.join(different)}; run python datasets/build.py"
        if different
        else "every file is what build.py makes"
    )
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
