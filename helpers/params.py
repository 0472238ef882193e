"""Every notebook parameter, once: five classes are the table of names, types, defaults, bounds, units and helps.

The `@param` comments, the sliders, the names that papermill takes, the checks and the types that mypy reads come from
them. `cell(stage)` renders a notebook's parameters cell, `resolve` checks values, `Params.freeze` ends their change.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, overload

from helpers import display
from helpers.errors import TunebookError
from helpers.parameter import Param, check_run, more, param, read_file, recipe_folder

SEED, STEPS, MANY = 2**31 - 1, 10**6, 10**7
FORMATS = "auto alpaca sharegpt messages prompt_completion text preference kto context_qa"
OPTIMIZERS = "adamw adamw_8bit paged_adamw paged_adamw_32bit paged_adamw_8bit lion adafactor sgd"
TRAIN_ON = "last all everything last_no_thoughts all_no_thoughts"
PRECISIONS = "auto bf16 fp16 fp32"
RECOMPUTE = "auto none half all offload"
APART = ("again", "resume", "publish_to", "publish_dry_run")  # decide no result
SYNTHETIC = "none questions questions_summaries preferences"
UNITS = "rows packed tokens"
SIZES = tuple(2**n for n in range(2, 10))
LENGTHS = tuple(2**n for n in range(8, 18))
RATES = (0.0, *(float(f"{digit}e{n}") for n in range(-7, -1) for digit in (1, 1.5, 2, 3, 5, 7)))
HALVES = tuple(n / 2 for n in range(1, 21))
METRICS = "exact number choice f1 rouge_l chrf regex"


@dataclass(repr=False)
class Params(display.Shown):
    """A stage's parameters: typed attributes, checked when one is set, until the work begins and they are frozen."""

    stage: ClassVar[str] = ""
    _frozen: ClassVar[bool] = False

    run: str = param("default", "Name of the run: its folder under runs/")
    again: bool = more(False, "Run the stage anew although it is finished with these parameters")

    def __setattr__(self, name: str, value: Any) -> None:
        value = find(self.stage, name).check(value)
        if name == "run":
            check_run(value)
        if self._frozen and value != getattr(self, name):
            raise TunebookError(
                f"Parameter {name} cannot be changed to {value!r} any more: stage {self.stage!r} works with "
                f"{name} = {getattr(self, name)!r}. Set it first, then run the notebook from its first cell."
            )
        object.__setattr__(self, name, value)

    def freeze(self) -> None:
        """Refuse every later change: the work has begun with these values."""
        object.__setattr__(self, "_frozen", True)
        self.__dict__.pop("_when_frozen", bool)()

    def when_frozen(self, call: Callable[[], Any]) -> None:
        """Have `call` made once, when the work begins: the panel locks its controls then."""
        self.__dict__["_when_frozen"] = call

    def as_dict(self) -> dict[str, Any]:
        """Name and value of what decides the stage's results: how a killed run is resumed does not."""
        return {p.name: getattr(self, p.name) for p in STAGES[self.stage] if p.name not in APART}

    @property
    def resumes(self) -> bool:
        """Whether a killed run is resumed."""
        return getattr(self, "resume", "auto") != "never"

    def changed(self) -> dict[str, Any]:
        """Only what differs from the defaults."""
        return {p.name: getattr(self, p.name) for p in STAGES[self.stage] if getattr(self, p.name) != p.default}

    def _shown(self) -> display.Html:
        changed, table = self.changed(), STAGES[self.stage]
        rows = [(p.name, getattr(self, p.name), p.unit, f"default {p.default!r}", p.help) for p in table]
        head, own = ("parameter", "value", "unit", "changed", "meaning"), [row for row in rows if row[0] in changed]
        shown = display.shown(own, head) if own else display.said("Every parameter is at its default.")
        return shown + display.fold(f"All {len(rows)} parameters", display.table(rows, head))


