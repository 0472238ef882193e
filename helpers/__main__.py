"""The command line: tunebook run | train | serve | chat | report | publish | runs; `tunebook COMMAND --help` says
more.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from helpers import display, machine, runs
from helpers.errors import TunebookError

COMMANDS = {
    "run": "run the notebooks 01 to 05 one after another",
    "train": "train one stage from a parameter file",
    "serve": "serve a run's export or a GGUF file on this machine",
    "chat": "talk to a run's export or a GGUF file in the terminal",
    "report": "write a run's report and model card, or compare runs",
    "publish": "publish a run to the Hugging Face hub",
    "runs": "list the runs and their finished stages",
}
MODULES = {"train": "helpers.train.__main__", "report": "helpers.report.__main__"}


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the command `tunebook`. Returns the exit status."""
    lines = "\n".join(f"  {name:<9} {does}" for name, does in COMMANDS.items())
    parser = argparse.ArgumentParser("tunebook", epilog=lines, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...")
    given = parser.parse_args(arguments)
    try:
        status = listed() if given.command == "runs" else _run(given.command, given.rest)
        sys.stdout.flush()
        return status
    except TunebookError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `tunebook runs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(command: str, arguments: list[str]) -> int:
    if command == "run":
        program = machine.PROJECT / "ci" / "pipeline.py"
        if not program.is_file():
            raise TunebookError(
                f"tunebook run needs the project's folder, and {program} is missing; clone the repository."
            )
        os.execv(sys.executable, [sys.executable, str(program), *arguments])
    return importlib.import_module(MODULES.get(command, f"helpers.{command}")).main(arguments)


def listed() -> int:
    """Print every run with its finished stages, newest first."""
    folders = [p for p in runs.root().iterdir() if p.is_dir()] if runs.root().is_dir() else []
    rows = []
    for folder in sorted(folders, key=lambda p: p.stat().st_mtime, reverse=True):
        stages = [s for s, name in runs.FOLDERS.items() if (folder / name / "manifest.json").is_file()]
        if stages or any((folder / name).is_dir() for name in runs.FOLDERS.values()):
            report = folder / "report.html"
            rows.append([folder.name, ", ".join(stages) or "none finished", report if report.is_file() else ""])
    print(display.text_table(rows, ["run", "stages", "report"]) if rows else f"There are no runs in {runs.root()} yet.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
