"""Preference training: ORPO against TRL's own arithmetic, direction, dropped pairs, and the losses beside it."""

import json
import math

import pytest
import torch
import train_data
from safetensors.torch import load_file

from helpers import params as parameters
from helpers import plots, runs
from helpers.errors import TunebookError
from helpers.evaluate import candidates
from helpers.train import as_long, callbacks, config, examples, rows, training


def settings(**given):
    return train_data.settings(
        "orpo", **{"start_from": "base", "max_steps": 3, "epochs": 30, "eval_steps": 3, "learning_rate": 1e-3, **given}
    )


def prepared(**given):
    return training.open(settings(**given))


def trained(**given):
    job = prepared(**given)
    job.train()
    return job


def logged(job, name):
    return plots.series(callbacks.read(job.log), name)[1]


def test_the_loss_is_nll_minus_beta_times_the_log_odds_ratio(data):
    for beta in (0.5, 2.0):
        job = trained(beta=beta, row_tokens=4000)
        lines = [line for line in callbacks.read(job.log) if "loss" in line]
        assert len(lines) == 3 and job.planned.accumulation == 1
        for line in lines:
            assert line["loss"] == pytest.approx(line["nll_loss"] - beta * line["log_odds_ratio"], rel=1e-5)
        held = next(line for line in callbacks.read(job.log) if "eval_loss" in line)
        assert held["eval_loss"] == pytest.approx(held["eval_nll_loss"] - beta * held["eval_log_odds_ratio"], rel=1e-6)


def test_packed_pairs_give_trls_own_loss(data, tokenizer):
    """TRL's ORPOTrainer works out the same batch, padded and with whole logits."""
    from trl.experimental.orpo import ORPOTrainer

    job = prepared().build()
    trainer, pairs = job.trainer, [job.train_rows[i] for i in range(5)]
    padded = rows.padded_tensors(
        [
            {"input_ids": p["prompt_ids"] + p[s], "labels": [-100] * len(p["prompt_ids"]) + p[s]}
            for s in ("chosen_ids", "rejected_ids")
            for p in pairs
        ],
        tokenizer.pad_token_id,
    )
    own = {
        f"{side}_{name}": padded[key][part]
        for side, part in (("chosen", slice(0, 5)), ("rejected", slice(5, 10)))
        for name, key in (("input_ids", "input_ids"), ("attention_mask", "attention_mask"), ("labels", "labels"))
    }
    trainer.model.eval()
    with torch.no_grad():
        expected, metrics = ORPOTrainer.get_batch_loss_metrics(trainer, trainer.model, own)
        for layout, share in (("packed", True), ("packed", False), ("padded", False)):
            batch = rows.PairCollator(tokenizer.pad_token_id, layout, share)([pairs])
            assert bool(batch.get("prefix_length")) == (share and layout == "packed")
            trainer.step_tokens, trainer.step_pairs = batch["nll_tokens"], batch["pair_count"]
            trainer.step_seen = batch["tokens"]
            assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected.item(), rel=1e-5)
            nll, answers, tokens, _ = trainer.forward_pairs(trainer.model, batch)
            chosen, rejected = (answers / tokens).split(5)
            assert chosen.mean().item() == pytest.approx(metrics["logps/chosen"], rel=1e-5)
            assert rejected.mean().item() == pytest.approx(metrics["logps/rejected"], rel=1e-5)
            assert nll.item() / batch["nll_tokens"] == pytest.approx(metrics["nll_loss"], rel=1e-5)


def test_one_row_of_eight_pairs_trains_like_many_small_rows(data):
    longest = max(
        2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"])
        for r in examples.pairs(data, "preference.parquet", settings())[0]
    )
    one, many = trained(row_tokens=4000), trained(row_tokens=longest)
    assert one.planned.accumulation == 1 and many.planned.accumulation >= 6
    assert logged(one, "loss") == pytest.approx(logged(many, "loss"), rel=1e-4)


