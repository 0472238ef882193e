"""SFT: the arithmetic of packed and shared rows, what a run leaves behind, what is refused."""

import json
import math
import weakref

import pytest
import torch
import train_data
from transformers import get_scheduler

from helpers import params as parameters
from helpers import plots, runs
from helpers.errors import TunebookError
from helpers.model import packed_attention
from helpers.model.loading import fast_bf16
from helpers.planner import row_plan
from helpers.train import callbacks, config, examples, rows, training


def settings(**given):
    return train_data.settings("sft", **{"max_steps": 3, "eval_steps": 3, **given})


def prepared(**given):
    return training.open(settings(**given))


def trained(**given):
    job = prepared(**given)
    job.train()
    return job


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


# ---------------------------------------------------------------- the loss


@pytest.fixture(scope="module")
def small(narrow_llama):
    """The narrow Llama in fp32 with an adapter whose B is not zero, and the fused loss."""
    from peft import LoraConfig, get_peft_model

    from helpers.model import fused_lora
    from helpers.model.loading import load_model

    model = load_model(narrow_llama, dtype="fp32", attention=packed_attention.register())
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    fused_lora.apply(model)
    return model


def loss_and_gradient(model, batch):
    batch = {k: v for k, v in batch.items() if k not in ("row_ids", "tokens")}
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def test_rows_with_a_shared_prefix_have_the_loss_and_gradient_of_separate_rows(small, tokenizer):
    documents = train_data.sft_rows(tokenizer, 6)
    shared = rows.RowCollator(tokenizer.pad_token_id, share=True)([documents])
    assert shared["prefix_length"] > 40 and shared["input_ids"].shape[1] < 0.6 * shared["tokens"]
    count = sum(sum(d["completion_mask"]) for d in documents)
    small.zero_grad()
    expected = 0.0
    for d in documents:
        logits = small(input_ids=torch.tensor([d["input_ids"]])).logits[0, :-1]
        target = torch.tensor([i if m else -100 for i, m in zip(d["input_ids"], d["completion_mask"], strict=True)])[1:]
        loss = torch.nn.functional.cross_entropy(logits, target, ignore_index=-100, reduction="sum") / count
        loss.backward()
        expected += loss.item()
    gradient = torch.cat([p.grad.flatten() for p in small.parameters() if p.requires_grad])
    for layout, share in (("packed", True), ("packed", False), ("padded", False)):
        loss, found = loss_and_gradient(small, rows.RowCollator(tokenizer.pad_token_id, layout, share)([documents]))
        assert loss == pytest.approx(expected, rel=1e-4), (layout, share)
        assert (found - gradient).norm() < 1e-4 * gradient.norm(), (layout, share)


def test_only_answers_and_their_end_of_turn_are_trained(data, tokenizer):
    from helpers.model.stop_tokens import end_of_turn

    found, counts = examples.supervised(data, "train.parquet")
    assert counts == {"rows": 32, "without trained tokens": 0}
    for row in found:
        kept = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        assert (
            tokenizer.decode(kept).startswith("SELECT")
            and kept[-1] == end_of_turn(tokenizer)
            and kept.count(kept[-1]) == 1
        )
    every, _ = examples.supervised(data, "train.parquet", "all")
    assert all(label != -100 for label in every[0]["labels"])


def test_a_prefix_is_shared_only_up_to_the_first_trained_token(tokenizer):
    text = tokenizer("one two three four five six seven eight nine ten " * 2)["input_ids"]
    same = [{"input_ids": [*text, n], "labels": [*text, n]} for n in (5, 6)]
    assert packed_attention.shareable(same) == 0
    masked = [{"input_ids": [*text, n], "labels": [-100] * len(text) + [n]} for n in (5, 6)]
    assert packed_attention.shareable(masked) == len(text) - 1


def test_one_row_of_eight_trains_like_eight_rows_of_one(data):
    one = trained(row_tokens=1200, packing=True)
    longest = max(len(i) for i in one.train_rows["input_ids"])
    eight = trained(row_tokens=longest)
    assert one.planned.accumulation == 1 and eight.planned.accumulation >= 6
    first, second = (plots.series(callbacks.read(j.log), "loss")[1] for j in (one, eight))
    assert first == pytest.approx(second, rel=1e-4)
    assert (flat(one.model) - flat(eight.model)).norm() < 2e-3 * flat(one.model).norm()


