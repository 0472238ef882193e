#!/usr/bin/env bash
# Sets up what is missing, then checks format, lint and types; `bash ci/lint.sh --fix` formats and mends what ruff can mend.
. "$(dirname "$0")/setup.sh"
if [ "${1:-}" = --fix ]; then
    .venv/bin/ruff format --quiet .
    .venv/bin/ruff check --quiet --fix . || true
fi
.venv/bin/ruff format --check --quiet . || { echo "Some files are not formatted: bash ci/lint.sh --fix" >&2; exit 1; }
.venv/bin/ruff check --quiet .
.venv/bin/mypy
