"""Who is judged, and one candidate at work: every question goes through the cache.

The base, what this run trained and exported, and any other model, GGUF file or endpoint by name. What was trained is
judged as it was trained, the adapter on the base as training saw it; what stage 04 merged is a candidate of its own.
A CPU without bfloat16 computes with the same weights in fp32.
"""

from __future__ import annotations

import gc
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from helpers import cache, display, machine
from helpers.cache import Answers
from helpers.data import vocabulary
from helpers.data.rendering import Chat, openai_form
from helpers.data.turns import RowError
from helpers.errors import TunebookError
from helpers.evaluate.generate import HfModel
from helpers.gguf import header, trained
from helpers.gguf.runner import GgufModel
from helpers.llm_client import Client, Endpoint, Request, shown_url
from helpers.model import loading
from helpers.runs import Manifest
from helpers.tasks.questions import Answer, Asked, Decoding

AS_LONG = "sft as long"  # SFT trained further for the time that preference training took
AS_LONG_FOLDER = "sft_as_long"  # beside adapter/, in the stage of preference training
ROLES = ("base", "sft", "orpo", "merged", "gguf")
#: What a candidate raises that cannot be loaded or run. Anything else is a bug of ours and ends the evaluation.
TROUBLE = (TunebookError, OSError, MemoryError)
WINDOW = 1024  # tokens of a text that loss is measured over at most
KEPT_AT_ONCE = 64  # texts or completions after which the results are written down
GIVE_UP = 5  # failures in a row after which a server that never answered is taken for gone
ANSWER_CHARS = 65536  # an answer longer than this is nonsense and is cut
Conversation = list[dict[str, Any]] | Asked


@dataclass(frozen=True)
class Candidate:
    """One judged model.

    kind: "hf", "gguf" or "endpoint". path: model folder or GGUF file (the base's folder for an adapter); address: an
    endpoint's, url#model. made_from: the candidate that it was exported from. onto: the base as training saw it,
    "16bit", "nf4" or "fp8". tokenizer: folder of the run's, where it is not the model's own. trouble: why it cannot be
    judged, known already while looking for it.
    """

    name: str
    role: str
    kind: str
    source: str
    path: Path | None = None
    adapter: Path | None = None
    address: str = ""
    made_from: str = ""
    onto: str = "16bit"
    tokenizer: Path | None = None
    trouble: str = ""

    @property
    def size_bytes(self) -> int | None:
        """Bytes of the files a user must hold to run it; None for an endpoint or where nothing is there."""
        if self.path is None or not self.path.exists():
            return None
        folders = [path for path in (self.path, self.adapter) if path and path.is_dir()]
        held = (f for folder in folders for f in folder.iterdir() if not f.name.startswith("consolidated"))
        files = [f for f in held if f.name.endswith(cache.MODEL_FILES)]
        return sum(f.stat().st_size for f in files or [self.path])

    @property
    def dated(self) -> bool:
        """Whether its chat template asks the clock: then the same question is another one tomorrow."""
        if self.kind == "gguf" and self.path:
            return "strftime_now" in str(header.check(self.path).metadata.get("tokenizer.chat_template", ""))
        folders = [folder for folder in (self.path, self.adapter) if folder]
        files = (folder / name for folder in folders for name in ("chat_template.jinja", "tokenizer_config.json"))
        return any("strftime_now" in file.read_text("utf-8", "replace") for file in files if file.is_file())

    def content(self) -> str:
        """Hash of all in its files that decides its answers: the cache's name for it. Endpoints have none."""
        files = [cache.content_hash(p) if p else "" for p in (self.path, self.adapter)]
        files += [cache.content_hash(self.tokenizer)] if self.tokenizer else []
        if self.kind == "gguf":
            return cache.key("gguf", files, machine.versions()["versions"].get("xllamacpp", ""))
        return cache.key("hf", files, self.onto, "as trained", str(loading.dtype()))