def test_swapped_labels_reverse_the_direction_on_held_out_pairs(data, narrow_llama, tokenizer):
    given = {
        "beta": 2.0,
        "learning_rate": 2e-2,
        "max_steps": 16,
        "eval_steps": 16,
        "method": "lora",
        "rank": 8,
        "alpha": 16,
    }
    right = prepared(**given).build()
    before = right.trainer.evaluate()["eval_log_odds_chosen"]
    right.train()
    pairs = train_data.pair_rows(tokenizer, 24)
    pairs = [{**row, "chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]} for row in pairs]
    train_data.data_stage("swapped", narrow_llama, tokenizer, pairs=pairs)
    swapped = trained(**given, run="swapped")
    assert right.result["log_odds_chosen"] > before + 0.5 > before - 0.5 > swapped.result["log_odds_chosen"]
    assert right.result["held_out_accuracies"] > 0.8 > 0.2 > swapped.result["held_out_accuracies"]


def test_over_long_empty_and_equal_pairs_are_left_out_and_counted(runs_root, narrow_llama, tokenizer):
    pairs = train_data.pair_rows(tokenizer, 12)
    pairs[0]["prompt_ids"] = pairs[0]["prompt_ids"] * 9
    pairs[1]["chosen_ids"] = []
    pairs[2]["rejected_ids"] = pairs[2]["chosen_ids"]
    train_data.data_stage("r", narrow_llama, tokenizer, pairs=pairs)
    job = prepared(max_length=256)
    assert job.counts["train"]["pairs"] == 12 and len(job.train_rows) == 9
    assert job.counts["train"]["left out"] == {"over 256 tokens": 1, "chosen is empty": 1, "chosen equals rejected": 1}
    assert job.counts["train"]["left out ids"] == ["p0-0", "p0-1", "p0-2"]
    table = repr(job.left_out())
    assert "1 over 256 tokens, 1 chosen is empty" in table and "none" in table and "{" not in table and "[" not in table
    with pytest.raises(TunebookError, match=r"has no pair to train on .*; raise max_length"):
        prepared(max_length=16)
    manifest = trained(max_length=256).finish()
    assert manifest.data["data_counts"]["train"]["left out"]["over 256 tokens"] == 1


def test_the_demo_preference_set_trains_without_nan(demo_data, runs_root, narrow_llama, tokenizer):
    from helpers.model.stop_tokens import end_of_turn

    names = {"human": "user", "gpt": "assistant", "system": "system"}
    pairs = []
    for number, row in enumerate(json.loads((demo_data / "dpo_en_demo.json").read_text())[:150]):
        turns = [{"role": names[m["from"]], "content": m["value"]} for m in row["conversations"]]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
        answers = [
            [*tokenizer(row[side]["value"], add_special_tokens=False)["input_ids"], end_of_turn(tokenizer)]
            for side in ("chosen", "rejected")
        ]
        pairs.append(
            {
                "id": str(number),
                "prompt": turns,
                "chosen": [],
                "rejected": [],
                "prompt_ids": prompt,
                "chosen_ids": answers[0],
                "rejected_ids": answers[1],
            }
        )
    train_data.data_stage("r", narrow_llama, tokenizer, pairs=pairs)
    job = trained(max_length=512, max_steps=6, eval_steps=6, batch_size=2)
    assert 0 < sum(job.counts["train"]["left out"].values()) < 150
    assert len(logged(job, "loss")) == 6 and all(
        math.isfinite(x) for name in ("loss", "log_odds_chosen", "grad_norm") for x in logged(job, name)
    )


def test_every_answer_ends_with_one_end_of_turn(data, tokenizer):
    from helpers.model.stop_tokens import end_of_turn

    stop = end_of_turn(tokenizer)
    job = prepared().build()
    for side in ("chosen_ids", "rejected_ids"):
        for answer in job.trainer.train_dataset[side]:
            assert answer[-1] == stop and answer.count(stop) == 1


@pytest.mark.parametrize("loss,beta", [("dpo", 0.1), ("kto", 0.1), ("simpo", 2.0)])
def test_the_losses_beside_orpo_widen_the_margin(data, loss, beta):
    job = trained(
        loss=loss, beta=beta, max_steps=8, eval_steps=8, learning_rate=5e-3, batch_size=4 if loss == "kto" else 2
    )
    losses = logged(job, "loss")
    assert all(math.isfinite(x) for x in losses) and losses[-1] < losses[0]
    assert job.result["eval_loss"] < {"dpo": math.log(2), "kto": 0.5, "simpo": 1.0}[loss]
    assert job.finish().data["artifacts"]["adapter/adapter_model.safetensors"]["bytes"] > 0


def test_every_loss_is_probed_and_ends_in_time(data):
    job = trained(loss="dpo", max_steps=8, max_minutes=1e-6, batch_size=2, best_checkpoint=False)
    assert job.result["steps"] == 1 == job.trainer.state.max_steps and job.planned.measured


@pytest.fixture
def after_sft(data):
    """(adapter folder of a short SFT, the data's manifest)."""
    first = training.open(train_data.settings("sft", max_steps=4, epochs=6, learning_rate=1e-2))
    first.train()
    return first.finish().path / "adapter"


@pytest.mark.parametrize(
    ("loss", "start"), [("dpo", "base"), ("kto", "base"), ("simpo", "base"), ("dpo", "sft"), ("kto", "sft")]
)
def test_packed_losses_are_those_of_trls_own_trainers(data, tokenizer, narrow_llama, tmp_path, request, loss, start):
    """TRL's DPOTrainer, KTOTrainer and CPOTrainer work out the same batch, padded and with whole logits."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    beta, one = 0.3, {"desirable_weight": 1.5, "undesirable_weight": 0.5} if loss == "kto" else {}
    adapter = request.getfixturevalue("after_sft") if start == "sft" else None
    job = prepared(loss=loss, beta=beta, start_from=start, batch_size=10 if loss == "kto" else 5, **one).build()
    trainer, found = job.trainer, {}
    with torch.no_grad():  # away from the reference, as after some steps
        torch.manual_seed(1)
        for weight in trainer.model.parameters():
            if weight.requires_grad:
                weight += 0.05 * torch.randn_like(weight)
    job.model.save_pretrained(tmp_path / "moved")
    group = trainer.rows[0]
    for layout, share in (("packed", True), ("packed", False), ("padded", False)):
        trainer.row_collator = rows.PairCollator(tokenizer.pad_token_id, layout, share, nll=False)
        trainer.references.clear()
        batches, items = trainer.get_batch_samples(iter([trainer.row_collator([group])]), 1, "cpu")
        assert bool(batches[0].get("prefix_length")) == (share and layout == "packed")
        found[layout, share] = trainer.compute_loss(trainer.model, batches[0], num_items_in_batch=items).item()

    plain = AutoModelForCausalLM.from_pretrained(narrow_llama, dtype=torch.float32)
    if start == "base":
        whole = get_peft_model(plain, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    else:
        whole = PeftModel.from_pretrained(plain, adapter, is_trainable=True)
    kind, arguments = {
        "dpo": (DPOTrainer, DPOConfig),
        "kto": (KTOTrainer, KTOConfig),
        "simpo": (CPOTrainer, CPOConfig),
    }[loss]
    given = {"simpo": {"loss_type": "simpo", "simpo_gamma": job.params.simpo_gamma, "cpo_alpha": 0.0}}.get(loss, one)
    texts = train_data.pair_rows(tokenizer, 4)
    raw = [{"prompt": r["prompt"], "chosen": r["chosen"], "rejected": r["rejected"]} for r in texts]
    options = {"output_dir": str(tmp_path / "trl"), "beta": beta, "use_cpu": True, "report_to": [], "bf16": False}
    options |= {"per_device_train_batch_size": 10, "max_length": None, "disable_dropout": True, **given}
    from datasets import Dataset

    own = kind(whole, args=arguments(**options), train_dataset=Dataset.from_list(raw), processing_class=tokenizer)
    own.model.load_adapter(tmp_path / "moved", "default")
    if loss == "simpo":
        made = rows.padded_tensors(
            [
                {"input_ids": p["prompt_ids"] + p[s], "labels": [-100] * len(p["prompt_ids"]) + p[s]}
                for s in ("chosen_ids", "rejected_ids")
                for p in group
            ],
            tokenizer.pad_token_id,
        )
        parts = (("chosen", slice(0, 5)), ("rejected", slice(5, 10)))
        batch = {f"{side}_{name}": made[name][part] for side, part in parts for name in made}
    else:
        columns = ("prompt_ids", "chosen_ids", "rejected_ids") if loss == "dpo" else ("prompt_ids", "completion_ids")
        extra = [{"label": r["label"], "KL_completion_ids": r["other_ids"]} if loss == "kto" else {} for r in group]
        batch = own.data_collator([{c: r[c] for c in columns} | e for r, e in zip(group, extra, strict=True)])
    own.model.eval()
    with torch.no_grad():
        expected = own.compute_loss(own.model, batch).item()
    assert all(value == pytest.approx(expected, rel=1e-4) for value in found.values()), (found, expected)
    if loss == "kto":
        assert trainer.kl == pytest.approx(own._metrics["eval"]["kl"][-1], rel=1e-3)
        assert start == "sft" or trainer.kl > 0


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_sixteen_bit_copies_of_the_adapter_as_it_began_do_not_stand_for_the_one_that_is_trained(after_sft, loss):
    """autocast keeps copies of fp32 weights by their places, and the reference's weights are put into those."""
    job = prepared(loss=loss, start_from="sft", precision="bf16", method="lora", batch_size=4).build()
    with torch.no_grad():
        for weight in job.trainer.trained:
            weight += 0.1 * torch.randn_like(weight)
    found = job.trainer.evaluate()
    assert abs(found["eval_rewards/chosen"]) > 0.01 < abs(found["eval_rewards/rejected"]), found


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_reference_is_asked_once_for_each_answer_in_all_epochs(data, monkeypatch, loss):
    from helpers.train import trainers

    job = prepared(loss=loss, epochs=3, max_steps=0, batch_size=8, eval_steps=100).build()
    forward, asked = trainers.RowPreferenceTrainer.forward_pairs, []

    def counted(self, model, inputs, *more):
        found = forward(self, model, inputs, *more)
        if any(getattr(module, "disable_adapters", None) is True for module in model.modules()):
            asked.extend(inputs["keys"])
        return found

    monkeypatch.setattr(trainers.RowPreferenceTrainer, "forward_pairs", counted)
    job.trainer.train()
    # Twice a pair, and twice an answer of KTO: each prompt with its own and with another one.
    answers = 2 * (len(job.train_rows) + len(job.held_out))
    assert job.trainer.state.epoch == 3 and len(asked) == answers, "not once, or anew in a later epoch"


@pytest.mark.parametrize(("loss", "epochs", "passes"), [("orpo", 3.0, 1), ("dpo", 1.0, 1), ("dpo", 3.0, 2)])
def test_a_probing_row_is_met_for_the_first_time_and_in_later_epochs_again(data, monkeypatch, loss, epochs, passes):
    job = prepared(loss=loss, epochs=epochs, max_steps=0, batch_size=4).build()
    given, known = job.trainer.get_batch_samples, []

    def counted(*args):
        known.append(len(job.trainer.references))
        return given(*args)

    monkeypatch.setattr(job.trainer, "get_batch_samples", counted)
    job._probe()
    assert len(known) == 2 * passes and known[::passes] == [0, 0]
    assert all(known[passes - 1 :: passes]) == (passes == 2), "the reference is kept for the second pass"


def test_it_starts_from_the_sft_adapter_from_the_base_or_from_a_folder(data, tokenizer):
    first = training.open(train_data.settings("sft", max_steps=6, epochs=6, learning_rate=1e-2))
    first.train()
    adapter = first.finish().path / "adapter"

    def nll(**given):
        return prepared(**given).build().trainer.evaluate()["eval_nll_loss"]

    base, after, folder = nll(), nll(start_from="sft"), nll(start_from=str(adapter))
    assert after == pytest.approx(folder, rel=1e-6) and after < base - 0.05
    assert set(prepared(start_from="sft").stage.parents) == {"data", "sft"}
    assert set(prepared().stage.parents) == {"data"}


def test_sft_goes_on_for_as_long_and_is_judged_beside_it(after_sft):
    job = prepared(start_from="sft", sft_as_long=True, max_steps=2)
    job.train()
    job.result["train_s"] = 8.0
    done = job.finish()
    after, before = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (job.stage.path / "sft_as_long", job.stage.parents["sft"].path / "adapter")
    )
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert "sft_as_long/adapter_model.safetensors" in done.data["artifacts"] and not (done.path / "work").exists()
    stages = {name: runs.load(job.params.run, name) for name in ("data", "sft", "orpo")}
    longer = next(c for c in candidates.find(stages, "base,sft,orpo") if c.name == candidates.AS_LONG)
    assert longer.adapter == job.stage.path / "sft_as_long" and longer.made_from == "sft"
    assert as_long.train(job.stage, 8.0) == longer.adapter  # once


def test_from_sft_without_an_sft_stage_is_refused(data):
    with pytest.raises(TunebookError, match="run notebook 02_qlora_sft"):
        prepared(start_from="sft")


def test_a_stage_leaves_margins_and_held_out_numbers(data):
    manifest = trained().finish()
    assert {"margins.png", "loss.png", "log.jsonl", "adapter/adapter_model.safetensors"} <= set(
        manifest.data["artifacts"]
    )
    assert {"log_odds_chosen", "held_out_margins", "held_out_accuracies", "eval_loss"} <= set(manifest.metrics)
    figure = plots.preference_curves(
        [
            {"step": 1, "log_odds_chosen": 0.1, "rewards/margins": 0.1, "rewards/accuracies": 0.5},
            {"step": 1, "eval_log_odds_chosen": 0.2},
        ]
    )
    assert len(figure.axes) == 3


@pytest.mark.parametrize(
    "given",
    [{"loss": "kto", "batch_size": 1}, {"loss": "dpo", "beta": 0.0}, {"sft_as_long": True, "start_from": "base"}],
)
def test_a_preference_setting_that_cannot_work_is_refused(given):
    with pytest.raises(TunebookError, match=r"This cannot work"):
        config.check(parameters.resolve("orpo", given))


@pytest.mark.parametrize("held_out", [0, 1], ids=["none was drawn", "the only one is too long"])
def test_without_a_held_out_pair_it_trains_and_says_that_there_is_no_figure(
    runs_root, narrow_llama, tokenizer, capsys, held_out
):
    pairs = [
        {**pair, "prompt_ids": pair["prompt_ids"] * 9} for pair in train_data.pair_rows(tokenizer, held_out, seed=1)
    ]
    train_data.data_stage("r", narrow_llama, tokenizer, held_out_pairs=pairs)
    job = trained(early_stopping=2)
    assert "No pair is held out: this run will have no held-out figure" in capsys.readouterr().out
    assert job.held_out is None and "eval_loss" not in job.result and "no held-out rows" in repr(job.train())
    assert "none: no rows were held out" in repr(job.summary()) and len(job.margins().axes) == 3
    assert "eval_loss" not in job.finish().metrics
