#!/usr/bin/env bash
# Sets up what is missing, then runs the tests, a worker a core and a file at a time (arguments go to pytest; -n 0 runs them in one process).
. "$(dirname "$0")/setup.sh"
exec .venv/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
