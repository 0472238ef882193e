"""Tiny random models of every family through the product's own chain, each figure beside plain transformers'.

    python ci/model_matrix.py                        all families, one child process each; resumes after the last
    python ci/model_matrix.py --only "Qwen3" --again
    python ci/model_matrix.py --page                 docs/models.md from the last results

For each family (`model_families`): SFT and ORPO on rows of notebook 01's form, the held-out loss compared with that of
transformers' eager attention in fp32, one document at a time; two training steps; the adapter merged, and the merged
model's log-probabilities compared with those of the adapter on its base; greedy answers; and the 16-bit GGUF file
of a merged model through the gates of notebook 04. "refused": one message before any weight was loaded.

Most converters read a byte-level vocabulary, of which they know those of real models only: GGUF then takes a model of
the same family with the default model's tokenizer, and an adapter of noise on all that an adapter takes, merged.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import logging
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from ci.model_families import FAMILIES, PUBLISHED, REASONS, make

RESULTS = PROJECT / "ci/results/models.jsonl"
PAGE = PROJECT / "docs/models.md"
LIMIT_S = 900  # a family's child is killed after this
EXACT = 2e-5  # relative difference of two fp32 losses
PARTS = ("SFT", "ORPO", "merge", "generation", "GGUF")
# Their converters read no other vocabulary.
SENTENCEPIECE = ("Gemma", "Gemma 2", "Gemma 3", "Gemma 3n text", "Gemma 4 text")
SPACED = ("Ernie 4.5", "Ernie 4.5 MoE", "Jamba", "Nemotron")  # those want a space before a text, too
OWN_WORDS = (
    "not measured: transformers gives its folder Qwen2's splitting of words, for which no vocabulary here is made"
)
HEAD = ("family", "model_type", "rows", "SFT", "ORPO", "experts", "merge", "generation", "GGUF")


def run(family: str, work: Path, parts: Sequence[str]) -> dict[str, Any]:
    """What one family came to, by column: "exact", a figure, "refused: …", "late: …" or "crash: …"."""
    import transformers

    from helpers.model import packed_attention

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    os.environ["TUNEBOOK_RUNS"] = str(work / "runs")
    tokenizer, rows = small()
    folder = _made(family, work / "model", tokenizer)
    found: dict[str, Any] = {"family": family, "model_type": FAMILIES[family][0]}
    found["parameters"] = sum(p.numel() for p in _plain(folder).parameters())
    made: dict[str, Any] = {"family": family, "folder": folder, "tokenizer": tokenizer, "work": work, "rows": rows}
    torch.manual_seed(0)
    packed_attention.register()
    for name, step in zip(PARTS, (_sft, _orpo, _merge, _generation, _gguf), strict=True):
        if name in parts:
            without = name in ("merge", "generation") and "adapter" not in made
            found |= {name: ""} if without else _tried(name, lambda step=step: step(made))  # type: ignore[misc]
    inside = re.compile(r"/\S*/matrix\.\w+/|/\S*/tmp\w+/")
    return {key: inside.sub("", value) if isinstance(value, str) else value for key, value in found.items()}


def _tried(name: str, step: Callable[[], dict[str, Any] | str]) -> dict[str, Any]:
    from helpers.errors import TunebookError

    try:
        value = step()
        return value if isinstance(value, dict) else {name: value}
    except _Refused as error:
        return {name: f"refused: {error}"}
    except TunebookError as error:
        return {name: f"late: {str(error)[:400]}"}
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {str(error)[:200]} ({Path(place.filename).name}:{place.lineno})"
        return {name: f"crash: {said}"}


class _Refused(Exception):
    """One message before any weight was loaded."""


@cache
def small(spaced: bool = False) -> tuple[Any, list[list[dict]]]:
    """(a byte-fallback SentencePiece of 600 pieces, rows of notebook 01's four files). spaced: it puts a space before a
    text."""
    from tests import train_data
    from tests.gguf.gguf_models import sentencepiece_tokenizer

    texts = [train_data.SCHEMA, *(text for asked in train_data.questions(200) for text in asked)]
    tokenizer = sentencepiece_tokenizer(Path(tempfile.mkdtemp(prefix="matrix.")) / "tokenizer", texts, prefix=spaced)
    rows = [train_data.sft_rows(tokenizer, 12), train_data.sft_rows(tokenizer, 4, 1)]
    return tokenizer, [*rows, train_data.pair_rows(tokenizer, 6), train_data.pair_rows(tokenizer, 3, 1)]


@cache
def large() -> tuple[Any, list[list[int]]]:
    """(the default model's tokenizer of 49,152, two rows to compare on)."""
    from helpers.model import loading
    from tests import train_data

    tokenizer = loading.load_tokenizer(loading.resolve_model(loading.DEFAULT_MODEL))
    return tokenizer, [row["input_ids"] for row in train_data.sft_rows(tokenizer, 2, 1)]


def _made(family: str, folder: Path, tokenizer: Any, **more: Any) -> Path:
    """The family's tiny model; of Phi the class tells the converter which kind of vocabulary it has."""
    make(family, folder, tokenizer, **more)
    if family.startswith("Phi"):
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}))
    return folder


