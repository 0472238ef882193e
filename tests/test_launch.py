"""The SkyPilot files in ci/launch/: what they run exists, and SkyPilot's own parser takes them where it is there."""

import re
import subprocess

import pytest
import yaml

from helpers import params
from tests.conftest import PROJECT

FILES = sorted((PROJECT / "ci" / "launch").glob("*.yaml"))
FIELDS = {"name", "workdir", "num_nodes", "resources", "envs", "file_mounts", "setup", "run"}
RESOURCES = {"accelerators", "disk_size", "network_tier", "use_spot", "job_recovery"}
GIVEN = {"SKYPILOT_NODE_RANK", "SKYPILOT_NODE_IPS", "SKYPILOT_NUM_NODES", "SKYPILOT_NUM_GPUS_PER_NODE"}
GIVEN |= {"SKYPILOT_TASK_ID"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_launch_file_names_what_there_is(file):
    text = file.read_text()
    task = yaml.safe_load(text)
    assert set(task) <= FIELDS and set(task["resources"]) <= RESOURCES and task["workdir"] == "."
    made = set(re.findall(r"^ *(?:export )?(\w+)=", task["run"], re.M))
    used = set(re.findall(r"\$\{?(\w+)", task["setup"] + task["run"] + str(task.get("file_mounts", ""))))
    assert used <= set(task["envs"]) | made | GIVEN and all(isinstance(v, str) for v in task["envs"].values())
    for script in (task["setup"], task["run"]):
        assert not subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=True).stderr
        for path in re.findall(r"\bci/[\w./-]+", script):
            assert (PROJECT / path).is_file(), path
    if "RECIPE" in task["envs"]:
        assert "sft" in params.recipe(task["envs"]["RECIPE"])
    for shown in re.findall(r"--env (\w+)=", text):
        assert shown in task["envs"]
    assert f"ci/launch/{file.name}" in text, "and its first lines say how to start it"


def test_there_is_a_file_for_one_node_for_several_and_for_a_sweep():
    tasks = {file.stem: yaml.safe_load(file.read_text()) for file in FILES}
    assert set(tasks) == {"one-node", "several-nodes", "sweep"} and tasks["several-nodes"]["num_nodes"] == 2
    assert "--rdzv-endpoint" in tasks["several-nodes"]["run"] and "ci/run.sh" in tasks["sweep"]["run"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_skypilot_itself_understands_a_launch_file(file):
    sky = pytest.importorskip("sky", reason="SkyPilot is not installed")
    task = sky.Task.from_yaml(str(file))
    assert task.num_nodes == yaml.safe_load(file.read_text()).get("num_nodes", 1) and task.resources
