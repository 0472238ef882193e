"""The scripts that measure on GPUs, as far as a CPU plays them: bases, resuming, limits, and bands of losses."""

import json
import subprocess
import sys

import psutil
import pytest

from ci import bands, gpu_session
from helpers import machine
from helpers import params as parameters
from helpers.model import layer_kinds, loading


@pytest.mark.parametrize("shape", ["135m", "32b", "30b-a3b"])
def test_a_base_of_random_weights_loads_with_every_tensor(smollm2, tmp_path, shape):
    gpu_session.make(shape, tmp_path, str(smollm2.path), tiny=True)
    model = loading.load_model(tmp_path / "16", dtype="fp32", device="cpu")
    weight = model.get_input_embeddings().weight
    assert 0.01 < float(weight.std()) < 0.03 and loading.load_tokenizer(tmp_path / "16").chat_template
    assert layer_kinds.shape_of(tmp_path / "16").parameters == sum(p.numel() for p in model.parameters())


def test_the_shapes_have_the_published_sizes():
    import transformers

    billions = {}
    for name, (kind, sizes) in gpu_session.SHAPES.items():
        config = getattr(transformers, f"{kind}Config")(**{"tie_word_embeddings": False, **sizes})
        billions[name] = round(layer_kinds.Shape(config).parameters / 1e9, 2)
    assert billions == {"135m": 0.13, "1.7b": 1.71, "8b": 8.03, "32b": 32.76, "70b": 70.55, "30b-a3b": 30.53}


def test_every_arm_is_a_command_that_there_is_with_parameters_that_there_are():
    names = [arm.name for arm in gpu_session.ARMS]
    assert len(set(names)) == len(names)
    for arm in gpu_session.ARMS:
        assert (machine.PROJECT / arm.command[0]).is_file() and arm.seconds <= 600
        stage = "sft" if "sft" in arm.command else "orpo"
        given = dict(arm.command[i + 1].split("=", 1) for i, word in enumerate(arm.command) if word == "--set")
        parameters.resolve(stage, {k: v for k, v in given.items() if k != "max_length"})


def test_an_arm_that_has_a_line_already_is_not_run_again(tmp_path):
    (tmp_path / "have.jsonl").write_text(json.dumps({"arm": "environment"}) + "\n")
    command = [sys.executable, "ci/gpu_session.py", str(tmp_path / "out"), "--only", "environment"]
    done = subprocess.run([*command, "--have", str(tmp_path / "have.jsonl")], cwd=machine.PROJECT, check=True)
    assert not done.returncode and not (tmp_path / "out" / "results.jsonl").exists()


def test_a_program_that_takes_more_host_memory_than_it_may_ends_as_if_killed(tmp_path):
    (tmp_path / "eats.py").write_text("import time\nheld = bytearray(400 * 10**6)\nprint('had it')\ntime.sleep(20)\n")
    command = [sys.executable, "ci/limited.py", "--host-gb", "0.3", "--cores", "1", str(tmp_path / "eats.py")]
    done = subprocess.run(command, cwd=machine.PROJECT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 137 and "0.3 are allowed" in done.stderr


def test_a_loss_outside_its_band_is_named_and_a_nan_is_outside_any():
    recorded = [2.0] * 10
    assert not bands.outside([2.009] * 9 + [2.05], recorded)
    assert bands.outside([2.02] + [2.0] * 9, recorded) == ["step 1: 2.02 where 2.0 ± 0.5 % was recorded"]
    assert bands.outside([2.0] * 9 + [float("nan")], recorded)[0].startswith("step 10: nan")


@pytest.mark.parametrize("arm", ["hf sft 16-bit", "hf orpo 16-bit"])
def test_a_trajectory_repeats_itself(runs_root, narrow_llama, tokenizer, arm):
    import train_data

    train_data.data_stage("r", narrow_llama, tokenizer)
    first = bands.losses("r", arm, steps=3)
    assert len(first) == 3 and not bands.outside(bands.losses("r", arm, steps=3), first)


def test_an_arm_that_is_ended_leaves_no_worker_behind_in_a_session_of_its_own():
    inner = "import subprocess, sys, time; c = [sys.executable, '-c', 'import time; time.sleep(60)']; "
    inner += "print(subprocess.Popen(c, start_new_session=True).pid, flush=True); time.sleep(60)"
    arm = subprocess.Popen([sys.executable, "-c", inner], stdout=subprocess.PIPE, text=True, start_new_session=True)
    worker = psutil.Process(int(arm.stdout.readline()))
    gpu_session.kill(arm.pid)
    arm.communicate()
    assert psutil.wait_procs([worker], timeout=20)[1] == [] and arm.returncode
