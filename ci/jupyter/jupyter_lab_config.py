"""JupyterLab begins with README, where it is started in the project; ci/prepare.py puts this file into .venv."""

from pathlib import Path

if Path("README.md").is_file() and Path("helpers/params.py").is_file():
    get_config().LabApp.default_url = "/lab/tree/README.md"  # noqa: F821 - JupyterLab gives it
