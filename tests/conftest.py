"""Settings every test runs under: one thread (the models are tiny), a fixed random state, kernels without a GPU.

Where there is no GPU, Triton's kernels run in its interpreter; that is decided before the first of them is imported.

Folders mirror those of the package.  Functions that several files share are modules in `shared/`; fixtures that many
look for are here:

    base, made, own               a base and an artifact of it, made in no time; `own` may be damaged
    model, texts                  a base and text files, to convert
    flat, converted_artifact      a base and what the real `convert` wrote for it, to certify
    somewhere                     a working folder and an environment of the test's own (every test in cli/ has it)
    self_test_once                loading a model of the same sizes again takes the level that the first load found
    restless_auto                 `auto` changes its plan at every step
    poisoned_memory               what was never written is NaN
"""

import os
import random
import signal
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from retrofit.runtime.kernels import interpreter

pytest.register_assert_rewrite("commands", "tiny_conversion")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a job in the background; what is interrupted here must notice
    signal.signal(signal.SIGINT, signal.default_int_handler)
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


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes what the user of this machine keeps."""
    monkeypatch.setenv("RETROFIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def self_test_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-test at load runs once a process for models of the same sizes: most of the time that a tiny one takes.

    For tests of what is loaded.  Those of the self-test itself, and of what it finds at load, do without.
    """
    from found_levels import settle_once

    from retrofit.runtime import loading

    monkeypatch.setattr(loading, "settle", settle_once)


@pytest.fixture
def restless_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` changes its plan at every step and goes by no time: any mixture of strategies must be lossless."""
    from retrofit.runtime.auto import cost
    from retrofit.runtime.auto.cost import Looked
    from retrofit.runtime.auto.policy import AutoPolicy
    from retrofit.runtime.plan import AR, Cycle, lookup

    rng = random.Random(0)

    def choose(
        policy: AutoPolicy,
        sampled: bool,
        batch: int,
        rows: int | None,
        context: int = 0,
        looked: Looked | None = None,
    ) -> Cycle:
        text = [] if looked is None else [lookup(policy.layout)] * 3
        model = policy.model(sampled)
        both = [] if looked is None else model.hybrids(rows) * 3
        return rng.choice([AR, *text, *both, *model.cycles(rows)])

    monkeypatch.setattr(AutoPolicy, "choose", choose)
    monkeypatch.setattr(cost, "REPEATS", 0)


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


@pytest.fixture
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written into the checkout; one device everywhere; nothing of the caller's environment."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("RETROFIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RETROFIT_DEVICE", "cpu")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


# Files that are made once.  They are read only; what a test changes it makes for itself, as `own` is made.  Imports
# stand inside, since tests of the runtime alone do without them.


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base's folder: weights, and a tokenizer that knows `saved.TEXT`."""
    from saved import save_base

    return save_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """An artifact of `base` with a random adapter."""
    from saved import save_artifact

    torch.manual_seed(0)
    return save_artifact(tmp_path_factory.mktemp("artifacts") / "made", base)


@pytest.fixture
def own(tmp_path: Path, base: Path) -> Path:
    """As `made`, an artifact of this test's own, to be damaged."""
    from saved import save_artifact

    return save_artifact(tmp_path / "own", base)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text files to convert `model` with."""
    from tiny_conversion import write_texts

    return write_texts(tmp_path_factory.mktemp("data") / "texts")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder: weights, and `tiny_conversion.tokenizer`, of one token a letter."""
    from several_processes import saved_model

    return saved_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of one layer whose drafts are often accepted; its tokenizer is that of `model`."""
    from certifying import flat_base

    return flat_base(tmp_path_factory.mktemp("flat") / "base")


@pytest.fixture(scope="session")
def converted_artifact(tmp_path_factory: pytest.TempPathFactory, flat: Path, texts: Path) -> Path:
    """What the real `convert` wrote for `flat`, with measured ranks, so that `fused` runs trees."""
    from certifying import converted

    return converted(tmp_path_factory.mktemp("converted") / "artifact", flat, texts)