def _plain(folder: Path, adapter: Path | None = None) -> Any:
    """transformers' own model, eager, fp32."""
    from transformers import AutoModelForCausalLM

    from helpers.model import loading

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return loading.load_adapter(model, adapter).eval() if adapter else model


def _logps(model: Any, prompt: list[int], answer: list[int], start: int | None = None) -> Any:
    ids = prompt + answer
    start = len(prompt) if start is None else start
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
    return logits[start - 1 : -1].gather(1, torch.tensor(ids[start:])[:, None])[:, 0].double()


def _job(made: dict[str, Any], stage: str, **given: Any) -> Any:
    from helpers.errors import TunebookError
    from helpers.train import training
    from tests import train_data

    try:
        if "data" not in made:
            made["data"] = train_data.data_stage("r", made["folder"], made["tokenizer"], *made["rows"])
        how = {"batch_size": 4, "max_steps": 2, "learning_rate": 1e-2, "eval_rows": 6, "init": "default"} | given
        return training.open(train_data.settings(stage, **how))
    except TunebookError as error:
        raise _Refused(str(error)[:400]) from error


def _compared(ours: float, plain: float) -> str:
    apart = abs(ours / plain - 1)
    return "exact" if apart <= EXACT else f"off by {apart:.1e}"


def _sft(made: dict[str, Any]) -> dict[str, Any]:
    from helpers.train import methods

    job = _job(made, "sft")
    job.build()
    plan = job.planned
    rows = "shared prefix" if plan.shares else "packed" if plan.packed else "padded"
    ours, plain = job.trainer.evaluate()["eval_loss"], _plain(made["folder"])
    apart = []
    for row in job.held_out:
        start = next(i for i, label in enumerate(row["labels"]) if label != -100)
        apart.append(_logps(plain, row["input_ids"][:start], row["input_ids"][start:]))
    found = {"rows": rows, "SFT": _compared(ours, -torch.cat(apart).mean().item())}
    names = {n for n, p in job.model.named_parameters() if p.requires_grad}
    found["experts"] = "trained" if any("expert" in n for n in names) else ""
    if any(part in n for n in names for part in (".gate.", ".router.")):
        found["experts"] += ", router too"
    job._train()
    losses = [line["loss"] for line in job.lines() if "loss" in line]
    if not losses or not all(0 < loss < 50 for loss in losses):
        found["SFT"] = f"losses {losses}"
    made["held_out"] = [list(row["input_ids"]) for row in job.held_out]
    made["adapter"] = job.stage.path / "adapter"
    methods.save(job.model, made["tokenizer"], made["adapter"])
    return found


def _orpo(made: dict[str, Any]) -> str:
    job = _job(made, "orpo", start_from="base")
    job.build()
    ours, plain, beta = job.trainer.evaluate()["eval_loss"], _plain(made["folder"]), job.params.beta
    nll, tokens, terms = 0.0, 0, []
    for pair in job.held_out:
        whole = _logps(plain, pair["prompt_ids"], pair["chosen_ids"], 1)
        nll, tokens = nll - whole.sum().item(), tokens + len(whole)
        good, bad = (_logps(plain, pair["prompt_ids"], pair[f"{s}_ids"]).mean() for s in ("chosen", "rejected"))
        odds = (good - bad) - (torch.log1p(-torch.exp(good)) - torch.log1p(-torch.exp(bad)))
        terms.append(F.logsigmoid(odds).item())
    found = _compared(ours, nll / tokens - beta * sum(terms) / len(terms))
    job._train()
    return found


