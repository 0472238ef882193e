"""Every notebook parameter, once: its name, default, bounds, unit and help.

The `@param` comments, the sliders, the names that papermill takes and the checks all come from `STAGES` below.
`cell(stage)` renders a notebook's parameters cell from it, `resolve` checks values against it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from helpers.errors import TunebookError

Value = str | int | float | bool


@dataclass(frozen=True)
class Param:
    """One parameter. Its type is that of `default`; "" stands for "none" or "choose for me" as the help says.

    low, high: inclusive bounds of a number; step: the slider's step; log: a slider on a logarithmic scale.
    choices: the only values allowed. advanced: not in the notebook's form, yet taken by papermill and shown folded in the panel.
    """

    name: str
    default: Value
    help: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    step: float | None = None
    log: bool = False
    choices: tuple[Value, ...] | None = None
    advanced: bool = False

    def check(self, value: Any) -> Value:
        """`value` as this parameter's type. Raises TunebookError naming the parameter, the value and what is allowed."""
        kind, given = type(self.default), value
        if kind is bool and isinstance(value, str) and value.strip().lower() in ("true", "false"):
            value = value.strip().lower() == "true"
        elif kind in (int, float) and not isinstance(value, bool) and isinstance(value, (str, int, float)):
            value = self._number(value, kind)
        elif kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
            value = str(value)
        elif kind is str and value is None:
            value = ""
        if type(value) is not kind:
            raise TunebookError(
                f"Parameter {self.name} is {given!r}, which is no {self.kind}; it takes {self.range()}."
            )
        if kind is float and not math.isfinite(value):
            raise TunebookError(f"Parameter {self.name} is {given!r}; it takes {self.range()}.")
        if self.choices is not None and value not in self.choices:
            raise TunebookError(f"Parameter {self.name} is {given!r}; it takes {self.range()}.")
        if (self.low is not None and value < self.low) or (self.high is not None and value > self.high):
            raise TunebookError(f"Parameter {self.name} is {given!r}, out of bounds; it takes {self.range()}.")
        return value

    @staticmethod
    def _number(value: str | int | float, kind: type) -> Any:
        try:
            number = float(value)
        except ValueError:
            return value
        if kind is float:
            return number
        return int(number) if number.is_integer() else value

    @property
    def kind(self) -> str:
        return {bool: "true/false value", int: "whole number", float: "number", str: "text"}[type(self.default)]

    def range(self) -> str:
        """What is allowed, for people: "a whole number from 4 to 128"."""
        if self.choices is not None:
            return "one of " + ", ".join(repr(c) for c in self.choices)
        bounds = [
            f"from {self.low:g}" if self.low is not None else "",
            f"to {self.high:g}" if self.high is not None else "",
        ]
        return " ".join(filter(None, [f"a {self.kind}", *bounds, self.unit]))

    def line(self) -> str:
        """The parameter's line in a notebook: a plain literal with Colab's form comment."""
        if type(self.default) is bool:
            form = '{type:"boolean"}'
        elif self.choices is not None:
            form = "[" + ", ".join(_literal(c) for c in self.choices) + "]"
        elif isinstance(self.default, str):
            form = '{type:"string"}'
        elif self.step and not self.log and self.low is not None and self.high is not None:
            form = f'{{type:"slider", min:{self.low:g}, max:{self.high:g}, step:{self.step:g}}}'
        else:
            form = '{type:"number"}' if isinstance(self.default, float) else '{type:"integer"}'
        return f"{self.name} = {_literal(self.default)}  # @param {form}"


def _literal(value: Value) -> str:
    import json

    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


RUN = Param("run", "default", "Name of the run: its folder under runs/")
MODEL_AGAIN = Param("model", "", "Base model; empty: the model that the data was prepared for", advanced=True)

