"""Figures of the export, one JSON line each.

python ci/bench_gguf.py                    the default model with a random adapter
python ci/bench_gguf.py --model FOLDER     another one (16-bit safetensors)
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helpers.gguf import convert, libraries

STEP = """
import json, resource, sys, time
from pathlib import Path
sys.path.insert(0, {project!r})
started = time.time()
{work}
own, below = (resource.getrusage(w).ru_maxrss / 2**20 for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print(json.dumps({{"seconds": round(time.time() - started, 2), "peak_gib": round(max(own, below), 3)}}))
"""


def step(work: str) -> dict:
    """Run `work` in a Python of its own: wall time, imports included unless it sets `started` anew, and peak memory."""
    project = str(Path(__file__).resolve().parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", STEP.format(project=project, work=work)], capture_output=True, text=True, cwd=project
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def say(name: str, **values: object) -> None:
    print(
        json.dumps(
            {"figure": name, "cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 1), **values}
        ),
        flush=True,
    )


def adapter_for(base: Path, folder: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    from helpers.model.loading import load_model

    model = get_peft_model(
        load_model(base), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.01)
    model.save_pretrained(folder)


def bare_seconds(source: Path, out: Path, kind: str) -> float:
    """llama.cpp's own function, called alone in a process that has it loaded."""
    request = {"library": str(libraries.for_quantizing()), "source": str(source), "out": str(out), "imatrix": ""}
    request["type"] = convert.LlamaFileType[f"MOSTLY_{kind.upper()}"].value
    work = f"from helpers.gguf import libraries\nstarted = time.time()\nlibraries.quantize({request!r})"
    return step(work)["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="")
    given = parser.parse_args()
    from helpers.model.loading import DEFAULT_MODEL, load_tokenizer, resolve_model

    base = resolve_model(given.model or DEFAULT_MODEL).path
    shard = max(f.stat().st_size for f in base.glob("*.safetensors")) / 2**30
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        adapter_for(base, work / "adapter")
        merged, f16 = work / "merged", work / "f16.gguf"
        seconds, peaks = [], []
        paths = [str(p) for p in (base, work / "adapter", merged)]
        for name, code in (
            ("merge", f"from helpers.model import merging\nmerging.merge(*map(Path, {paths!r}))"),
            ("f16", f"from helpers.gguf import convert\nconvert.convert(Path({str(merged)!r}), Path({str(f16)!r}))"),
        ):
            found = step(code)
            seconds.append(found["seconds"])
            peaks.append(found["peak_gib"])
            say(name, **found)
        for kind in ("q8_0", "q4_k_m"):
            times, alone = [], []
            for _ in range(5):
                started = time.time()
                convert.quantize(f16, work / f"{kind}.gguf", kind)
                times.append(time.time() - started)
                alone.append(bare_seconds(f16, work / "alone.gguf", kind))
            peaks.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20)
            seconds.append(min(times))
            say(kind, seconds=round(min(times), 2), alone=min(alone), ratio=round(min(times) / min(alone), 2))
        say(
            "merge, f16, q8_0, q4_k_m",
            seconds=round(sum(seconds), 1),
            peak_gib=round(max(peaks), 3),
            largest_shard_gib=round(shard, 3),
            allowed_gib=round(1.5 * shard + 1, 3),
        )
        tokenizer = load_tokenizer(base)
        text = " ".join(p.read_text() for p in sorted(Path("helpers").glob("*.py")))
        ids = tokenizer(text)["input_ids"]
        rows = [ids[i * 250 : i * 250 + 251] for i in range(8)]
        code = (
            "import torch\nfrom transformers import AutoModelForCausalLM\nfrom helpers.gguf import fidelity\n"
            "started = time.time()\n"
            f"ref = fidelity.Reference(Path({str(merged)!r}), {rows!r}, [{rows[0][:40]!r}])\n"
            f"files = {{k: Path({str(work)!r}) / f'{{k}}.gguf' for k in ('f16', 'q8_0', 'q4_k_m')}}\n"
            "weights = {k: ref.weights_kl(files[k], files['f16']) for k in ('q8_0', 'q4_k_m')}\nref.model = None\n"
            "for kind, file in files.items():\n    fidelity.measure(ref, file, kind, weights.get(kind))\nref.close()"
        )
        say("fidelity, 2,000 tokens, 3 files, torch and transformers loaded before", **step(code))


if __name__ == "__main__":
    main()
