"""Everything that is to be measured on GPUs, in one command that can be cut off and called again:

    python ci/gpu_session.py OUT --tokenizer DIR --data DIR [--gpus 4] [--minutes 9] [--have FILE] [--only ARM,…]
    python ci/gpu_session.py OUT --list                  the arms, their GPUs and goals
    python ci/gpu_session.py OUT --tokenizer DIR --data DIR --tiny       a dry run of the arms on a CPU

Each arm is a child with a time limit of its own, and as many run at once as there are GPUs for; what it measured is a
JSON line in OUT/results.jsonl with the arm's goal beside it, its output OUT/ARM.log. An arm that --have (an earlier
results.jsonl) or OUT has a line of is not run again; one that no longer fits into --minutes is left to the next call.
Bases are random weights of the published shapes (weights do not change speed or memory), written to --models once, a
tensor at a time. DATA: LLaMA-Factory's alpaca_en_demo.json and dpo_en_demo.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "ci")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

LLAMA = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8}
SHAPES = {  # name → (class in transformers, sizes of its config)
    "135m": ("Llama", {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}),
    "1.7b": ("Llama", {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "vocab_size": 49152}),
    "8b": ("Llama", LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}),
    "32b": ("Qwen2", {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "vocab_size": 152064}),
    "70b": ("Llama", LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}),
    "30b-a3b": ("Qwen3Moe", {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48}),
}
SHAPES["135m"][1].update(num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
SHAPES["1.7b"][1].update(num_attention_heads=32, num_key_value_heads=32, tie_word_embeddings=True)
SHAPES["32b"][1].update(num_attention_heads=40, num_key_value_heads=8)
SHAPES["70b"][1].update(num_attention_heads=64)
SHAPES["30b-a3b"][1].update(num_attention_heads=32, num_key_value_heads=4, head_dim=128, vocab_size=151936)
SHAPES["30b-a3b"][1].update(num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True)
LARGEST = ("32b", "70b")
SMALLER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 49152}
SMALLER |= {"num_attention_heads": 4, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Arm:
    """name; gpus that it needs; seconds it may take; the shape it trains; the command after python; what is hoped."""

    name: str
    gpus: int
    seconds: int
    shape: str
    command: tuple[str, ...]
    goal: str = ""


def job(name: str, shape: str, gpus: int, *options: str, stage: str = "sft", goal: str = "", **given: object) -> Arm:
    """A training job of ours by ci/bench_gpu.py; given: parameters of the stage."""
    settings = [word for key, value in given.items() for word in ("--set", f"{key}={value}")]
    command = ("ci/bench_gpu.py", stage, "--arm", name, "--steps", "10", "--processes", str(gpus), *options, *settings)
    return Arm(name, gpus, 540, shape, command, goal)


def rival(name: str, shape: str, arm: str, steps: int = 12) -> Arm:
    return Arm(name, 1, 540, shape, ("ci/bench_rivals.py", arm, "--steps", str(steps)))


# The default job, not the larger model that a machine with such a GPU would take.
NOTEBOOKS = ("ci/pipeline.py", "--recipe", "cpu", "--run", "session", "--fresh", "-p", "sft.max_minutes", "0")
EXPERTS = {"batch_size": 218, "optimizer": "adamw_8bit"}
MANY = ("--steps", "150")  # enough that CUDA graphs are worth their capture
TEN = "ten steps, planned peak within 7 %"
T4 = {"precision": "fp16", "batch_size": 16}
ARMS = [
    Arm("environment", 0, 60, "", ("ci/gpu_session.py", "environment")),
    *(
        job(f"small_{method}", "135m", 1, *MANY, batch_size=batch, method=method, goal="20,000 tokens/s")
        for method, batch in (("lora", 8), ("qlora", 8))
    ),
    job("small_large_batch", "135m", 1, batch_size=128, method="lora"),
    rival("small_unsloth", "135m", "unsloth_sft_packed"),
    rival("small_unsloth_notebook", "135m", "unsloth_sft"),
    job("1.7b_lora", "1.7b", 1, *MANY, batch_size=8, method="lora", goal="twice 1.7b_lora_kernels"),
    job("1.7b_lora_kernels", "1.7b", 1, *MANY, batch_size=8, method="lora", cuda_graphs="off"),
    rival("1.7b_unsloth", "1.7b", "unsloth_sft_packed"),
    Arm("notebooks_first", 1, 580, "", NOTEBOOKS),
    Arm("notebooks_again", 1, 300, "", NOTEBOOKS, "session_s of 120 at most, caches warm"),
    Arm("bands", 1, 580, "", ("ci/bands.py", "record", "--file", "OUT/bands.json")),
    *(job(f"8b_merge_{seed}", "8b", 1, "--merges", method="qlora", batch_size=64, seed=seed) for seed in (17, 18, 19)),
    job("8b_qlora_x1", "8b", 1, "--steps", "16", method="qlora"),
    job("8b_qlora_x2", "8b", 2, "--steps", "16", method="qlora", goal="1.95 times x1"),
    job("8b_qlora_x4", "8b", 4, "--steps", "16", method="qlora", goal="3.8 times x1"),
    job("8b_lora_x1", "8b", 1, method="lora"),
    job("8b_fp8_x1", "8b", 1, method="lora", quantize="fp8", goal="20,000 tokens/s, losses beside 8b_lora_x1"),
    job("32b_fp8_x1", "32b", 1, method="lora", quantize="fp8", batch_size=64, goal="ten steps on one GPU"),
    Arm("fp8_products", 1, 240, "", ("ci/bench_fp8.py", "products")),
    Arm("fp8_agrees", 1, 120, "", ("ci/bench_fp8.py", "agrees")),
    job("8b_lora_x4", "8b", 4, method="lora", goal=TEN),
    job("70b_qlora_x4", "70b", 4, method="qlora", batch_size=64, shard_weights=True, goal=TEN),
    job("8b_full_x4", "8b", 4, method="full", save_steps=1000, goal=f"{TEN}; fp32 master weights"),
    job("32b_lora_x4", "32b", 4, method="lora", batch_size=64, goal=TEN),
    job("1.7b_full_killed_x2_on_x4", "1.7b", 4, "--killed-on", "2", method="full", batch_size=64, goal="went on"),
    job("8b_qlora_sharded_x4", "8b", 4, method="qlora", shard_weights=True, goal="losses of 8b_qlora_x1"),
    job("70b_qlora_40gib_x4", "70b", 4, method="qlora", batch_size=64, goal="sharded by the planner"),
    job("8b_full_offload_x2", "8b", 2, method="full", batch_size=64, cpu_offload=True, save_steps=1000, goal=TEN),
    job("8b_full_x2", "8b", 2, method="full", batch_size=64, save_steps=1000, goal="the same on two"),
    job("8b_qlora_killed_x2_on_x4", "8b", 4, "--killed-on", "2", method="qlora", batch_size=64, shard_weights=True),
    job("70b_qlora_x2", "70b", 2, method="qlora", batch_size=64, shard_weights=True, goal=TEN),
    job("70b_lora_x4", "70b", 4, method="lora", batch_size=64, goal=TEN),
    job("70b_qlora_x1", "70b", 1, method="qlora", batch_size=64),
    *(job(f"8b_{loss}", "8b", 1, stage=loss, goal="80 % of orpo") for loss in ("orpo", "dpo", "kto", "simpo")),
    *(  # 40 pairs: from the second epoch on their references are kept
        job(f"8b_{loss}_epochs", "8b", 1, "--rows", "40", "--steps", "18", stage=loss, goal="80 % of 8b_orpo_epochs")
        for loss in ("orpo", "dpo", "kto")
    ),
    job("8b_orpo_long", "8b", 1, "--steps", "60", stage="orpo", goal="mean within 3 % of the median step"),
    # Their experts stay in 16 bits, 54 GiB; about 32,000 tokens a step, as the rival's.
    job("30b-a3b_lora", "30b-a3b", 1, **EXPERTS, method="lora", goal="ten steps beside 30b-a3b_unsloth"),
    rival("30b-a3b_unsloth", "30b-a3b", "unsloth_sft_packed", 10),
    rival("30b-a3b_unsloth_any", "30b-a3b", "unsloth_sft_packed", 10),
    job("30b-a3b_qlora", "30b-a3b", 1, **EXPERTS, method="qlora", target_modules="q_proj,k_proj,v_proj,o_proj"),
    job("t4_like", "135m", 1, **T4, method="lora", goal="finite losses"),
    job("t4_like_8b", "8b", 1, **T4, method="qlora", goal="finite losses within 15 GiB and 12.7 GB"),
    Arm("hf-mistral-7b-alpaca", 1, 540, "", ("ci/bench_recipes.py", "OUT/recipes", "--only", "hf-mistral-7b-alpaca")),
    Arm(
        "llama-factory-full-4gpu",
        4,
        580,
        "",
        ("ci/bench_recipes.py", "OUT/recipes4", "--only", "llama-factory-full-4gpu", "--gpus", "4"),
    ),
]
PLAYED = {  # what an arm's machine is held to, or its library: the environment of its child
    "30b-a3b_unsloth_any": {"UNSLOTH_LOADER": "FastModel"},
    "70b_qlora_40gib_x4": {"BENCH_LIMITS": "--gpu-gib 40"},
    "t4_like": {"TUNEBOOK_ATTENTION": "sdpa", "BENCH_LIMITS": "--gpu-gib 15 --host-gb 12.7 --cores 2"},
    "t4_like_8b": {"TUNEBOOK_ATTENTION": "sdpa", "BENCH_LIMITS": "--gpu-gib 15 --host-gb 12.7 --cores 2"},
}


def as_published(name: str, weight) -> list[tuple[str, tuple[int, ...]]]:
    """The tensors of the hub's files for a parameter: of a stack of experts a matrix for each."""
    if ".experts." not in name:
        return [(name, tuple(weight.shape))]
    parent, kind = name.rsplit(".", 1)
    count, rows, columns = weight.shape
    parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
    size = (rows // len(parts), columns)
    return [(f"{parent}.{expert}.{part}.weight", size) for expert in range(count) for part in parts]


def make(shape: str, folder: Path, tokenizer: str, tiny: bool) -> None:
    """Random weights of a shape into folder/16, in bf16; one process makes them for all. Of the largest shapes every
    layer has the numbers of the first one, since a processor would be busy with them for minutes."""
    import fcntl
    import re
    from concurrent.futures import ThreadPoolExecutor

    import torch
    import transformers

    from helpers.cache import write_json
    from helpers.model.weights import INDEX, write_safetensors

    folder.mkdir(parents=True, exist_ok=True)
    held = open(folder / "lock", "w")  # noqa: SIM115  held until this process ends or goes on as another
    fcntl.flock(held, fcntl.LOCK_EX)
    if (folder / "16" / "done").is_file():
        return
    kind, sizes = SHAPES[shape]
    loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
    sizes = sizes | (SMALLER if tiny else {})
    if tiny and "num_experts" in sizes:
        sizes |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    sizes |= {"vocab_size": max(sizes["vocab_size"], len(loaded)), "max_position_embeddings": 8192}
    config = getattr(transformers, f"{kind}Config")(**{"tie_word_embeddings": False, **sizes}, dtype="bfloat16")
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    out, device = folder / "16", "cuda" if torch.cuda.is_available() else "cpu"
    out.mkdir(parents=True, exist_ok=True)
    entries = [
        (name, size, "BF16") for name, weight in model.named_parameters() for name, size in as_published(name, weight)
    ]
    torch.manual_seed(0)

    known: dict = {}

    def values(entry):
        name, size, _ = entry
        if len(size) == 1:
            return torch.ones(size) if "norm" in name else torch.zeros(size)
        if (first := re.sub(r"\.layers\.\d+\.", ".layers.0.", name)) in known:
            return known[first]
        # A wide and deep model of larger numbers than this makes 14 % of difference out of bf16's rounding.
        wide = min(0.02, 0.5 / size[-1] ** 0.5) if shape in LARGEST and ".layers." in name else 0.02
        made = torch.empty(size, dtype=torch.bfloat16, device=device).normal_(0, wide).cpu()
        return known.setdefault(first, made) if shape in LARGEST and ".layers." in name else made

    parts, room = [[]], 5 * 2**30
    for entry in entries:
        size = 2 * torch.Size(entry[1]).numel()
        if size > room and parts[-1]:
            parts.append([])
            room = 5 * 2**30
        parts[-1].append(entry)
        room -= size
    names = [f"model-{n:05d}-of-{len(parts):05d}.safetensors" for n in range(1, len(parts) + 1)]
    for entry in entries if shape in LARGEST else ():
        if ".layers.0." in entry[0]:
            values(entry)
    with ThreadPoolExecutor(16 if shape in LARGEST else 1) as writers:
        total = sum(writers.map(lambda n, p: write_safetensors(out / n, p, map(values, p)), names, parts))
    placed = {entry[0]: name for name, part in zip(names, parts, strict=True) for entry in part}
    write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})
    config.architectures = [type(model).__name__]
    config.save_pretrained(out)
    loaded.save_pretrained(out)
    (out / "done").touch()


