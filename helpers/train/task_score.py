"""What a model in training scores on a few held-out questions, every so often: as notebook 05 judges, greedily.

Asked after 1, 2, 4, 8 … minutes, at every evaluation and at the end, together for at most `SHARE` of the run's time:
how many questions follows from what the last ones took. The checkpoint that is kept is the last one, unless an earlier
one is better by more than the standard error of their paired difference: 32 questions tell apart what differs by a
dozen points, and the end of a schedule is better than its middle until a model overfits.
"""

from __future__ import annotations

import json
import math
import random
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from helpers import display
from helpers.data.encode import plain_turns
from helpers.data.rendering import thoughts_of
from helpers.evaluate import evaluation, statistics
from helpers.params import EvalParams
from helpers.tasks import questions, text_metrics
from helpers.tasks.questions import Decoding, Item
from helpers.train import callbacks, distributed

SHARE, FEWEST, LONGEST = 0.1, 8, 256  # of the time; questions that are worth asking; tokens of an answer
SHORT_MINUTES = 8.0  # a run of at most that long is evaluated at these minutes and at its end alone
NEAR_END = 0.85  # of the time: what comes after is the end's


def make(job: Any) -> TaskScore | None:
    """The scorer of a built `job.TrainJob`; None where its task has no score, or its model cannot be asked cheaply."""
    p, folder = job.params, job.stage.parents["data"].path
    if not p.score_rows or job.held_out is None or distributed.sharded(p) or job.planned.backend != "hf":
        return None
    items, prompts, longest = _questions(folder / "eval.parquet", p.score_rows, p.seed)
    database = folder / "database.sqlite" if (folder / "database.sqlite").is_file() else None
    kind = questions.task_kind(items, database)
    if kind not in ("text_to_sql", "references"):
        return None
    judges = evaluation.sql_judges(items, database, p.seed) if kind == "text_to_sql" else {}
    return TaskScore(job, items, prompts, judges, min(LONGEST, longest + longest // 4 + 8))


def _questions(file: Any, count: int, seed: int) -> tuple[list[Item], list[list[int]], int]:
    """(a seeded choice of the held-out rows, the tokens before the last answer of each, the longest reference)."""
    import pyarrow.parquet as parquet

    items, prompts, longest = list[Item](), [], 0
    table: Any = parquet.read_table(file, memory_map=True) if file.is_file() else []
    drawn = random.Random(seed).sample(range(len(table)), min(len(table), 4 * count))  # some may have no answer
    for row in table.take(drawn).to_pylist() if drawn else ():
        (*asked, answer), mask = json.loads(row.get("messages") or "[]") or [{"role": ""}], row["completion_mask"]
        last = max((i for i, on in enumerate(mask) if on), default=-1)
        first = max((i for i, on in enumerate(mask[: last + 1]) if not on), default=-1) + 1
        reference = plain_turns([{**answer, "content": thoughts_of(answer)[1]}])[0]["content"] if asked else ""
        if asked and answer["role"] == "assistant" and 0 < first <= last and reference and len(items) < count:
            items.append(Item(row["id"], asked, reference, {}, row.get("tools"), answer))
            prompts.append(row["input_ids"][:first])
            longest = max(longest, last + 1 - first)
    return items, prompts, longest


class TaskScore(TrainerCallback, ExportableState):
    """found: {minutes, step, score, low, high, n, values} of every time; all of it is in the checkpoints."""

    def __init__(self, job: Any, items: list[Item], prompts: list[list[int]], judges: dict, limit: int) -> None:
        self.job, self.items, self.prompts, self.judges, self.limit = job, items, prompts, judges, limit
        self.found: list[dict[str, Any]] = []
        self.spent, self.before, self.passed = 0.0, 0.0, 0.0  # seconds
        self.accepted, self.lowest, self.stale = True, math.inf, 0

    @property
    def elapsed(self) -> float:
        return self.before + self.job.deadline.elapsed

    @property
    def time(self) -> float:
        """Seconds that the run is to take."""
        return 60 * self.job.params.max_minutes or self.job.planned.seconds[0]

    def ahead(self) -> list[float]:
        """Seconds at which it is asked besides the evaluations, of those that are still to come."""
        marks = (60.0 * 2**i for i in range(12))
        return [mark for mark in marks if self.passed < mark < NEAR_END * self.time]

    def state(self) -> dict[str, Any]:
        names = ("found", "spent", "passed", "accepted", "lowest", "stale")
        return {"args": {}, "attributes": {name: getattr(self, name) for name in names} | {"before": self.elapsed}}

    def restore(self, state: Any) -> None:
        for name, value in state.stateful_callbacks.get("TaskScore", {}).get("attributes", {}).items():
            setattr(self, name, value)
        if self.job.params.max_minutes:  # its clock goes on by itself
            self.before = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:
            self.restore(state)
            state.stateful_callbacks.setdefault("TaskScore", self.state())  # of a sharded run there was none
        elif self.job.adapter:
            self.ask(0, math.inf)

    def on_step_end(self, args, state, control, **kwargs):
        due = distributed.shared(lambda: self.elapsed >= min(self.ahead(), default=math.inf))
        if due and not control.should_training_stop:
            control.should_evaluate = args.eval_strategy != "no"
            control.should_save = control.should_save or args.load_best_model_at_end

    def on_evaluate(self, args, state, control, **kwargs):
        if 0 < self.job.params.early_stopping <= self.stale:
            control.should_training_stop = True

    def affordable(self, left: int) -> int:
        """Questions that can be asked now when `left` more times are to come; 0 for too few to tell anything."""
        count = min(len(self.items), int((SHARE * self.time - self.spent) / (left + 1) / self.each))
        return count if count >= min(FEWEST, len(self.items)) else 0

    @property
    def each(self) -> float:
        """Seconds that a question takes, as the last ones did."""
        asked = [one["seconds"] / one["n"] for one in self.found if one["n"]]
        return asked[-1] if asked else max(0.02, 2 * self.limit / self.job.planned.tokens_per_s)

    def reserve(self, pause_s: float) -> float:
        """Seconds that what is to come will take, the end with it: questions, and evaluations for their sake alone."""
        left = len(self.ahead())
        return left * pause_s + max((left + 1) * self.affordable(left), self.affordable(0)) * self.each

    def ask(self, step: int, loss: float, last: bool = False) -> dict[str, float]:
        """What an evaluation adds to its figures: eval_score where there is time for it, and eval_kept, the step when
        its checkpoint is to be kept, else -1: by the score, before there is one by the held-out loss."""
        # A minute that is as good as over is not waited for.
        self.passed = max(self.passed, 1.05 * self.elapsed) if step else 0.0
        scored, again = [o for o in self.found if o["step"]], any(o["step"] == step for o in self.found)
        count = distributed.shared(lambda: 0 if again else self.affordable(0 if last else self._left()))
        one = distributed.shared(lambda: self._asked(step, count)) if count else None
        if one:
            best = max(scored, key=lambda o: o["score"], default=one)
            self.found.append(one)
            self.spent += one["seconds"]
            lost = [a - b for a, b in zip(best["values"], one["values"], strict=False) if None not in (a, b)]
            self.accepted = len(lost) < 2 or sum(lost) / len(lost) <= statistics.standard_error(lost)
            self.stale = 0 if not scored or one["score"] > best["score"] else self.stale + 1
        elif not scored:
            self.accepted, self.stale = loss <= self.lowest, 0 if loss < self.lowest else self.stale + 1
            self.lowest = min(loss, self.lowest)
        return {"eval_kept": step if self.accepted else -1} | ({"eval_score": one["score"]} if one else {})

    def _left(self) -> int:
        """How many more times it will be asked, the end with them."""
        state = self.job.trainer.state
        regular = (state.max_steps - state.global_step) // max(1, state.eval_steps or 1)
        return len(self.ahead()) + max(1, regular)

    def _asked(self, step: int, count: int) -> dict[str, Any]:
        def score(item: Item, answer: Any) -> float | None:
            if not self.judges:
                return text_metrics.entry(answer.text, item.reference, EvalParams().reference_metric)["score"]
            judge = self.judges.get(item.id)
            return judge.score(answer.text, item.reference, answer.stopped)["score"] if judge else None

        before = self.elapsed
        answers = callbacks.answers(self.job, self.prompts[:count], Decoding(self.limit))
        values = list(map(score, self.items, answers))
        share = statistics.share(values)
        one = {name: share[name] or 0.0 for name in ("low", "high", "n")} | {"score": share["value"] or 0.0}
        right = display.percent(one["score"], 0)
        display.say(f"step {step}, {before / 60:.1f} min: {right} of {one['n']} held-out questions")
        one |= {"minutes": round(before / 60, 2), "step": step, "seconds": self.elapsed - before}
        return {**one, "values": values}

    def close(self) -> None:
        for judge in self.judges.values():
            judge.close()

    def outcome(self, kept: int) -> dict[str, Any]:
        """What the stage's metrics hold: score_after and, where an adapter was trained further, against_start."""
        names = ("minutes", "step", "score", "low", "high", "n")
        found: dict[str, Any] = {"score_after": [{name: one[name] for name in names} for one in self.found]}
        start, end = (next((o["values"] for o in self.found if o["step"] == step), None) for step in (0, kept))
        if start and end:
            same = min(len(start), len(end))
            for pair in statistics.settle([statistics.pair("start", "end", start[:same], end[:same])]):
                found["against_start"] = pair["sentence"]
        return found
