"""What is trained and what is kept of it: a new adapter, an earlier one trained further, or the model's own weights.

Unsloth is the second backend: the same parameters, the same trainers, the same outputs. It patches transformers and has
to be imported before it, so `import_first` runs first thing in a training process (`notebook.start` and `python -m
helpers.train` call it). It is optional: its licences (Apache-2.0 with AGPL and LGPL parts) stay with whoever installs
it. Its statistics stay off and it makes no call home.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from helpers import compat, runs
from helpers.data.vocabulary import add_tokens, fit, new_tokens
from helpers.errors import TunebookError
from helpers.model import layer_kinds, loading, merging, packed_attention, weights
from helpers.planner import cost_model
from helpers.planner.proposals import choose_backend
from helpers.train import distributed

QUIET = {"UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_AUTO_INSTALL": "0"}
QUIET |= {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
PACKED = {"method": "qlora", "init": "default", "quantize": "auto"}  # what goes with a base that is packed as it comes
PISSA = "work/pissa"  # in a stage's folder: PiSSA's adapter before training
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(job: Any, precision: str) -> tuple[Any, list[str]]:
    """(the model of a `job.TrainJob` with its adapter, ready to train, and what was done to it)."""
    import transformers

    from helpers.model import checkpointing, chunked_loss, fp8, fused_lora

    transformers.logging.disable_progress_bar()
    params, plan, notes = job.params, job.planned, []
    tokenizer = loading.load_tokenizer(job.source)
    tokens, frozen = new_tokens(tokenizer, job.tokenizer), params.method == "freeze"
    if tokens and (plan.backend == "unsloth" or frozen):
        found, setting = (params.method, "method to lora") if frozen else ("unsloth", "backend to hf")
        raise TunebookError(
            f"The run adds {len(tokens)} tokens to the vocabulary ({', '.join(tokens)[:100]}), whose rows {found} does "
            f"not train; set {setting}, or in notebook 01 template_tokens to eos and add_tokens to nothing."
        )
    if plan.backend == "unsloth":
        return load_unsloth(job.source, params, job.adapter)
    packed_attention.register()
    attention = packed_attention.SHARED if plan.shares else plan.attention
    quantize, model_config = plan.setting.quantize, loading.load_config(job.source)
    if bits := loading.quantizer(model_config):
        _check_packed(job.source.name, bits, params)
        notes.append(f"the base's own {bits} weights, as they were published")
    whole = _needs_whole_base(params, model_config, job.tokenizer)
    if distributed.sharded(params) and not whole:
        job.base = distributed.Base(job.source, precision, attention, quantize, params.double_quant)
    elif distributed.sharded(params):
        if quantize == "nf4":
            raise TunebookError(
                f"The 4-bit base is shared out over {distributed.size()} GPUs, and {whole} needs all of it in each; "
                "take that back, or set shard_weights and cpu_offload to False on GPUs with room for the whole base."
            )
        notes.append(f"the base was loaded whole in each process and then sharded, for {whole}")
    given = {"double_quant": params.double_quant, "dtype": precision, "attention": attention}
    base = job.base
    model = base.model if base else fp8.load(job.source, quantize, **given)
    notes += [model.in_fp8] if quantize == "fp8" else []
    model.config.use_cache = False
    rows_before = model.get_input_embeddings().weight.shape[0]
    # Of a mixture of experts the router's loss is ours (`router_aux_loss`); its own fails in generation with a cache.
    model.config.get_text_config().output_router_logits = False
    fit(model, tokenizer)  # its padding may be a new token
    added = add_tokens(model, tokenizer, tokens) if tokens else []
    if added:
        free = f", {sum(i < rows_before for i in added)} of them in free rows of the embedding"
        free *= added[0] < rows_before
        notes.append(f"{len(added)} added tokens{free}, each started as the mean of its pieces")
    if params.method in ("full", "freeze"):
        model.requires_grad_(params.method == "full")
        if params.method == "freeze":
            layers, count = checkpointing.decoder_layers(model), params.freeze_layers
            if count > len(layers):
                raise TunebookError(f"freeze_layers is {count} and the model has {len(layers)} layers; lower it.")
            layers[-count:].requires_grad_(True)
        notes.append("the model's weights are trained in fp32 and written in bf16")
    else:
        with compat.adapters_off_meta(base is not None):
            if job.adapter:
                model = loading.load_adapter(model, job.adapter, trainable=True)
            else:
                model = _new_adapter(model, params, job.source, added)
        if not job.adapter or weights.adapter_without_embedding(job.adapter):  # else PEFT writes all of a longer one
            model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)
    if params.method in ("lora", "qlora") and not job.adapter:
        if (experts := model.peft_config["default"].target_parameters) and params.target_modules == "all-linear":
            notes.append(f"adapted: every linear layer and the experts ({', '.join(sorted(experts))}), no router")
            notes[-1] += "; PEFT's own loader takes dense MLPs for experts: serve this adapter merged"
        if params.init == "pissa":  # what it took out of the base is subtracted when the adapter is written
            model.peft_config["default"].init_lora_weights = True
            model.save_pretrained(job.stage.path / PISSA, safe_serialization=True)
            notes.append("PiSSA: the adapter is written as plain LoRA of twice the rank, for the base as it was")
        if params.init == "loftq":
            _loftq(model, job.source.path)
            notes.append("LoftQ: the adapter belongs to the 4-bit base and is merged onto that")
    keep_in_fp32(model)
    if params.modules_to_save:
        notes.append(f"trained whole, in fp32: {', '.join(_speak_16_bits(model))}")
    notes += fused_lora.apply(model, fused_lora=not params.dora, prove=base is None)
    if plan.setting.recompute:
        notes.append(f"activation checkpointing in {checkpoint_activations(model, plan.option.setting)} layers")
    if base:
        notes.append(base.share_out(model, precision, params.cpu_offload))
        notes[-1] += chunked_loss.prove(model)
    return model, notes


def _needs_whole_base(params: Any, config: Any, tokenizer: Any) -> str:
    """What cannot be done to a base of which a process holds its rows alone; "" for the rest."""
    reasons = {
        "tokens that are added": len(tokenizer) > config.get_text_config().vocab_size,
        "modules_to_save": params.modules_to_save,
        f"init {params.init!r}": params.init != "default",
        "DoRA": params.dora,
        "a model with a vision part": config.get_text_config() is not config,
    }
    return next((what for what, true in reasons.items() if true), "")


def _check_packed(name: str, packed: str, params: Any) -> None:
    """Raises TunebookError for what needs the weights that `packed` ones were made from."""
    needs = {"method": params.method in ("full", "freeze"), "init": params.init in ("loftq", "pissa")}
    needs["quantize"] = params.quantize == "fp8"
    for setting in (key for key, true in needs.items() if true):
        raise TunebookError(
            f"{setting} is {getattr(params, setting)!r}, which needs 16-bit weights, and {name} holds {packed} ones; "
            f"set {setting} to {PACKED[setting]!r}, or name the 16-bit model."
        )


def keep_in_fp32(model: Any) -> None:
    """Put every trained weight in fp32: 16 bits round the small updates at the end of a cosine away, and fp16's scaler
    cannot unscale their gradients. TRL turns the adapters of a 4-bit base to bf16."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def _speak_16_bits(model: Any) -> list[str]:
    """Let embeddings and head that are trained in fp32 take and give what the 16-bit layers around them do."""
    import torch
    from peft.utils.other import ModulesToSaveWrapper

    causal, names = model.get_base_model(), []
    for name, wrapper in causal.named_modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            names.append(name)
            if isinstance(wrapper.original_module, torch.nn.Embedding):
                wrapper.register_forward_hook(lambda _, given, out: out.to(causal.dtype))
            else:
                wrapper.register_forward_pre_hook(lambda module, given: (given[0].to(module.weight.dtype), *given[1:]))
    return names


