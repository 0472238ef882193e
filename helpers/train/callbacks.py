"""Watching a run: a line of jsonl a step, a stop with a sentence when it goes wrong, sealed checkpoints, samples, a live curve."""

from __future__ import annotations

import json
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from helpers import machine
from helpers.errors import TunebookError
from helpers.train import resume

SCALER_STEPS = 10  # fp16's loss scale starts too high on purpose: its first steps overflow and are skipped
ZERO_STEPS = 3  # steps in a row without any gradient before a run is called dead


class Log(TrainerCallback):
    """log.jsonl: every number of every step with tokens/s, memory and time left. Lines after the checkpoint that a resumed
    run goes on from are cut off first, so the file reads like one unbroken run."""

    def __init__(self, path: Path, trainer: Any = None):
        self.path, self.trainer, self.file = Path(path), trainer, None

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        kept = [
            line
            for line in read(self.path)
            if line.get("step", 0) <= state.global_step and not (line.get("end") or not state.global_step)
        ]
        self.before = max((line.get("seconds", 0.0) for line in kept), default=0.0)
        self.tokens_before = max((line.get("trained_tokens", 0) for line in kept), default=0)
        self.file = open(self.path, "w", encoding="utf-8")
        for line in kept:
            self._write(line)
        self.started, self.first_step = time.time(), state.global_step
        self.last = (self.started, 0)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.file is None or not logs:
            return
        now, tokens = time.time(), getattr(self.trainer, "trained_tokens", 0)
        line = {
            "step": state.global_step,
            "epoch": round(state.epoch or 0.0, 4),
            **{k: v for k, v in logs.items() if isinstance(v, (int, float))},
        }
        line["seconds"] = round(self.before + now - self.started, 2)
        if "loss" in logs:
            done = state.global_step - self.first_step
            line["left_s"] = round((now - self.started) / max(done, 1) * (state.max_steps - state.global_step), 1)
            if tokens:
                line["trained_tokens"] = self.tokens_before + tokens
                line["tokens_per_s"] = round((tokens - self.last[1]) / max(now - self.last[0], 1e-6), 1)
            line["memory_gib"] = machine.peak_memory_gib()
        self.last = (now, tokens)
        self._write(line)

    def on_train_end(self, args, state, control, **kwargs):
        if self.file is not None:
            self.file.close()
            self.file = None

    def _write(self, line: dict[str, Any]) -> None:
        # A number that is none (NaN) is kept as text: the file stays readable for every JSON reader.
        self.file.write(
            json.dumps({k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in line.items()})
            + "\n"
        )
        self.file.flush()


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl; a last line that a kill cut off is left out."""
    lines = []
    if Path(path).is_file():
        for text in Path(path).read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
    return lines


class Guard(TrainerCallback):
    """Stops a run that cannot come right: NaN, no gradient, or a loss that has run away. Names the rows of that step."""

    def __init__(self, trainer: Any = None, fp16: bool = False, rise: float = 3.0, over: int = 10):
        self.trainer, self.fp16, self.rise, self.over = trainer, fp16, rise, over
        self.smooth, self.lowest, self.high, self.zeros, self.skipped = None, math.inf, 0, 0, 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs:
            return
        loss, norm = logs["loss"], logs.get("grad_norm")
        if not math.isfinite(loss):
            self._stop(
                state,
                f"the loss is {loss}",
                "lower learning_rate, or look at these rows (an empty answer, or one of thousands of repeats)",
            )
        if norm is not None and not math.isfinite(norm):
            self.skipped += 1
            if not self.fp16 or self.skipped > SCALER_STEPS:
                self._stop(
                    state,
                    f"the gradient is {norm}",
                    "lower learning_rate" + (" or set precision to 'fp32'" if self.fp16 else ""),
                )
            return
        self.skipped = 0
        self.zeros = self.zeros + 1 if norm == 0.0 and logs.get("learning_rate", 1) else 0
        if self.zeros >= ZERO_STEPS:
            self._stop(
                state,
                f"no weight had a gradient in {ZERO_STEPS} steps",
                "check that these rows have trained tokens and that target_modules names layers in use",
            )
        self.smooth = loss if self.smooth is None else 0.9 * self.smooth + 0.1 * loss
        self.lowest = min(self.lowest, self.smooth)
        self.high = self.high + 1 if self.smooth > self.rise * max(self.lowest, 0.5) else 0
        if self.high >= self.over:
            self._stop(
                state,
                f"the loss rose from {self.lowest:.2f} to {self.smooth:.2f} and stayed there",
                "lower learning_rate or raise warmup_ratio",
            )

    def _stop(self, state: Any, what: str, remedy: str) -> None:
        raise TunebookError(
            f"Training stopped at step {state.global_step}: {what}; {remedy}. Rows of that step: {self._rows()}."
        )

    def _rows(self) -> str:
        batches = getattr(self.trainer, "step_rows", [])
        bad = [ids for ids, loss in batches if not math.isfinite(float(loss))] or [ids for ids, _ in batches]
        ids = [i for batch in bad for i in batch if i]
        return ", ".join(ids[:16]) + (f" and {len(ids) - 16} more" if len(ids) > 16 else "") if ids else "not known"


class Seal(TrainerCallback):
    """Marks every finished checkpoint as whole, and copies it to the mirror where there is one.

    Hashing and copying go on beside the training; the next checkpoint and the end wait for them, and raise what they raised.
    """

    def __init__(self, of: dict[str, Any], mirror: str = "", log: Path | None = None):
        self.of, self.mirror, self.log = of, Path(mirror) if mirror else None, log
        self.worker, self.pending = ThreadPoolExecutor(1, "seal"), None

    def on_save(self, args, state, control, **kwargs):
        import torch

        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # every process has written its part
        if not state.is_world_process_zero:
            return
        self._wait()
        self.pending = self.worker.submit(self._seal, Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args, state, control, **kwargs):
        self._wait()

    def _wait(self) -> None:
        if self.pending is not None:
            self.pending.result()
            self.pending = None

    def _seal(self, folder: Path) -> None:
        resume.seal(folder, self.of)
        if self.mirror:
            resume.mirror(folder, self.mirror)
            if self.log and self.log.exists():
                resume.mirror(self.log, self.mirror)


class Samples(TrainerCallback):
    """Greedy answers to a few held-out prompts every so many steps, into samples.jsonl and onto the screen."""

    def __init__(self, path: Path, prompts: list[dict[str, Any]], tokenizer: Any, every: int = 0, most: int = 96):
        self.path, self.prompts, self.tokenizer, self.every, self.most = path, prompts, tokenizer, every, most

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.every and state.global_step % self.every == 0 and state.is_world_process_zero:
            self.write(model, state.global_step)

    def write(self, model: Any, step: int) -> list[dict[str, Any]]:
        """Answer every prompt and append {step, id, prompt, answer, stopped, reference} to the file."""
        found = [{"step": step, **row} for row in answers(model, self.tokenizer, self.prompts, self.most)]
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        print(f"step {step}: {found[0]['answer']!r}" if found else "", flush=True)
        return found


def answers(model: Any, tokenizer: Any, prompts: list[dict[str, Any]], most: int = 96) -> list[dict[str, Any]]:
    """Greedy answers to tokenised prompts (dicts with id, prompt_ids, reference), in one padded batch.

    stopped: the model ended its turn by itself within `most` tokens.
    """
    import torch

    from helpers.model.loading import fast_bf16
    from helpers.model.stop_tokens import stop_tokens

    if not prompts:
        return []
    stops, training = stop_tokens(tokenizer), model.training
    longest = max(len(p["prompt_ids"]) for p in prompts)
    ids = torch.tensor(
        [[tokenizer.pad_token_id] * (longest - len(p["prompt_ids"])) + list(p["prompt_ids"]) for p in prompts]
    )
    mask = torch.tensor([[0] * (longest - len(p["prompt_ids"])) + [1] * len(p["prompt_ids"]) for p in prompts])
    device, state = next(model.parameters()).device, torch.get_rng_state()
    model.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cpu" and fast_bf16()):
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            do_sample=False,
            max_new_tokens=most,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=stops,
            pad_token_id=tokenizer.pad_token_id,
        )
    model.train(training)
    torch.set_rng_state(state)
    rows = []
    for prompt, tokens in zip(prompts, out[:, longest:].tolist(), strict=True):
        end = next((at for at, token in enumerate(tokens) if token in stops), None)
        stopped, tokens = end is not None, tokens[:end]
        rows.append(
            {
                "id": prompt.get("id", ""),
                "prompt": tokenizer.decode(prompt["prompt_ids"][-64:], skip_special_tokens=True),
                "answer": tokenizer.decode(tokens, skip_special_tokens=True),
                "stopped": stopped,
                "reference": prompt.get("reference", ""),
            }
        )
    return rows


class LiveCurve(TrainerCallback):
    """Draws the curves anew every few seconds where someone is watching; headless, a line of text every 20 seconds."""

    def __init__(self, log: Path, draw: Any, every_s: float = 3.0):
        self.log, self.draw, self.every_s = log, draw, every_s if machine.interactive() else 20.0
        self.last, self.handle = 0.0, None

    def on_log(self, args, state, control, logs=None, **kwargs):
        now = time.time()
        if not state.is_world_process_zero or now - self.last < self.every_s:
            return
        self.last = now
        if machine.interactive():
            self._draw()
            return
        lines = [line for line in read(self.log) if "loss" in line]
        if lines:
            line = lines[-1]
            print(
                f"step {line['step']}/{state.max_steps}  loss {line['loss']:.4f}  {line.get('tokens_per_s', 0):,.0f} tokens/s  "
                f"{line.get('left_s', 0):.0f} s left",
                flush=True,
            )
            sys.stdout.flush()

    def on_train_end(self, args, state, control, **kwargs):
        if machine.interactive() and state.is_world_process_zero:
            self._draw()

    def _draw(self) -> None:
        from IPython.display import display

        figure = self.draw(read(self.log))
        if self.handle is None:
            self.handle = display(figure, display_id=True)
        else:
            self.handle.update(figure)
