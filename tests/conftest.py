"""Settings every test runs under: one thread (the models are tiny), a fixed random state, kernels without a GPU.

Where there is no GPU, Triton's kernels run in its interpreter; that is decided before the first of them is imported.
"""

import os
import random
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from retrofit.runtime.kernels import interpreter

torch.set_num_threads(1)  # hand-over between threads costs more than a tiny model's matrix products
if interpreter.interpreted():
    interpreter.patch()


@pytest.fixture(autouse=True)
def fixed_random_state() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_gpu_unless_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Device `auto` is the CPU: tests are the same wherever they run."""
    monkeypatch.setattr("retrofit.hub.default_device", lambda: "cpu")


@pytest.fixture
def restless_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` changes its plan at every step and measures nothing: any mixture of strategies must be lossless."""
    from retrofit.runtime.auto import policy
    from retrofit.runtime.auto.cost import CostModel, Template

    rng = random.Random(0)

    def best(model: CostModel, batch: int, rows: int | None = None) -> Template:
        return rng.choice([Template("ar"), *model.templates(rows)])

    monkeypatch.setattr(CostModel, "best", best)
    monkeypatch.setattr(policy, "calibrate", lambda *_: None)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory holds NaN, or the largest integer: whoever reads it is found out."""

    def poison(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text files to convert with."""
    from resuming import write_texts  # needs what tests of the runtime alone do without

    return write_texts(tmp_path_factory.mktemp("data") / "texts")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder."""
    from together import saved_model

    return saved_model(tmp_path_factory.mktemp("model"))
