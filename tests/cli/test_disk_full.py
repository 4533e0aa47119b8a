"""Output that finds no room ends in one clear error, whichever command writes it."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from retrofit.errors import disk_full

FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="this machine has no /dev/full")
@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["generate", "--help"], ["recipes", "ls"]])
def test_a_full_disk_is_one_clear_error(arguments: list[str]) -> None:
    with FULL.open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "retrofit.cli.main", *arguments], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 4, done.stderr
    assert done.stderr == "Error: no space left to write the output\nhint: free some, or send it elsewhere\n"


def test_other_errors_are_none() -> None:
    assert disk_full(OSError(errno.EIO, "broken")) is None
    assert disk_full(ValueError("No space left on device")) is None
    found = disk_full(OSError(errno.ENOSPC, "No space left on device", "results.jsonl"))
    assert found is not None and str(found) == "results.jsonl: no space left to write the output"