@dataclass(repr=False)
class DataParams(Params):
    stage = "data"

    model: str = param("HuggingFaceTB/SmolLM2-135M-Instruct", "Base model (hub id or folder); its template is used")
    chat_template: str = param("", "Empty: the model's own; or chatml, llama3 …, a .jinja file, or a template's text")
    dataset: str = param(
        "datasets/atlas_train.jsonl",
        "Files, folders, globs, dataset_info names, hub ids (owner/name@revision:subset:split); separated by commas",
    )
    format: str = param("auto", "Shape of the rows; auto finds it row by row", choices=FORMATS)
    test_dataset: str = param("datasets/atlas_test.jsonl", "Held-out questions; empty: a part of dataset")
    preference_dataset: str = param("datasets/atlas_preference.jsonl", "Preference pairs; empty: none")
    database: str = param("datasets/atlas.sqlite", "SQLite database that answers are executed on; empty: none")
    train_on: str = param(
        "last", "Trained tokens: last or all answers, whole or without thoughts; or all", choices=TRAIN_ON
    )
    max_length: int = param(512, "Longest row; 0: what the lengths propose", "tokens", high=131072, grid=(0, *LENGTHS))
    over_long: str = param("drop", "Rows over max_length", choices="drop split truncate")
    eval_share: float = param(0.05, "Training rows held out for the loss while training", high=0.5, step=0.01)
    near_duplicates: float = param(0.8, "Jaccard similarity of near-duplicates; 0: keep them", high=1, step=0.05)
    seed: int = param(17, "Seed of every random choice", high=SEED)

    shuffle: bool = more(False, "Shuffle the rows of dataset before the first max_rows are taken")
    max_rows: int = more(0, "Rows taken of dataset; 0: all", "rows", high=10**9)
    template_tokens: str = more("auto", "Turn tokens that the vocabulary lacks: added, or text", choices="auto add eos")
    system: str = more("", "System prompt of rows that have none")
    template_arguments: str = more("", "The template's own switches: enable_thinking=false, date_string=…; or JSON")
    control_tokens: str = more("reject", "Control tokens in a text: its row goes, or text", choices="reject text")
    dataset_info: str = more("", "A dataset_info.json with named sets; empty: datasets/dataset_info.json")
    columns: str = more("", "Own mapping, part=column: prompt=question,response=sql,system=schema")
    unanswerable: str = more("The text does not say.", "Answer where the text has none (context_qa)")
    reject_limit: float = more(0.05, "Share of unusable rows from which the job stops", high=1)
    loss_limit: float = more(0.3, "Share of a set's rows that may be in no split; above, the job stops", high=1)
    test_share: float = more(0.1, "Rows held out for evaluation when no test_dataset is named", high=0.5)
    preference_eval_share: float = more(0.1, "Preference pairs held out", high=0.5)
    group_by: str = more("", "Column whose equal values never straddle two splits")
    chunk_tokens: int = more(384, "Documents are cut into pieces of N tokens", "tokens", low=16, high=131072)
    chunk_overlap: int = more(32, "Tokens that neighbouring pieces share", "tokens", high=8192)
    min_document_chars: int = more(100, "Shorter documents are dropped and counted", "characters", high=10**6)
    repair_unicode: bool = more(True, "Mend mojibake and control characters")
    exact_duplicates: bool = more(True, "Drop rows with the same content")
    languages: str = more("", "Keep these languages only, as codes: en,zh; empty: all")
    min_chars: int = more(1, "Shortest answer", "characters", high=10**6)
    max_chars: int = more(0, "Longest example; 0: any", "characters", high=10**9)
    min_tokens: int = more(0, "Shortest answer; 0: any", "tokens", high=10**6)
    drop_repetitive: bool = more(False, "Drop answers that repeat themselves")
    drop_gibberish: bool = more(False, "Drop rows with text that is of no language")
    personal_data: str = more("off", "E-mail, phone, card, IBAN, IP address", choices="off count mask drop")
    toxicity: str = more("none", "Scorer: transformers:model, or a registered name")
    toxicity_threshold: float = more(0.5, "Score from which a row is dropped", high=1)
    weights: str = more("", "Mixture: share of each source, name=2,other=1; empty: every row")
    caps: str = more("", "Maximum rows of a source, name=1000,other=50")
    replay_dataset: str = more("", "General data mixed in against forgetting")
    replay_share: float = more(0.0, "Its share of the whole", high=0.9)
    synthetic: str = more("none", "Rows that endpoint makes of the documents", choices=SYNTHETIC)
    endpoint: str = more("", "OpenAI-compatible server, http://127.0.0.1:8080/v1")
    endpoint_model: str = more("", "Name of the model there")
    endpoint_key_name: str = more("OPENAI_API_KEY", "Environment variable that holds the server's key")
    pairs_per_document: int = more(3, "Questions asked about each piece of a document", low=1, high=50)
    max_cost: float = more(0.0, "Refuse synthetic jobs that could cost more; 0: no limit", high=10**6)
    price_in: float = more(0.0, "Price of a million tokens sent to the endpoint", high=10**4)
    price_out: float = more(0.0, "Price of a million tokens that it writes", high=10**4)
    sql_negatives: bool = more(False, "Make preference pairs by running mistaken queries on the database")
    compare_tokenizer: str = more("", "A second model whose tokenizer is measured beside this one's")
    add_tokens: str = more("", "New tokens, separated by commas")
    decontaminate: float = more(0.5, "A row with this share of a test question's 8-grams is dropped; 0: none", high=1)