def _merge(made: dict[str, Any]) -> str:
    from helpers.gguf.trained import divergence, logprobs
    from helpers.model import loading, merging

    made["merged"] = merging.merge(made["folder"], made["adapter"], made["work"] / "merged").path
    base, merged = _plain(made["folder"]), _plain(made["merged"])
    after = [logprobs(merged, row) for row in made["held_out"]]
    moved = torch.cat([divergence(logprobs(base, row), a) for row, a in zip(made["held_out"], after, strict=True)])
    trained = loading.load_adapter(base, made["adapter"]).eval()
    kl = torch.cat([divergence(logprobs(trained, row), a) for row, a in zip(made["held_out"], after, strict=True)])
    if not moved.median() > 10 * kl.median().clamp(min=1e-6):  # rounding sends some tokens to another expert
        return f"KL {kl.mean():.1e} where training moved it by {moved.mean():.1e}"
    return f"KL {max(kl.mean().item(), 0):.0e}"


def _generation(made: dict[str, Any]) -> str:
    """Greedy answers of `HfModel` and of transformers' whole forward passes, one prompt at a time without a cache."""
    from helpers.evaluate.generate import HfModel
    from helpers.model import loading
    from helpers.tasks.questions import Decoding

    model = HfModel(loading.load_model(made["merged"], dtype="fp32"), made["tokenizer"])
    prompts = [row[: 20 + 7 * i] for i, row in enumerate(made["held_out"][:4])]
    ours = [answer.text for answer in model.generate(prompts, Decoding(12))]
    plain, theirs = _plain(made["merged"]), []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + 12 and not model.stops & {*ids[len(prompt) :]}:
            with torch.no_grad():
                ids.append(int(plain(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        theirs.append(made["tokenizer"].decode(ids[len(prompt) :], skip_special_tokens=True).strip())
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    how = "shared prefix" if model.fast else "transformers"
    return f"equal ({how})" if same == len(prompts) else f"{same} of {len(prompts)} answers equal ({how})"


def _gguf(made: dict[str, Any]) -> str:
    """What preflight says against the base; else the gates of a merged model's 16-bit file."""
    from contextlib import closing

    from helpers.gguf import convert, fidelity, preflight

    if made["family"] in ("Qwen2", "Qwen2.5"):
        return OWN_WORDS
    base, merged, rows = _merged_noise(made)
    if found := preflight.check(base).problems:
        raise _Refused(" ".join(found)[:400])
    file = convert.convert(merged, made["work"] / "model.gguf", "f16", name="matrix")
    window = convert.lost_window(merged, file)
    rows = [row[-(window or 48) :] for row in rows]
    with closing(fidelity.Reference(merged, rows, rows[:1], 4, made["work"])) as reference:
        result = fidelity.measure(reference, file, "f16")
    failed = "; ".join(f"{gate}: {why}" for gate, why in result.failed.items())
    within = f" within the window ({FAMILIES[made['family']][0]} has none in llama.cpp)" if window else ""
    return f"failed {failed[:300]}" if failed else f"gates passed, KL {max(result.mean_kl, 0):.0e}{within}"


def _merged_noise(made: dict[str, Any]) -> tuple[Path, Path, list[list[int]]]:
    """(a base with the large vocabulary, it with an adapter of noise merged in, rows)."""
    from helpers.model import loading, merging
    from helpers.train import methods
    from tests import train_data

    (tokenizer, rows), work = large(), made["work"]
    if made["family"] in (*SENTENCEPIECE, *SPACED):
        tokenizer = small(made["family"] in SPACED)[0]
        rows = [row["input_ids"] for row in train_data.sft_rows(tokenizer, 2, 1)]
    if made["family"].startswith("GLM"):  # its converter looks these up
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_tokens(["[gMASK]", "<|user|>", "<|observation|>"], special_tokens=True)
    base = _made(made["family"], work / "large", tokenizer, **PUBLISHED.get(made["family"], {}))
    source = loading.ModelSource(made["family"], base, "", "folder")
    settings = train_data.settings("sft")
    adapted = methods._new_adapter(loading.load_model(base, dtype="fp32"), settings, source, [])
    with torch.no_grad():
        for weight in (p for p in adapted.parameters() if p.requires_grad):
            weight.add_(0.05 * torch.randn_like(weight))
    adapted.save_pretrained(work / "noise")
    return base, merging.merge(base, work / "noise", work / "large-merged").path, rows


# ---------------------------------------------------------------- all of them


def measure(family: str, parts: Sequence[str]) -> dict[str, Any]:
    """A family's result from a process of its own, which may crash or hang alone; forked, so that the libraries are
    imported once."""
    context, started = multiprocessing.get_context("fork"), time.monotonic()
    given, taken = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(family, tuple(parts), taken))
    process.start()
    taken.close()
    try:
        found = given.recv() if given.poll(LIMIT_S) else {"SFT": f"crash: nothing after {LIMIT_S} s"}
    except EOFError:
        process.join()
        found = {"SFT": f"crash: its process ended with status {process.exitcode}"}
    process.kill()
    process.join()
    made = dict.fromkeys(parts, datetime.date.today().isoformat())
    return {"family": family, **found, "s": round(time.monotonic() - started), "made": made}


def _child(family: str, parts: Sequence[str], taken: Any) -> None:
    with tempfile.TemporaryDirectory(prefix="matrix.") as work:
        taken.send(run(family, Path(work), parts))


def read() -> dict[str, dict[str, Any]]:
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.is_file() else []
    return {line["family"]: line for line in map(json.loads, lines)}


def write(found: dict[str, dict[str, Any]]) -> None:
    ordered = [found[family] for family in FAMILIES if family in found]
    partial = RESULTS.with_suffix(".partial")
    partial.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in ordered), encoding="utf-8")
    partial.replace(RESULTS)


