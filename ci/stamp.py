"""Write what all notebooks share into each of them: the badge, the bootstrap cell and the parameters cell.

    python ci/stamp.py                       writes
    python ci/stamp.py --check               says which files differ, and exits with 1 when one does
    python ci/stamp.py owner/name COMMIT     first sets the published repository and the commit that bootstraps fetch

Repository, commit and tag stand in helpers/machine.py, the parameters in helpers/params.py. To publish: push, stamp the
commit that was pushed, commit the stamped notebooks and push again.
"""

import re
import sys
from pathlib import Path

import nbformat

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from ci import colab
from helpers import machine, params
from helpers.runs import FOLDERS

NOTEBOOKS = {"quick": "00_quickstart", **FOLDERS}
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
PAGES = ("README.md", "docs/README.zh-CN.md", "docs/colab.md")
OPENED = re.compile(r"(https://colab\.research\.google\.com/github/)[^)\s]+/blob/[^/)\s]+/notebooks/")
FORM = {"cellView": "form", "jupyter": {"source_hidden": True}}
BOOTSTRAP = """\
# @title Bootstrap: in Colab this fetches the project and installs what is missing; elsewhere it only finds the project
keep_runs_in = "this session"  # @param ["this session", "Google Drive"] {{allow-input: true}}
{asked}import os, subprocess, sys
from pathlib import Path

_source, _commit = os.environ.get("TUNEBOOK_SOURCE", ""), "{commit}"
_places = [Path(_source), Path.cwd(), *Path.cwd().parents, *Path("/content").glob("*")]
_here = next((p.resolve() for p in _places if (p / "helpers/params.py").is_file()), None)
if _here is None:
    _here, _from = Path("/content/tunebook"), _source or "https://github.com/{repository}"
    _get = 'git init -q "$0" && cd "$0" && git fetch -q --depth 1 "$1" "${{2:-HEAD}}" && git checkout -q FETCH_HEAD'
    _get += ' && test "$(git rev-parse HEAD)" = "${{2:-$(git rev-parse HEAD)}}"'
    _get = _get if "google.colab" in sys.modules else "echo only Colab fetches it >&2; false"
    _run = ["bash", "-c", _get, str(_here), _from, "" if _source else _commit]
    _got = subprocess.run(_run, env={{**os.environ, "GIT_TERMINAL_PROMPT": "0"}}, capture_output=True, text=True)
    if _got.returncode:
        _Stop = type("Stop", (Exception,), {{"_render_traceback_": lambda self: [str(self)]}})
        _said = f"The project is not here and could not be fetched from {{_from}} ({{_got.stderr.strip()[-300:]}}); "
        raise _Stop(_said + f"upload the folder to {{_here}}, or set TUNEBOOK_SOURCE to a folder or a git address")
os.chdir(_here)
sys.path.insert(0, str(_here))
from ci import colab

colab.prepare("{notebook}", keep_runs_in{passed})"""


def bootstrap(notebook: str) -> str:
    """Source of the notebook's first code cell."""
    asked = colab.ASKED.get(notebook)
    choices = ", ".join(f'"{one}"' for one in ("", *(asked or ())))
    return BOOTSTRAP.format(
        asked=f'also_install = ""  # @param [{choices}]\n' if asked else "",
        commit=machine.COMMIT,
        repository=machine.REPOSITORY,
        notebook=notebook,
        passed=", also_install" if asked else "",
    )


def address(notebook: str) -> str:
    """Where Colab opens it."""
    place = f"{machine.REPOSITORY}/blob/{machine.TAG or machine.COMMIT or 'main'}/notebooks"
    return f"https://colab.research.google.com/github/{place}/{NOTEBOOKS[notebook]}.ipynb"


def stamped(notebook: nbformat.NotebookNode, name: str) -> nbformat.NotebookNode:
    """The notebook with its shared parts as they should be: title line kept, badge below, cells 1 and 2 replaced."""
    title, *rest = [line for line in notebook.cells[0].source.split("\n") if not line.startswith("[![Open in Colab]")]
    while rest and not rest[0].strip():
        rest.pop(0)
    notebook.cells[0].source = "\n".join([title, f"{BADGE}({address(name)})", "", *rest]).rstrip()
    notebook.cells[1].source = bootstrap(name)
    if name in FOLDERS:
        notebook.cells[2].source = params.cell(name)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"{name}-{number:02d}"
        cell.metadata = nbformat.from_dict({1: FORM, 2: {**FORM, "tags": ["parameters"]}}.get(number, {}))
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


def files() -> dict[Path, str]:
    """Every stamped file and what it should hold."""
    made = {}
    for name, stem in NOTEBOOKS.items():
        path = PROJECT / "notebooks" / f"{stem}.ipynb"
        made[path] = nbformat.writes(stamped(nbformat.read(path, as_version=4), name)) + "\n"
    for path in (PROJECT / page for page in PAGES):
        if path.is_file():
            place = f"{machine.REPOSITORY}/blob/{machine.TAG or machine.COMMIT or 'main'}/notebooks/"
            made[path] = OPENED.sub(rf"\g<1>{place}", path.read_text(encoding="utf-8"))
    return made


def publish(repository: str, commit: str) -> None:
    """Set the published repository and commit in helpers/machine.py."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]*/[\w.-]+", repository) or not re.fullmatch("[0-9a-f]{40}", commit):
        sys.exit(f"{repository} {commit}: give owner/name as GitHub spells it and the 40 digits of a commit.")
    path = PROJECT / "helpers" / "machine.py"
    text = path.read_text()
    for name, value in (("REPOSITORY", repository), ("COMMIT", commit)):
        text = re.sub(rf'^{name} = ".*"$', f'{name} = "{value}"', text, flags=re.M)
        setattr(machine, name, value)
    path.write_text(text)


def main(argv: list[str]) -> int:
    check = "--check" in argv
    if len(argv) == 2:
        publish(*argv)
    stale = [path for path, text in files().items() if path.read_text(encoding="utf-8") != text]
    for path, text in files().items() if not check else ():
        path.write_text(text, encoding="utf-8")
    if stale:
        print(("Stale, run `python ci/stamp.py`: " if check else "Written: ") + ", ".join(p.name for p in stale))
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
