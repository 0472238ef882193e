"""One process or two, data parallel or sharded: the same rows a step, the same losses, checkpoints that move."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys

import pytest
import torch
import train_data

from helpers import machine, runs
from helpers import params as parameters
from helpers.errors import TunebookError
from helpers.model import weights
from helpers.train import config, distributed, training

SMALL = {
    "epochs": 1.0,
    "batch_size": 8,
    "precision": "fp32",
    "best_checkpoint": False,
    "eval_rows": 4,
    "rank": 4,
    "max_steps": 4,
    "save_steps": 2,
    "recompute": "none",
    "learning_rate": 1e-3,
}


def losses(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def trained(runs_root, narrow_llama, tokenizer, run, processes, **changes):
    train_data.data_stage(
        run,
        narrow_llama,
        tokenizer,
        train=train_data.sft_rows(tokenizer, 40),
        held_out=train_data.sft_rows(tokenizer, 4, seed=1),
    )
    return go(run, processes, **changes)


def torchrun(stage, values, processes, nodes=1):
    """Exit status and output of a training stage in several processes, as its user would start it: one torchrun, or
    one on each node, which meet at a rendezvous."""
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes // nodes}"]
    if nodes == 1:
        start += ["--standalone"]
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            start += [f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free.getsockname()[1]}"]
        start += ["--rdzv-id=one", "--local-addr=127.0.0.1"]
    given = [x for name, value in values.as_dict().items() for x in ("-p", name, str(value))]
    command = [*start, "-m", "helpers.train", "--stage", stage, *given]
    how = {"cwd": machine.PROJECT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [subprocess.Popen(command, **how) for _ in range(nodes)]
    said = [one.communicate(timeout=400)[0] for one in started]
    return max(abs(one.returncode) for one in started), "".join(said)


def go(run, processes, nodes=1, **changes):
    """Train the run's SFT stage here, or in that many processes; returns its folder."""
    values = parameters.resolve("sft", {**SMALL, "run": run, **changes})
    if processes > 1:
        status, said = torchrun("sft", values, processes, nodes)
        assert status == 0, said[-3000:]
        return runs.folder(run, "sft")
    from helpers.train.__main__ import train

    train(values)
    return runs.folder(run, "sft")


def test_two_processes_give_the_losses_of_one_and_their_checkpoint_resumes_in_one(
    runs_root, narrow_llama, tokenizer, two_cores
):
    one = losses(trained(runs_root, narrow_llama, tokenizer, "one", 1))
    folder = trained(runs_root, narrow_llama, tokenizer, "two", 2)
    two = losses(folder)
    assert one.keys() == two.keys() == {1, 2, 3, 4}
    for step, loss in one.items():
        assert two[step] == pytest.approx(loss, rel=1e-3), f"step {step}: {loss} alone, {two[step]} in two processes"
    assert runs.load("two", "sft").data["plan"]["world_size"] == 2
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    (folder / "manifest.json").unlink()  # as if killed after step 2
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
    go("two", 1)
    resumed = losses(folder)
    for step in (3, 4):
        assert resumed[step] == pytest.approx(one[step], rel=1e-3)


def test_a_base_in_fp8_is_whole_in_each_of_two_processes(runs_root, narrow_llama, tokenizer, two_cores, monkeypatch):
    monkeypatch.setenv(config.EMULATED, "1")
    given = {"method": "lora", "quantize": "fp8", "max_steps": 2}
    one, folder = (trained(runs_root, narrow_llama, tokenizer, f"of{n}", n, **given) for n in (1, 2))
    assert losses(folder) == pytest.approx(losses(one), rel=3e-3)
    with pytest.raises(TunebookError, match="each GPU holds all of it, against shard_weights"):
        monkeypatch.setenv("WORLD_SIZE", "2")
        config.check(parameters.resolve("sft", {**given, "shard_weights": True}), (9, 0))


def test_a_sharded_sixteen_bit_base_learns_like_one_process_and_their_checkpoints_move_both_ways(
    runs_root, untied_llama, tokenizer, two_cores
):
    folder_of_one = trained(runs_root, untied_llama, tokenizer, "one", 1, method="lora")
    one = losses(folder_of_one)
    folder = trained(runs_root, untied_llama, tokenizer, "sharded", 2, method="lora")
    assert losses(folder) == pytest.approx(one, rel=1e-3)
    pieces = folder / "checkpoints" / "checkpoint-4" / "pieces"
    assert sorted(file.name for file in pieces.iterdir()) == ["00000.safetensors", "00001.safetensors"]
    from safetensors import safe_open

    for file in (
        folder / "adapter" / "adapter_model.safetensors",
        folder / "checkpoints" / "checkpoint-4" / "adapter_model.safetensors",
    ):
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
            assert len(names) == 2 * 7 * 2 and all(opened.get_slice(n).get_shape()[0] > 0 for n in names)
    for run, place, processes in (("sharded", folder, 1), ("one", folder_of_one, 2)):
        (place / "manifest.json").unlink()  # as if killed after step 2
        shutil.rmtree(place / "checkpoints" / "checkpoint-4")
        go(run, processes, method="lora")
        resumed = losses(place)
        assert {step: resumed[step] for step in (3, 4)} == pytest.approx(
            {step: one[step] for step in (3, 4)}, rel=1e-3
        ), f"{run} on {processes}"