@dataclass(repr=False)
class TrainingParams(Params):
    """What both training stages take."""

    model: str = more("", "Base model; empty: the model that the data was prepared for")
    method: str = param(
        "auto", "LoRA on 16 bits, or 4 (qlora); auto: 16 where they fit", choices="auto qlora lora full freeze"
    )
    rank: int = param(16, "Rank r of the LoRA adapter", low=1, high=512, grid=SIZES)
    alpha: int = param(32, "LoRA's scaling numerator alpha", low=1, high=512, grid=SIZES)
    learning_rate: float = param(0.0, "Peak learning rate; 0: by method, rank and size", low=1e-8, high=0.1, grid=RATES)
    epochs: float = param(1.0, "Passes over the training rows", low=0.01, high=100, grid=HALVES)
    batch_size: int = param(8, "What an optimizer step sees on all GPUs together, in batch_unit", low=1, high=MANY)
    schedule: str = param("cosine", "Learning rate after warm-up", choices="linear cosine constant wsd")
    max_steps: int = param(0, "Stop after N optimizer steps; 0: as the epochs say", "steps", high=MANY)
    start_from: str = param("", "Adapter folder to train further; empty: a new adapter")
    seed: int = param(17, "Seed of every random choice", high=SEED)

    batch_unit: str = more("rows", "batch_size counts examples, packed max_lengths or tokens", choices=UNITS)
    micro_batch: int = more(0, "Of batch_size, what a GPU sees at once; 0: the planner chooses", high=MANY)
    accumulation: int = more(0, "Micro-batches per optimizer step; 0: the planner chooses", high=MANY)
    group_by_length: bool = more(False, "Without packing: examples of similar length share a step")
    warmup_ratio: float = more(0.05, "Share of the steps in which the learning rate rises", high=1, step=0.01)
    warmup_steps: int = more(0, "Steps in which the learning rate rises; 0: by warmup_ratio", "steps", high=STEPS)
    max_minutes: float = more(0.0, "Train at most this long; 0: as the epochs say", "minutes", high=10**5)
    eval_steps: int = more(0, "Held-out loss every N steps; 0: five times a run", "steps", high=STEPS)
    eval_rows: int = more(64, "Held-out rows used for it; 0: all", "rows", high=MANY)
    save_steps: int = more(0, "Checkpoint every N steps; 0: five times a run, at least every 50", "steps", high=STEPS)
    keep_checkpoints: int = more(2, "Newest checkpoints kept, besides the best", low=2, high=1000)
    early_stopping: int = more(0, "Stop after N evaluations without a better score or loss; 0: never", high=1000)
    best_checkpoint: bool = more(True, "Keep the adapter with the best held-out score, or loss, instead of the last")
    score_rows: int = more(32, "Held-out questions answered for the task's score; 0: none, by the loss", high=10**4)
    sample_every: int = more(0, "Answer a few held-out prompts every N steps; 0: at the end", "steps", high=STEPS)
    resume: str = more("auto", "A killed run: resume it, or start anew", choices="auto never")
    mirror: str = more("", "Folder on a mounted drive that checkpoints are copied to and resumed from")
    loggers: str = more("", "Besides TensorBoard: trackio, wandb, mlflow, swanlab, separated by commas")
    backend: str = more("auto", "Training code; auto: by GPU, model and length", choices="auto hf unsloth")
    precision: str = more("auto", "auto: bf16 where the GPU has it, else fp16 with fp32 adapters", choices=PRECISIONS)
    packing: bool = more(True, "Put several rows into one, without attention across them")
    row_tokens: int = more(0, "Longest packed row; 0: the planner chooses what fits", "tokens", high=MANY)
    recompute: str = more("auto", "Layers with activation checkpointing; offload: CPU offload too", choices=RECOMPUTE)
    cuda_graphs: str = more("auto", "Rows as CUDA graphs; auto: where launches take long", choices="auto on off")
    cpu_offload: bool = more(False, "Of a sharded job (several GPUs) weights and optimizer state stay in host memory")
    shard_weights: bool = more(False, "qlora: share the 4-bit base out over the GPUs even where each has room for it")
    plan_for: str = more("", "Plan for a named GPU (T4, L4, A100-40, A100-80, H100, H200) instead of the one here")
    export_check: bool = more(True, "Refuse, before training, a model that could not be exported to GGUF afterwards")
    quantize: str = more("auto", "fp8: LoRA on a base of 8-bit floats (GPU of 8.9 or more)", choices="auto none fp8")
    double_quant: bool = more(True, "qlora: quantise the scales of the 4-bit weights too (0.4 bits a weight less)")
    optimizer: str = more("adamw", "Optimizer; 8-bit and paged ones have a small state", choices=OPTIMIZERS)
    weight_decay: float = more(0.0, "Weight decay", high=1)
    max_grad_norm: float = more(1.0, "Gradients are clipped to this norm", high=1000)
    target_modules: str = more("all-linear", "Layers that get an adapter: all-linear, or names separated by commas")
    dropout: float = more(0.0, "Dropout on the adapter's input", high=0.9)
    modules_to_save: str = more("", "Trained whole beside the adapter: embed_tokens, lm_head; by commas")
    router_aux_loss: float = more(0.0, "Weight of the load-balancing loss of a mixture of experts; 0: none", high=10)
    rslora: bool = more(False, "Rank-stabilised scaling, alpha over the root of the rank")
    dora: bool = more(False, "DoRA: magnitude and direction apart")
    init: str = more("default", "Adapter initialisation: noise, PiSSA, LoftQ", choices="default pissa loftq")
    lora_plus_ratio: float = more(0.0, "LoRA+: learning rate of B over that of A (paper: 16); 0: the same", high=1000)


