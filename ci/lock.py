"""Resolve requirements.txt into ci/locks/.

    python ci/lock.py [cpu] [cuda] [colab]           writes those locks (all without names)
    python ci/lock.py --check colab                  resolves again and compares; exits with 1 when one would change

cpu     without the lines marked [cuda] and without CUDA's own packages
cuda    everything
colab   Python 3.13 against what Colab's GPU runtime ships (ci/locks/colab-runtime.txt): torch, torchvision, numpy,
        ipykernel and ipywidgets stay as they are, other packages of Colab's move only when they must. Holds just
        what is to be installed on top.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
LOCKS = PROJECT / "ci" / "locks"
CUDA_ONLY = re.compile(r"(nvidia-|cuda-|triton\b)")
STAY = ("torch", "torchvision", "numpy", "ipykernel", "ipywidgets")
# On Colab these take our tested versions; whatever else Colab ships already is taken as it is.
OURS = ("transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes", "unsloth", "liger-kernel")
NOT_ON_COLAB = ("jupyterlab", "papermill", "uv")
# Colab's torchao is older than PEFT accepts.
COLAB_ALSO = ("torchao>=0.16",)
# What only some notebooks install on Colab (ci/colab.py says which), and with it what nothing else requires.
GROUPS = {
    "documents": ("ftfy", "py3langid", "trafilatura", "lxml-html-clean", "pypdf", "python-docx"),
    "training": ("trl", "liger-kernel"),
    "evaluation": ("lm-eval", "sacrebleu", "rouge-score"),
    "presidio": ("presidio-analyzer",),
    "unsloth": ("unsloth",),
}


def requirements() -> list[str]:
    lines = [line.strip() for line in (PROJECT / "requirements.txt").read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def name_of(line: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", line).group().lower().replace("_", "-").replace(".", "-")


def canonical(line: str) -> str:
    """name==version with the name in its normal form and no local version."""
    return f"{name_of(line)}=={re.sub(r'[+ #].*', '', line.split('==')[1]).strip()}"


def bare(line: str) -> str:
    return line.split("#")[0].strip()


def compile_lock(
    lines: list[str], options: list[str], preferred: str = "", annotate: str = "--no-annotate"
) -> list[str]:
    """uv's resolution of `lines`; versions in `preferred` are kept where they can be."""
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "in.txt", Path(folder) / "out.txt"
        source.write_text("\n".join(lines) + "\n")
        out.write_text(preferred)
        subprocess.run(
            [
                sys.executable,
                "-m",
                "uv",
                "pip",
                "compile",
                "-q",
                "--no-header",
                annotate,
                *options,
                str(source),
                "-o",
                str(out),
            ],
            check=True,
        )
        return out.read_text().splitlines()


def cpu() -> list[str]:
    lines = [bare(line) for line in requirements() if "[cuda]" not in line]
    return [
        line
        for line in compile_lock(lines, ["--universal", "--python-version", "3.11"], current("cpu"))
        if not CUDA_ONLY.match(line)
    ]


def cuda() -> list[str]:
    return compile_lock(
        [bare(line) for line in requirements()], ["--universal", "--python-version", "3.11"], current("cuda")
    )


def colab() -> list[str]:
    runtime = {
        name_of(line): line
        for line in (LOCKS / "colab-runtime.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    }
    text = (PROJECT / "requirements.txt").read_text().split("# Development")[0]
    wanted = [
        bare(line)
        for line in text.splitlines()
        if line.strip() and not line.startswith("#") and name_of(line) not in NOT_ON_COLAB
    ]
    wanted = [name_of(line) if name_of(line) in runtime and name_of(line) not in OURS else line for line in wanted]
    exact = [re.sub(r"\+\w+", "", runtime[name]) for name in STAY]
    locked = {name_of(line): line for line in current("colab").splitlines() if "==" in line}
    preferred = "\n".join(canonical(line) for line in {**runtime, **locked}.values())
    options = ["--python-version", "3.13", "--python-platform", "x86_64-manylinux_2_35"]
    asked = [*wanted, *exact, *COLAB_ALSO]
    resolved = compile_lock(asked, options, preferred, "--annotation-style=line")
    shipped, group = {canonical(line) for line in runtime.values()}, groups(resolved, {name_of(a) for a in asked})
    return [
        canonical(line) + (f"  # {group[name_of(line)]}" if name_of(line) in group else "")
        for line in resolved
        if canonical(line) not in shipped and not CUDA_ONLY.match(line) and name_of(line) not in STAY
    ]


def groups(resolved: list[str], asked: set[str]) -> dict[str, str]:
    """Package → the groups that need it, where nothing else does. resolved: lines that end in "# via a, b"."""
    parents = {name_of(line): line.partition("# via")[2].replace(",", " ").split() for line in resolved}

    def required(roots: set[str]) -> set[str]:
        found: set[str] = set()
        while more := {n for n, via in parents.items() if n in roots or found & set(via)} - found:
            found |= more
        return found

    always = required(asked - {name for own in GROUPS.values() for name in own})
    needs = {group: required(set(own)) for group, own in GROUPS.items()}
    return {n: ", ".join(g for g in GROUPS if n in needs[g]) for n in set().union(*needs.values()) - always}


def current(kind: str) -> str:
    path = LOCKS / f"{kind}.txt"
    return path.read_text() if path.is_file() else ""


HEADERS = {
    "cpu": "# For a machine without an NVIDIA GPU. Written by ci/lock.py from requirements.txt.",
    "cuda": "# For a machine with an NVIDIA GPU. Written by ci/lock.py from requirements.txt.",
    "colab": "# What Colab's GPU runtime needs on top of what it ships; install with --no-deps. "
    "Written by ci/lock.py from requirements.txt.",
}


def main(argv: list[str]) -> int:
    check = "--check" in argv
    stale = []
    for kind in [a for a in argv if a != "--check"] or list(HEADERS):
        text = "\n".join([HEADERS[kind], *{"cpu": cpu, "cuda": cuda, "colab": colab}[kind]()]) + "\n"
        if text != current(kind):
            stale.append(kind)
            if not check:
                (LOCKS / f"{kind}.txt").write_text(text)
    print(f"{'Would change' if check else 'Written'}: {', '.join(stale) or 'nothing'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
