"""Rows padded into a few forms train as they would by themselves; with CUDA their graphs give the same losses."""

import random

import pytest
import torch
import train_data

from helpers.planner import plan as planner
from helpers.train import graphs, training
from helpers.train.rows import RowCollator


def row_of(*lengths):
    draw = random.Random(0)
    return RowCollator(0)([[{"input_ids": [draw.randrange(3, 900) for _ in range(n)]} for n in lengths]])


def gradients(model):
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


def assert_same(found, known, least=1):
    assert found.keys() == known.keys() and len(known) >= least
    for name, grad in known.items():
        assert torch.allclose(found[name], grad, atol=1e-5 * max(1.0, grad.abs().max().item())), name


@pytest.mark.parametrize(
    "lengths, form",
    [
        ((9, 30, 4), (64, 8, 32, 64)),
        ((33,), (256, 9, 64, 33)),
        ((1,), (128, 3, 128, 128)),
        ((7,) * 6, (42, 6, 7, 40)),  # nothing is left to pad
        ((64, 64), (128, 2, 64, 126)),
        ((5, 70), (200, 4, 70, 80)),
    ],
)
def test_a_padded_row_is_whole_and_its_tail_is_documents_without_labels(lengths, form):
    row, form = row_of(*lengths), graphs.Form(*form)
    assert form.holds(row)
    made, count = graphs.padded(row, form), sum(lengths)
    ends = made["cu_seq_lens_q"].tolist()
    assert ends[: len(lengths) + 1] == row["cu_seq_lens_q"].tolist() and ends[-1] == form.tokens
    assert len(ends) == form.documents + 1 and made["cu_seq_lens_q"].dtype == torch.int32
    sizes = made["cu_seq_lens_q"].diff()
    assert sizes.min() >= 0 and sizes.max() <= form.longest == made["max_length_q"]
    assert made["input_ids"].shape == made["labels"].shape == made["position_ids"].shape == (1, form.tokens)
    assert (made["labels"][0, count:] == -100).all() and made["position_ids"].max() < form.longest
    positions = made["loss_positions"].tolist()
    trained = row["loss_positions"].tolist()
    assert len(positions) == form.positions and positions[: len(trained)] == trained
    assert set(positions[len(trained) :]) <= {form.tokens - 1}


@pytest.mark.parametrize(
    "lengths, form", [((9, 30), (32, 8, 32, 64)), ((9, 9, 9), (64, 3, 9, 64)), ((9, 30), (64, 8, 32, 20))]
)
def test_a_row_that_has_no_room_in_a_form_is_not_held(lengths, form):
    assert not graphs.Form(*form).holds(row_of(*lengths))


def test_forms_hold_every_row_that_they_were_made_for():
    draw = random.Random(0)
    for _ in range(40):
        lengths = [draw.randint(1, 900) for _ in range(50)]
        rows = [draw.sample(lengths, draw.randint(1, 9)) for _ in range(30)]
        made = graphs.forms([sum(row) for row in rows], lengths, 9)
        assert 1 <= len(made) <= 3 and [f.tokens for f in made] == sorted({f.tokens for f in made})
        for row in rows:
            form = next(f for f in made if f.tokens >= sum(row))
            room = (form.documents - len(row)) * form.longest
            assert max(row) <= form.longest and form.tokens <= sum(row) + room


@pytest.mark.parametrize(
    "stage, shares, given",
    [
        ("sft", False, {"accumulation": 2}),
        ("sft", True, {}),
        ("sft", False, {"train_on": "all", "method": "full"}),
        ("orpo", False, {"start_from": "base", "accumulation": 2}),
        ("orpo", False, {"start_from": "base", "loss": "kto", "beta": 0.1}),
    ],
)
def test_losses_and_gradients_are_those_of_the_rows_as_they_are(data, stage, shares, given, monkeypatch):
    monkeypatch.setattr(planner.Plan, "shares", shares)
    job = training.open(train_data.settings(stage, max_steps=2, batch_size=4, **given)).build()
    trainer, rows = job.trainer, job.trainer.rows

    def step():
        items = [trainer.row_collator([rows[i]]) for i in range(job.planned.accumulation)]
        trainer.current_gradient_accumulation_steps = len(items)
        batches, count = trainer.get_batch_samples(iter(items), len(items), torch.device("cpu"))
        total = sum(float(trainer.training_step(trainer.model, batch, count)) for batch in batches)
        return total, gradients(trainer.model)

    many = max(map(len, rows.rows)) * 2
    known, plain = step()
    trainer.graphs = graphs.Graphs(trainer.model, graphs.forms(rows.costs(), rows.lengths, many))
    found, padded = step()
    assert found == pytest.approx(known, abs=1e-5)
    assert_same(padded, plain, 10)
    assert trainer.graphs.missed == (1 if shares else 0) and not trainer.graphs.off


@pytest.mark.parametrize(
    "given, said",
    [
        ({"cuda_graphs": "auto"}, "they save"),
        ({"cuda_graphs": "off"}, ""),
        ({"cuda_graphs": "on", "recompute": "all"}, "checkpointing"),
        ({"cuda_graphs": "on", "packing": False}, "padded"),
        ({"cuda_graphs": "on", "max_steps": 2}, "they save"),
        ({"cuda_graphs": "auto", "max_steps": 2}, "of the run"),
        ({"cuda_graphs": "on", "plan_for": "T4"}, "document by document"),
    ],
)
def test_the_plan_says_whether_rows_are_graphs_and_why(smollm2, given, said):
    params = train_data.settings("sft", **{"plan_for": "H100", "precision": "auto", "epochs": 3, **given})
    made = planner.plan(params, [150] * 400, smollm2)
    lines = [reason for reason in made.reasons if reason.startswith("CUDA graphs")]
    assert len(lines) == bool(said) and all(said in line for line in lines)
    assert made.setting.graphs == ("launching" in " ".join(lines)) == made.as_dict()["graphs"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need CUDA")
@pytest.mark.parametrize("stage, given", [("sft", {}), ("sft", {"method": "qlora"}), ("orpo", {"start_from": "base"})])
def test_graphs_give_the_losses_of_kernels_that_are_launched_one_by_one(data, stage, given):
    losses = {}
    for way in ("off", "on"):
        params = train_data.settings(stage, again=True, max_steps=6, cuda_graphs=way, precision="auto", **given)
        job = training.open(params)
        job.run()
        losses[way] = [line["loss"] for line in job.lines() if "loss" in line]
        assert job.planned.setting.graphs == (way == "on")
    assert losses["on"] == pytest.approx(losses["off"], abs=1e-3)
