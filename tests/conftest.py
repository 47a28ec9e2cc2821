"""What all tests share: no network, few threads, a cache of their own, and the reference data."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

# Before anything imports transformers: tests never reach for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores, and so do the programs that they start
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["OMP_WAIT_POLICY"] = "passive"  # where a test wants two threads, one must not spin till the other's turn

ROOT = Path(__file__).resolve().parent.parent

# The page comes first: it waits for a browser, while other checks still run beside the tests.
LONGEST = ("test_page.py", "test_main_job.py", "test_ranks.py", "test_jobs.py", "test_installed.py", "test_beam.py")

# A million objects stay until a worker ends: modules, and tests.  Python's collector walked over all of them again and
# again, for a quarter of the time; now it looks only at what tests make.
gc.disable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_configure(config: pytest.Config) -> None:
    # The converted base model is kept between runs in pytest's own cache, and the user's cache is left alone.
    os.environ.setdefault("LORALIB_CACHE", str(config.cache.mkdir("loralib")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs the modules with the longest tests first, so that all workers finish at about the same time."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("bf16_units") is not None:
        import torch

        from loralib.engine.frozen_linear import can_prepack

        if not can_prepack(torch.zeros(4, 4, dtype=torch.bfloat16)):
            pytest.skip("this processor has no units for bf16")


@pytest.fixture(scope="session", autouse=True)
def modest_threads() -> None:
    """Two threads at most, and one per worker: results must not depend on the machine, and machines are shared."""
    import torch

    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_disks() -> Iterator[None]:
    """Disables fsync: what tests write does not have to survive a power cut; tests of that replace fsync themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def frozen_objects() -> Iterator[None]:
    """Keeps objects frozen: a run freezes all of them for its duration, and would unfreeze the session's as well."""
    set_aside = SimpleNamespace(collect=gc.collect, freeze=lambda: None, unfreeze=lambda: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loralib.training.memory.gc", set_aside)
        yield


@pytest.fixture(scope="module", params=["kernels", "operators"])
def both_ways(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs tests both with the compiled kernels, if there is a compiler, and with PyTorch's operators instead."""
    from loralib.engine.kernels import compiled, loaded

    compiled.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "operators":
            patch.setenv("LORALIB_ENGINE", "torch")
        elif loaded() is None:
            pytest.skip("no gcc here")
        yield
    compiled.cache_clear()


@pytest.fixture(scope="session")
def load_file() -> Callable[[Path], ModuleType]:
    """Imports a script or an example, which are not part of a package; each call returns a new module."""

    def load(path: Path) -> ModuleType:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def warm_command(
    load_file: Callable[[Path], ModuleType], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., tuple[list[str], dict[str, str]]]]:
    """Returns command lines and environments as `loralib_command` does, of processes that have imported everything."""
    with load_file(Path(__file__).with_name("warm.py")).warm_processes(tmp_path_factory.mktemp("warm")) as command:
        yield command


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder of reference data, for tests with ``pytestmark = pytest.mark.golden``."""
    folder = Path(os.environ.get("LORALIB_GOLDENS") or ROOT.parent / "shared" / "goldens")
    if not folder.is_dir():
        pytest.skip(f"no reference data in {folder} (LORALIB_GOLDENS names another folder)")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """The default base model in fp32 and its tokenizer, shared by all tests: deepcopy the model before changing it."""
    from loralib.bases.loading import load_base

    return load_base("smollm2-135m", dtype="fp32", device="cpu")