def find(stages: Mapping[str, Manifest], wanted: str = "base,sft,orpo,merged,gguf", extra: str = "") -> list[Candidate]:
    """The candidates named in `wanted` (in that order, those that the run has), then those in `extra`.

    extra: `name=what` separated by commas; what is a model folder, hub id, .gguf file or http(s)://host/v1#model.
    Raises TunebookError for a word that names no candidate and for a name used twice.
    """
    names = [w.strip() for w in wanted.split(",") if w.strip()]
    if unknown := [word for word in names if word not in ROLES]:
        raise TunebookError(
            f"candidates names {unknown[0]!r}; it takes {', '.join(ROLES)}, separated by commas. Others go into "
            "extra_candidates."
        )
    made: dict[str, list[Candidate]] = {}
    if {"base", "sft", "orpo"} & set(names):
        base = _base(stages)
        made["base"] = [base]
        made |= {stage: [_trained(stage, stages[stage], base)] for stage in ("sft", "orpo") if stage in stages}
        if "orpo" in stages and (adapter := stages["orpo"].path / AS_LONG_FOLDER).is_dir():
            (orpo,), source = made["orpo"], f"{adapter.parent.name}/{adapter.name}"
            longer = replace(orpo, name=AS_LONG, role="other", source=source, adapter=adapter, made_from="sft")
            made["orpo"].insert(0, longer)
    if "gguf" in stages:
        folder, last = stages["gguf"].path, stages["gguf"].metrics["trained_by"]

        parts = [("merged", "hf", p.parent) for p in sorted(folder.glob("merged/*.safetensors"))[:1]]
        files = sorted(folder.glob("model-*.gguf"), key=lambda p: -p.stat().st_size)
        for name, kind, path in parts + [(f"gguf {p.stem.removeprefix('model-')}", "gguf", p) for p in files]:
            one = Candidate(name, name.split()[0], kind, f"{folder.name}/{path.name}", path, made_from=last)
            made.setdefault(one.role, []).append(one)
    found = [c for word in dict.fromkeys(names) for c in made.get(word, [])]
    found += [_other(text.strip()) for text in extra.split(",") if text.strip()]
    name, count = Counter(c.name for c in found).most_common(1)[0] if found else ("", 0)
    if count > 1:
        raise TunebookError(f"Two candidates are called {name!r}; give the extra one another name.")
    if not found:
        raise TunebookError(
            f"There is nothing to judge: of {', '.join(names) or 'no candidate'} this run has none; "
            "name a model in extra_candidates."
        )
    return found


def _base(stages: Mapping[str, Manifest]) -> Candidate:
    used = [stages[s].data.get("model") for s in ("sft", "orpo", "data") if s in stages]
    known: dict[str, Any] = next(filter(None, used), {})
    name = known.get("name") or loading.DEFAULT_MODEL
    here = known and (Path(known["path"]) / "config.json").is_file()
    found: dict[str, Any] = {"path": Path(known["path"])} if here else _resolved(name)
    data = stages.get("data")
    if data and (data.data.get("chat_template") or data.params.get("add_tokens")):
        found["tokenizer"] = vocabulary.of_run(data.path, found.get("path"))
    return Candidate("base", "base", "hf", name, **found)


def _trained(stage: str, manifest: Manifest, base: Candidate) -> Candidate:
    """What a training stage made: an adapter, or a whole model where every weight was trained."""
    folder = manifest.path
    if (folder / "model" / "config.json").is_file():
        return Candidate(stage, stage, "hf", f"{folder.name}/model", folder / "model")
    adapter, onto = folder / "adapter", trained.saw(manifest)
    trouble = base.trouble or ("" if adapter.is_dir() else f"{adapter} is missing; run the {stage} stage again")
    return Candidate(stage, stage, "hf", f"{folder.name}/adapter", base.path, adapter, onto=onto, trouble=trouble)


def _other(text: str) -> Candidate:
    name, _, what = (part.strip() for part in text.partition("="))
    if not name or not what:
        raise TunebookError(
            f"extra_candidates has {text!r}; each is name=what, where what is a model folder, a hub id, a .gguf file "
            "or http(s)://host/v1#model."
        )
    if re.match(r"https?://", what):
        return Candidate(name, "other", "endpoint", shown_url(what), address=what)
    if what.endswith(".gguf"):
        path = machine.path(what)
        missing = "" if path.is_file() else f"the file {path} does not exist"
        return Candidate(name, "other", "gguf", what, path, trouble=missing)
    return Candidate(name, "other", "hf", what, **_resolved(what))


def _resolved(model: str) -> dict[str, Any]:
    """The folder of a model, or why there is none, for a Candidate."""
    try:
        return {"path": loading.resolve_model(model).path}
    except TunebookError as error:
        return {"trouble": str(error)}