def checkpoint_activations(model: Any, setting: Any) -> int:
    """Set activation checkpointing as a planner's `Setting` says; returns in how many layers."""
    from helpers.model import checkpointing

    layers = checkpointing.set_recompute(model, setting.recompute, setting.offload, setting.tile_mlp)
    if hasattr(model, "enable_input_require_grads") and not setting.offload:
        model.enable_input_require_grads()
    return layers


def _new_adapter(model: Any, params: Any, base: loading.ModelSource, added: list[int]) -> Any:
    """added: ids of tokens whose embeddings are trained whole. Raises TunebookError for unknown target modules."""
    import torch
    from peft import LoraConfig, get_peft_model

    modules, whole = params.target_modules.strip(), [m.strip() for m in params.modules_to_save.split(",") if m.strip()]
    every, linear = modules == "all-linear", layer_kinds.linear_layers(model)
    named = linear if every else [m.strip() for m in modules.split(",") if m.strip()]
    unknown = [m for m in named if not any(f".{n}".endswith(f".{m}") for n, _ in model.named_modules())]
    if not named or unknown:
        raise TunebookError(
            f"target_modules is {modules!r}; {', '.join(unknown) or 'nothing'} names no layer of this model; "
            f"its linear layers are {', '.join(linear)}, or say 'all-linear'."
        )
    given, head = (find() for find in (model.get_input_embeddings, model.get_output_embeddings))
    ends = {name.rsplit(".", 1)[-1]: module for name, module in model.named_modules() if module in (given, head)}
    rows, tied = _token_rows(model, added) or {}, head is not None and head.weight is given.weight
    if wrong := set(whole) - set(ends):
        raise TunebookError(
            f"modules_to_save names {', '.join(wrong)}; this model has {', '.join(ends)} to train whole."
        )
    # Modules outside the language model (a vision part) get no adapter.
    inside = {id(module) for module in (*layer_kinds.decoder(model).modules(), model.get_output_embeddings())}
    held = {id(m) for m in model.modules() if any(id(part) in inside for part in m.modules())}
    outside = "|".join(f"{re.escape(n)}(\\..*)?" for n, m in model.named_modules() if id(m) not in held)
    adapter = LoraConfig(
        r=params.rank,
        lora_alpha=params.alpha,
        lora_dropout=params.dropout,
        use_rslora=params.rslora,
        use_dora=params.dora,
        target_modules=named,
        target_parameters=(layer_kinds.experts(model) if every else []) or None,
        exclude_modules=outside or None,
        task_type="CAUSAL_LM",
        trainable_token_indices={n: ids for n, ids in rows.items() if not (whole and (tied or n in whole))} or None,
        modules_to_save=whole or None,
        ensure_weight_tying=bool(whole) and tied,
        init_lora_weights="pissa_niter_16" if params.init == "pissa" else True,
    )
    torch.manual_seed(params.seed)  # the adapter's first noise is part of the run
    try:
        compat.adapters_as_named()
        wrapped = get_peft_model(model, adapter)
    except ValueError as error:
        said = f"PEFT cannot adapt {modules} of this model ({str(error).splitlines()[0][:200]}); change target_modules."
        if "ParamWrapper" in str(error):
            said = (
                "The model's experts are one parameter, which takes plain LoRA alone; set dropout to 0, dora to False"
            )
            said += " and init to 'default', or name target_modules without the experts (q_proj,k_proj,v_proj,o_proj)."
        raise TunebookError(said) from error
    wrapped.peft_config["default"].base_model_name_or_path = base.name
    return wrapped