@dataclass(repr=False)
class SftParams(TrainingParams):
    stage = "sft"

    freeze_layers: int = more(2, "method freeze: how many of the last layers are trained", "layers", low=1, high=1000)
    train_on: str = more("completion", "Trained tokens: answers, or all (to pretrain on)", choices="completion all")
    neftune_alpha: float = more(0.0, "NEFTune's noise on the embeddings; 0: none", high=50)


@dataclass(repr=False)
class OrpoParams(TrainingParams):
    stage = "orpo"

    loss: str = param("orpo", "Preference objective", choices="orpo dpo kto simpo")
    start_from: str = param("sft", "sft: the adapter of notebook 02; base: a new adapter; or an adapter folder")
    beta: float = param(0.5, "Weight of the preference term; at 7B 0.05 to 0.1", high=10, step=0.05)
    epochs: float = param(1.0, "Passes over the pairs", low=0.01, high=100, grid=HALVES)
    max_length: int = param(512, "Longer pairs are left out and counted", "tokens", low=16, high=131072, grid=LENGTHS)

    method: str = more("auto", "LoRA on a 4-bit or 16-bit base; auto: as the adapter began", choices="auto qlora lora")
    rank: int = more(16, "From base: rank r of the LoRA adapter", low=1, high=512, grid=SIZES)
    alpha: int = more(32, "From base: LoRA's scaling numerator alpha", low=1, high=512, grid=SIZES)
    warmup_ratio: float = more(0.1, "Share of the steps in which the learning rate rises", high=1, step=0.01)
    max_prompt_length: int = more(0, "Longer prompts lose their beginning, counted; 0: none", "tokens", high=131072)
    desirable_weight: float = more(1.0, "KTO: weight of good answers; 4/3 n_bad/n_good at most", high=1000)
    undesirable_weight: float = more(1.0, "KTO: weight of bad answers", high=1000)
    simpo_gamma: float = more(0.5, "SimPO's target margin", high=10)
    sft_as_long: bool = more(False, "Also train SFT further for as long as this took; notebook 05 compares both")