class Session:
    """`with Session(candidate, "answers") as s: s.answers(...)`. place: where answers are kept, a folder or its name in
    the cache; end: text of the token that ends a turn, chat: how the run's template shows turns, and threads (0: of all
    cores), for GGUF files.

    What an endpoint answered belongs to the model that the server serves now and to the candidate's name.
    """

    def __init__(
        self, candidate: Candidate, place: str | Path, end: str = "", chat: Chat | None = None, threads: int = 0
    ):
        if candidate.trouble:
            raise TunebookError(candidate.trouble)
        self.candidate, self.end_of_turn, self.chat = candidate, end, chat if candidate.role == "gguf" else None
        self.threads = threads
        self._reader: Any = None
        if candidate.kind == "endpoint":
            servers = Answers(place, cache.key("endpoint", candidate.address))
            self._reader = RemoteModel(client(candidate.address, servers))
        content = [self._reader.client.served, candidate.name] if self._reader else [candidate.content()]
        self.store = Answers(place, cache.key(*content))

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._reader is not None:
            self._reader.close()
        self._reader = None
        gc.collect()
        torch = sys.modules.get("torch")
        if torch is not None and self.candidate.kind == "hf" and torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def reader(self) -> Any:
        """The loaded model; loads it on first use. Raises TunebookError when it cannot be."""
        if self._reader is None:
            self._reader = self._load(self.candidate.path, self.candidate.adapter)
        return self._reader

    def _load(self, path: Any, adapter: Path | None) -> HfModel | GgufModel:
        if self.candidate.kind == "gguf":
            return GgufModel(path, self.end_of_turn, self.chat, threads=self.threads)
        if adapter is not None:
            tokenizer = loading.load_tokenizer(adapter if (adapter / "tokenizer.json").is_file() else path)
            return HfModel(trained.load(path, adapter, tokenizer, self.candidate.onto), tokenizer)
        model, tokenizer = loading.load_model(path), loading.load_tokenizer(path)
        vocabulary.fit(model, tokenizer)  # its padding may be a new token
        if self.candidate.tokenizer:
            own, tokenizer = tokenizer, loading.load_tokenizer(self.candidate.tokenizer)
            vocabulary.add_tokens(model, own, vocabulary.new_tokens(own, tokenizer))  # as training began
        return HfModel(model, tokenizer)

    def answers(
        self, prompts: Sequence[Conversation], decoding: Decoding, label: str = ""
    ) -> tuple[list[Answer], dict[str, Any]]:
        """(answers in order, {"seconds", "items_per_s", "tokens", "from_cache"}); failed ones, and those of questions
        that cannot be asked, are not kept. The speed is that of the questions answered now, 0 when all were in the
        cache. Raises TunebookError where no question can be asked."""
        asked = [one if isinstance(one, Asked) else Asked(one) for one in prompts]
        ids: dict[int, Any] = {}
        failed: dict[int, Answer] = {}

        def encode(places: Iterable[int]) -> None:
            for i in places:
                try:
                    ids[i] = self.reader.encode(*asked[i])
                except RowError as error:
                    failed[i] = Answer("", 0, False, refused=error.detail)
                    continue
                longest, window = len(ids[i]) + decoding.max_new_tokens, getattr(self.reader, "window", 0)
                if 0 < window < longest:
                    del ids[i]
                    why = f"it takes {longest:,} tokens with its answer and the model reads {window:,}"
                    failed[i] = Answer("", 0, False, refused=why)

        dated = self.candidate.dated
        if dated:
            encode(range(len(asked)))
        shown = [ids.get(i) if dated else one if one.tools else one.messages for i, one in enumerate(asked)]
        keys = [cache.key("answer", one, decoding.key()) for one in shown]
        missing = [i for i, key in enumerate(keys) if i not in failed and self.store.get(key) is None]
        if not dated:
            encode(missing)
            missing = [i for i in missing if i not in failed]
        if asked and len(failed) == len(asked):
            raise TunebookError(f"No question can be asked: {failed[0].refused}.")
        seconds = 0.0
        if missing:
            reader, started = self.reader, time.monotonic()
            with self._bar(label or self.candidate.name, len(keys), len(missing)) as bar:

                def done(place: int, answer: Answer) -> None:
                    if answer.failed:
                        failed[missing[place]] = answer
                    else:
                        self.store.put(keys[missing[place]], [answer.text, answer.tokens, answer.stopped])
                    bar.update()

                reader.generate([ids[i] for i in missing], decoding, done)
            seconds = round(max(time.monotonic() - started, 1e-3), 3)
        answers = [failed[i] if i in failed else Answer(*self.store.get(key)) for i, key in enumerate(keys)]
        speed = {"seconds": seconds, "items_per_s": round(len(missing) / seconds, 3) if missing else 0.0}
        return answers, {**speed, "tokens": sum(a.tokens for a in answers), "from_cache": len(keys) - len(missing)}

    def logprobs(self, asked: Sequence[tuple[Any, Any]], what: str) -> list[tuple[float, int]]:
        """(summed log-probabilities in nats, tokens) of each answer: turns behind an `Asked`, of them the tokens that
        training has; (before, tokens) runs of ids behind {}; behind [] a text's first WINDOW tokens but the very first.

        0 tokens where the template refuses the answer.
        """

        def runs(before: Any, answer: Any) -> list[tuple[Any, Any]]:
            if isinstance(before, Asked):
                return self.reader.answered(*before, answer)
            tokens = self.reader.tokens(answer) if before == [] else []
            return [(tokens[:1], tokens[1:WINDOW])] if before == [] else answer

        keys = [cache.key("logprobs", before, answer, WINDOW) for before, answer in asked]
        missing = [i for i, key in enumerate(keys) if self.store.get(key) is None]
        missing.sort(key=lambda i: -len(str(asked[i][1])))  # those of one size together
        refused: dict[int, tuple[float, int]] = {}
        with self._bar(f"{self.candidate.name}, {what}", len(keys), len(missing)) as bar:
            for start in range(0, len(missing), KEPT_AT_ONCE):
                parts = []
                for i in missing[start : start + KEPT_AT_ONCE]:
                    try:
                        parts += [(i, run) for run in runs(*asked[i])]
                    except RowError:
                        refused[i] = (0.0, 0)
                sums: dict[int, list] = {i: [0.0, 0] for i, _ in parts}
                values = self.reader.logprobs([run for _, run in parts]) if parts else []
                for (i, _), found in zip(parts, values, strict=True):
                    sums[i] = [sums[i][0] + sum(found), sums[i][1] + len(found)]
                for i, total in sums.items():
                    self.store.put(keys[i], total)
                    bar.update()
        return [refused[i] if i in refused else tuple(self.store.get(key)) for i, key in enumerate(keys)]

    def _bar(self, label: str, total: int, missing: int) -> Any:
        from tqdm import tqdm

        silent = not missing or machine.unwatched()
        how: dict[str, Any] = {"mininterval": 2, "ncols": 90, "file": sys.stdout, "disable": silent}
        return tqdm(desc=display.clean(label), total=total, initial=total - missing, **how)