# What both training stages take. Rarely touched: folded away in the panel, not in the form.
TRAINING = (
    Param("seed", 17, "Seed of every random choice", low=0, high=2**31 - 1),
    Param(
        "max_minutes",
        0.0,
        "Train at most so long: a probing step tells how many steps that is; 0: as the epochs say",
        unit="minutes",
        low=0.0,
        high=10**5,
        advanced=True,
    ),
    Param(
        "eval_steps",
        0,
        "Held-out loss every so many steps; 0: five times a run",
        unit="steps",
        low=0,
        high=10**6,
        advanced=True,
    ),
    Param("eval_rows", 64, "Held-out rows used for it; 0: all", unit="rows", low=0, high=10**7, advanced=True),
    Param(
        "save_steps",
        0,
        "Checkpoint every so many steps; 0: five times a run, at least every 50 steps",
        unit="steps",
        low=0,
        high=10**6,
        advanced=True,
    ),
    Param("keep_checkpoints", 2, "Newest checkpoints kept, besides the best", low=2, high=1000, advanced=True),
    Param(
        "early_stopping",
        0,
        "Stop after so many evaluations without a better held-out loss; 0: never",
        low=0,
        high=1000,
        advanced=True,
    ),
    Param(
        "best_checkpoint", True, "Keep the adapter with the best held-out loss instead of the last one", advanced=True
    ),
    Param(
        "sample_every",
        0,
        "Write sample answers every so many steps; 0: only at the end",
        unit="steps",
        low=0,
        high=10**6,
        advanced=True,
    ),
    Param(
        "resume",
        "auto",
        "A killed run of these parameters: auto goes on with it, must refuses to start over, never starts over",
        choices=("auto", "must", "never"),
        advanced=True,
    ),
    Param(
        "mirror",
        "",
        "Folder (a mounted drive) that checkpoints are copied to, and read back from when the run folder is lost",
        advanced=True,
    ),
    Param("loggers", "", "Besides TensorBoard: trackio, wandb, mlflow, separated by commas", advanced=True),
    Param(
        "backend",
        "auto",
        "Training code; auto chooses by card, model and length",
        choices=("auto", "hf", "unsloth"),
        advanced=True,
    ),
    Param(
        "precision",
        "auto",
        "auto: bf16 where the card has it, else fp16 with fp32 adapters",
        choices=("auto", "bf16", "fp16", "fp32"),
        advanced=True,
    ),
    Param("packing", True, "Put several rows into one, without attention across them", advanced=True),
    Param(
        "row_tokens",
        0,
        "Longest packed row; 0: the planner chooses what fits",
        unit="tokens",
        low=0,
        high=10**7,
        advanced=True,
    ),
    Param(
        "recompute",
        "auto",
        "Activations computed a second time to save memory",
        choices=("auto", "none", "half", "all", "offload"),
        advanced=True,
    ),
    Param(
        "plan_for",
        "",
        "Plan for a named card (T4, L4, A100-40, A100-80, H100, H200) instead of the one here",
        advanced=True,
    ),
    Param(
        "export_check",
        True,
        "Refuse, before training, a model that could not be exported to GGUF afterwards",
        advanced=True,
    ),
    Param(
        "optimizer",
        "adamw",
        "Optimizer; 8bit and paged forms keep their state small",
        choices=("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion", "adafactor", "sgd"),
        advanced=True,
    ),
    Param("weight_decay", 0.0, "Weight decay", low=0.0, high=1.0, advanced=True),
    Param("max_grad_norm", 1.0, "Gradients are clipped to this norm", low=0.0, high=1000.0, advanced=True),
)
ADAPTER = (
    Param(
        "target_modules",
        "all-linear",
        "Layers that get an adapter: all-linear, or names separated by commas",
        advanced=True,
    ),
    Param("dropout", 0.0, "Dropout on the adapter's input", low=0.0, high=0.9, advanced=True),
    Param("rslora", False, "Rank-stabilised scaling, alpha over the root of the rank", advanced=True),
    Param("dora", False, "DoRA: magnitude and direction apart", advanced=True),
    Param(
        "init",
        "default",
        "First value of the adapter: noise and zeros, or the base's main directions (pissa), or its 4-bit error (loftq)",
        choices=("default", "pissa", "loftq"),
        advanced=True,
    ),
    Param(
        "lora_plus_ratio",
        0.0,
        "LoRA+: learning rate of B over that of A; 0: the same, the paper's is 16",
        low=0.0,
        high=1000.0,
        advanced=True,
    ),
)

