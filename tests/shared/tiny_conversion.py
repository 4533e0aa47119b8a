"""A conversion of a second, to be interrupted and killed: what the tests of checkpoints share."""

import json
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from recurrent_models import any_tiny
from tiny_models import VOCABULARY
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from retrofit.artifact import folder as artifact
from retrofit.recipes import convert as conversion
from retrofit.recipes.training import checkpoint
from retrofit.recipes.training.checkpoint import Checkpoints, folder_of
from retrofit.recipes.training.step import Trainer

STEPS = 9
RECIPE = {
    "train.steps": STEPS,
    "train.save_every": 2,
    "train.batch_size": 2,
    "train.anchors": 4,
    "train.warmup": 2,
    "train.lr": 1e-2,
    "adapter.rank": 2,
    "adapter.targets": ["q", "down"],
    "adapter.markov_rank": 2,
    "draft.block": 4,
    "objective.diffusion_share": 0.25,  # one block of the few
    "data.max_length": 24,
    "data.held_out": 1,
}
LETTERS = "abcdefghijklmnopqrstuvwxyz \n.,:()=+"
TEXTS = 5


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter."""
    assert len(LETTERS) < VOCABULARY
    made = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token=" "))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False)


def write_texts(folder: Path) -> Path:
    """Fewer windows than the shuffle buffer holds, so that several epochs lie in it."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(TEXTS):
        letters = torch.randint(0, len(LETTERS), (150 + 40 * number,), generator=generator).tolist()
        (folder / f"{number}.txt").write_text("".join(LETTERS[i] for i in letters))
    return folder


def run(out: Path, texts: Path, **options: Any) -> artifact.Artifact:
    """Convert a tiny model, `base`; other options are those of `convert`, or recipe keys with `__` for the dot."""
    recipe = {key.replace("__", "."): options.pop(key) for key in list(options) if "__" in key or key == "profile"}
    overrides = {**RECIPE, "data.source": str(texts), **recipe}
    options = {"quiet": True, "tokenizer": tokenizer(), **options}
    return briefly(any_tiny(options.pop("base", "llama")), "tiny", out, overrides, **options)


def briefly(*arguments: Any, **options: Any) -> artifact.Artifact:
    """`convert`, whose Markov head begins with little text: it reads so many windows of a tiny one, again and again,
    that this took more than half of a conversion."""
    with patch.object(conversion, "TOKENS", 1 << 8):
        return conversion.convert(*arguments, **options)


def die_in(function: str, call: int) -> None:
    """From now on, the given call of a function of `checkpoint` kills the process; a file is then half-written."""
    right: Callable[..., Any] = getattr(checkpoint, function)
    calls = []

    def dying(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) < call:
            return right(*arguments)
        if function == "write_file":
            half_written(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(checkpoint, function, dying)


def half_written(path: Path, content: bytes | Iterable[memoryview]) -> None:
    data = content if isinstance(content, bytes) else b"".join(content)
    path.write_bytes(data[: len(data) // 2])


def child(out: Path, texts: Path, function: str | None = None, call: int = 0, **options: Any) -> None:
    """What a process of the tests does."""
    torch.set_num_threads(1)
    if function is not None:
        die_in(function, call)
    run(out, texts, overwrite=True, **options)


def learned(out: Path) -> tuple[bytes, bytes]:
    return (out / "adapter/adapter_model.safetensors").read_bytes(), (out / "heads.safetensors").read_bytes()


def curve(path: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what only a clock knows."""

    def timeless(record: dict[str, Any]) -> dict[str, Any]:
        return {k: timeless(v) if isinstance(v, dict) else v for k, v in record.items() if k[:7] != "seconds"}

    return [timeless(json.loads(line)) for line in path.read_text().splitlines()]


def steps(out: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in sorted(checkpoint.folder_of(out).glob("step-*"))]


def at_step(step: int, action: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, method: str = "update") -> None:
    """Let something happen in the given step, before its gradients are known or after its weights have moved."""
    right = getattr(Trainer, method)

    def wrapped(self: Trainer, *arguments: Any) -> Any:
        if method == "gradients" and self.steps_done + 1 == step:
            action()
        result = right(self, *arguments)
        if method == "update" and self.steps_done == step:
            action()
        return result

    monkeypatch.setattr(Trainer, method, wrapped)


def interrupted(out: Path, texts: Path, step: int, number: int = signal.SIGINT, **options: Any) -> BaseException:
    """Run until a signal comes in the given step; returns what was raised."""
    with pytest.MonkeyPatch.context() as patch:
        at_step(step, lambda: os.kill(os.getpid(), number), patch)
        with pytest.raises((KeyboardInterrupt, SystemExit)) as caught:
            run(out, texts, **options)
    return caught.value


def whole(out: Path) -> list[int]:
    """Steps of checkpoints that verify, and nothing else lies there."""
    said: list[str] = []
    folder = folder_of(out)
    found = [path for path in folder.iterdir() if path.name not in ("metrics.jsonl", "lock")]
    assert all(path.name.startswith(("step-", "stopped-")) for path in found), found
    assert Checkpoints(folder).newest(said.append) is not None
    assert said == []
    return steps(out)


def failing_in_step_6(error: Exception, patch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise error

    at_step(6, fail, patch, "gradients")
