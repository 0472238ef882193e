"""Figures of the export, one JSON line each.

python ci/bench_gguf.py                    the default model with a random adapter
python ci/bench_gguf.py --model FOLDER     another one (16-bit safetensors)
python ci/bench_gguf.py --merges 4         both merges of an adapter trained on 4 bits, against it: 4 random layers in
                                           the shapes of Llama 3 8B (32: all), on the GPU where there is one
python ci/bench_gguf.py --run NAME         the same of a run that notebook 02 has finished, task scores included
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


def random_8b(folder: Path, layers: int) -> Path:
    """Random weights in the shapes of Llama 3 8B with the default model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from helpers.model.loading import DEFAULT_MODEL, load_tokenizer, resolve_model

    torch.manual_seed(0)
    size = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = LlamaConfig(vocab_size=128256, num_hidden_layers=layers, tie_word_embeddings=False, **size)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    load_tokenizer(resolve_model(DEFAULT_MODEL)).save_pretrained(folder)
    return folder


def merges(layers: int, tokens: int = 2000) -> None:
    from functools import partial

    import torch

    from helpers.gguf import trained
    from helpers.model import loading, merging

    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        base = random_8b(work / "base", layers)
        adapter_for(base, work / "adapter")
        tokenizer = loading.load_tokenizer(base)
        how = trained.placement(sum(f.stat().st_size for f in base.glob("*.safetensors")) / 2**30)
        models = {"trained": partial(trained.load, base, work / "adapter", tokenizer, "nf4", **how)}
        for onto in ("nf4", "16bit"):
            merging.merge(base, work / "adapter", work / onto, onto)
            models[onto] = partial(loading.load_model, work / onto, **how)
        torch.manual_seed(1)
        rows = [torch.randint(0, 49152, (251,)).tolist() for _ in range(tokens // 250)]
        for one in trained.compare(models, rows, lambda model: (None, 0))[1:]:
            say(one.name, layers=layers, tokens=one.tokens, kl=round(one.mean_kl, 6), top1=round(one.top1, 4), **how)


def merges_of_run(name: str) -> None:
    from helpers import params
    from helpers.gguf import export

    job = export.open(params.resolve("gguf", {"run": name}))
    started = time.time()
    job.merge()
    for one in job.merges:
        score = {"task_score": one.task_score, "questions": one.task_count}
        say(one.name, tokens=one.tokens, kl=round(one.mean_kl, 6), top1=round(one.top1, 4), **score)
    say("merge, compared", seconds=round(time.time() - started, 1))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="")
    parser.add_argument("--merges", type=int, default=0)
    parser.add_argument("--run", default="")
    given = parser.parse_args()
    if given.merges or given.run:
        merges(given.merges) if given.merges else merges_of_run(given.run)
        return
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