def _token_rows(model: Any, added: list[int]) -> dict[str, list[int]] | None:
    """The rows that are trained for added tokens: of the embedding, and of an output layer of its own."""
    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    given, out = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [given] if out is None or out.weight is given.weight else [given, out]
    return {names[id(layer)]: added for layer in layers} if added else None


def _loftq(model: Any, folder: Path) -> None:
    """Start every adapter at the main directions of what its layer lost to 4 bits (arXiv:2310.08659, one iteration).

    B·A·scaling is the best rank-r approximation of W - W4; PEFT's own leaves the scaling out and needs CUDA.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit

    held = weights.Weights(folder)
    for name, layer in compat.lora_linears(model):
        weight = layer.get_base_layer().weight
        if hasattr(weight, "quant_state"):
            exact = held.read(f"{name}.weight").to(weight.device, torch.float32)
            lost = exact - dequantize_4bit(weight.data.view(-1, 1), weight.quant_state).float().view(exact.shape)
            rank = layer.r["default"]
            u, s, v = torch.svd_lowrank(lost, q=min(rank + 8, *lost.shape), niter=8)
            root = (s[:rank] / layer.scaling["default"]).sqrt()
            layer.lora_A["default"].weight.data = (root[:, None] * v[:, :rank].T).contiguous()
            layer.lora_B["default"].weight.data = (u[:, :rank] * root).contiguous()


def lora_plus(model: Any, params: Any, arguments: Any) -> Any:
    """LoRA+'s optimizer with its two learning rates (arXiv:2402.12354); None where it is not asked for."""
    if not params.lora_plus_ratio:
        return None
    from peft.optimizers import create_loraplus_optimizer
    from transformers import Trainer

    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    options |= {"loraplus_lr_ratio": params.lora_plus_ratio, "loraplus_weight_decay": params.weight_decay}
    return create_loraplus_optimizer(model, kind, **options)


