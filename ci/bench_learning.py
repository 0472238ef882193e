"""What is learnt in the same time: this project's defaults against TRL's SFT script and, on a GPU, Unsloth's notebook.

    python ci/bench_learning.py [--task NAME[=TRAIN,TEST[,DATABASE]]]... [--fetch] [--minutes 1,2,4] [--seeds 17,18,19]

Tasks: `atlas` (embedded), `geoquery` and `banking77` (public: named as geoquery=FOLDER, the folder of their files, or
downloaded by --fetch and kept in the cache), or any NAME=TRAIN,TEST[,DATABASE] that notebook 01 reads. GeoQuery comes
without a licence of its own in jkkummerfeld/text2sql-data, BANKING77 under CC BY 4.0; neither is part of this project.

Each arm trains in a process of its own for the given minutes and answers the same held-out questions; notebook 05's
code scores them. Loading is not part of the minutes, nor are a rival's steps until its speed has settled, after which
it starts anew; its learning rate falls linearly with the share of the minutes (or of the epochs) that is used. A JSON
line an arm, then one a comparison: the difference to TRL over all seeds with its 95 % interval, questions resampled.
--plot draws score against minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
os.environ.setdefault("TUNEBOOK_HEADLESS", "1")

from ci.learning_tasks import sources
from helpers import cache, machine, params, plots, runs, worker
from helpers.errors import TunebookError, command

Row = dict[str, Any]
# A script after TRL's documentation of SFTTrainer with peft, the settings as the SFT of small models has them.
TRL = {"rank": 16, "alpha": 32, "dropout": 0.0, "learning_rate": 1e-3, "batch": 8, "schedule": "linear", "warmup": 0.03}
# What Unsloth's notebooks ship: 4 bits, rank 16, alpha 16, 2e-4, batches of 2 × 4, 8-bit AdamW.
UNSLOTH = TRL | {"alpha": 16, "learning_rate": 2e-4}
PROBE_STEPS, PROBE_S = 40, 120.0  # of a rival before its training, at most: Unsloth compiles in them
WINDOW = 3  # steps whose median is the speed
CHILD = "ci.bench_learning:child"
NEW_TOKENS = {"atlas": 64, "banking77": 24}  # longest answer; others 160


# ---------------------------------------------------------------- arms, each in a child


def prepare(task: str, found: dict[str, str], given: argparse.Namespace) -> None:
    """Notebook 01 for a task, by its defaults; and once more with every row kept, for the arms that have no such
    cleaning."""
    from helpers.data import prepare as data

    everything = {"near_duplicates": 0, "decontaminate": 0, "exact_duplicates": False, "eval_share": 0}
    for run, more in ((task, {}), (f"{task}-whole", everything)):
        model = {"model": given.model} if given.model else {}
        job = data.open(params.resolve("data", {"run": run, **found, **model, **more}))
        if job.stage.done is None:
            job.read(), job.generate(), job.clean(), job.mix(), job.split()
            job.template(), job.vocabulary(), job.encode(), job.lengths(), job.pairs(), job.finish()


def child(spec: Row, event: Callable[[Any], None]) -> Row:
    """The worker's handler: train one arm, or answer the held-out questions with the `adapter` that one has trained, in
    a process that Unsloth has not patched."""
    if "adapter" in spec:
        return score(Path(spec["adapter"]), spec["onto"], spec)
    adapter, onto, made = (ours if spec["arm"] == "ours" else rival)(spec)
    return {"adapter": str(adapter), "onto": onto, "made": made}


def ours(spec: Row) -> tuple[Path, str, Row]:
    """(adapter, base that it was trained on, figures) of this project's defaults."""
    from helpers.gguf import trained
    from helpers.train import training

    run = spec.get("run") or f"{spec['task']}-{spec['minutes']:g}-{spec['seed']}"
    data, link = runs.load(spec["task"], "data", verify=False), runs.folder(run, "data")
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.symlink_to(data.path.resolve())
    chosen = {"epochs": spec["epochs"], "max_minutes": spec["minutes"], "seed": spec["seed"], **spec["ours"]}
    job = training.open(params.resolve("sft", {"run": run, "again": True, **chosen}))
    began = time.monotonic()
    job.train()
    made = {"whole_s": round(time.monotonic() - began, 1), "settings": chosen}
    job.finish()
    done = runs.load(run, "sft", verify=False)
    made |= {name: done.metrics.get(name) for name in ("steps", "train_s", "trained_tokens", "eval_loss")}
    made |= {"learning_rate": done.data["learning_rate_used"], "method": done.data["method"]}
    return done.path / "adapter", trained.saw(done), made


