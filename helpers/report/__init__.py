"""One self-contained HTML page and a model card for a run, and a page that compares runs, all from manifests and scores.json.

python -m helpers.report myrun            runs/myrun/report.html and MODEL_CARD.md
python -m helpers.report run1 run2 …      runs/compare.html
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def build(run: str, stage: Any = None) -> Path:
    """Write runs/<run>/report.html, MODEL_CARD.md and params.yaml and return the page's path.

    stage: the open evaluation stage, when the report shall be part of it: both files are then put into its folder as well.
    A run with missing, unfinished or damaged stages gets a page that says so at its top. Raises TunebookError when there is
    no such run.
    """
    from helpers.report import facts, model_card, page, stages
    from helpers.runs import write_atomic

    found = facts.gather(run, stage)
    made = {"report.html": page.render(found), "MODEL_CARD.md": model_card.render(found)}
    if found.stages:
        write_atomic(found.folder / "params.yaml", stages.params_yaml(found))
    for folder in [found.folder] + ([stage.path] if stage is not None else []):
        for name, text in made.items():
            write_atomic(folder / name, text)
    return found.folder / "report.html"


def compare(names: list[str], out: str | Path | None = None) -> Path:
    """Write one page that compares two or more runs (a sweep) and return its path; default runs/compare.html."""
    from helpers import runs
    from helpers.report import compare
    from helpers.runs import write_atomic

    return write_atomic(Path(out) if out else runs.root() / "compare.html", compare.render(names))