STAGES: dict[str, tuple[Param, ...]] = {
    "data": (
        RUN,
        Param(
            "model",
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            "Base model: hub id or local folder; its tokenizer and template render the data",
        ),
        Param(
            "dataset",
            "datasets/atlas_train.jsonl",
            "Training data: files, folders, globs, dataset_info names or hub ids (owner/name@revision:subset:split), separated by commas",
        ),
        Param(
            "format",
            "auto",
            "Shape of the rows; auto finds it row by row",
            choices=(
                "auto",
                "alpaca",
                "sharegpt",
                "messages",
                "prompt_completion",
                "text",
                "preference",
                "kto",
                "context_qa",
            ),
        ),
        Param(
            "test_dataset",
            "datasets/atlas_test.jsonl",
            "Held-out questions for evaluation; empty: a part of the training data",
        ),
        Param("preference_dataset", "datasets/atlas_preference.jsonl", "Preference pairs; empty: none"),
        Param("database", "datasets/atlas.sqlite", "SQLite database that answers are executed on; empty: none"),
        Param(
            "train_on",
            "last",
            "Trained tokens: the last answer, every assistant turn, or everything",
            choices=("last", "all", "everything"),
        ),
        Param(
            "max_length", 512, "Longest row; 0: what the lengths propose", unit="tokens", low=0, high=131072, step=16
        ),
        Param("over_long", "drop", "Rows over max_length", choices=("drop", "split", "truncate")),
        Param("eval_share", 0.05, "Training rows held out for the loss while training", low=0.0, high=0.5, step=0.01),
        Param(
            "near_duplicates",
            0.8,
            "Jaccard similarity from which a row is a near-duplicate; 0: keep them",
            low=0.0,
            high=1.0,
            step=0.05,
        ),
        Param("seed", 17, "Seed of every random choice", low=0, high=2**31 - 1),
        Param(
            "dataset_info", "", "A dataset_info.json with named sets; empty: datasets/dataset_info.json", advanced=True
        ),
        Param("columns", "", "Own mapping, part=column: prompt=question,response=sql,system=schema", advanced=True),
        Param(
            "unanswerable",
            "The text does not say.",
            "Answer to a question that its text does not answer (context_qa)",
            advanced=True,
        ),
        Param(
            "reject_limit", 0.05, "Share of unusable rows from which the job stops", low=0.0, high=1.0, advanced=True
        ),
        Param(
            "test_share",
            0.1,
            "Rows held out for evaluation when no test_dataset is named",
            low=0.0,
            high=0.5,
            advanced=True,
        ),
        Param("preference_eval_share", 0.1, "Preference pairs held out", low=0.0, high=0.5, advanced=True),
        Param("group_by", "", "Column whose equal values never straddle two splits", advanced=True),
        Param(
            "chunk_tokens",
            384,
            "Documents are cut into pieces of so many tokens",
            unit="tokens",
            low=16,
            high=131072,
            advanced=True,
        ),
        Param(
            "chunk_overlap", 32, "Tokens that neighbouring pieces share", unit="tokens", low=0, high=8192, advanced=True
        ),
        Param(
            "min_document_chars",
            100,
            "Shorter documents are dropped and counted",
            unit="characters",
            low=0,
            high=10**6,
            advanced=True,
        ),
        Param("repair_unicode", True, "Mend mojibake and control characters", advanced=True),
        Param("exact_duplicates", True, "Drop rows with the same content", advanced=True),
        Param("languages", "", "Keep these languages only, as codes: en,zh; empty: all", advanced=True),
        Param("min_chars", 1, "Shortest answer", unit="characters", low=0, high=10**6, advanced=True),
        Param("max_chars", 0, "Longest example; 0: any", unit="characters", low=0, high=10**9, advanced=True),
        Param("min_tokens", 0, "Shortest answer; 0: any", unit="tokens", low=0, high=10**6, advanced=True),
        Param("drop_repetitive", False, "Drop answers that repeat themselves", advanced=True),
        Param("drop_gibberish", False, "Drop answers that are no language", advanced=True),
        Param(
            "personal_data",
            "off",
            "E-mail, phone, card, IBAN, address of a computer: count, mask, or drop the row (some thousand texts/s)",
            choices=("off", "count", "mask", "drop"),
            advanced=True,
        ),
        Param(
            "toxicity",
            "none",
            "Scorer: module:function, transformers:model, or an endpoint http://host/v1#model",
            advanced=True,
        ),
        Param("toxicity_threshold", 0.5, "Score from which a row is dropped", low=0.0, high=1.0, advanced=True),
        Param("weights", "", "Mixture: share of each source, name=2,other=1; empty: every row", advanced=True),
        Param("caps", "", "Most rows of a source, name=1000,other=50", advanced=True),
        Param(
            "mix_unit",
            "rows",
            "What the shares of the mixture are counted in",
            choices=("rows", "tokens"),
            advanced=True,
        ),
        Param("replay_dataset", "", "General data mixed in against forgetting", advanced=True),
        Param("replay_share", 0.0, "Its share of the whole", low=0.0, high=0.9, advanced=True),
        Param(
            "synthetic",
            "none",
            "Rows made from the documents in dataset by a model behind endpoint",
            choices=("none", "questions", "preferences"),
            advanced=True,
        ),
        Param("endpoint", "", "OpenAI-compatible server, http://127.0.0.1:8080/v1", advanced=True),
        Param("endpoint_model", "", "Name of the model there", advanced=True),
        Param("endpoint_key_name", "OPENAI_API_KEY", "Environment variable that holds the server's key", advanced=True),
        Param("pairs_per_document", 3, "Questions asked of each piece of a document", low=1, high=50, advanced=True),
        Param(
            "max_cost",
            0.0,
            "Refuse synthetic jobs that could cost more; 0: no limit",
            low=0.0,
            high=10**6,
            advanced=True,
        ),
        Param("price_in", 0.0, "Price of a million tokens sent to the endpoint", low=0.0, high=10**4, advanced=True),
        Param("price_out", 0.0, "Price of a million tokens that it writes", low=0.0, high=10**4, advanced=True),
        Param(
            "sql_negatives", False, "Make preference pairs by running mistaken queries on the database", advanced=True
        ),
        Param("compare_tokenizer", "", "A second model whose tokenizer is measured beside this one's", advanced=True),
        Param("add_tokens", "", "New tokens, separated by commas", advanced=True),
        Param(
            "decontaminate",
            0.5,
            "Share of a test question's 8-grams from which a training row holds it; 0: do not look",
            low=0.0,
            high=1.0,
            advanced=True,
        ),
    ),
    "sft": (
        RUN,
        MODEL_AGAIN,
        Param(
            "method",
            "qlora",
            "What is trained: LoRA on a 4-bit or a 16-bit base, every weight, or the last layers",
            choices=("qlora", "lora", "full", "freeze"),
        ),
        Param("rank", 16, "Rank r of the LoRA adapter", low=1, high=256, step=1),
        Param("alpha", 32, "LoRA's scaling numerator alpha", low=1, high=512, step=1),
        Param("learning_rate", 1e-3, "Peak learning rate", low=1e-7, high=1e-1, log=True),
        Param("epochs", 1.0, "Passes over the training rows", low=0.01, high=100, step=0.5),
        Param(
            "batch_size",
            8,
            "Rows per optimizer step, however they are packed or spread over GPUs",
            unit="rows",
            low=1,
            high=4096,
        ),
        Param(
            "schedule",
            "cosine",
            "Course of the learning rate after warm-up",
            choices=("linear", "cosine", "constant", "wsd"),
        ),
        Param(
            "max_steps",
            0,
            "Stop after this many optimizer steps; 0: when the epochs are done",
            unit="steps",
            low=0,
            high=10**7,
        ),
        Param("start_from", "", "Adapter folder to train further; empty: a new adapter"),
        *TRAINING,
        Param(
            "warmup_ratio",
            0.05,
            "Share of the steps in which the learning rate rises",
            low=0.0,
            high=1.0,
            step=0.01,
            advanced=True,
        ),
        Param(
            "freeze_layers",
            2,
            "method freeze: how many of the last layers are trained",
            unit="layers",
            low=1,
            high=1000,
            advanced=True,
        ),
        Param(
            "train_on",
            "completion",
            "Which tokens count: answers only, or all (continued pretraining)",
            choices=("completion", "all"),
            advanced=True,
        ),
        Param("neftune_alpha", 0.0, "NEFTune's noise on the embeddings; 0: none", low=0.0, high=50.0, advanced=True),
        *ADAPTER,
    ),
    "orpo": (
        RUN,
        MODEL_AGAIN,
        Param("loss", "orpo", "Preference objective", choices=("orpo", "dpo", "kto", "simpo")),
        Param("start_from", "sft", "sft: the adapter of notebook 02; base: a new adapter; or an adapter folder"),
        Param(
            "beta",
            0.5,
            "Weight of the preference term; 0.05 to 0.1 at 7B, 0.5 to 1 for small models",
            low=0.0,
            high=10.0,
            step=0.05,
        ),
        Param("learning_rate", 1e-4, "Peak learning rate; 5e-6 to 8e-6 at 7B", low=1e-8, high=1e-1, log=True),
        Param("epochs", 1.0, "Passes over the pairs", low=0.01, high=100, step=0.5),
        Param("batch_size", 8, "Pairs per optimizer step", unit="pairs", low=1, high=4096),
        Param(
            "max_length",
            512,
            "Longest prompt with an answer; longer pairs are left out and counted",
            unit="tokens",
            low=16,
            high=131072,
            step=16,
        ),
        Param(
            "schedule",
            "cosine",
            "Course of the learning rate after warm-up",
            choices=("linear", "cosine", "constant", "wsd"),
        ),
        Param(
            "max_steps",
            0,
            "Stop after this many optimizer steps; 0: when the epochs are done",
            unit="steps",
            low=0,
            high=10**7,
        ),
        *TRAINING,
        Param(
            "method",
            "qlora",
            "From base: LoRA on a 4-bit or 16-bit base. From an adapter: the base it is trained on",
            choices=("qlora", "lora"),
            advanced=True,
        ),
        Param("rank", 16, "From base: rank r of the LoRA adapter", low=1, high=256, step=1, advanced=True),
        Param("alpha", 32, "From base: LoRA's scaling numerator alpha", low=1, high=512, step=1, advanced=True),
        Param(
            "warmup_ratio",
            0.1,
            "Share of the steps in which the learning rate rises",
            low=0.0,
            high=1.0,
            step=0.01,
            advanced=True,
        ),
        Param(
            "swap_labels",
            False,
            "Exchange chosen and rejected: the control that shows what the preference term does",
            advanced=True,
        ),
        Param("simpo_gamma", 0.5, "SimPO's target margin", low=0.0, high=10.0, advanced=True),
        *ADAPTER,
    ),
    "gguf": (
        RUN,
        Param(
            "export",
            "auto",
            "Which stage's model: the latest one trained, or one by name",
            choices=("auto", "orpo", "sft", "base"),
        ),
        Param(
            "quantizations",
            "q8_0,q4_k_m",
            "GGUF types, separated by commas: f16, bf16, q8_0, q6_k, q5_k_m, q5_k_s, q4_k_m, q4_k_s, q4_0, "
            "q3_k_m, q3_k_s, q2_k",
        ),
        Param(
            "merge_onto",
            "auto",
            "Base that the adapter is merged into: 16-bit weights, or those after a round trip through NF4; "
            "auto: what the adapter was made for",
            choices=("auto", "16bit", "nf4"),
        ),
        Param("imatrix", False, "Weigh errors by an importance matrix from the training data (better below 5 bits)"),
        Param(
            "fidelity_tokens",
            1000,
            "Held-out text that each file is compared on",
            unit="tokens",
            low=16,
            high=1_000_000,
        ),
        Param(
            "task_questions",
            24,
            "Test questions that each file answers for the size-against-score plot; 0: none",
            low=0,
            high=10**6,
        ),
        Param(
            "context_length",
            0,
            "Context that the Modelfile asks for; 0: the model's own, at most 8192",
            unit="tokens",
            low=0,
            high=1 << 20,
        ),
        Param(
            "outputs",
            "merged,gguf",
            "What stays: adapter, merged (16-bit safetensors), gguf, adapter_gguf; separated by commas",
        ),
        Param("model_name", "tunebook", "What the model is called in Ollama, vLLM and LM Studio", advanced=True),
        Param(
            "llama_cpp",
            "",
            "Folder of your own llama.cpp build; empty: TUNEBOOK_LLAMA_CPP, else the prebuilt library",
            advanced=True,
        ),
        Param("fidelity_gates", True, "Stop when a file is not the model that was trained", advanced=True),
        Param("fidelity_answers", 4, "Greedy answers compared one by one", low=0, high=1000, advanced=True),
        Param(
            "imatrix_tokens",
            8192,
            "Training text for the importance matrix",
            unit="tokens",
            low=256,
            high=10**7,
            advanced=True,
        ),
        Param("seed", 17, "Seed of every random choice", low=0, high=2**31 - 1, advanced=True),
    ),
    "eval": (
        RUN,
        Param(
            "candidates",
            "base,sft,orpo,gguf",
            "Who of this run is judged: base, sft, orpo, merged, gguf, separated by commas",
        ),
        Param(
            "extra_candidates",
            "",
            "Others, as name=what separated by commas: a model folder, hub id, .gguf file or http(s)://host/v1#model",
        ),
        Param("limit", 0, "Questions per candidate, a seeded choice; 0: all", unit="questions", low=0, high=10**6),
        Param("max_new_tokens", 96, "Longest answer", unit="tokens", low=1, high=8192, step=8),
        Param("temperature", 0.0, "0: greedy, the same answer every time", low=0.0, high=2.0, step=0.1),
        Param("seeds", "17", "Seeds of the draws, separated by commas; more than one needs a temperature above 0"),
        Param(
            "general_text",
            "datasets/general_text.jsonl",
            "Texts that must not get harder to predict; empty: not measured",
        ),
        Param(
            "general_tasks",
            "datasets/general_tasks.jsonl",
            "Multiple-choice questions that must not be forgotten; empty: none",
        ),
        Param("general_chat", "datasets/general_chat.jsonl", "Small talk and prompts to refuse; empty: none"),
        Param("harness_tasks", "", "More lm-eval tasks, separated by commas"),
        Param("judge", "", "Endpoint of a judge, http(s)://host/v1#model; empty: none"),
        Param("seed", 17, "Seed of the resampling and of `limit`", low=0, high=2**31 - 1),
        Param(
            "loss_increase",
            0.15,
            "General text may get this much harder before the verdict is 'forgot'",
            unit="nats per token",
            low=0.0,
            high=10.0,
            advanced=True,
        ),
        Param(
            "task_drop",
            0.15,
            "General questions, refusals and manners may lose this share",
            low=0.0,
            high=1.0,
            advanced=True,
        ),
        Param(
            "forgetting_gguf",
            False,
            "Measure forgetting and preference on GGUF files too; notebook 04 already holds them against the merged model",
            advanced=True,
        ),
        Param(
            "reference_metric",
            "f1",
            "What counts as right where the answer is free text",
            choices=("exact", "f1", "rouge_l", "chrf"),
            advanced=True,
        ),
        Param(
            "contamination_share",
            0.5,
            "Share of a question's 8-grams in one training row from which it is scored apart",
            low=0.01,
            high=1.0,
            advanced=True,
        ),
        Param("harness_include", "", "Folder with YAML tasks of your own", advanced=True),
        Param("harness_limit", 0, "Items per harness task; 0: all", unit="items", low=0, high=10**6, advanced=True),
        Param(
            "judge_limit",
            50,
            "Pairs of answers that the judge compares",
            unit="pairs",
            low=1,
            high=10**5,
            advanced=True,
        ),
        Param(
            "judge_budget",
            200_000,
            "The judge is not asked when it would take more tokens than this",
            unit="tokens",
            low=0,
            high=10**9,
            advanced=True,
        ),
        Param(
            "precision", "auto", "Precision of HF candidates", choices=("auto", "bf16", "fp16", "fp32"), advanced=True
        ),
        MODEL_AGAIN,
    ),
}