def settled(step_s: list[float]) -> bool:
    """Whether the steps, in seconds, have stopped getting faster: the median of the last WINDOW is at least 90 % of
    that of the WINDOW before, and none of the last took twice that median, as one with a compilation does."""
    if len(step_s) < 2 * WINDOW:
        return False
    before, last = step_s[-2 * WINDOW : -WINDOW], step_s[-WINDOW:]
    middle = statistics.median(last)
    return middle >= 0.9 * statistics.median(before) and max(last) <= 2 * middle


def rate_factor(share: float, warmup: float) -> float:
    """Factor on the peak learning rate once this share of the training is over: a linear rise during the share
    `warmup`, then a linear fall to 0."""
    return share / warmup if share < warmup else max(0.0, (1 - share) / (1 - warmup))


def rival(spec: Row) -> tuple[Path, str, Row]:
    """The same of TRL's SFT script or Unsloth's notebook, on every row of the task."""
    unsloth, cuda = spec["arm"] == "unsloth", machine.gpu() is not None
    base = Path(runs.load(spec["task"], "data", verify=False).data["model"]["path"])
    use = UNSLOTH if unsloth else TRL
    if unsloth:
        from unsloth import FastLanguageModel

        model, tokenizer = FastLanguageModel.from_pretrained(str(base), max_seq_length=2048, load_in_4bit=True)
        shape = {"use_gradient_checkpointing": "unsloth", "random_state": spec["seed"], "bias": "none"}
        model = FastLanguageModel.get_peft_model(model, r=use["rank"], lora_alpha=use["alpha"], lora_dropout=0, **shape)
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
    from trl import SFTConfig, SFTTrainer

    from datasets import Dataset

    adapter: dict[str, Any] = {}
    set_seed(spec["seed"])
    if not unsloth:
        tokenizer = AutoTokenizer.from_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, device_map="cuda" if cuda else None)
        shape = {"r": use["rank"], "lora_alpha": use["alpha"], "lora_dropout": use["dropout"]}
        adapter = {"peft_config": LoraConfig(**shape, target_modules="all-linear", task_type="CAUSAL_LM")}
    table = Dataset.from_parquet(str(runs.load(f"{spec['task']}-whole", "data", verify=False).path / "train.parquet"))
    chats = [json.loads(text) for text in table["messages"]]
    if unsloth:  # as its notebooks: rendered text, the loss on the responses alone
        from unsloth.chat_templates import train_on_responses_only

        rows = Dataset.from_dict({"text": [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]})
        marks = {"instruction_part": "<|im_start|>user\n", "response_part": "<|im_start|>assistant\n"}
    else:
        rows = Dataset.from_list([{"prompt": chat[:-1], "completion": chat[-1:]} for chat in chats])
    folder = runs.run_folder(f"{spec['task']}-{spec['arm']}")

    class Clock(TrainerCallback):
        """Sets the learning rate by the share of `limit_s` or of the steps that is used, whichever is larger, and ends
        with the step that ends nearest to the limit. Without a limit: a probe, which ends when its speed has settled.
        """

        def __init__(self, limit_s: float = 0.0) -> None:
            self.limit_s, self.began, self.ended = limit_s, 0.0, 0.0
            self.step_s: list[float] = []

        @property
        def train_s(self) -> float:
            return self.ended - self.began

        @property
        def speed(self) -> float:
            return statistics.median(self.step_s[-WINDOW:])

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.began = self.ended = time.monotonic()

        def on_step_begin(self, args: Any, state: Any, control: Any, **has: Any) -> None:
            if self.limit_s:
                share = max((time.monotonic() - self.began) / self.limit_s, state.global_step / state.max_steps)
                rate = args.learning_rate * rate_factor(share, use["warmup"])
                for group in has["optimizer"].param_groups:
                    group["lr"] = rate

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            now = time.monotonic()
            self.step_s.append(now - self.ended)
            self.ended = now
            if self.limit_s:
                control.should_training_stop |= self.train_s + self.speed / 2 > self.limit_s
            else:
                control.should_training_stop |= settled(self.step_s) or self.train_s > PROBE_S

    def trainer(steps: int, clock: Clock, **more: Any) -> Any:
        kind = {"lr_scheduler_type": "constant", "optim": "adamw_8bit" if unsloth else "adamw_torch"}
        rate = {"learning_rate": use["learning_rate"]}  # the peak, which Clock scales
        at_once = 2 if unsloth else use["batch"]
        batch = {"per_device_train_batch_size": at_once, "gradient_accumulation_steps": use["batch"] // at_once}
        here = {"bf16": cuda, "use_cpu": not cuda, "seed": spec["seed"], "output_dir": str(folder / "checkpoints")}
        quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 10}
        whole = {"max_steps": steps, "max_length": 2048, "gradient_checkpointing": False}
        whole |= {"dataset_text_field": "text", "weight_decay": 0.01} if unsloth else {}
        args = SFTConfig(**whole, **kind, **rate, **batch, **here, **quiet)
        made = {"processing_class": tokenizer, "train_dataset": rows, "callbacks": [clock]}
        job = SFTTrainer(model=model, args=args, **made, **more)
        return train_on_responses_only(job, **marks) if unsloth else job

    probe = Clock()
    first = trainer(PROBE_STEPS, probe, **adapter)
    model = first.model
    kept = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    first.train()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.copy_(kept[name])
    del first  # and its optimizer: the training has one of its own
    limit_s, most = spec["minutes"] * 60, max(1, int(spec["epochs"] * len(rows) / use["batch"]))
    clock = Clock(limit_s)
    job = trainer(most, clock)
    job.train()
    job.model.save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")
    done = {"steps": job.state.global_step, "planned_steps": max(1, min(round(limit_s / probe.speed), most))}
    done |= {"train_s": round(clock.train_s, 2), "probe_s": round(probe.train_s, 2), "probe_steps": len(probe.step_s)}
    done |= {"step_s": round(probe.speed, 3)}
    tokens = next((line["num_tokens"] for line in reversed(job.state.log_history) if "num_tokens" in line), None)
    made = {"trained_tokens": tokens, "learning_rate": use["learning_rate"], "settings": use}
    return folder / "adapter", "nf4" if unsloth else "16bit", done | made