@dataclass(repr=False)
class GgufParams(Params):
    stage = "gguf"

    export: str = param("auto", "Which model: the latest trained, or by stage", choices="auto orpo sft base")
    quantizations: str = param(
        "q8_0,q4_k_m",
        "GGUF types, by commas: f16, bf16, q8_0, q6_k, q5_k_m, q5_k_s, q4_k_m, q4_k_s, q4_0, q3_k_m, q3_k_s, q2_k",
    )
    merge_onto: str = param(
        "auto", "Merge into 16-bit weights, or these after NF4 or FP8", choices="auto 16bit nf4 fp8"
    )
    imatrix: bool = param(False, "Weigh errors by an importance matrix from the training data (better below 5 bits)")
    fidelity_tokens: int = param(1000, "Held-out text that each file is compared on", "tokens", low=16, high=10**6)
    task_questions: int = param(24, "Test questions that each file answers; 0: none", high=10**6)
    context_length: int = param(0, "Context in the Modelfile; 0: the model's own, up to 8192", "tokens", high=1 << 20)
    outputs: str = param("merged,gguf", "What is kept, of: adapter, merged, gguf, adapter_gguf; separated by commas")

    model_16bit: str = more("", "16-bit model that a 4-bit base was made from, to merge onto; empty: the base unpacked")
    publish_to: str = more("", "Repository on the hub, user/name, that the last cell shows or fills; empty: none")
    publish_dry_run: bool = more(True, "List what would be uploaded to publish_to, and upload nothing")
    model_name: str = more("tunebook", "What the model is called in Ollama, vLLM and LM Studio")
    llama_cpp: str = more("", "Folder of your llama.cpp build that quantises; empty: TUNEBOOK_LLAMA_CPP or prebuilt")
    fidelity_gates: bool = more(True, "Stop when a file is not the model that was trained")
    fidelity_answers: int = more(4, "Greedy answers compared one by one", high=1000)
    imatrix_tokens: int = more(8192, "Training text for the importance matrix", "tokens", low=256, high=MANY)
    seed: int = more(17, "Seed of every random choice", high=SEED)


@dataclass(repr=False)
class EvalParams(Params):
    stage = "eval"

    candidates: str = param("base,sft,orpo,merged,gguf", "This run's models, of the default ones; by commas")
    extra_candidates: str = param("", "Others: name=folder, hub id, .gguf file or http(s)://host/v1#model; by commas")
    limit: int = param(0, "Questions per candidate, a seeded choice; 0: all", "questions", high=10**6)
    max_new_tokens: int = param(96, "Longest answer", "tokens", low=1, high=8192, grid=tuple(range(16, 8193, 16)))
    temperature: float = param(0.0, "0: greedy, the same answer every time", high=2, step=0.1)
    seeds: str = param("17", "Seeds of the draws, separated by commas; more than one needs a temperature above 0")
    general_text: str = param("datasets/general_text.jsonl", "Texts that must stay predictable; empty: none")
    general_tasks: str = param("datasets/general_tasks.jsonl", "Multiple-choice questions to remember; empty: none")
    general_chat: str = param("datasets/general_chat.jsonl", "Small talk and prompts to refuse; empty: none")
    harness_tasks: str = param("", "More lm-eval tasks, separated by commas")
    judge: str = param("", "Endpoint of a judge, http(s)://host/v1#model; empty: none")
    seed: int = param(17, "Seed of the resampling and of `limit`", high=SEED)

    margin: float = more(0.02, "A smaller file ships if it is shown to lose at most this share to the best", high=1)
    loss_increase: float = more(0.15, "Loss on general text may rise by this, else 'forgot'", "nats per token", high=10)
    task_drop: float = more(0.15, "General questions, refusals and manners may lose this share", high=1)
    forgetting_gguf: bool = more(False, "Measure forgetting and preferences on every export too")
    reference_metric: str = more("f1", "What counts as right in free text", choices=METRICS)
    contamination_share: float = more(0.5, "Share of 8-grams found in training: scored apart", low=0.01, high=1)
    harness_include: str = more("", "Folder with YAML tasks of your own")
    harness_limit: int = more(0, "Items per harness task; 0: all", "items", high=10**6)
    judge_limit: int = more(50, "Pairs of answers that the judge compares", "pairs", low=1, high=10**5)
    judge_budget: int = more(200_000, "No judging that would take more tokens than this", "tokens", high=10**9)