def save(model: Any, tokenizer: Any, folder: Path, whole: dict[str, Any] | None = None) -> None:
    """Adapter or whole model (in bf16) with its tokenizer into `folder`, which is whole or not there.

    whole: the state gathered from all processes, where the model is sharded.
    """
    import torch

    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if hasattr(model, "peft_config"):
        extra: dict[str, Any] = {"state_dict": whole} if whole else {}
        if (folder.parent / PISSA).is_dir():
            extra["path_initial_model_for_weight_conversion"] = str(folder.parent / PISSA)
        model.save_pretrained(partial, safe_serialization=True, selected_adapters=["default"], **extra)
        weights.sort_adapter_config(partial)
    else:
        state = whole or model.state_dict()
        state = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in state.items()}
        model.config.dtype = torch.bfloat16
        model.save_pretrained(partial, state_dict=state, safe_serialization=True)
        base, rows = Path(model.name_or_path), model.get_input_embeddings().weight.shape[0]
        files = (base / "config.json").is_file()
        if files and loading.load_config(base).model_type == model.config.model_type:  # not the text part alone
            merging.write_settings(base, partial, tokenizer, torch.bfloat16, rows)
    (partial / "README.md").unlink(missing_ok=True)  # PEFT's empty card; 05 writes the real one
    if not (partial / "tokenizer.json").is_file():
        tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


# ---------------------------------------------------------------- Unsloth


def decide(params: Any) -> str:
    """ "hf" or "unsloth": what the planner will choose, told by its own function before transformers is imported.

    Raises TunebookError for backend "unsloth" where it cannot train.
    """
    if params.backend == "hf" or (params.backend == "auto" and importlib.util.find_spec("unsloth") is None):
        return "hf"
    try:
        known = runs.load(params.run, "data", verify=False).data["model"]
        folder = loading.resolve_model(params.model).path if params.model else Path(known["path"])
        base = json.loads((folder / "config.json").read_text())
    except (TunebookError, OSError, KeyError):  # the job says what is missing when it is opened
        return params.backend.replace("auto", "hf")
    model_type = base.get("text_config", {}).get("model_type") or base.get("model_type", "")
    card = cost_model.card_named(params.plan_for) if params.plan_for else cost_model.card_here()
    return choose_backend(params.backend, card, model_type, params.as_dict())[0]


def import_first(params: Any) -> bool:
    """Import Unsloth before transformers where these parameters will use it; True when it was imported.

    Raises TunebookError when transformers came first (Unsloth's patches would be missing from it), or when the import
    fails, with the reason.
    """
    if decide(params) == "hf":
        return False
    if "unsloth" in sys.modules:
        return True
    if "transformers" in sys.modules:
        raise TunebookError(
            "Unsloth has to be imported before transformers, which this process has loaded already; restart the kernel "
            "and run from the first cell, or set backend to hf."
        )
    os.environ.update(QUIET)
    try:
        import unsloth  # noqa: F401  it patches the libraries when it is imported
    except (ImportError, NotImplementedError, RuntimeError, OSError) as error:
        why = str(error).splitlines()[0][:200]
        raise TunebookError(
            f"Unsloth cannot be imported ({why}); set backend to hf, or install the versions in requirements.txt."
        ) from error
    return True


def load_unsloth(source: Any, params: Any, adapter: Path | None = None) -> tuple[Any, list[str]]:
    """(model with its adapter, notes) for a job's source and parameters.

    The head's loss is `helpers.model.chunked_loss`, as in the other backend: the trainers do not see a difference.
    Activations are checkpointed and offloaded to host memory, Unsloth's own way.
    """
    if "unsloth" not in sys.modules:
        raise TunebookError("Unsloth has to be imported first; begin with notebook.start, or python -m helpers.train.")
    from unsloth import FastLanguageModel

    from helpers.model import chunked_loss

    base = json.loads((source.path / "config.json").read_text())
    longest = base.get("max_position_embeddings") or base.get("text_config", {}).get("max_position_embeddings")
    model, _ = FastLanguageModel.from_pretrained(
        str(source.path),
        max_seq_length=params.max_length if params.stage == "orpo" else int(longest or 4096),
        dtype=None,
        load_in_4bit=params.method == "qlora",
        trust_remote_code=False,
    )
    if adapter is not None:
        model = loading.load_adapter(model, adapter, trainable=True)
        model = FastLanguageModel.for_training(model) or model
    else:
        modules = params.target_modules
        model = FastLanguageModel.get_peft_model(
            model,
            r=params.rank,
            lora_alpha=params.alpha,
            lora_dropout=params.dropout,
            bias="none",
            target_modules=TARGETS if modules == "all-linear" else [m.strip() for m in modules.split(",")],
            use_gradient_checkpointing="unsloth",
            random_state=params.seed,
            use_rslora=params.rslora,
        )
    if why := chunked_loss.can_fuse(model.get_base_model()):
        raise TunebookError(f"The Unsloth backend needs a plain output head, and {why}; set backend to hf.")
    chunked_loss.install(model.get_base_model(), prove=False)
    unsloth = f"Unsloth {sys.modules['unsloth'].__version__}"
    return model, [f"{unsloth}: its kernels and offloaded activation checkpointing, cross-entropy without whole logits"]
