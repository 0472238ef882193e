#!/usr/bin/env bash
# Sets up what is missing, then runs notebooks 01 to 05 and prints the scores and the report's path.
#   bash ci/run.sh [--recipe NAME] [--run NAME] [-p sft.rank 32]... [--from 03] [--to 05] [--fresh]
. "$(dirname "$0")/setup.sh"
.venv/bin/python ci/pipeline.py "$@"
# In CI, where there is a GPU: ten-step losses of every kind of training, held to what such a GPU gave before.
if [ -n "${CI:-}" ] && [ "$lock" = ci/locks/cuda.txt ]; then .venv/bin/python ci/bands.py check; fi
