"""A frozen base in FP8, measured on a GPU: products, kernels and whole layers at an 8B's shapes, and what it costs in
held-out loss.

    python ci/bench_fp8.py products [--tokens 16384] [--tiny]      JSON lines: each product forward and back, variants
    python ci/bench_fp8.py agrees [--tiny]                         the GPU beside the same numbers in fp32, and dense
    python ci/bench_fp8.py quality MODEL [--steps 150] [--seeds 17,18,19] [--arms 16-bit,NF4,FP8] [--gpus 4]
                                                                   held-out losses of 16 bits, NF4 and FP8, seeds paired

quality makes notebook 01's default data once (run "fp8") and trains a job an arm and seed, --side at a time each GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TUNEBOOK_HEADLESS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from helpers.model import fp8

# (outputs, inputs) of an 8B Llama's linear layers, and how many of each a decoder layer has.
SHAPES = {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 2, (4096, 14336): 1}
LAYERS = 32
EIGHT = {"method": "lora", "quantize": "fp8"}
ARMS = {"16-bit": {"method": "lora"}, "NF4": {"method": "qlora"}, "FP8": EIGHT}
# What evaluation and layers in 16 bits change: rounded: activations in evaluation too; else name parts that stay.
TRIED: dict[str, tuple[str, ...]] = {
    "FP8-rounded": (),
    "FP8-down": ("down_proj",),
    "FP8-o-down": ("o_proj", "down_proj"),
}
TRIED |= {"FP8-ends": ("layers.0.", "layers.1.", "layers.28.", "layers.29."), "FP8-qkvo": ("self_attn",)}
ARMS |= dict.fromkeys(TRIED, EIGHT)


def say(**line: object) -> None:
    print("RESULT " + json.dumps(line), flush=True)


def seconds(work, times: int = 20) -> float:
    """Median of a call's time on the GPU (on a CPU, for a dry run: of one call)."""
    if not torch.cuda.is_available():
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    for _ in range(3):
        work()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
    for first, last in marks:
        first.record()
        work()
        last.record()
    torch.cuda.synchronize()
    return sorted(first.elapsed_time(last) for first, last in marks)[times // 2] / 1e3


def variants(tokens: int, rows: int, columns: int) -> dict:
    """name → a call, for the products x Wᵀ and g W with W (rows, columns)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    x = torch.randn(tokens, columns, device=device, dtype=torch.bfloat16)
    g = torch.randn(tokens, rows, device=device, dtype=torch.bfloat16) * 1e-4
    w = torch.randn(rows, columns, device=device, dtype=torch.bfloat16) * 0.02
    codes, scale = fp8.quantize(w)
    back, back_scale = fp8.quantize(w.t().contiguous())  # the second layout, with scales of its own
    weight, y = codes.view(torch.uint8), torch.empty(tokens, rows, device=device, dtype=torch.bfloat16)
    xq, gq = fp8._rows(x), fp8._rows(g, scale)
    turned, ones = fp8.turned(codes), torch.ones(columns, device=device)

    def product(a, b, scale_b, fast=True):
        if device == "cpu":
            return a[0].float() @ b.float().t()
        how = {"out_dtype": torch.bfloat16, "use_fast_accum": fast}
        return torch._scaled_mm(a[0], b.t(), scale_a=a[1][:, None], scale_b=scale_b[None], **how)

    found = {
        "bf16 forward": lambda: torch.mm(x, w.t()),
        "bf16 back": lambda: torch.mm(g, w),
        "fp8 forward": lambda: fp8.forward(x, weight, scale, y),
        "fp8 back, turned each time": lambda: fp8.backward(g, weight, scale),
        "fp8 back, two layouts": lambda: product(fp8._rows(g), back, back_scale),
        "product forward": lambda: product(xq, codes, scale),
        "product back": lambda: product(gq, turned, ones),
        "product forward, slow accumulation": lambda: product(xq, codes, scale, False),
        "quantise x": lambda: fp8._rows(x),
        "quantise g": lambda: fp8._rows(g, scale),
        "quantise x, plain": lambda: fp8.quantize(x),
        "turn": lambda: fp8.turned(codes),
        "turn, plain": lambda: weight.t().contiguous(),
    }
    if device == "cuda":
        compiled = torch.compile(fp8.quantize, dynamic=True)
        found["quantise x, compiled"] = lambda: compiled(x)
        found["quantise g, compiled"] = lambda: compiled(g, scale)
        found["product forward, one scale"] = lambda: torch._scaled_mm(
            xq[0], codes.t(), scale_a=ones[0], scale_b=ones[0], out_dtype=torch.bfloat16, use_fast_accum=True
        )
    return found


def torchao_variants(tokens: int, rows: int, columns: int) -> dict:
    """The same by torchao's float8 training, of a frozen weight; {} where it is not installed or too old."""
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except Exception as error:
        return {"torchao left out": f"{type(error).__name__}: {error}"[:200]}
    linear = torch.nn.Sequential(torch.nn.Linear(columns, rows, bias=False, device="cuda", dtype=torch.bfloat16))
    linear.requires_grad_(False)
    try:
        model = convert_to_float8_training(linear, config=Float8LinearConfig.from_recipe_name("rowwise"))
        model = torch.compile(model)
        x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        g = torch.randn(tokens, rows, device="cuda", dtype=torch.bfloat16)
        model(x).backward(g)
        return {"torchao forward and back, compiled": lambda: model(x).backward(g)}
    except Exception as error:
        return {"torchao left out": f"{type(error).__name__}: {error}"[:300]}


def products(given: argparse.Namespace) -> None:
    tokens = 64 if given.tiny else given.tokens
    shapes = {(64, 32): 2, (32, 64): 1} if given.tiny else SHAPES
    sums: dict[str, float] = {}
    for (rows, columns), count in shapes.items():
        calls = variants(tokens, rows, columns)
        calls |= torchao_variants(tokens, rows, columns) if torch.cuda.is_available() else {}
        found = {}
        for name, call in calls.items():
            if isinstance(call, str):
                found[name] = call
                continue
            try:
                found[name] = round(1e3 * seconds(call), 4)
                sums[name] = sums.get(name, 0.0) + LAYERS * count * found[name]
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"[:300]
        say(arm="fp8 products", rows=rows, columns=columns, tokens=tokens, ms=found)
    say(arm="fp8 products, all layers", tokens=tokens, ms={name: round(value, 1) for name, value in sums.items()})


def agrees(given: argparse.Namespace) -> None:
    """The GPU's codes, products and gradients beside those of the same numbers in fp32 on the CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    for rows, columns in ((48, 64), (1024, 4096), (4096, 14336)) if not given.tiny else ((48, 64),):
        linear = torch.nn.Linear(columns, rows, dtype=torch.bfloat16)
        x = torch.randn(300, columns, dtype=torch.bfloat16)
        g = torch.randn(300, rows, dtype=torch.bfloat16) * 1e-5
        made = {}
        for place in ("cpu", device):
            layer = fp8.Fp8Linear.of(linear, place).to(place)
            given_x = x.to(place).detach().requires_grad_(True)
            y = layer(given_x)
            y.backward(g.to(place))
            codes = fp8._rows(x.to(place))[0].float().cpu()
            made[place] = (layer.weight.cpu(), y.detach().float().cpu(), given_x.grad.float().cpu(), codes)
            alone = torch.cat([layer(given_x[at : at + n]) for at, n in ((0, 33), (33, 64), (97, 1), (98, 202))])
            apart = float((alone.detach() - y.detach()).float().norm() / y.detach().float().norm())
        own, here = made["cpu"], made[device]
        wanted, wanted_grad = (
            (x.float() @ linear.weight.float().t()).detach(),
            g.float() @ linear.weight.detach().float(),
        )
        far = lambda a, b: round(float((a - b).norm() / b.norm()), 5)  # noqa: E731
        say(
            arm="fp8 agrees",
            rows=rows,
            columns=columns,
            weights_equal=bool(torch.equal(own[0], here[0])),
            codes_that_differ=round(float((own[3] != here[3]).float().mean()), 6),
            forward_from_cpu=far(here[1], own[1]),
            back_from_cpu=far(here[2], own[2]),
            rows_from_rows_alone=round(apart, 6),
            forward_from_dense=far(here[1] - linear.bias.detach().float().cpu(), wanted),
            back_from_dense=far(here[2], wanted_grad),
        )


# ---------------------------------------------------------------- held-out loss


def vary(arm: str) -> None:
    """Make FP8 what an arm of TRIED asks, in this process."""
    own = fp8.layers

    def layers(model):
        taken, kept = own(model)
        stay = [name for name in taken if any(part in f"{name}." for part in TRIED[arm])]
        return {n: m for n, m in taken.items() if n not in stay}, kept + stay

    fp8.layers = layers
    if arm == "FP8-rounded":
        fp8.Fp8Linear.train = lambda self, mode=True: torch.nn.Module.train(self, True)


def train(given: argparse.Namespace) -> None:
    """One job of `quality`, in a process of its own: prints its held-out loss."""
    from helpers import params
    from helpers.train import training

    name, seed, run = given.model.split(",")
    if name in TRIED:
        vary(name)
    values = {"run": run, "seed": int(seed), "max_steps": given.steps, "eval_steps": given.steps, "again": True}
    values |= {"save_steps": given.steps, "eval_rows": 0, "score_rows": 0, "export_check": False, "epochs": 100.0}
    job = training.open(params.resolve("sft", {**values, "best_checkpoint": False, **ARMS[name]}))
    began = time.time()
    job.train()
    found = job.result
    say(
        arm="fp8 quality",
        base=name,
        seed=int(seed),
        steps=found["steps"],
        eval_loss=found["eval_loss"],
        last_loss=found["last_loss"],
        tokens_per_s=found.get("tokens_per_s"),
        notes=job.notes,
        wall_s=round(time.time() - began, 1),
    )


def quality(given: argparse.Namespace) -> None:
    """The jobs side by side, then the paired differences."""
    from helpers import params, runs
    from helpers.data import prepare

    began, folder = time.time(), Path(os.environ.setdefault("TUNEBOOK_RUNS", "/tmp/bench-fp8"))
    data = prepare.open(params.resolve("data", {"run": "fp8", "model": given.model}))
    for step in ("read", "generate", "clean", "mix", "split", "template", "vocabulary", "encode", "lengths", "pairs"):
        getattr(data, step)()
    data.finish()
    source = runs.folder("fp8", "data")
    say(arm="fp8 quality data", seconds=round(time.time() - began, 1))
    work, running, found = [], [], []
    for seed in given.seeds.split(","):
        for name in given.arms.split(","):
            run = f"fp8-{name.lower()}-{seed}"
            (folder / run).mkdir(parents=True, exist_ok=True)
            if not (folder / run / source.name).exists():
                (folder / run / source.name).symlink_to(source.resolve())
            work.append((name, seed, run))
    slots = [gpu for gpu in range(max(given.gpus, 1)) for _ in range(given.side)]
    while work or running:
        while work and slots:
            gpu, (name, seed, run) = slots.pop(0), work.pop(0)
            command = [sys.executable, __file__, "train", f"{name},{seed},{run}", "--steps", str(given.steps)]
            shown = {"CUDA_VISIBLE_DEVICES": str(gpu)} if torch.cuda.is_available() else {}
            log = folder / f"{run}.log"
            with open(log, "w") as file:
                child = subprocess.Popen(command, env={**os.environ, **shown}, stdout=file, stderr=file, cwd=ROOT)
            running.append((child, gpu, log))
        time.sleep(0.2)
        for child, gpu, log in [one for one in running if one[0].poll() is not None]:
            running.remove((child, gpu, log))
            slots.append(gpu)
            said = log.read_text(errors="replace")
            lines = [json.loads(line[7:]) for line in said.splitlines() if line.startswith("RESULT {")]
            found += lines
            for line in lines or [{"arm": "fp8 quality", "run": log.stem, "failed": " ".join(said.split())[-900:]}]:
                say(**line)
    losses = {(one["base"], one["seed"]): one["eval_loss"] for one in found}
    seeds = sorted({seed for _, seed in losses})
    for name in [arm for arm in given.arms.split(",") if arm != "16-bit"]:
        apart = [
            losses[name, s] / losses["16-bit", s] - 1 for s in seeds if {(name, s), ("16-bit", s)} <= losses.keys()
        ]
        if apart:
            mean = sum(apart) / len(apart)
            say(arm="fp8 quality", base=name, seeds=seeds, apart=[round(a, 5) for a in apart], mean=round(mean, 5))
    say(arm="fp8 quality", wall_s=round(time.time() - began, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("products", "agrees", "quality", "train"))
    parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder of quality's")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", default="17,18,19")
    parser.add_argument("--arms", default="16-bit,NF4,FP8", help=f"of quality: any of {', '.join(ARMS)}")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--side", type=int, default=3, help="jobs of quality at a time on each GPU")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    try:
        {"products": products, "agrees": agrees, "quality": quality, "train": train}[given.what](given)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


if __name__ == "__main__":
    main()