def test_unpacked_rows_train_like_packed_ones(data):
    packed, padded = trained(), trained(packing=False)
    assert packed.planned.packed and not padded.planned.packed
    first, second = (plots.series(callbacks.read(j.log), "loss")[1] for j in (packed, padded))
    assert first == pytest.approx(second, rel=1e-3)


# ---------------------------------------------------------------- what a run leaves behind


def test_a_run_leaves_adapter_log_pictures_tensorboard_and_a_manifest(data, narrow_llama):
    job = trained(method="qlora", precision="auto", max_steps=6, eval_steps=2, sample_every=3, learning_rate=3e-3)
    manifest = job.finish()
    files = manifest.data["artifacts"]
    assert {
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "adapter/tokenizer.json",
        "log.jsonl",
        "loss.png",
    } <= set(files)
    assert list((manifest.path / "tensorboard").glob("events.*"))
    lines = [json.loads(line) for line in (manifest.path / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert all({"learning_rate", "grad_norm", "tokens_per_s", "memory_gib", "left_s"} <= set(line) for line in steps)
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4, 6]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3
    config = json.loads((manifest.path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(narrow_llama) and config["r"] == 4
    written = [json.loads(line) for line in (manifest.path / "samples.jsonl").read_text().splitlines()]
    asked = [question for question, _, _ in train_data.questions(4, seed=1)]
    assert [row["question"] for row in written[:4]] == asked, "the question alone, without the schema"
    assert {row["step"] for row in written} == {3, 6} and all(row["reference"].startswith("SELECT") for row in written)
    assert manifest.metrics["trained_tokens"] > 0 and manifest.data["plan"]["errors"]
    assert runs.load("r", "sft").data["template_hash"] == data.data["template_hash"]


def test_the_written_adapter_answers_as_the_trained_model(data, narrow_llama):
    from peft import PeftModel

    from helpers.model.loading import load_model

    for given in ({"rslora": True, "lora_plus_ratio": 16.0}, {"dora": True}, {"init": "pissa"}):
        job = trained(best_checkpoint=False, **given)
        ids = torch.tensor([job.train_rows[0]["input_ids"]])
        with torch.no_grad():
            live = job.model.eval()(input_ids=ids).logits
        folder = job.finish().path / "adapter"
        with torch.no_grad():
            base = load_model(narrow_llama, dtype="fp32").eval()
            before = base(input_ids=ids).logits
            again = PeftModel.from_pretrained(base, folder).eval()(input_ids=ids).logits
        assert (live - again).abs().max() < 1e-3 < 0.05 < (live - before).abs().max(), given


def test_the_checkpoint_with_the_best_held_out_loss_is_kept_and_a_stale_run_stops(data):
    job = trained(
        max_steps=12,
        eval_steps=2,
        early_stopping=2,
        learning_rate=0.05,
        rank=16,
        schedule="constant",
        epochs=12,
        keep_checkpoints=2,
    )
    held = {line["step"]: line["eval_loss"] for line in callbacks.read(job.log) if "eval_loss" in line}
    best = min(held, key=held.get)
    assert job.result["best_step"] == best and job.result["eval_loss"] == pytest.approx(held[best], rel=1e-6)
    assert max(held) < 12 or best >= 10
    assert job.trainer.evaluate()["eval_loss"] == pytest.approx(held[best], rel=1e-4)


def test_the_held_out_loss_is_the_mean_over_tokens_whatever_the_rows(data):
    job = prepared().build()
    whole = job.trainer.evaluate()["eval_loss"]
    job.trainer.held_out_rows = rows.PackedRows(job.held_out, row_plan.Batches(3), accumulation=1, shuffle=False)
    assert job.trainer.evaluate()["eval_loss"] == pytest.approx(whole, rel=1e-5)


def test_curves_are_drawn_from_the_log(data, tmp_path):
    lines = [
        {"step": s, "loss": 3 / s, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens_per_s": 100.0} for s in range(1, 30)
    ] + [{"step": 15, "eval_loss": 0.4}]
    figure = plots.training_curves(lines)
    left = figure.axes[0]
    assert [len(line.get_xdata()) for line in left.get_lines()] == [29, 29, 1]
    assert plots.smoothed([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])


# ---------------------------------------------------------------- the notebook's steps


def test_nothing_is_written_or_set_aside_before_the_first_step(data):
    trained(max_steps=1).finish()
    manifest = (runs.folder("r", "sft") / "manifest.json").read_bytes()
    job = prepared(max_steps=2)
    assert "steps" in repr(job.plan()) and "SELECT" in repr(job.first_row()) and "32" in repr(job.left_out())
    assert (runs.folder("r", "sft") / "manifest.json").read_bytes() == manifest
    with pytest.raises(TunebookError, match="has not been trained"):
        job.summary()
    job.train()
    assert not (runs.folder("r", "sft") / "manifest.json").exists()


def test_a_step_called_twice_shows_the_first_and_a_finished_run_shows_everything_from_disk(data, monkeypatch):
    job = trained()
    weights, first = flat(job.model).clone(), job.train()
    assert job.train() is first and torch.equal(flat(job.model), weights) and job.trainer.state.global_step == 3
    shown = {name: repr(getattr(job, name)()) for name in ("plan", "first_row", "summary", "answers")}
    assert job.answers() is job.answers() and job.figure() is job.figure()
    asked = [question for question, _, _ in train_data.questions(4, seed=1)]
    assert len((job.stage.path / "samples.jsonl").read_text().splitlines()) == 4
    assert all(question in shown["answers"] for question in asked) and "Tables:" not in shown["answers"]
    manifest = job.finish()
    assert job.finish() is manifest
    monkeypatch.setattr(training, "_base", lambda *given: pytest.fail("a finished run needs no model"))
    again = prepared()
    assert repr(again.train()) == repr(first) and again.finish().sha256 == manifest.sha256
    assert {name: repr(getattr(again, name)()) for name in shown} == shown
    assert again.figure().data.startswith(b"\x89PNG")


def test_a_finished_job_lets_go_of_its_model(data):
    job = trained()
    model, trainer, optimizer = (weakref.ref(x) for x in (job.model, job.trainer, job.trainer.optimizer))
    job.finish()
    assert model() is None and trainer() is None and optimizer() is None
    with pytest.raises(TunebookError, match="no longer in memory"):
        job.answers()


# ---------------------------------------------------------------- methods


@pytest.mark.parametrize(
    "given",
    [
        {"method": "full", "learning_rate": 1e-4},
        {"method": "freeze", "freeze_layers": 1, "learning_rate": 1e-3},
        {"dora": True},
        {"method": "qlora", "init": "loftq"},
        {"neftune_alpha": 5.0, "packing": False},
        {"target_modules": "q_proj, v_proj", "optimizer": "adamw_8bit"},
        {"optimizer": "lion", "learning_rate": 1e-4},
        {"optimizer": "sgd", "learning_rate": 0.1},
        {"dropout": 0.1, "recompute": "all"},
    ],
    ids=lambda g: "-".join(map(str, g.values())),
)
def test_every_method_trains_and_can_be_kept(data, given):
    job = prepared(max_steps=2, eval_steps=2, warmup_ratio=0.0, **given).build()
    before = job.trainer.evaluate()["eval_loss"]
    job.train()
    assert (
        all(math.isfinite(x) for x in plots.series(callbacks.read(job.log), "loss")[1])
        and job.result["eval_loss"] < before
    )
    manifest = job.finish()
    kept = (
        "model/model.safetensors" if given.get("method") in ("full", "freeze") else "adapter/adapter_model.safetensors"
    )
    assert kept in manifest.data["artifacts"]
    whole = given.get("method") in ("full", "freeze")
    assert ("the model's weights are trained in fp32 and written in bf16" in manifest.data["notes"]) == whole


@pytest.mark.parametrize("packing", [True, False])
def test_sample_answers_leave_the_training_as_it_was(data, packing):
    given = {"dropout": 0.3, "max_steps": 4, "packing": packing}
    plain, sampled = (
        plots.series(callbacks.read(trained(**given, sample_every=every).log), "loss")[1] for every in (0, 1)
    )
    assert sampled == pytest.approx(plain, rel=1e-6)


def test_lora_plus_lets_b_learn_faster_than_a(data):
    job = trained(lora_plus_ratio=16.0, max_steps=1, schedule="constant", warmup_ratio=0.0)
    rates = {id(w): group["lr"] for group in job.trainer.optimizer.param_groups for w in group["params"]}
    rate = {"A": set(), "B": set()}
    for name, weight in job.model.named_parameters():
        if weight.requires_grad:
            rate["B" if "lora_B" in name else "A"].add(rates[id(weight)])
    assert rate == {"A": {job.planned.learning_rate}, "B": {16 * job.planned.learning_rate}}


def test_loftq_starts_nearer_to_the_sixteen_bit_base_and_its_adapter_is_merged_onto_the_four_bit_one(
    data, narrow_llama, tokenizer
):
    from helpers.model.loading import load_model

    def logits(model):
        with torch.no_grad():
            return model.eval()(input_ids=ids).logits.float()

    plain, loftq = (prepared(method="qlora", rank=32, **more).build() for more in ({}, {"init": "loftq"}))
    ids = torch.tensor([plain.train_rows[0]["input_ids"]])
    exact = logits(load_model(narrow_llama, dtype="fp32"))
    assert (logits(loftq.model) - exact).norm() < 0.8 * (logits(plain.model) - exact).norm()
    loftq.train()
    first = loftq.finish()
    train_data.data_stage("further", narrow_llama, tokenizer)
    further = trained(run="further", method="qlora", start_from=str(first.path / "adapter"), max_steps=1).finish()
    assert first.data["merge_onto"] == further.data["merge_onto"] == "nf4"


def test_frozen_layers_stay_as_they_were(data, narrow_llama):
    from helpers.model.loading import load_model

    job = trained(method="freeze", freeze_layers=1, learning_rate=1e-2)
    before = dict(load_model(narrow_llama, dtype="fp32").named_parameters())
    changed = {
        n for n, p in job.model.named_parameters() if not torch.equal(p.detach().float(), before[n].detach().float())
    }
    assert changed and all(".layers.1." in n for n in changed)


def test_schedules_end_where_they_should(data):
    rates = {}
    for schedule in ("linear", "cosine", "constant", "wsd"):
        job = prepared(schedule=schedule, max_steps=10, warmup_ratio=0.1, learning_rate=1e-3)
        made = config.arguments(job.stage, config.precision_of(None, "fp32"), job.planned, 8)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=made["learning_rate"])
        options = made["lr_scheduler_kwargs"] or None
        course = get_scheduler(
            made["lr_scheduler_type"],
            optimizer,
            made["warmup_steps"],
            made["max_steps"],
            scheduler_specific_kwargs=options,
        )
        rates[schedule] = []
        for _ in range(10):
            rates[schedule].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            course.step()
    assert rates["constant"][-1] == rates["constant"][2] == pytest.approx(1e-3)
    assert rates["wsd"][6] == pytest.approx(1e-3) and rates["wsd"][-1] < 9e-4
    assert rates["linear"][-1] < 2e-4 and rates["cosine"][-1] < 5e-5


REFUSED = [
    ({"init": "loftq", "method": "lora"}, None),
    ({"init": "pissa", "method": "qlora"}, None),
    ({"dora": True, "init": "pissa"}, None),
    ({"method": "full", "lora_plus_ratio": 16.0}, None),
    ({"lora_plus_ratio": 16.0, "optimizer": "lion"}, None),
    ({"lora_plus_ratio": 0.5}, None),
    ({"neftune_alpha": 5.0}, None),
    ({"method": "full", "dora": True}, None),
    ({"method": "full", "start_from": "somewhere"}, None),
    ({"optimizer": "paged_adamw"}, None),
    ({"precision": "fp16"}, None),
    ({"precision": "bf16"}, (7, 5)),
    ({"method": "full", "precision": "auto"}, (7, 5)),
    ({"early_stopping": 2, "best_checkpoint": False}, None),
    ({"warmup_ratio": 1.0}, None),
    ({"quantize": "fp8"}, None),
    ({"quantize": "fp8"}, (8, 6)),
    *(
        ({"quantize": "fp8", **other}, (9, 0))
        for other in (
            {"method": "qlora"},
            {"method": "full"},
            {"precision": "fp16"},
            {"dora": True},
            {"backend": "unsloth"},
        )
    ),
]


@pytest.mark.parametrize(
    "given,card", REFUSED, ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else str(x)
)
def test_a_combination_that_cannot_work_is_refused_with_its_reason(given, card):
    with pytest.raises(TunebookError, match=r"This cannot work: .+; set|This cannot work: .+; take") as found:
        config.check(parameters.resolve("sft", {"method": "lora", "precision": "auto", **given}), card)
    assert str(next(iter(given.values()))) in str(found.value) or next(iter(given)) in str(found.value)


def test_pissa_is_refused_where_the_model_is_sharded(monkeypatch):
    given = parameters.resolve("sft", {"method": "lora", "init": "pissa"})
    config.check(given)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TunebookError, match="this run is sharded; set init to 'default'"):
        config.check(given)


def test_what_the_table_does_not_name_is_let_through():
    for given, card in (
        ({}, None),
        ({}, (7, 5)),
        ({"optimizer": "paged_adamw_8bit"}, (8, 0)),
        ({"method": "full"}, (9, 0)),
        ({"dora": True, "rslora": True}, None),
    ):
        config.check(parameters.resolve("sft", given), card)


def test_precision_follows_the_card():
    for capability in ((8, 0), (9, 0)):
        assert config.precision_of(capability)[0] == "bf16"
    assert config.precision_of((7, 5))[0] == "fp16"
    assert config.precision_of(None)[0] == ("bf16" if fast_bf16() else "fp32")
    assert config.precision_of(None, "fp32")[0] == "fp32" and config.precision_of(None, "bf16")[0] == "bf16"


def test_trained_weights_stay_in_fp32_beside_a_4_bit_base(data):
    job = prepared(method="qlora", precision="auto").build()
    assert {p.dtype for p in job.model.parameters() if p.requires_grad} == {torch.float32}
    from bitsandbytes.nn import Linear4bit

    layers = [m for m in job.model.modules() if isinstance(m, Linear4bit)]
    assert layers and all(m.weight.quant_state.quant_type == "nf4" and m.weight.quant_state.nested for m in layers)


# ---------------------------------------------------------------- bad input


def test_target_modules_that_the_model_lacks_are_named(data):
    with pytest.raises(TunebookError, match=r"target_modules is 'foo'.*q_proj"):
        trained(target_modules="foo")


def test_rows_whose_tokens_are_all_masked_are_refused(runs_root, narrow_llama, tokenizer):
    masked = [{**row, "completion_mask": [0] * len(row["input_ids"])} for row in train_data.sft_rows(tokenizer, 4)]
    some = train_data.sft_rows(tokenizer, 4) + masked[:2]
    train_data.data_stage("r", narrow_llama, tokenizer, train=some)
    assert prepared().counts["train"] == {"rows": 6, "without trained tokens": 2}
    train_data.data_stage("all", narrow_llama, tokenizer, train=masked)
    with pytest.raises(TunebookError, match="every token is masked"):
        prepared(run="all")


def test_a_run_before_its_data_is_refused(runs_root):
    with pytest.raises(TunebookError, match="run notebook 01_data_prep"):
        prepared(run="nothing")


def test_loggers_and_steps_are_checked():
    with pytest.raises(TunebookError, match="loggers names 'tensorflow'"):
        config.loggers("tensorflow")
    with pytest.raises(TunebookError, match="set save_steps to 20"):
        config.timetable(parameters.resolve("sft", {"eval_steps": 10, "save_steps": 15}), 13)
    made = config.timetable(parameters.resolve("sft"), 13)
    assert (made["max_steps"], made["eval_steps"], made["save_steps"]) == (13, 3, 3)


def test_padded_rows_of_one_micro_batch_give_the_losses_of_one_row_at_a_time(data):
    def losses(**given):
        job = trained(packing=False, batch_size=4, seed=3, **given)
        lines = map(json.loads, (job.stage.path / "log.jsonl").read_text().splitlines())
        return job.planned.accumulation, [line["loss"] for line in lines if "loss" in line]

    (one, together), (four, alone) = losses(row_tokens=4096), losses(micro_batch=1, accumulation=4)
    assert (one, four) == (1, 4) and len(alone) == 3 and together == pytest.approx(alone, rel=1e-4)
