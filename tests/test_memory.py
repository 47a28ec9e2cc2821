"""Freed memory stays with the process during a run, live objects are left alone, and nothing is worse afterwards."""

import gc
import subprocess
import sys
import weakref

import pytest

from loralib.training.memory import freeze_objects

PROGRAM = """
import resource, sys
import torch
from loralib.allocator import keep_freed_memory

def faults(numbers=2**20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(numbers)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
with keep_freed_memory():
    faults()
    during = faults()
    with keep_freed_memory(lean=True):
        lean = faults(2**23)  # larger than what was kept
    faults()
    again = faults()
faults()
print(during, lean, again, faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems' allocators have no such setting")
def test_a_block_that_was_freed_is_there_again():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    during, lean, again, after = map(int, done.stdout.split())
    assert during < 1024  # 20 blocks of 1,024 pages
    assert lean > 10 * 1024
    assert again < 1024
    assert after < 1024


def test_objects_are_set_aside_for_the_time_of_a_run_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loralib.training.memory.gc", gc)  # which conftest.py replaces

    class Cycle:
        def __init__(self):
            self.itself = self

    gc.collect()
    kept = Cycle()
    old, living = weakref.ref(Cycle()), weakref.ref(kept)
    with freeze_objects():
        assert old() is None  # garbage is not set aside
        del kept
        new = weakref.ref(Cycle())
        gc.collect()
        assert new() is None
        assert living() is not None
    gc.collect()
    assert living() is None
    gc.freeze()  # as all was before