def page(found: dict[str, dict[str, Any]]) -> str:
    """docs/models.md: the families, and the reason of every cell that is not as it ought to be."""
    from importlib.metadata import version

    intro = (PROJECT / "ci/model_matrix.md").read_text(encoding="utf-8")
    packages = ", ".join(f"{name} {version(name)}" for name in ("transformers", "peft", "trl", "gguf", "xllamacpp"))
    rows = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for line in found.values():
        cells = [str(line.get(column, "")).replace("|", "/").replace("\n", " ") for column in HEAD]
        rows.append("| " + " | ".join(cells) + " |")
    days = sorted(day for line in found.values() for day in line["made"].values())
    reasons = [f"- **{family}**: {REASONS[family]}" for family in found if family in REASONS]
    told = "\n".join(["Cells that are not as they ought to be:\n", *reasons, "\n"]) if reasons else ""
    filled = {"packages": packages, "table": "\n".join(rows), "reasons": told, "first": days[0], "last": days[-1]}
    return re.sub(r"\{(\w+)\}", lambda place: filled[place[1]], intro)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="families by name")
    parser.add_argument("--again", action="store_true", help="also what has a result")
    parser.add_argument("--page", action="store_true", help="write the page alone")
    parser.add_argument("--check", action="store_true", help="exit 1 where a result is worse than the committed one")
    parser.add_argument("--parts", nargs="*", default=PARTS, help="columns; others keep what they had")
    asked = parser.parse_args()
    if unknown := set(asked.only) - FAMILIES.keys():
        parser.error(f"{', '.join(unknown)}: the families are {', '.join(FAMILIES)}")
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not asked.page:
        from helpers.evaluate import generate  # noqa: F401  what every child would import
        from helpers.train import trainers  # noqa: F401

        small(), large()

    found = read()
    before = dict(found)
    for family in () if asked.page else asked.only or FAMILIES:
        missing = [part for part in asked.parts if asked.again or part not in found.get(family, {})]
        if missing:
            # the other parts build on each other
            result = measure(family, missing if missing == ["GGUF"] else asked.parts)
            found = read()  # another run may have written meanwhile
            before_it = found.get(family, {})
            found[family] = before_it | result | {"made": before_it.get("made", {}) | result["made"]}
            write(found)
            print(json.dumps(found[family], ensure_ascii=False), flush=True)
    PAGE.write_text(page(found), encoding="utf-8")
    worse = [f for f in found if _good(before.get(f, {})) > _good(found[f])]
    if asked.check and worse:
        sys.exit(f"Worse than the committed result: {', '.join(worse)}")


def bad(line: dict[str, Any]) -> list[str]:
    """The columns of a result that are not what they ought to be; a refusal before training is what it ought to be."""
    words = ("crash", "late", "off by", "failed", "losses", "where training moved", "not measured", "answers equal")
    cells = ((part, str(line.get(part, ""))) for part in PARTS)
    return [p for p, c in cells if not c or (any(word in c for word in words) and not c.startswith("refused"))]


def _good(line: dict[str, Any]) -> int:
    return sum(not str(line.get(part, "")).startswith("refused") for part in PARTS) - len(bad(line))


if __name__ == "__main__":
    main()
