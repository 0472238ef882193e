"""One HTML page and a model card for a run, and a page that compares runs, all from manifests and scores.json.

python -m helpers.report myrun            runs/myrun/report.html and MODEL_CARD.md
python -m helpers.report run1 run2 …      runs/compare.html
"""

from __future__ import annotations

from pathlib import Path

from helpers import runs
from helpers.report import facts, model_card, page
from helpers.report.compare import render as render_comparison


def build(run: str, stage: runs.Stage | None = None) -> Path:
    """Write runs/<run>/report.html, MODEL_CARD.md and params.yaml and return the page's path.

    stage: the open evaluation stage, when the report shall be part of it: both files are then put into its folder, too.
    A run with missing, unfinished or damaged stages gets a page that says so at its top. Raises TunebookError when
    there is no such run.
    """
    found = facts.gather(run, stage)
    made = {"report.html": page.render(found), "MODEL_CARD.md": model_card.render(found)}
    if found.stages:
        runs.write_atomic(found.folder / "params.yaml", page.params_yaml(found))
    for folder in [found.folder] + ([stage.path] if stage is not None else []):
        for name, text in made.items():
            runs.write_atomic(folder / name, text)
    return found.folder / "report.html"


def compare(names: list[str], out: str | Path | None = None) -> Path:
    """Write one page that compares two or more runs (a sweep) and return its path; default runs/compare.html."""
    return runs.write_atomic(Path(out) if out else runs.root() / "compare.html", render_comparison(names))
