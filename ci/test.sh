#!/usr/bin/env bash
# Sets up what is missing, then runs the tests (arguments go to pytest).
. "$(dirname "$0")/setup.sh"
exec .venv/bin/python -m pytest "$@"
