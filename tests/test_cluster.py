"""Files that start training on clusters: each is valid for its system, and contains valid commands of loralib.

Slurm has no parser in Python: the script is checked by bash, and its directives against what `sbatch` knows.  The
Kubernetes files are checked by the models of kubeflow-trainer-api, and SkyPilot's by SkyPilot, where these packages are
installed; otherwise by what their systems require at least.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loralib.cli import parser_of
from loralib.training import TrainConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = ROOT / "examples" / "cluster"
yaml = pytest.importorskip("yaml")


def read(name: str) -> str:
    return (CLUSTER / name).read_text(encoding="utf-8")


def shell_commands() -> Iterator[tuple[str, list[str]]]:
    """Yields each torchrun command with its file."""
    job = yaml.safe_load(read("trainjob.yaml"))["spec"]["trainer"]
    yield "trainjob.yaml", [*job["command"], *job["args"]]
    (node,) = yaml.safe_load(read("jobset.yaml"))["spec"]["replicatedJobs"]
    (container,) = node["template"]["spec"]["template"]["spec"]["containers"]
    texts = {"jobset.yaml": container["args"][0], "skypilot.yaml": yaml.safe_load(read("skypilot.yaml"))["run"]}
    for name, text in {"slurm.sbatch": read("slurm.sbatch"), **texts}.items():
        text = re.sub(r"#.*", "", text.replace("\\\n", " "))
        (line,) = [line for line in text.splitlines() if "torchrun" in line]
        yield name, shlex.split(line[line.index("torchrun") :])


COMMANDS = dict(shell_commands())


@pytest.mark.parametrize("name", COMMANDS)
def test_torchrun_and_train_take_the_flags(name: str) -> None:
    from torch.distributed.run import get_args_parser

    words = [re.sub(r"\$\w+", "7", word) for word in COMMANDS[name]]
    launch = get_args_parser().parse_args(words[1:])
    assert (launch.module, launch.training_script, launch.training_script_args[0]) == (True, "loralib", "train")
    args: Any = parser_of("train").parse(launch.training_script_args[1:])  # type: ignore[attr-defined]
    given = {name: value for name, value in vars(args).items() if value is not None and name in vars(TrainConfig())}
    assert TrainConfig(**given).resume, "what is started again goes on"
    assert args.save_steps, "a machine that is taken away costs the steps since the last checkpoint"


def test_the_slurm_script_is_one() -> None:
    text = read("slurm.sbatch")
    if shutil.which("bash"):
        subprocess.run(["bash", "-n"], input=text, text=True, encoding="utf-8", check=True)
    options = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, re.MULTILINE)
    assert len(options) == text.count("#SBATCH")
    known = {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "requeue", "open-mode",
             "output"}  # fmt: skip
    assert {name for name, _ in options} <= known
    last = max(text.index(f"#SBATCH --{name}") for name, _ in options)
    assert last < text.index("\nset "), "sbatch reads directives up to the first command"
    assert dict(options)["ntasks-per-node"] == "1", "torchrun starts the processes of a machine"


def unknown(model: Any, value: Any, where: str = "") -> list[str]:
    """Returns the keys of a value that a pydantic model ignores."""
    if isinstance(value, dict):
        kept = model if isinstance(model, dict) else {} if model is None else model
        return [
            fault
            for key, inner in value.items()
            for fault in ([f"{where}.{key}"] if key not in kept else unknown(kept[key], inner, f"{where}.{key}"))
        ]
    if isinstance(value, list):
        return [f for n, (a, b) in enumerate(zip(model, value, strict=True)) for f in unknown(a, b, f"{where}[{n}]")]
    return [] if model == value else [f"{where}: {value!r} became {model!r}"]


KINDS = {"trainjob.yaml": "TrainerV1alpha1TrainJob", "jobset.yaml": "JobsetV1alpha2JobSet"}


@pytest.mark.parametrize("name", KINDS)
def test_kubernetes_files_fit_their_schemas(name: str) -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models")
    value = yaml.safe_load(read(name))
    model = getattr(models, KINDS[name]).from_dict(value)
    assert unknown(model.to_dict(), value) == []


def test_kubernetes_files_hold_what_is_required() -> None:
    job, group = (yaml.safe_load(read(name)) for name in KINDS)
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert job["spec"]["runtimeRef"]["name"] == "torch-distributed"
    (patch,) = job["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    assert volumes(node["template"]["spec"]["template"]["spec"]) == {"work"}
    assert (group["apiVersion"], group["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (node,) = group["spec"]["replicatedJobs"]
    spec, words = node["template"]["spec"], COMMANDS["jobset.yaml"]
    pods = str(spec["completions"])
    assert (spec["completionMode"], str(spec["parallelism"]), words[words.index("--nnodes") + 1]) == (
        "Indexed",
        pods,
        pods,
    )
    first = f"{group['metadata']['name']}-{node['name']}-0-0.{group['metadata']['name']}"
    assert words[words.index("--master_addr") + 1] == first
    assert volumes(spec["template"]["spec"]) == {"work"}


def volumes(pod: dict[str, Any]) -> set[str]:
    """Returns the names of a pod's volumes, which are those that its containers mount."""
    names = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]} == names
    return names


