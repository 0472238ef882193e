"""One HTML page and a model card for a run, and a page that compares runs, all from manifests and scores.json.

tunebook report myrun            runs/myrun/report.html and MODEL_CARD.md
tunebook report run1 run2 …      runs/compare.html
"""

from __future__ import annotations

import argparse
from pathlib import Path

from helpers import runs
from helpers.display import say
from helpers.report import facts, model_card, page
from helpers.report.compare import render as render_comparison


def build(run: str, stage: runs.Stage | None = None) -> Path:
    """Write runs/<run>/report.html, MODEL_CARD.md and recipe/ and return the page's path.

    stage: the open evaluation stage, when the report shall be part of it: both files are then put into its folder, too.
    A run with missing, unfinished or damaged stages gets a page that says so at its top. Raises TunebookError when
    there is no such run.
    """
    found = facts.gather(run, stage)
    made = {"report.html": page.render(found), "MODEL_CARD.md": model_card.render(found)}
    for name, text in page.recipe(found).items():
        runs.write_atomic(found.folder / "recipe" / name, text)
    for folder in [found.folder] + ([stage.path] if stage is not None else []):
        for name, text in made.items():
            runs.write_atomic(folder / name, text)
    return found.folder / "report.html"


def compare(names: list[str], out: str | Path | None = None) -> Path:
    """Write one page that compares two or more runs (a sweep) and return its path; default runs/compare.html."""
    return runs.write_atomic(Path(out) if out else runs.root() / "compare.html", render_comparison(names))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tunebook report", description="Write a run's report, or compare runs.")
    parser.add_argument("runs", nargs="+", help="one run for its report and model card, several for a comparison")
    parser.add_argument("--out", default=None, help="where the comparison goes (default runs/compare.html)")
    given = parser.parse_args(arguments)
    say(compare(given.runs, given.out) if len(given.runs) > 1 else build(given.runs[0]))
    return 0
