"""The command line: tunebook run | runs | train | serve | chat | report | publish | import | check."""

from __future__ import annotations

import argparse
import importlib
import sys

from helpers import machine
from helpers.errors import TunebookError, command

COMMANDS = {
    "run": "run the notebooks 01 to 05 one after another",
    "runs": "list the runs and what was set aside; restore or remove folders",
    "train": "train one stage from a parameter file",
    "serve": "serve a run's export or a GGUF file on this machine",
    "chat": "talk to a run's export or a GGUF file in the terminal",
    "report": "write a run's report and model card, or compare runs",
    "publish": "publish a run to the Hugging Face hub",
    "import": "write a recipe from a LLaMA-Factory or Axolotl YAML",
    "check": "look at a recipe's rows, fit and time before anything is trained",
}
MODULES = {"train": "helpers.train.__main__", "import": "helpers.import_recipe", "check": "helpers.check_recipe"}
PROGRAMS = {"run": "pipeline", "runs": "run_list"}  # in ci/


@command
def main(arguments: list[str] | None = None) -> int:
    """Entry point of the command `tunebook`. Returns the exit status."""
    lines = "\n".join(f"  {name:<9} {does}" for name, does in COMMANDS.items())
    parser = argparse.ArgumentParser("tunebook", epilog=lines, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...")
    given = parser.parse_args(arguments)
    if given.command not in PROGRAMS:
        return importlib.import_module(MODULES.get(given.command, f"helpers.{given.command}")).main(given.rest)
    program = machine.PROJECT / "ci" / f"{PROGRAMS[given.command]}.py"
    if not program.is_file():
        needs = f"tunebook {given.command} needs the project's folder"
        raise TunebookError(f"{needs}, and {program} is missing; clone the repository.")
    sys.path.insert(0, str(machine.PROJECT))
    return importlib.import_module(f"ci.{program.stem}").main(given.rest)


if __name__ == "__main__":
    sys.exit(main())