def score(adapter: Path, onto: str, spec: Row) -> Row:
    """The held-out questions, answered by the adapter on the base as training saw it and scored as notebook 05 does."""
    from helpers.evaluate import candidates, evaluation
    from helpers.evaluate import statistics as tests

    off = dict.fromkeys(("general_text", "general_tasks", "general_chat"), "")
    how = {"limit": spec["questions"], "max_new_tokens": spec["new_tokens"], "reference_metric": "exact", **off}
    job = evaluation.open(params.resolve("eval", {"run": spec["task"], "candidates": "base", "again": True, **how}))
    base = job.findings.candidates[0].path
    one = candidates.Candidate(spec["arm"], "sft", "hf", str(adapter), base, adapter, onto=onto)
    job.findings.candidates, job.pairs = [one], []
    job.measure()
    values = job.findings.measured[spec["arm"]].values
    found = tests.share(values)
    right = "".join("-" if value is None else str(int(value == 1)) for value in values)
    return {"score": found["value"], "low": found["low"], "high": found["high"], "n": found["n"], "right": right}


# ---------------------------------------------------------------- what it came to


def comparisons(lines: list[Row]) -> list[Row]:
    """Of each task, minutes and arm: the median score of its seeds and, beside TRL, the paired difference over all of
    them with its interval; a question that several seeds answered is resampled as one."""
    from helpers.evaluate import statistics as tests

    found = []
    for task, minutes, arm in dict.fromkeys((line["task"], line["minutes"], line["arm"]) for line in lines):

        def of(who: str, at: tuple[str, float] = (task, minutes)) -> dict[int, Row]:
            return {one["seed"]: one for one in lines if (one["task"], one["minutes"], one["arm"]) == (*at, who)}

        mine, other = of(arm), of("trl")
        both = [seed for seed in mine if seed in other]
        line = {"bench": "learning, compared", "task": task, "minutes": minutes, "arm": arm, "seeds": len(mine)}
        line |= {"score": statistics.median(one["score"] for one in mine.values())}
        if arm != "trl" and both:
            a, b = ([None if c == "-" else float(c) for s in both for c in side[s]["right"]] for side in (other, mine))
            names = [str(place) for seed in both for place in range(len(mine[seed]["right"]))]
            pair = tests.pair("trl", arm, a, b, names if len(both) > 1 else None) or {}
            line |= {"against": "trl", "difference": pair.get("difference"), "low": pair.get("low")}
            line |= {"high": pair.get("high"), "n": pair.get("n")}
        found.append(line)
    return found


