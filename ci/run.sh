#!/usr/bin/env bash
# Sets up what is missing, then runs notebooks 01 to 05 and prints the scores and the report's path.
#   bash ci/run.sh [--recipe NAME] [--run NAME] [-p sft.rank 32]... [--from 03] [--to 05] [--fresh]
. "$(dirname "$0")/setup.sh"
exec .venv/bin/python ci/pipeline.py "$@"