class Params:
    """A stage's parameters: read as attributes, checked again whenever one is set."""

    def __init__(self, stage: str, values: Mapping[str, Value]):
        object.__setattr__(self, "stage", stage)
        object.__setattr__(self, "_values", dict(values))

    def __getattr__(self, name: str) -> Value:
        try:
            return object.__getattribute__(self, "_values")[name]
        except KeyError:
            raise AttributeError(f"the {self.stage} stage has no parameter {name!r}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self._values[name] = find(self.stage, name).check(value)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def as_dict(self) -> dict[str, Value]:
        return dict(self._values)

    def changed(self) -> dict[str, Value]:
        """Only what differs from the defaults."""
        return {n: v for n, v in self._values.items() if v != find(self.stage, n).default}

    def _repr_html_(self) -> str:
        from helpers.display import table

        rows = [
            (
                p.name,
                self._values[p.name],
                p.unit,
                "" if self._values[p.name] == p.default else f"default {p.default!r}",
                p.help,
            )
            for p in STAGES[self.stage]
        ]
        return table(rows, ("parameter", "value", "unit", "changed", "meaning"))

    def __repr__(self) -> str:
        import textwrap

        return textwrap.fill(", ".join(f"{n} = {v!r}" for n, v in self._values.items()), 110, break_long_words=False)


def find(stage: str, name: str) -> Param:
    """The parameter of that name. Raises TunebookError with the nearest names when there is none."""
    for param in STAGES[stage]:
        if param.name == name:
            return param
    near = difflib.get_close_matches(name, [p.name for p in STAGES[stage]], n=3, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(near)}?"
        if near
        else "its parameters are " + ", ".join(p.name for p in STAGES[stage]) + "."
    )
    raise TunebookError(f"The {stage} stage has no parameter {name!r}; {hint}")


def resolve(stage: str, given: Mapping[str, Any] | None = None) -> Params:
    """The defaults of `stage` with `given` laid over them, every value checked."""
    if stage not in STAGES:
        raise TunebookError(f"There is no stage {stage!r}; the stages are {', '.join(STAGES)}.")
    values = {p.name: p.default for p in STAGES[stage]}
    for name, value in (given or {}).items():
        values[name] = find(stage, name).check(value)
    return Params(stage, values)


def read_globals(stage: str, namespace: Mapping[str, Any]) -> dict[str, Any]:
    """A notebook's parameters among its globals. A plain value under another name is taken for a misspelt parameter."""
    plain = {
        n: v
        for n, v in namespace.items()
        if not n.startswith("_")
        and n not in ("In", "Out")
        and (v is None or isinstance(v, (str, int, float, bool, list, dict, tuple)))
    }
    for name in plain:
        find(stage, name)
    return plain


def cell(stage: str) -> str:
    """Source of the notebook's parameters cell."""
    return "\n".join(["# @title Parameters", *(p.line() for p in STAGES[stage] if not p.advanced)])
