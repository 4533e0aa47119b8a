"""Work that `benchmarks.gpu` does in processes of its own, each with a time limit: the tests, first of all."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from benchmarks.gpu.bench import Bench, Found

ROOT = Path(__file__).resolve().parents[2]
GPU_MARK = "pytest.mark.gpu"
KERNEL_TESTS = "runtime/kernels"
FUSED_TESTS = (
    *(f"runtime/backends/fused/test_{name}.py" for name in ("exact", "fused_backend", "paged", "weights")),
    *(f"runtime/device/test_{name}.py" for name in ("device_kinds", "device_loop", "device_loop_faults")),
)
"""They choose the GPU where there is one.  Paths here are those beneath tests/."""
TAIL = 4000
"""Characters of a test run's output that are kept."""
TEST_SECONDS = 120.0
"""How long the tests may go on after everything else that may run beside them is done."""


@dataclass
class Process:
    """A command under way, its output in a file."""

    process: subprocess.Popen[bytes]
    output: IO[bytes]

    @classmethod
    def start(cls, command: Sequence[str], folder: Path, environment: dict[str, str]) -> Process:
        output = tempfile.TemporaryFile()  # noqa: SIM115
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        return cls(process, output)

    def finish(self, limit: float) -> tuple[int | None, str]:
        """(exit code, output); None for the code where the time ran out and it was ended, with all that it started."""
        code: int | None
        try:
            code = self.process.wait(max(0.0, limit))
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            code = None
        self.output.seek(0)
        return code, self.output.read().decode(errors="replace")


def _under(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def start_tests(bench: Bench) -> dict[str, Process]:
    """Tests of the kernels and of the fused backend without the interpreter, and tests marked gpu."""
    folder = ROOT / "tests"
    kernels = sorted(_under(folder, path) for path in folder.glob(f"{KERNEL_TESTS}/test_*.py"))
    # Only files that hold such a test are collected: others may import what this machine does not have.
    whole = {*kernels, *FUSED_TESTS}
    holding = sorted(_under(folder, path) for path in folder.rglob("test_*.py") if GPU_MARK in path.read_text())
    marked = [name for name in holding if name not in whole]
    runs = {"kernel tests": kernels, "tests of the fused backend": list(FUSED_TESTS)}
    if marked:
        runs["tests marked gpu"] = ["-m", "gpu", *marked]
    if bench.dry:
        runs = {"kernel tests": [f"{KERNEL_TESTS}/test_kernel_norm.py", "-k", "embed"]}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if not bench.dry:
        environment.pop("TRITON_INTERPRET", None)
    started = {}
    for name, arguments in runs.items():
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        command.append("--continue-on-collection-errors")  # a file that lacks a package is one error among the counts
        if find_spec("xdist") is not None and not bench.dry:
            command += ["-n", "5"]  # what takes time is compiling kernels
        started[name] = Process.start(command, folder, environment)
    return started


def tests(bench: Bench, found: Found) -> None:
    """What became of the tests, which other sections may have run beside."""
    started = bench.tests or start_tests(bench)
    limit = min(TEST_SECONDS, bench.left() - 5)
    shown, met = [], True
    for name, process in started.items():
        code, output = process.finish(limit)
        counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", output[-TAIL:])}
        found.figures[name] = {
            "command": process.process.args, "exit_code": code, "counts": counts, "output": output[-TAIL:]
        }  # fmt: skip
        met &= code == 0
        done = ", ".join(f"{n} {word}" for word, n in counts.items()) or "none ran"
        shown.append(f"{name}: {done if code is not None else 'not done in time'}")
    bench.tests = {}
    found.judge("tests", "; ".join(shown), met)
