"""Command line of the report; see the package's docstring."""

import argparse
import sys

from helpers import report
from helpers.errors import TunebookError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m helpers.report", description="Write a run's report and model card, or compare runs."
    )
    parser.add_argument("runs", nargs="+", help="one run for its report, several for a comparison")
    parser.add_argument("--out", default="", help="where the comparison goes (default runs/compare.html)")
    options = parser.parse_args(arguments)
    try:
        print(
            report.compare(options.runs, options.out or None)
            if len(options.runs) > 1
            else report.build(options.runs[0])
        )
    except TunebookError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