def environment() -> dict:
    import torch

    from helpers import machine

    cuda = torch.cuda.is_available()
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
    return {"arm": "environment", "gpus": names, "cores": os.cpu_count(), **machine.versions()}


def start(arm: Arm, given: argparse.Namespace, out: Path, cards: list[int]) -> subprocess.Popen:
    """The arm's child on those GPUs, its base made first; its output goes to OUT/ARM.log."""
    words = [word.replace("OUT/", f"{out}/") for word in arm.command]
    if words[0] in ("ci/bench_gpu.py", "ci/bench_rivals.py"):
        base = given.models / arm.shape
        words += ["--model", str(base if words[0] == "ci/bench_gpu.py" else base / "16"), "--data", given.data]
    elif words[0] == "ci/bench_recipes.py":
        words += ["--tokenizer", given.tokenizer]
    words += ["--tiny"] * (given.tiny and words[0] in ("ci/bench_gpu.py", "ci/bench_recipes.py"))
    if given.tiny and "--processes" in words:
        place = words.index("--processes") + 1
        words[place] = str(min(2, int(words[place])))
    environment = {**os.environ, "TUNEBOOK_RUNS": str(given.models / "runs"), "PYTHONUNBUFFERED": "1"}
    environment |= {"OMP_NUM_THREADS": "1"} if given.tiny else PLAYED.get(arm.name, {})
    if arm.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, cards))
    if arm.shape:  # in the same child, so that the arms beside it go on
        base = ["--make", arm.shape, "--models", str(given.models), "--tokenizer", given.tokenizer]
        words = ["ci/gpu_session.py", str(out), *base, *["--tiny"] * given.tiny, "--then", *words]
    with open(out / f"{arm.name}.log", "w") as log:
        return subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )


