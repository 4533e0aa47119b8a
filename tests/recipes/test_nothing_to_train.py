"""A conversion that could train nothing is refused, and leaves nothing; one that can train a little goes on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from several_processes import saved_model
from tiny_conversion import RECIPE

from retrofit.adapters.layout import DraftLayout
from retrofit.cli import main as cli
from retrofit.errors import DataError, UsageError
from retrofit.recipes.problems import nothing_trained
from retrofit.recipes.schema import load_recipe
from retrofit.recipes.text.documents import Document
from retrofit.recipes.training.blocks import BlockBatch, add_sequence, eligible_anchors, shares
from retrofit.recipes.training.order import Order

LAYOUTS = [
    DraftLayout(block=4),
    DraftLayout(block=1),
    DraftLayout(block=3, seed_row="draft"),
    DraftLayout(block=3, seed_row="draft", shift=0),
    DraftLayout(block=2, attention="causal", input="noise"),
]


def judged(response: Sequence[bool], layout: DraftLayout, diffusion: bool) -> bool:
    """Whether training on every anchor of the document would judge any row."""
    batch, tokens = BlockBatch(layout, 0), list(range(len(response)))
    rng = np.random.default_rng(0)
    add_sequence(batch, tokens, response, eligible_anchors(response).tolist(), 0, rng, 64, diffusion)
    blocks = zip(batch.eligible, batch.weight, strict=True)
    return any((eligible & ((weight > 0) | (not diffusion))).any() for eligible, weight in blocks)


def command(model: Path, source: Any, out: Path, *more: str) -> Any:
    recipe = {**RECIPE, "train.steps": 2, "train.warmup": 0, "data.source": source, "data.held_out": 0}
    words = [f"{key}={json.dumps(value) if isinstance(value, list) else value}" for key, value in recipe.items()]
    line = ["convert", model, "--recipe", "tiny", "-o", out, "--offline", *words, *more]
    return CliRunner(env={"RETROFIT_DEVICE": "cpu"}).invoke(cli.main, [str(one) for one in line])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("base") / "base")


def texts(folder: Path, *contents: str) -> Path:
    folder.mkdir()
    for number, text in enumerate(contents):
        (folder / f"{number}.txt").write_text(text)
    return folder


def short_answers(path: Path) -> Path:
    path.write_text("".join(json.dumps({"prompt": "hello there", "response": c}) + "\n" for c in "abcdef"))
    return path


def refused(done: Any, message: str, code: int = 1) -> None:
    assert done.exit_code == code, done.output
    assert done.stdout == "" and message in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith(("Error: ", "hint: "))]
    assert len(lines) == 2 and "loss" not in lines[0]


def test_documents_that_are_too_short(base: Path, tmp_path: Path) -> None:
    source = texts(tmp_path / "texts", *["ab"] * 6)
    answers = short_answers(tmp_path / "answers.jsonl")
    before = sorted(path.name for path in tmp_path.iterdir())
    mixed = [{"source": str(source), "weight": 2.0}, {"source": str(answers)}]
    for one in (source, answers, mixed):
        refused(command(base, one, tmp_path / "out"), "nothing to train: of ")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_few_documents_that_do(base: Path, tmp_path: Path) -> None:
    """They make up every batch, so no step is without a loss."""
    source = texts(tmp_path / "texts", *["ab"] * 20, "def area(radius): return radius")
    answers = short_answers(tmp_path / "answers.jsonl")
    for number, one in enumerate((source, [{"source": str(source)}, {"source": str(answers)}])):
        done = command(base, one, tmp_path / f"out{number}")
        assert done.exit_code == 0, done.output
        lines = (tmp_path / f"out{number}" / "metrics.jsonl").read_text().splitlines()
        assert all(json.loads(line)["loss"]["draft"] > 0 for line in lines)


def test_an_epoch_without_any(tmp_path: Path) -> None:
    """Of responses that are written anew each time, a later epoch may be the first that holds nothing."""

    def epoch(number: int) -> Any:
        length = 9 if number < 2 else 2
        return iter([Document(f"{number}/{i}", tuple(range(length)), (True,) * length) for i in range(3)])

    order = Order(epoch, 2, seed=0, layout=DraftLayout())
    with pytest.raises(DataError, match="nothing to train: of 3 documents"):
        order.batch()
    good = Order(lambda number: epoch(0), 2, seed=0, layout=DraftLayout())
    assert all(len(document.tokens) == 9 for document, _ in good.batch())


# Weights


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0, "beta": 0}, "nothing trains the drafts"),
        ({"beta": 0, "diffusion_share": 0}, "0 of train.anchors 4 blocks train L_diff"),
        ({"alpha": 0, "diffusion_share": 1}, "and 0 L_draft"),
        ({"beta": 0, "diffusion_share": 0.1}, "nothing trains the drafts"),  # a tenth of four blocks is none
    ],
    ids=str,
)
def test_weights_that_train_nothing(settings: dict[str, float], message: str, base: Path, tmp_path: Path) -> None:
    source = texts(tmp_path / "texts", "def area(radius): return radius" * 3)
    words = [f"objective.{key}={value}" for key, value in settings.items()]
    done = command(base, source, tmp_path / "out", *words)
    refused(done, message, code=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["beta", "alpha", "diffusion_share"])
def test_weights_that_train_something(key: str) -> None:
    load_recipe(None, {"objective.diffusion_share": 0.25, f"objective.{key}": 0})


def test_the_count_is_that_of_training() -> None:
    for anchors in (1, 3, 4, 64):
        for share in (0.0, 0.1, 0.12, 0.125, 0.25, 0.5, 0.9, 1.0):
            for block in (1, 8):
                uniform, missed, masked = shares(anchors, share, block)
                assert bool(nothing_trained(1, 0, share, anchors, block)) == (masked == 0)
                assert bool(nothing_trained(0, 1, share, anchors, block)) == (uniform + missed == 0)
                assert nothing_trained(1, 1, share, anchors, block) == []


def test_a_block_of_one_and_no_weight_on_it() -> None:
    with pytest.raises(UsageError, match="nothing trains the drafts"):
        load_recipe(None, {"draft.block": 1, "objective.diffusion_share": 0, "objective.beta": 0})
