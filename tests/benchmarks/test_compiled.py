"""Every kernel that the fused backend launches at full size compiles for an H100 or H200, which need not be there."""

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.common import ROOT


def test_kernels_of_an_8b_model_compile_for_hopper(tmp_path: Path) -> None:
    """In a process of its own: here kernels may be interpreted, and interpreted ones cannot be compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    options = ["--model", "llama-8b", "--temperature", "0.8", "--lanes", "1"]
    command = [sys.executable, "-m", "benchmarks.compiled", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    counted = done.stdout.splitlines()[-1].split()
    assert counted[0] == counted[2] and int(counted[0]) > 15
    names = {line.split()[0] for line in done.stdout.splitlines()}
    assert {"_matmul", "_qkv", "_attend", "_combine", "_add_rms_norm", "_swiglu", "_draft", "_accept_kernel"} <= names
    # Spilled registers are memory traffic in the innermost loops.
    assert "stack 0 " in done.stdout and done.stdout.count("stack 0 ") == int(counted[0])
