"""The command `tunebook`: each job by its name, one error message, a status of its own."""

import subprocess
import sys
import tomllib

import pytest

from helpers import __main__ as command_line
from tests.conftest import PROJECT


def test_the_project_table_installs_the_command_and_takes_the_version_from_one_place():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"tunebook": "helpers.__main__:main"}
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "helpers.machine.VERSION"}


@pytest.mark.parametrize("command", command_line.COMMANDS)
def test_every_command_explains_itself(command):
    call = [sys.executable, "-m", "helpers", command, "--help"]
    done = subprocess.run(call, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage:" in done.stdout and not done.stderr


def test_an_unknown_command_is_refused_with_the_list(capsys):
    with pytest.raises(SystemExit, match="2"):
        command_line.main(["nosuch\x1b[2J"])
    said = capsys.readouterr().err
    assert "nosuch" in said and "\x1b" not in said and all(name in said for name in command_line.COMMANDS)
    with pytest.raises(SystemExit, match="0"):
        command_line.main(["--help"])
    said = capsys.readouterr().out
    assert "tunebook" in said and all(does in said for does in command_line.COMMANDS.values())


def test_a_run_that_is_not_there_is_one_error_message(runs_root, capsys):
    assert command_line.main(["report", "nosuch"]) == 1
    assert "nosuch" in capsys.readouterr().err