def client(address: str, answers: Answers | None = None, **options: Any) -> Client:
    """A client of an OpenAI-compatible server that is a candidate or a judge. address: http://127.0.0.1:8080/v1#model,
    without a model the first that the server lists. The key is never printed or stored."""
    url, _, model = address.partition("#")
    key = "TUNEBOOK_API_KEY" if os.environ.get("TUNEBOOK_API_KEY") else "OPENAI_API_KEY"
    options = {"key_name": key, "concurrency": 8, "retries": 2, "timeout_s": 60.0, **options}
    return Client(Endpoint(url, model, **options), answers)


class RemoteModel:
    """A server behind the methods of a model: a question that fails costs its own answer only."""

    def __init__(self, client: Client):
        self.client, self.close = client, client.__exit__

    def encode(self, messages: list[dict[str, Any]], tools: str | None = None) -> Asked:
        """The turns as they are: the server renders them."""
        return Asked(openai_form(messages), tools)

    def generate(
        self, prompts: Sequence[Conversation], decoding: Decoding, done: Callable[[int, Answer], None] | None = None
    ) -> list[Answer]:
        """An answer a conversation; one that failed has `failed` set. A server that keeps failing is asked no more: the
        others fail with that reason or, where nothing was ever answered, TunebookError is raised."""
        how = (None, decoding.max_new_tokens, decoding.temperature, decoding.seed, None)
        asked = (one if isinstance(one, Asked) else Asked(one) for one in prompts)
        requests = (Request(one.messages, *how, json.loads(one.tools) if one.tools else None) for one in asked)
        answers: list[Answer] = []
        for reply in self.client.ask(requests, patience=GIVE_UP):
            text = reply.text[:ANSWER_CHARS].strip()
            answers.append(Answer(text, reply.completion_tokens, reply.finished, reply.error))
            if done:
                done(len(answers) - 1, answers[-1])
        return answers