def plot(lines: list[Row], file: Path) -> None:
    """Score against minutes, a panel a task: the median of the seeds, and the 95 % interval of each."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(line["task"] for line in lines))
    figure = Figure(figsize=(4.6 * len(tasks), 3.2), layout="constrained")
    for panel, task in zip(figure.subplots(1, len(tasks), squeeze=False).flat, tasks, strict=True):
        here = [line for line in lines if line["task"] == task]
        for arm, colour in zip(dict.fromkeys(line["arm"] for line in here), plots.PALETTE, strict=False):
            of_arm = [one for one in here if one["arm"] == arm]
            minutes = sorted({one["minutes"] for one in of_arm})
            scores = [[100 * one["score"] for one in of_arm if one["minutes"] == at] for at in minutes]
            panel.plot(minutes, list(map(statistics.median, scores)), color=colour, marker="o", label=plots.label(arm))
            for one in of_arm:
                panel.plot([one["minutes"]] * 2, [100 * one["low"], 100 * one["high"]], color=colour, alpha=0.35)
        panel.set_title(plots.label(task))
        panel.set_xlabel("minutes of training")
        panel.set_ylabel("right of the held-out questions, %")
        panel.set_ylim(0, min(100, 5 + max(100 * one["high"] for one in here)))
        panel.grid(alpha=0.25)
        panel.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=144)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", default=[], help="default: atlas; may be given again")
    parser.add_argument("--fetch", action="store_true", help="download a public task's files that are not there")
    parser.add_argument("--minutes", default="4", help="minutes of training, separated by commas")
    parser.add_argument("--seeds", default="17,18,19")
    parser.add_argument("--arms", default="ours,trl", help="of ours, trl, unsloth (where it is installed, on a GPU)")
    parser.add_argument("--epochs", type=float, default=3, help="at most so many passes, whatever the minutes")
    parser.add_argument("--questions", type=int, default=150, help="held-out questions an arm; 0: all")
    parser.add_argument("--model", default="", help="base model; default: notebook 01's")
    pair: Any = {"nargs": 2, "metavar": ("NAME", "VALUE")}
    parser.add_argument("--ours", action="append", default=[], help="a parameter of notebook 02", **pair)
    parser.add_argument("--work", default="", help="folder of runs and adapters; default: in the cache")
    parser.add_argument("--out", default="", help="file that the lines are added to, besides the terminal")
    parser.add_argument("--plot", default="", help="PNG of score against minutes")
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> int:
    given = arguments(argv)
    arms, tasks = given.arms.split(","), given.task or ["atlas"]
    if unknown := set(arms) - {"ours", "trl", "unsloth"}:
        raise TunebookError(f"--arms has {', '.join(unknown)}; it takes ours, trl and unsloth, separated by commas.")
    if "unsloth" in arms and (machine.gpu() is None or find_spec("unsloth") is None):
        raise TunebookError("--arms has unsloth, which needs a GPU and `pip install -e .[unsloth]`; leave it out.")
    os.environ["TUNEBOOK_RUNS"] = given.work or str(cache.folder() / "learning" / "runs")
    os.environ["TUNEBOOK_ANSWER_CACHE"] = "off"
    lines, failed = list[Row](), False

    def tell(line: Row) -> None:
        print(json.dumps(line), flush=True)
        if given.out:
            with open(given.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    gpu = machine.gpu()
    here = {"device": gpu.name if gpu else "cpu", "cores": len(os.sched_getaffinity(0))}
    here |= machine.versions()["versions"]
    for task in tasks:
        name = task.partition("=")[0]
        found = sources(task, Path(os.environ["TUNEBOOK_RUNS"]) / "files" / name, given.fetch)
        with contextlib.redirect_stdout(sys.stderr):
            prepare(name, found, given)
        for seed in map(int, given.seeds.split(",")):
            for minutes in map(float, given.minutes.split(",")):
                for arm in arms:
                    spec = {"task": name, "arm": arm, "seed": seed, "minutes": minutes, "epochs": given.epochs}
                    asked = {"questions": given.questions, "new_tokens": NEW_TOKENS.get(name, 160)}
                    line, whole = {"bench": "learning", **spec}, {**spec, **asked, "ours": dict(given.ours)}
                    try:
                        trained = worker.run(CHILD, whole, wall_s=None, name=f"{arm} on {name}")
                        made = trained.pop("made")
                        made |= worker.run(CHILD, whole | trained, wall_s=None, name=f"answers of {arm} on {name}")
                    except TunebookError as error:  # the other arms are measured nevertheless
                        failed = True
                        tell(line | {"error": str(error)})
                        continue
                    lines.append(line | made | {"new_tokens": asked["new_tokens"], **here})
                    tell(lines[-1])
    for line in comparisons(lines):
        tell(line)
    if given.plot and lines:
        plot(lines, Path(given.plot))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
