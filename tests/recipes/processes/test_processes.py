"""Several processes give what one gives: losses, weights, responses; a checkpoint knows not how many there were."""

import gc
import os
import signal
import weakref
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  (imported before the processes are forked)
import pytest
import torch
from safetensors.torch import load_file
from several_processes import FSDP, converts, converts_live, quiet_end, rank, run_folder, saved_model, together, values
from tiny_conversion import STEPS, at_step, curve, interrupted, run, steps
from torch.distributed.tensor import DTensor

from retrofit.adapters.attach import Attached
from retrofit.recipes import convert as conversion
from retrofit.recipes.processes import Processes
from retrofit.recipes.text.regenerate import ResponseCache
from retrofit.recipes.training.shards import shard
from retrofit.recipes.training.shares import assign
from retrofit.recipes.training.step import Trainer
from retrofit.runtime.backends.hf.backend import HFBackend
from retrofit.runtime.engine import Engine

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")

SIX = {"train__steps": 6, "train__batch_size": 4, "train__save_every": 0, "data__max_length": 48}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, texts: Path, model: Path) -> Path:
    """What one process makes of SIX."""
    out = tmp_path_factory.mktemp("one") / "out"
    run_folder(out, model, texts, **SIX)
    return out


def losses_differ(a: Path, b: Path) -> float:
    """Largest relative difference of any loss of any step."""
    one, other = (curve(path / "metrics.jsonl") for path in (a, b))
    assert len(one) == len(other) > 0
    assert [r["rows"] for r in one] == [r["rows"] for r in other]
    pairs = [(x["loss"][k], y["loss"][k]) for x, y in zip(one, other, strict=True) for k in x["loss"]]
    return max(abs(x - y) / max(abs(x), 1e-3) for x, y in pairs)


def same_results(out: Path, straight: Path) -> None:
    """Losses within 1e-5; weights within rounding that Adam's first steps, which go by signs, have multiplied."""
    assert losses_differ(out, straight) < 1e-5
    for name in ("adapter/adapter_model.safetensors", "heads.safetensors"):
        made, wanted = load_file(out / name), load_file(straight / name)
        for key in wanted.keys() - {"confidence_temperature"}:  # out of a grid: the nearest may be the next one
            torch.testing.assert_close(made[key], wanted[key], rtol=1e-3, atol=1e-4)
    assert [p.name for p in out.parent.iterdir() if p.name.startswith(out.name) and p != out] == []


# The same results


def test_every_document_is_dealt_once_and_evenly() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 3, 8):
        for count in (size, size + 1, 4 * size):
            loads = torch.randint(1, 2048, (count,), generator=generator).tolist()
            shares = assign(loads, size)
            assert sorted(item for share in shares for item in share) == list(range(count))
            assert all(shares)
            carried = [sum(loads[item] for item in share) for share in shares]
            assert max(carried) - min(carried) <= max(loads)


@pytest.mark.parametrize(("size", "variables"), [(2, {}), (2, FSDP), (3, {})], ids=["two", "fsdp", "three"])
def test_several_processes_have_the_losses_of_one(
    tmp_path: Path, texts: Path, model: Path, straight: Path, size: int, variables: dict[str, str]
) -> None:
    made = values(together(convert_and_look, tmp_path / "out", model, texts, size=size, **variables))
    same_results(tmp_path / "out", straight)
    for whole, held in made:
        if variables:
            assert held < 0.6 * whole
        else:
            assert held == whole


def test_two_processes_convert_a_hybrid_as_one_does(tmp_path: Path, texts: Path) -> None:
    model, few = saved_model(tmp_path / "model", "qwen3_5"), {**SIX, "train__steps": 4}
    run_folder(tmp_path / "one", model, texts, **few)
    values(together(converts, tmp_path / "out", model, texts, few))
    assert losses_differ(tmp_path / "out", tmp_path / "one") < 1e-5