def test_the_skypilot_file_is_a_task() -> None:
    task = yaml.safe_load(read("skypilot.yaml"))
    assert task.keys() <= {"name", "resources", "num_nodes", "workdir", "file_mounts", "setup", "run"}
    if importlib.util.find_spec("sky") is not None:
        schemas = pytest.importorskip("sky.utils.schemas")
        jsonschema = pytest.importorskip("jsonschema")
        jsonschema.validate(task, schemas.get_task_schema())
        jsonschema.validate(task["resources"], schemas.get_resources_schema())
        for mount in task["file_mounts"].values():
            jsonschema.validate(mount, schemas.get_storage_schema())


def test_the_uv_script_says_what_it_needs() -> None:
    packaging = pytest.importorskip("packaging.requirements")
    block = re.search(r"(?m)^# /// script\n((?:#(?: .*)?\n)+)^# ///$", read("uv_train.py"))
    assert block is not None
    needs = tomllib.loads("".join(line[2:] or "\n" for line in block[1].splitlines(keepends=True)))
    (requirement,) = map(packaging.Requirement, needs["dependencies"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert requirement.name == project["name"]
    assert requirement.extras <= project["optional-dependencies"].keys()
    assert needs["requires-python"] == project["requires-python"]
    assert (CLUSTER / needs["tool"]["uv"]["sources"]["loralib"]["path"]).resolve() == ROOT


def test_the_uv_script_runs() -> None:
    done = subprocess.run(
        [sys.executable, CLUSTER / "uv_train.py", "--help"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert "usage: loralib train" in done.stdout, done.stderr


@pytest.mark.distributed
def test_ray_starts_the_same_training(tmp_path: Path) -> None:
    pytest.importorskip("ray.train")
    data = [{"prompt": f"{n} {n + 1}", "completion": f"{n + 2}"} for n in range(8)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, data)), encoding="utf-8")
    flags = ["--train_data", "data.jsonl", "--max_steps", "2", "--batch_size", "4", "--model", "scratch",
             "--hidden_dim", "16", "--num_layers", "1", "--device", "cpu", "--dtype", "fp32", "--lr", "1e-3",
             "--valid_fraction", "0"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> None:
        done = subprocess.run(
            [sys.executable, *words, *flags],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
        assert done.returncode == 0, done.stdout + done.stderr

    run(str(CLUSTER / "ray_train.py"), "--workers", "2", "--output_dir", "by_ray")
    run("-m", "loralib", "train", "--output_dir", "alone")
    losses = [
        [
            json.loads(line)["loss"]
            for line in (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for name in ("by_ray", "alone")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
