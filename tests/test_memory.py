"""Freed memory stays with the process during a run, and nothing is worse after it."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from loralib.train.memory import freed_memory_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
with freed_memory_kept():
    faults()
    during = faults()
faults()
print(during, faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems' allocators have no such setting")
def test_a_block_that_was_freed_is_there_again():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    during, after = map(int, done.stdout.split())
    assert during < 1024  # 20 blocks of 1,024 pages
    assert after < 1024
