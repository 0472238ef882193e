"""Write what all notebooks share into each of them: the badge, the bootstrap cell and the parameters cell.

    python ci/stamp.py            writes
    python ci/stamp.py --check    says which notebooks differ, and exits with 1 when one does

The repository and tag come from helpers/machine.py, the parameters from helpers/params.py.
"""

import sys
from pathlib import Path

import nbformat

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from helpers import machine, params
from helpers.runs import FOLDERS

BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
BOOTSTRAP = """\
# @title Bootstrap: in Colab this fetches the project and installs what is missing; elsewhere it only finds the project
import os
import pathlib
import subprocess
import sys

_places = (pathlib.Path.cwd(), *pathlib.Path.cwd().parents)
_here = next((p for p in _places if (p / "helpers/params.py").is_file()), None)
if "google.colab" in sys.modules:
    _here = pathlib.Path("/content/tunebook")
    _clone = ["git", "clone", "-q", "--depth", "1", "--branch", "{tag}", "https://github.com/{repository}"]
    _install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "-r", str(_here / "ci/locks/colab.txt")]
    if not (_here / ".installed").exists():
        if not _here.exists():
            subprocess.run([*_clone, str(_here)], check=True)
        subprocess.run(_install, check=True)
        (_here / ".installed").touch()
assert _here, "Open this notebook from inside the project's folder: helpers/ was not found above " + os.getcwd()
os.chdir(_here)
sys.path.insert(0, str(_here))"""


def stamped(notebook: nbformat.NotebookNode, stage: str) -> nbformat.NotebookNode:
    """The notebook with its shared parts as they should be: title line kept, badge below, cells 1 and 2 replaced."""
    name = FOLDERS[stage]
    title, *rest = [line for line in notebook.cells[0].source.split("\n") if not line.startswith("[![Open in Colab]")]
    while rest and not rest[0].strip():
        rest.pop(0)
    badge = f"{BADGE}(https://colab.research.google.com/github/{machine.REPOSITORY}/blob/{machine.TAG}/notebooks/{name}.ipynb)"
    notebook.cells[0].source = "\n".join([title, badge, "", *rest]).rstrip()
    notebook.cells[1].source = BOOTSTRAP.format(repository=machine.REPOSITORY, tag=machine.TAG)
    notebook.cells[2].source = params.cell(stage)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"{stage}-{number:02d}"
        cell.metadata = nbformat.from_dict(
            {"tags": ["parameters"]}
            if number == 2
            else {"cellView": "form", "jupyter": {"source_hidden": True}}
            if number == 1
            else {}
        )
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "accelerator": "GPU",
            "colab": {"provenance": []},
        }
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def main(check: bool) -> int:
    stale = []
    for stage, name in FOLDERS.items():
        path = PROJECT / "notebooks" / f"{name}.ipynb"
        before = path.read_text()
        after = nbformat.writes(stamped(nbformat.reads(before, as_version=4), stage)) + "\n"
        if before != after:
            stale.append(path.name)
            if not check:
                path.write_text(after)
    if stale:
        print(("Stale, run `python ci/stamp.py`: " if check else "Written: ") + ", ".join(stale))
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