@pytest.mark.parametrize(("loss", "method"), [("dpo", "lora"), ("kto", "qlora")], ids=["sharded", "data parallel"])
def test_references_are_asked_once_and_known_to_every_process(
    runs_root, untied_llama, tokenizer, two_cores, loss, method
):
    """Three epochs: rows come to other processes in the later ones, and a step's last row may be empty. A process of a
    sharded job that asked alone would wait for the others for ever."""
    given = {"loss": loss, "method": method, "start_from": "base", "batch_size": 5, "max_steps": 6, "epochs": 3.0}
    given |= {"save_steps": 6, "eval_rows": 3, "recompute": "none", "precision": "fp32", "best_checkpoint": False}
    found = []
    for run, processes in (("one", 1), ("two", 2)):
        pairs = train_data.pair_rows(tokenizer, 8 if loss == "dpo" else 4)
        train_data.data_stage(run, untied_llama, tokenizer, pairs=pairs, held_out_pairs=pairs[:3])
        values = parameters.resolve("orpo", {"run": run, "rank": 4, "learning_rate": 1e-3, **given})
        if processes == 1:
            job = training.open(values)
            job.train()
            asked = len(job.trainer.references)
            job.finish()
        else:
            status, said = torchrun("orpo", values, processes)
            assert status == 0, said[-3000:]
        found.append(losses(runs.folder(run, "orpo")))
    assert found[1] == pytest.approx(found[0], rel=1e-3) and asked > 0


def test_a_sharded_four_bit_base_learns_like_one_process_and_its_checkpoints_move_both_ways(
    runs_root, untied_llama, tokenizer, two_cores
):
    given = {"method": "qlora"}
    folder_of_one = trained(runs_root, untied_llama, tokenizer, "one", 1, **given)
    one = losses(folder_of_one)
    folder = trained(runs_root, untied_llama, tokenizer, "shared", 2, **given, shard_weights=True)
    assert losses(folder) == pytest.approx(one, rel=1e-4)
    note = next(n for n in runs.load("shared", "sft").data["notes"] if n.startswith("sharded over 2 processes"))
    read, whole = (float(part) for part in re.findall(r"([\d.]+) MB", note))
    assert read == pytest.approx(whole / 2, rel=0.02), note
    adapters = (folder / "adapter", folder / "checkpoints" / "checkpoint-4", folder_of_one / "adapter")
    names, *others = (set(weights.header(place / "adapter_model.safetensors")) for place in adapters)
    assert len(names) == 2 * 7 * 2 and others == [names, names]
    for run, place, processes in (("shared", folder, 1), ("one", folder_of_one, 2)):
        (place / "manifest.json").unlink()  # as if killed after step 2
        shutil.rmtree(place / "checkpoints" / "checkpoint-4")
        go(run, processes, **given, shard_weights=processes > 1)
        resumed = losses(place)
        assert {n: resumed[n] for n in (3, 4)} == pytest.approx({n: one[n] for n in (3, 4)}, rel=1e-4), processes


def test_full_tuning_is_loaded_trained_kept_and_gathered_in_shares_and_goes_on_in_one_process(
    runs_root, untied_llama, tokenizer, two_cores
):
    from safetensors.torch import load_file

    full = {"method": "full", "learning_rate": 1e-4, "cpu_offload": True}  # which changes no result
    folder_of_one = trained(runs_root, untied_llama, tokenizer, "one", 1, **full)
    one = losses(folder_of_one)
    folder = trained(runs_root, untied_llama, tokenizer, "shared", 2, **full)
    assert losses(folder) == pytest.approx(one, rel=1e-4)
    note = next(n for n in runs.load("shared", "sft").data["notes"] if n.startswith("sharded over 2 processes"))
    read, whole = (float(part) for part in re.findall(r"([\d.]+) MB", note))
    assert read == pytest.approx(whole / 2, rel=0.02), note
    pieces = sorted((folder / "checkpoints" / "checkpoint-4" / "pieces").iterdir())
    sizes = [file.stat().st_size for file in pieces]
    assert len(pieces) == 2 and sizes[0] == pytest.approx(sizes[1], rel=0.05) and not (folder / "work").exists()
    assert not list((folder / "checkpoints" / "checkpoint-4").glob("*.bin")), "nothing whole, nothing pickled but small"
    same, other = (load_file(place / "model" / "model.safetensors") for place in (folder_of_one, folder))
    assert same.keys() == other.keys()
    for name, tensor in same.items():
        assert torch.allclose(tensor.float(), other[name].float(), atol=1e-4, rtol=1e-2), name
    assert (folder / "model" / "config.json").is_file() and (folder / "model" / "tokenizer.json").is_file()
    for run, place, processes in (("shared", folder, 1), ("one", folder_of_one, 2)):
        (place / "manifest.json").unlink()  # as if killed after step 2
        shutil.rmtree(place / "checkpoints" / "checkpoint-4")
        go(run, processes, **full)
        resumed = losses(place)
        assert {n: resumed[n] for n in (3, 4)} == pytest.approx({n: one[n] for n in (3, 4)}, rel=1e-4), processes