def kill(pid: int) -> None:
    """End a process and all that it started. torchrun gives each worker a session of its own: one that outlived its
    arm would keep a GPU's memory, with which the next arm's plan could not count."""
    import psutil

    starter = psutil.Process(pid)
    for process in [*starter.children(recursive=True), starter]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def line_of(arm: Arm, out: Path, status: int | str, seconds: float, beside: int) -> dict:
    """The arm's line: what its child printed as its result, or how it failed. beside: arms that ran meanwhile."""
    said = (out / f"{arm.name}.log").read_text(errors="replace")
    found = [
        json.loads(line.removeprefix("RESULT ")) for line in said.splitlines() if line[:8] in ("RESULT {", '{"recipe')
    ]
    line = {"arm": arm.name, **(found[-1] if found else {}), "status": status, "session_s": round(seconds, 1)}
    line |= ({"goal": arm.goal} if arm.goal else {}) | ({"beside": beside} if beside else {})
    return line if found or status == 0 else line | {"said": " ".join(said.split())[-900:]}


def run_all(arms: list[Arm], given: argparse.Namespace, out: Path) -> None:
    """The arms in their order, as many at once as there are GPUs for; one that needs more waits for them."""
    began, waiting, running = time.time(), list(arms), {}
    free = list(range(max(given.gpus, 1)))
    while waiting or running:
        for arm in list(waiting):
            if max(arm.gpus, 1) > len(free):
                continue
            waiting.remove(arm)
            if time.time() - began + arm.seconds > 60 * given.minutes and not given.only:
                print(f"left to the next call: {arm.name}", flush=True)
                continue
            cards, free = free[: max(arm.gpus, 1)], free[max(arm.gpus, 1) :]
            for other in running.values():
                other[-1].add(arm.name)
            running[arm] = (start(arm, given, out, cards), time.time(), cards, {other.name for other in running})
        for arm, (child, since, cards, beside) in list(running.items()):
            status: int | str | None = child.poll()
            if status is None and time.time() - since > arm.seconds:
                kill(child.pid)
                child.wait()
                status = "timeout"
            if status is None:
                continue
            del running[arm]
            free = sorted([*free, *cards])
            line = line_of(arm, out, status, time.time() - since, len(beside))
            print(json.dumps(line), flush=True)
            with open(out / "results.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        time.sleep(0.2)


def main() -> int:
    if sys.argv[1:] == ["environment"]:
        print("RESULT " + json.dumps(environment()))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", default="", help="folder of any tokenizer of less than 128,256 tokens")
    parser.add_argument("--data", default="")
    parser.add_argument("--models", type=Path, default=Path("/tmp/gpu-session"), help="where bases and runs lie")
    parser.add_argument("--gpus", type=int, default=1, help="arms that need more are left out")
    parser.add_argument("--least-gpus", type=int, default=0, help="and those that need fewer")
    parser.add_argument("--minutes", type=float, default=9.0, help="no arm begins that may end after this")
    parser.add_argument("--have", type=Path, action="append", default=[], help="earlier results: their arms are done")
    parser.add_argument("--only", default="", help="arms, separated by commas")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--make", default="", help="a shape's weights alone, then the command after --then")
    parser.add_argument("--then", nargs=argparse.REMAINDER, default=[])
    given = parser.parse_args()
    if given.make:
        make(given.make, given.models / given.make, given.tokenizer, given.tiny)
        if given.then:
            os.execv(sys.executable, [sys.executable, *given.then])
        return 0
    if given.list:
        for arm in ARMS:
            print(f"{arm.name:26} {arm.gpus} GPU  {arm.seconds:4} s  {arm.shape or '-':8} {arm.goal}")
        return 0
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    files = [file for file in (out / "results.jsonl", *given.have) if file.is_file()]
    done = {json.loads(line)["arm"] for file in files for line in file.read_text().splitlines()}
    wanted = given.only.split(",") if given.only else [arm.name for arm in ARMS]
    arms = [arm for arm in ARMS if arm.name in wanted and arm.name not in done]
    if given.only:
        arms.sort(key=lambda arm: wanted.index(arm.name))
    run_all([arm for arm in arms if given.least_gpus <= arm.gpus <= given.gpus], given, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
