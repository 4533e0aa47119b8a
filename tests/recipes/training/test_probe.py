"""The live probe: it repeats itself, changes no training, and what it decides comes out the same after any stop."""

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from decoding import randomise
from safetensors.torch import load_file
from tiny_conversion import STEPS, child, curve, interrupted, learned, run, steps, tokenizer
from tiny_models import build

from retrofit.adapters.layout import DraftLayout
from retrofit.cli import main as cli
from retrofit.errors import UsageError
from retrofit.recipes import convert as convert_module
from retrofit.recipes.schema import load_recipe
from retrofit.recipes.text.documents import Document
from retrofit.recipes.training import probe as module
from retrofit.recipes.training.checkpoint import folder_of
from retrofit.recipes.training.probe import Probe, best_step, exhausted, live_probe
from retrofit.runtime.engine import Engine

PROCESSES = multiprocessing.get_context("fork")  # everything slow is imported already
PROBED = {"train__probe_every": 2, "train__probe_prompts": 2, "train__probe_tokens": 8, "data__held_out": 2}
BEST = {**PROBED, "train__publish": "best", "train__patience": 2}
LAYOUTS = [DraftLayout(4), DraftLayout(4, seed_row="draft"), DraftLayout(3, shift=0, seed_row="draft")]
FIGURES = [1.0, 1.2, 1.1, 1.2, 1.9]
"""TPF of the probes of a run of 9 steps (after 2, 4, 6, 8 and 9): the best is at step 4, patience 2 ends it at 8."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    """A conversion without probes."""
    out = tmp_path_factory.mktemp("plain") / "out"
    run(out, texts, data__held_out=2)
    return out


def scripted(patch: pytest.MonkeyPatch) -> list[int]:
    """Probes decode as ever, but their TPF is the one in FIGURES; returns the steps they were made at."""
    right_run, right, made = convert_module.Session.run, Probe.__call__, []
    sessions: list[Any] = []

    def run_session(self: Any, on_step: Any) -> None:
        sessions.append(self)
        right_run(self, on_step)

    def probe(self: Probe) -> dict[str, Any]:
        step = sessions[-1].trainer.steps_done
        made.append(step)
        return right(self) | {"tpf": FIGURES[(step - 1) // 2 if step < STEPS else -1]}

    patch.setattr(convert_module.Session, "run", run_session)
    patch.setattr(Probe, "__call__", probe)
    return made


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    """A conversion that nothing interrupted, which stops early and publishes its best step; checkpoints kept."""
    out = tmp_path_factory.mktemp("best") / "out"
    with pytest.MonkeyPatch.context() as patch:
        assert scripted(patch) == []
        run(out, texts, keep_checkpoints=True, **BEST)
    return out


# Measuring


@pytest.mark.parametrize("layout", LAYOUTS)
def test_figures_are_those_of_decoding_and_repeat_themselves(layout: DraftLayout) -> None:
    engine = randomise(Engine.from_model(build("llama"), tokenizer(), layout=layout))
    documents = [Document(f"{n}", tuple(range(1, 30 + n)), (True,) * (29 + n)) for n in range(3)]
    plan = load_recipe(None, {"train.probe_every": 1, "train.probe_tokens": 12, "data.temperature": 0})
    probe = live_probe(plan, documents, engine.backend, engine.attached, tokenizer())  # type: ignore[arg-type]
    assert probe is not None
    assert [len(prompt) < len(d.tokens) for prompt, d in zip(probe.prompts, documents, strict=True)] == [True] * 3
    assert probe.temperature == module.TEMPERATURE
    threads, generator = torch.get_num_threads(), torch.get_rng_state()
    found = probe()
    assert found == probe()
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), generator)
    assert sum(found["accepted"]) <= found["forwards"]
    assert found["tokens"] == 3 * 11, "the first token of each comes from the prefill"
    assert found["tpf"] == pytest.approx(found["tokens"] / found["forwards"], abs=1e-4)
    cycles = found["tokens"] / found["tau"]
    assert cycles == pytest.approx(round(cycles), rel=1e-3)


def test_a_document_that_is_nothing_but_response_gives_no_prompt() -> None:
    engine = Engine.from_model(build("llama"), tokenizer(), layout=DraftLayout(4))
    one = [Document("a", (5,), (True,))]
    plan = load_recipe(None, {"train.probe_every": 1})
    with pytest.raises(UsageError, match="no held-out document has anything before its first response token"):
        live_probe(plan, one, engine.backend, engine.attached, tokenizer())  # type: ignore[arg-type]


def test_probes_change_no_training(tmp_path: Path, texts: Path, plain: Path) -> None:
    out = tmp_path / "out"
    made = run(out, texts, **PROBED)
    assert learned(out) == learned(plain)
    records = curve(out / "metrics.jsonl")
    probed = {record["step"]: record.pop("probe") for record in records if "probe" in record}
    assert list(probed) == [2, 4, 6, 8, 9]
    assert records == curve(plain / "metrics.jsonl")
    raw = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(record["probe"]["seconds"] > 0 for record in raw if "probe" in record)
    training = made.config["training"]
    assert (training["published_step"], training["stopped_early"], training["steps"]) == (9, False, 9)
    assert training["probe"]["tpf"] == probed[9]["tpf"]
    run(tmp_path / "again", texts, **PROBED)
    assert curve(tmp_path / "again" / "metrics.jsonl") == curve(out / "metrics.jsonl")


def test_the_time_of_a_probe_is_not_the_steps(tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    right = Probe.__call__

    def slow(self: Probe) -> dict[str, Any]:
        clock[0] += 1000
        return right(self)

    monkeypatch.setattr(
        "retrofit.recipes.training.session.time.perf_counter", lambda: clock[0]
    )  # stands still but for probes
    monkeypatch.setattr(Probe, "__call__", slow)
    run(tmp_path / "out", texts, **{**PROBED, "train__steps": 3})
    raw = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [record["seconds"] for record in raw] == [0.0] * 3
    assert [record["probe"]["seconds"] for record in raw if "probe" in record] == [1000.0] * 2


# Deciding


def history(*figures: float | None) -> list[dict[str, Any]]:
    return [{"step": n, **({} if f is None else {"probe": {"tpf": f}})} for n, f in enumerate(figures, 1)]


def test_what_follows_from_a_history() -> None:
    assert best_step(history(None, None)) is None
    assert best_step(history(None, 1.0, None, 1.5, 1.5, 1.2)) == 4, "the first of equals"
    falling = history(None, 1.5, None, 1.5, 1.2)
    assert [exhausted(falling, patience) for patience in (0, 1, 2, 3)] == [False, True, True, False]
    assert not exhausted(history(None, 1.0, 1.1, 1.2), 1)
    assert not exhausted(history(None, None), 1)


def test_it_stops_early_and_publishes_the_best_step(best: Path, plain: Path) -> None:
    training = json.loads((best / "retrofit.json").read_text())["training"]
    assert (training["steps"], training["published_step"], training["stopped_early"]) == (8, 4, True)
    assert training["probe"]["tpf"] == 1.2
    assert [record["step"] for record in curve(best / "metrics.jsonl")] == list(range(1, 9))
    assert steps(best) == [4, 6, 8], "the newest two, and the one they need"
    weights = load_file(folder_of(best) / "step-000004" / "weights.safetensors")
    published = load_file(best / "adapter/adapter_model.safetensors")
    assert published
    for name, tensor in published.items():
        inner = name.replace(".weight", ".default.weight")
        assert torch.equal(tensor, weights[inner]), name


def test_the_last_step_is_published_where_none_was_better(tmp_path: Path, texts: Path, plain: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        assert scripted(patch) == []
        made = run(tmp_path / "out", texts, **PROBED, train__publish="best", train__save_every=0)
    assert made.config["training"]["published_step"] == 9
    assert learned(tmp_path / "out") == learned(plain)
    assert not folder_of(tmp_path / "out").exists()


# Stopped and gone on


def same(out: Path, best: Path) -> bool:
    assert curve(out / "metrics.jsonl") == curve(best / "metrics.jsonl")
    one, two = (json.loads((path / "retrofit.json").read_text())["training"] for path in (out, best))
    for training in (one, two):
        del training["seconds"], training["probe"]["seconds"]
    assert one == two
    return learned(out) == learned(best)


@pytest.mark.parametrize(("step", "save_every"), [(3, 0), (5, 2), (7, 0), (8, 2)])
def test_a_resumed_run_decides_as_a_straight_one(
    tmp_path: Path, texts: Path, best: Path, step: int, save_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch)
    out = tmp_path / "out"
    interrupted(out, texts, step, **BEST, train__save_every=save_every)
    run(out, texts, **BEST, train__save_every=save_every)
    assert same(out, best)
    assert not folder_of(out).exists()


@pytest.mark.parametrize("step", [2, 4, 8])
def test_a_signal_cuts_a_probe_short_and_it_is_made_again(
    tmp_path: Path, texts: Path, best: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, made = tmp_path / "out", scripted(monkeypatch)
    right = Probe.__call__

    def cut(self: Probe) -> dict[str, Any]:
        found = right(self)
        if made[-1] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Probe, "__call__", cut)
        with pytest.raises(SystemExit) as caught:
            run(out, texts, **BEST)
    assert f"saved step {step} of {STEPS}" in caught.value.__notes__[0]
    assert "probe" not in curve(folder_of(out) / f"step-{step:06d}" / "metrics.jsonl")[-1]
    assert len(curve(folder_of(out) / "metrics.jsonl")) == step - 1
    run(out, texts, **BEST)
    assert made.count(step) == 2
    assert same(out, best)


def dying_child(out: Path, texts: Path, function: str, call: int) -> None:
    scripted(pytest.MonkeyPatch())
    child(out, texts, function, call, **BEST)


# Saved are the steps 2, 4, 6 and 8, with six files each.
@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
@pytest.mark.parametrize("call", [8, 20])
def test_killed_while_a_checkpoint_is_written(
    tmp_path: Path, texts: Path, best: Path, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    process = PROCESSES.Process(target=dying_child, args=(out, texts, "write_file", call))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    scripted(monkeypatch)
    run(out, texts, **BEST)
    assert same(out, best)


def test_the_best_steps_checkpoint_gone_or_damaged_is_refused(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch)
    out = tmp_path / "out"
    interrupted(out, texts, 7, **BEST)
    assert steps(out) == [4, 6, 7]
    path = folder_of(out) / "step-000004" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UsageError, match="step-000004, which holds the weights to publish, cannot be used: weights"):
        run(out, texts, **BEST)
    assert steps(out) == [4, 6, 7]
    made = run(out, texts, **{**BEST, "train__publish": "last"}, resume="force")
    assert made.config["training"]["published_step"] == 8


def test_how_to_probe_may_change_unless_it_decides(tmp_path: Path, texts: Path, plain: Path) -> None:
    out = tmp_path / "out"
    interrupted(out, texts, 3, **PROBED)
    run(out, texts, **{**PROBED, "train__probe_every": 3, "train__probe_tokens": 4})
    assert learned(out) == learned(plain)
    interrupted(tmp_path / "two", texts, 3, **BEST)
    with pytest.raises(UsageError, match=r"train\.probe_tokens: 8 -> 4"):
        run(tmp_path / "two", texts, **{**BEST, "train__probe_tokens": 4})


# Recipes and words


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train.patience": 1}, r"train\.patience: 1 goes by probes, and there are none; set train\.probe_every"),
        ({"train.publish": "best"}, r"train\.publish: best goes by probes"),
        ({"train.probe_every": 5, "data.held_out": 0}, r"train\.probe_every: .*data\.held_out is 0; raise data"),
    ],
)
def test_recipes_that_make_no_sense(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_recipe("default", given)


def test_the_probe_is_shown(tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        scripted(patch)
        run(tmp_path / "out", texts, **BEST, quiet=False)
    said = capsys.readouterr().err
    assert "probe TPF 1.20 tau" in said
    assert "stopped early at step 8: 2 probes were no better" in said
    assert "publishing step 4; probe: TPF 1.20 tau" in said


def test_the_command_refuses_patience_without_probes() -> None:
    result = CliRunner().invoke(cli.main, ["convert", "-o", "x", "train.patience=3"])
    assert result.exit_code == 2
    assert "train.patience: 3 goes by probes" in result.stderr