def convert_and_look(out: Path, model: Path, texts: Path) -> tuple[int, int]:
    """Bytes of the layers' weights, and those that this process held in training."""
    held: list[tuple[int, int]] = []
    right = Trainer.gradients

    def looking(self: Trainer, *arguments: Any) -> Any:
        result = right(self, *arguments)
        layers = [p for n, p in self.backend.trunk.layers.named_parameters() if "lora_" not in n]
        here = [p.to_local() if isinstance(p, DTensor) else p for p in layers]
        held.append((sum(p.numel() for p in layers), sum(p.numel() for p in here)))
        return result

    def emptied(attached: Attached, backend: HFBackend, processes: Processes) -> None:
        """Nothing keeps the whole weights alive."""
        layers = backend.trunk.layers.named_parameters()
        whole = [weakref.ref(p) for n, p in layers if "lora_" not in n]
        shard(attached, backend, processes)
        gc.collect()
        assert [p() is None for p in whole] == [True] * len(whole)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "gradients", looking)
        patch.setattr(conversion, "shard", emptied)
        run_folder(out, model, texts, **SIX)
    assert len(set(held)) == 1
    return held[0]


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma3", "deepseek_v3"])
def test_other_architectures_are_split_too(tmp_path: Path, texts: Path, name: str) -> None:
    """Routed experts; tied embeddings and windows; latent attention."""
    options = {**SIX, "train__steps": 2, "train__batch_size": 2, "adapter__targets": ["q"]}
    model = saved_model(tmp_path / "model", name)
    run_folder(tmp_path / "one", model, texts, **options)
    options["train__checkpointing"] = True
    values(together(converts, tmp_path / "out", model, texts, options, **FSDP))
    same_results(tmp_path / "out", tmp_path / "one")


def test_uneven_batches_and_accumulation(tmp_path: Path, texts: Path, model: Path) -> None:
    options = {**SIX, "train__batch_size": 3, "train__accumulation": 2, "train__steps": 4}
    run_folder(tmp_path / "one", model, texts, **options)
    values(together(converts, tmp_path / "out", model, texts, options))
    same_results(tmp_path / "out", tmp_path / "one")


def test_a_live_model(tmp_path: Path, texts: Path) -> None:
    run(tmp_path / "one", texts, train__steps=3)
    values(together(converts_live, tmp_path / "out", texts, {"train__steps": 3}))
    same_results(tmp_path / "out", tmp_path / "one")


def test_responses_are_written_once_and_by_all(tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"data__responses": "regenerate", "train__steps": 2}
    monkeypatch.setenv("RETROFIT_CACHE", str(tmp_path / "one-cache"))
    run(tmp_path / "one", texts, **options)
    monkeypatch.setenv("RETROFIT_CACHE", str(tmp_path / "cache"))
    first = values(together(counts_responses, tmp_path / "out", texts, options))
    same_results(tmp_path / "out", tmp_path / "one")
    assert min(first) > 0.4 * sum(first)
    (responses,), (wanted,) = ([*(tmp_path / f / "responses").iterdir()] for f in ("cache", "one-cache"))
    assert sorted(responses.read_text().splitlines()) == sorted(wanted.read_text().splitlines())
    assert values(together(counts_responses, tmp_path / "again", texts, options)) == [0, 0]


def counts_responses(out: Path, texts: Path, options: dict[str, Any]) -> int:
    """How many responses this process generated."""
    right, generated = Engine.stream, [0]

    def counted(self: Engine, prompts: Any, *arguments: Any, **named: Any) -> Any:
        generated[0] += len(prompts)
        return right(self, prompts, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "stream", counted)
        if rank() > 0:
            patch.setattr(ResponseCache, "__init__", lambda *_: pytest.fail("the cache is the main process's"))
        run(out, texts, **options)
    return generated[0]


# Interrupted and gone on


def test_one_goes_on_where_two_stopped_and_two_where_one_did(tmp_path: Path, texts: Path) -> None:
    options = {"train__batch_size": 4, "train__save_every": 0}
    run(tmp_path / "one", texts, **options)
    ended = together(stopped, tmp_path / "a", texts, 4, signal.SIGTERM, options)
    assert (ended[0].kind, ended[0].code) == ("SystemExit", 143)  # type: ignore[union-attr]
    assert f"saved step 4 of {STEPS}" in ended[0].notes[0]  # type: ignore[union-attr]
    assert quiet_end(ended[1], 1)
    assert steps(tmp_path / "a") == [4]
    run(tmp_path / "a", texts, **options)
    same_results(tmp_path / "a", tmp_path / "one")
    interrupted(tmp_path / "b", texts, 5, **options)
    values(together(converts_live, tmp_path / "b", texts, options))
    same_results(tmp_path / "b", tmp_path / "one")


def stopped(out: Path, texts: Path, step: int, number: int, options: dict[str, Any]) -> None:
    """As launchers do it, every process gets the signal."""
    at_step(step, lambda: os.kill(os.getpid(), number), pytest.MonkeyPatch())
    run(out, texts, **options)
