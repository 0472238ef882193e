"""The parts that set-up fetches besides packages: the default model and llama.cpp's libraries, both only once; and how
JupyterLab begins: with README, without a question about news."""

import shutil
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from helpers.errors import TunebookError


def main() -> int:
    from helpers.gguf import libraries
    from helpers.model import loading

    jupyter(Path(sys.prefix) / "etc/jupyter")
    try:
        source = loading.resolve_model(loading.DEFAULT_MODEL)
        place = "its offline copy" if source.origin == "wheel" else f"the {source.origin}"
        print(f"Model: {source.name} from {place} in {source.path}")
        libraries.converter()
        try:
            libraries.for_quantizing()
        except TunebookError as error:
            print(f"Here only 16-bit GGUF files can be made. {error}")
    except TunebookError as error:
        print(f"Set-up stopped: {error}", file=sys.stderr)
        return 1
    return 0


def jupyter(folder: Path) -> None:
    """Write JupyterLab's settings of ci/jupyter into a folder where Jupyter looks for them; a person's own win."""
    try:
        shutil.copytree(PROJECT / "ci/jupyter", folder, dirs_exist_ok=True)
    except OSError as error:  # an environment that somebody else keeps
        print(f"JupyterLab begins as it would without the project: {folder} cannot be written ({error}).")


if __name__ == "__main__":
    sys.exit(main())