CLASSES: dict[str, type[Params]] = {c.stage: c for c in (DataParams, SftParams, OrpoParams, GgufParams, EvalParams)}


def _table(stage: type[Params]) -> tuple[Param, ...]:
    """A stage's parameters in the order of its form: the run, the stage's own, then what it shares with others."""
    described = {f.name: f.metadata["param"] for f in fields(stage)}
    order = dict.fromkeys(["run", *(name for c in stage.__mro__ for name in vars(c).get("__annotations__", ()))])
    return tuple(replace(described[name], name=name) for name in order if name in described)


STAGES: dict[str, tuple[Param, ...]] = {stage: _table(made) for stage, made in CLASSES.items()}


def find(stage: str, name: str) -> Param:
    """The parameter of that name. Raises TunebookError with the nearest names when there is none."""
    names = {p.name: p for p in STAGES[stage]}
    if name in names:
        return names[name]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"its parameters are {', '.join(names)}."
    raise TunebookError(f"The {stage} stage has no parameter {name!r}; {hint}")


@overload
def resolve(stage: Literal["data"], given: Mapping[str, Any] | None = None) -> DataParams: ...
@overload
def resolve(stage: Literal["sft"], given: Mapping[str, Any] | None = None) -> SftParams: ...
@overload
def resolve(stage: Literal["orpo"], given: Mapping[str, Any] | None = None) -> OrpoParams: ...
@overload
def resolve(stage: Literal["gguf"], given: Mapping[str, Any] | None = None) -> GgufParams: ...
@overload
def resolve(stage: Literal["eval"], given: Mapping[str, Any] | None = None) -> EvalParams: ...
@overload
def resolve(stage: str, given: Mapping[str, Any] | None = None) -> Any: ...
def resolve(stage: str, given: Mapping[str, Any] | None = None) -> Any:
    """The stage's class with `given` in place of some defaults, every name and value checked."""
    if stage not in STAGES:
        raise TunebookError(f"There is no stage {stage!r}; the stages are {', '.join(STAGES)}.")
    for name in given or {}:
        find(stage, name)
    return CLASSES[stage](**(given or {}))


def recipe(name: str | Path) -> dict[str, Params]:
    """The parameters of each stage that a recipe's flat files give. Raises TunebookError for any other YAML in it."""
    folder = recipe_folder(name)
    files = {file.name: file for file in sorted(folder.glob("*.y*ml"))}
    expected = {f"{stage}.yaml": stage for stage in STAGES}
    if not files or not set(files) <= set(expected):
        wrong = ", ".join(file for file in files if file not in expected) or "none"
        raise TunebookError(f"The recipe {folder} has {wrong}; a recipe's files are {', '.join(expected)}.")
    made: dict[str, Params] = {}
    for file, stage in expected.items():
        if file in files:
            values = read_file(files[file])
            try:
                made[stage] = resolve(stage, values)
            except TunebookError as error:
                raise TunebookError(f"{files[file]}: {error}") from None
    return made


def cell(stage: str) -> str:
    """Source of the notebook's parameters cell."""
    return "\n".join(["# @title Parameters", *(p.line() for p in STAGES[stage] if not p.advanced)])