def test_a_sharded_run_on_two_nodes_writes_sample_answers_and_does_not_wait_for_ever(
    runs_root, untied_llama, tokenizer, two_cores
):
    given = {"method": "lora", "lora_plus_ratio": 8.0, "max_steps": 2}
    folder = trained(runs_root, untied_llama, tokenizer, "samples", 2, nodes=2, sample_every=1, **given)
    written = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in written] == [1] * 4 + [2] * 4
    alone = losses(trained(runs_root, untied_llama, tokenizer, "alone", 1, **given))
    assert losses(folder) == pytest.approx(alone, rel=1e-3), "nor do the answers or LoRA+'s two rates differ"


def test_a_process_whose_held_out_pairs_are_all_empty_rows_evaluates_with_the_others(
    runs_root, narrow_llama, tokenizer, two_cores
):
    one = train_data.pair_rows(tokenizer, 1, seed=1)
    for run in ("alone", "pair"):
        train_data.data_stage(run, narrow_llama, tokenizer, held_out_pairs=one)
    given = {**SMALL, "start_from": "base", "max_steps": 2, "eval_steps": 2}
    alone = training.open(parameters.resolve("orpo", {**given, "run": "alone"})).run()
    status, said = torchrun("orpo", parameters.resolve("orpo", {**given, "run": "pair"}), 2)
    assert status == 0, said[-3000:]
    both = runs.load("pair", "orpo").metrics
    for name in ("eval_loss", "held_out_margins", "log_odds_chosen"):
        assert both[name] == pytest.approx(alone.metrics[name], rel=1e-3, abs=1e-4), name


def seen_last(said):
    """What torchrun's output ends in, below its own stack."""
    return [line for line in said.splitlines() if line.strip("=- ")][-1].split(" : ", 1)[-1]


def test_a_failing_process_ends_in_its_own_message(runs_root, two_cores):
    status, said = torchrun("sft", parameters.resolve("sft", {**SMALL, "run": "nothing-here"}), 2)
    assert status and seen_last(said).startswith("Stopped: Stage 'data' of the run 'nothing-here' has not been run yet")
    assert said.count("\nStopped: ") == 1, "one process says it, not each"


def test_a_refused_parameter_is_the_last_thing_that_torchrun_says(runs_root, two_cores):
    values = parameters.resolve("sft", {**SMALL, "run": "r"})
    object.__setattr__(values, "rank", 0)
    status, said = torchrun("sft", values, 2)
    assert status and seen_last(said).startswith("Stopped: Parameter rank is '0'"), said[-600:]


def test_gpus_by_number_end_in_one_line_alone_and_train_what_torchrun_trains(
    runs_root, narrow_llama, tokenizer, two_cores
):
    def run(*given):
        command = [sys.executable, "-m", "helpers.train", "--gpus", "2", *given]
        return subprocess.run(command, cwd=machine.PROJECT, capture_output=True, text=True, timeout=400)

    done = run("-p", "run", "nothing-here")
    assert done.returncode == 1 and "Traceback" not in done.stderr + done.stdout
    assert done.stderr.strip().splitlines()[-1].startswith("Stopped: Stage 'data' of the run 'nothing-here' has not")
    assert (done.stdout + done.stderr).count("Stopped: ") == 1
    train_data.data_stage("r", narrow_llama, tokenizer, train=train_data.sft_rows(tokenizer, 8))
    given = {**SMALL, "run": "r", "max_steps": 1, "save_steps": 1, "eval_rows": 0}
    done = run(*(x for name, value in given.items() for x in ("-p", name, str(value))))
    assert done.returncode == 0, done.stderr[-2000:]
    assert runs.load("r", "sft").data["plan"]["world_size"] == 2


def test_without_torchrun_there_is_one_process_and_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    distributed.setup()
    assert distributed.size() == 1 and distributed.first()
    full = parameters.resolve("sft", {"method": "full"})
    assert distributed.options(full) == {} and not distributed.sharded(full)
    assert distributed.shared(lambda: 7) == 7


def test_a_sixteen_bit_base_is_sharded_and_a_four_bit_one_where_that_is_asked_for(monkeypatch):
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")

    def options(**values):
        return distributed.options(parameters.resolve("sft", values))

    assert options(method="lora")["fsdp_config"]["version"] == 2 and options(method="full")["fsdp"]
    assert options(method="qlora") == {}
    assert options(method="qlora", shard_weights=True)["fsdp"] and options(method="qlora", cpu_offload=True)["fsdp"]


def test_a_single_process_keeps_to_one_of_several_gpus(tmp_path, capsys):
    from trl import SFTConfig

    from helpers import compat

    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    args._n_gpu = 2  # what transformers sets on a machine with two: rows would be spread by nn.DataParallel
    assert args.train_batch_size == 2 * args.per_device_train_batch_size
    assert compat.use_one_gpu(args).train_batch_size == args.per_device_train_batch_size
    assert "tunebook train --gpus 2" in capsys.readouterr().out
