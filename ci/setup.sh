# Sourced by run.sh and test.sh: makes .venv with the locked packages, the default model and llama.cpp's libraries, once.
# PYTHON names another interpreter (3.11 to 3.13); what is already there is used again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false TRL_EXPERIMENTAL_SILENCE=1 UNSLOTH_DISABLE_STATISTICS=1
unset PYTHONDONTWRITEBYTECODE  # where nothing is kept, every process compiles its imports anew: 20 s of the 36 s that training's took on 2 old cores

find_python() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Python 3.11, 3.12 or 3.13 is needed and was not found; install one, or name it: PYTHON=/path/to/python bash $0" >&2
    return 1
}

lock=ci/locks/cpu.txt
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then lock=ci/locks/cuda.txt; fi
wanted=$(cat "$lock" ci/setup.sh pyproject.toml | sha256sum | cut -d' ' -f1)
if [ "$(cat .venv/.installed 2>/dev/null)" != "$wanted" ]; then
    echo "Setting up .venv from $lock (about 3 GB; one to three minutes)"
    python=$(find_python)
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    # uv installs in a third of pip's time; it is told what pip was told about indexes and local wheels
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep -E '^uv==' "$lock")"
    [ -z "${PIP_INDEX_URL:-}" ] || export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}"
    [ -z "${PIP_EXTRA_INDEX_URL:-}" ] || export UV_INDEX="${UV_INDEX:-$PIP_EXTRA_INDEX_URL}" UV_INDEX_STRATEGY=unsafe-best-match
    [ -z "${PIP_FIND_LINKS:-}" ] || export UV_FIND_LINKS="${UV_FIND_LINKS:-$PIP_FIND_LINKS}"
    [ -z "${PIP_CERT:-}" ] || export SSL_CERT_FILE="${SSL_CERT_FILE:-$PIP_CERT}"
    .venv/bin/uv pip install --python .venv/bin/python -r "$lock"
    .venv/bin/uv pip install --python .venv/bin/python --quiet --no-deps --no-build-isolation -e .  # the command tunebook
    .venv/bin/python -m ipykernel install --sys-prefix --name python3 >/dev/null
    echo "$wanted" > .venv/.installed
fi
.venv/bin/python ci/prepare.py
