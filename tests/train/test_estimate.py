"""What 02 and 03 would come to, as the sliders move: the planner's figures, for every GPU, without opening a job."""

import math
from dataclasses import replace

import pytest
import train_data

from helpers import params as parameters
from helpers import runs
from helpers.errors import TunebookError
from helpers.planner import cost_model
from helpers.planner import plan as planner
from helpers.train import examples, training


def settings(data, stage, **given):
    """max_length 0 stands for one that cuts off about half of the pairs."""
    if given.get("max_length") == 0:
        counts = examples.token_counts(data, train_data.settings(stage, **{**given, "max_length": 512}))
        given["max_length"] = int(sorted(counts[:, 0] + counts[:, 1:].max(1))[len(counts) // 2])
    return train_data.settings(stage, **given)


@pytest.mark.parametrize(
    "stage, given",
    [
        ("sft", {}),
        ("sft", {"rank": 64, "batch_size": 2, "epochs": 2.5}),
        ("sft", {"train_on": "all", "method": "lora", "max_steps": 7}),
        ("sft", {"packing": False, "group_by_length": True}),
        ("orpo", {"start_from": "base"}),
        ("orpo", {"start_from": "base", "loss": "dpo", "max_prompt_length": 16}),
        ("orpo", {"start_from": "base", "loss": "kto", "max_length": 0}),
    ],
)
def test_the_estimate_is_the_plan_of_the_job_that_is_opened_then(data, stage, given):
    params = settings(data, stage, **given)
    trained, every, outlooks = training.Estimate()(params)
    plan = training.open(params).planned
    assert outlooks[0].seconds == plan.seconds
    assert outlooks[0].need_gib == plan.option.need_gib
    assert trained == cost_model.trained_parameters(plan.shape, plan.setting) < every == plan.shape.parameters
    assert [o.card.name for o in outlooks[1:]] == ["T4", "L4", "A100-40", "A100-80", "H100"]
    assert all(o.need_gib > 0 for o in outlooks)


@pytest.mark.parametrize("stage, given", [("sft", {}), ("sft", {"train_on": "all"}), ("orpo", {"max_length": 0})])
def test_row_lengths_are_those_of_the_rows_that_are_trained(data, stage, given):
    params = settings(data, stage, **given)
    train = examples.read(data, params)[0]
    plain, padded = examples.lengths_at(examples.token_counts(data, params), params)
    assert plain == examples.lengths_of(train) and padded == examples.lengths_of(train, padded=True)


def test_rows_without_a_trained_token_are_left_out_of_the_estimate_too(narrow_llama, tokenizer, runs_root):
    rows = train_data.sft_rows(tokenizer, 24)
    for row in rows[::3]:
        row["completion_mask"] = [0] * len(row["input_ids"])
    rows[1]["completion_mask"] = [1] + [0] * (len(rows[1]["input_ids"]) - 1)  # the first is never predicted
    data = train_data.data_stage("masked", narrow_llama, tokenizer, train=rows)
    for train_on, left in (("completion", 15), ("all", 24)):
        params = train_data.settings("sft", run="masked", train_on=train_on)
        plain = examples.lengths_at(examples.token_counts(data, params), params)[0]
        assert plain == examples.lengths_of(examples.read(data, params)[0]) and len(plain) == left


def test_a_change_is_followed_and_the_rows_are_read_once(data, monkeypatch):
    reads, counts = [], examples.token_counts
    monkeypatch.setattr(examples, "token_counts", lambda *given: reads.append(given) or counts(*given))
    estimate = training.Estimate()
    small, large = (estimate(train_data.settings("sft", max_steps=0, rank=rank)) for rank in (4, 64))
    long = estimate(train_data.settings("sft", max_steps=0, rank=64, epochs=4.0))
    estimate(train_data.settings("sft", max_steps=0, rank=64, train_on="all"))
    assert large[0] == 16 * small[0] and large[2][0].need_gib > small[2][0].need_gib
    assert long[2][0].seconds[0] > 3 * large[2][0].seconds[0]
    assert len(reads) == 1


def test_many_rows_are_sampled_and_come_to_the_same(data, monkeypatch):
    params = train_data.settings("sft", max_steps=0, epochs=3.0, batch_size=2)
    whole = training.Estimate()(params)[2]
    monkeypatch.setattr(training, "MOST_ROWS", max(2, examples.token_counts(data, params).shape[0] // 2))
    sampled = training.Estimate()(params)[2]
    for exact, about in zip(whole, sampled, strict=True):
        assert math.isclose(about.seconds[0], exact.seconds[0], rel_tol=0.3)
        assert math.isclose(about.need_gib, exact.need_gib, rel_tol=0.05)


def test_what_cannot_run_says_why_for_its_gpu_alone(data):
    outlooks = training.Estimate()(train_data.settings("sft", precision="bf16", plan_for="L4"))[2]
    why = {o.card.name: o.why for o in outlooks[1:]}
    assert "bf16" in why["T4"] and not why["H100"] and outlooks[0].card.name == "L4"


def test_what_does_not_fit_is_refused_with_the_planners_own_words(data, monkeypatch):
    small = replace(cost_model.CARDS["T4"], total_gib=0.5)
    monkeypatch.setitem(cost_model.CARDS, "T4", small)
    params = train_data.settings("sft", plan_for="T4", method="full")
    here = training.Estimate()(params)[2][0]
    with pytest.raises(planner.DoesNotFit) as refused:
        training.open(params)
    assert here.why == str(refused.value) and here.need_gib == refused.value.need_gib > 0.5
    assert here.seconds is None and "use a" in here.why


@pytest.mark.parametrize(
    "given, said",
    [
        ({"run": "empty"}, "has not been run"),
        ({"model": "some/model"}, "not on this machine yet"),
        ({"model": "no model at all"}, "not on this machine yet"),
        ({"start_from": "sft"}, "02_qlora_sft"),
        ({"start_from": "nowhere"}, "holds no adapter"),
        ({"max_length": 16}, "raise max_length"),
    ],
)
def test_where_nothing_can_be_estimated_the_reason_is_said(data, given, said):
    with pytest.raises(TunebookError, match=said):
        training.Estimate()(parameters.resolve("orpo", {"run": "r", "start_from": "base", **given}))


def test_the_estimate_writes_nothing_and_freezes_nothing(data):
    before = sorted(runs.root().rglob("*"))
    params = train_data.settings("sft", max_steps=0)
    training.Estimate()(params)
    params.rank = 8
    assert sorted(runs.root().rglob("*")) == before
