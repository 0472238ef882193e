"""`tunebook report`, or `python -m helpers.report`; see the package's docstring."""

import argparse
import sys

from helpers import report
from helpers.errors import TunebookError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tunebook report", description="Write a run's report and model card, or compare runs."
    )
    parser.add_argument("runs", nargs="+", help="one run for its report, several for a comparison")
    parser.add_argument("--out", default=None, help="where the comparison goes (default runs/compare.html)")
    given = parser.parse_args(arguments)
    try:
        print(report.compare(given.runs, given.out) if len(given.runs) > 1 else report.build(given.runs[0]))
    except TunebookError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
