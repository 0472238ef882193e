"""From a job's plan to a model that is ready and a trainer around it."""

from __future__ import annotations

from typing import Any

from helpers import machine
from helpers.train import config, distributed, job, methods, precision
from helpers.train.packing import PackedRows, SharedCollator, SharedPairCollator
from helpers.train.rows import lengths_of


def model(work: Any) -> tuple[Any, list[str], precision.Precision]:
    """(model with its adapter, what was done to it in sentences, precision) for a `job.Job`."""
    import transformers

    import datasets
    from helpers.model import fused_lora
    from helpers.model.loading import load_model

    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    params, plan = work.params, work.plan
    card = machine.gpu()
    numbers = precision.choose(card.capability if card else None, params.precision)
    notes = [numbers.reason]
    if plan.backend == "unsloth":
        from helpers.train import unsloth_backend

        loaded, said = unsloth_backend.load(work.source, params, work.adapter)
        return loaded, [*notes, plan.reason, *said], numbers
    loaded = load_model(
        work.source,
        quantize="nf4" if params.method == "qlora" else "none",
        dtype=numbers.load,
        attention=attention(work),
    )
    loaded.config.use_cache = False
    added = added_tokens(loaded, work)
    wrapped = methods.trainable(loaded, params, work.source, work.adapter, getattr(params, "freeze_layers", 0), added)
    if added:
        notes.append(f"{len(added)} added tokens, each started as the mean of its pieces")
    if params.init == "pissa" and not work.adapter and params.method == "lora":
        first_adapter(wrapped, work.stage.path / "work" / "pissa")
        notes.append("PiSSA: the adapter is written as plain LoRA of twice the rank, for the base as it was")
    if params.init == "loftq" and not work.adapter:
        notes.append("LoftQ: the adapter belongs to the 4-bit base and is merged onto that")
    own_logits = getattr(params, "loss", "orpo") != "orpo"
    notes += fused_lora.apply(wrapped, fused_loss=not own_logits, fused_lora=not (params.dora or params.dropout))
    if plan.recompute:
        notes.append(f"{recomputing(wrapped, plan.option.setting)} layers recomputed")
    return wrapped, notes, numbers


def recomputing(wrapped: Any, setting: Any) -> int:
    """Let the model recompute as a `memory.Setting` says; returns how many layers do."""
    from helpers.model import checkpointing

    layers = checkpointing.set_recompute(wrapped, setting.recompute, setting.offload, setting.tile_mlp)
    if hasattr(wrapped, "enable_input_require_grads") and not setting.offload:
        wrapped.enable_input_require_grads()
    return layers


def added_tokens(loaded: Any, work: Any) -> list[int]:
    """Ids of the tokens that notebook 01 added (`add_tokens`), with rows for them in the model."""
    tokens = work.stage.parents["data"].data["params"].get("add_tokens", "")
    if not tokens:
        return []
    from helpers.data.vocabulary import add_tokens
    from helpers.model.loading import load_tokenizer

    return add_tokens(loaded, load_tokenizer(work.source), tokens)


def first_adapter(wrapped: Any, folder: Any) -> None:
    """Keep PiSSA's first adapter: PEFT subtracts it when the trained one is written, since PiSSA took it out of the base."""
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(folder, safe_serialization=True)


def attention(work: Any) -> str | None:
    """The attention implementation: the plan's, or the one that shares common beginnings where the plan's is exact and slow."""
    from helpers.model import packed_attention as packed
    from helpers.model import prefix_sharing

    packed.register()
    if getattr(work.params, "loss", "orpo") != "orpo":
        return "sdpa"
    return prefix_sharing.register() if work.plan.packed and work.plan.attention == packed.SDPA else work.plan.attention


def collator(work: Any, pairs: bool) -> Any:
    """Rows to batches: packed with common beginnings shared, packed, or padded, as the plan says."""
    from helpers.model import packed_attention as packed

    layout = "packed" if work.plan.packed else "padded"
    share = work.plan.packed and work.plan.backend == "hf" and work.plan.attention == packed.SDPA
    kind = SharedPairCollator if pairs else SharedCollator
    return kind(work.tokenizer.pad_token_id, layout, share)


def trainer(work: Any, numbers: precision.Precision) -> Any:
    """The TRL trainer of this job, its rows in place."""
    loss = getattr(work.params, "loss", "")
    if loss in ("dpo", "kto", "simpo"):
        from helpers.train import other_losses

        return other_losses.trainer(work, numbers)
    options = config.common(
        work.stage, work.params, numbers, len(work.train_rows), len(work.held_out or ()), work.plan.accumulation
    )
    made = (_orpo if loss == "orpo" else _sft)(work, options)
    distributed.shard(made)
    precision.keep_in_fp32(work.model)
    padded = not work.plan.packed
    train = PackedRows(
        work.train_rows,
        batch_size=work.params.batch_size,
        accumulation=work.plan.accumulation,
        world_size=job.world_size(),
        seed=work.params.seed,
        lengths=lengths_of(work.train_rows, padded),
        budget=work.plan.row_tokens or None,
        padded=padded,
    )
    held_out = None
    if work.held_out is not None:
        held_out = PackedRows(
            work.held_out,
            batch_size=min(work.params.batch_size, 8) * job.world_size(),
            accumulation=1,
            world_size=job.world_size(),
            shuffle=False,
            lengths=lengths_of(work.held_out, padded),
            padded=padded,
        )
    from helpers.model.chunked_loss import can_fuse
    from helpers.model.packed_attention import check_boundaries

    causal = work.model.get_base_model() if hasattr(work.model, "peft_config") else work.model
    made.use_rows(train, held_out, collator(work, bool(loss)), fused=not can_fuse(causal))
    if work.plan.backend == "unsloth":  # its trainers leave the model set for inference, without recomputation
        work.model.for_training()
    elif work.plan.packed:
        with made.accelerator.autocast():
            check_boundaries(work.model)
    made.optimizer, _ = methods.optimizer_of(work.model, work.params, made.args)
    quiet(made)
    return made


def quiet(made: Any) -> None:
    """Leave out the trainer's own line a step: `callbacks.LiveCurve` speaks for it."""
    from transformers import PrinterCallback

    made.remove_callback(PrinterCallback)


def _sft(work: Any, options: dict[str, Any]) -> Any:
    from trl import SFTConfig

    from helpers.train.trainers import RowSFTTrainer

    arguments_ = SFTConfig(
        **options,
        loss_type="nll",
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,
        padding_free=False,
        neftune_noise_alpha=work.params.neftune_alpha or None,
    )
    return RowSFTTrainer(
        model=work.model,
        args=config.one_gpu(arguments_),
        train_dataset=work.train_rows,
        eval_dataset=work.held_out,
        processing_class=work.tokenizer,
    )


def _orpo(work: Any, options: dict[str, Any]) -> Any:
    from helpers.train.trainers import RowORPOTrainer  # before TRL's, which it keeps quiet
    from trl.experimental.orpo import ORPOConfig  # isort: skip

    arguments_ = ORPOConfig(**options, beta=work.params.beta, max_length=work.params.max_length, disable_dropout=False)
    return RowORPOTrainer(
        model=work.model,
        args=config.one_gpu(arguments_),
        train_dataset=work.train_rows,
        eval_dataset=work.held_out,
        processing_class=work.tokenizer,
    )
