"""Artifacts by the real `convert`, small enough to be certified in a second: shared by tests of the certificate."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from several_processes import run_folder
from tiny_conversion import tokenizer
from tiny_models import SIZES
from transformers import LlamaConfig, LlamaForCausalLM

from retrofit.artifact import folder as artifacts
from retrofit.cli.main import main
from retrofit.eval import certify
from retrofit.eval.exactness import Verdict

QUICK = {"data__held_out": 2, "train__steps": 4, "train__anchors": 8}
"""Enough held-out blocks that every slot has candidates with a chance."""


def flat_base(folder: Path, **changes: Any) -> Path:
    """A tiny Llama.  Its distributions are rather flat, so drafts drawn with the same noise are often accepted."""
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": 1, "initializer_range": 0.12, **changes}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def converted(out: Path, base: Path, texts: Path, **keys: Any) -> Path:
    """An artifact by the real `convert`; keys are the recipe's, with `__` for the dot."""
    run_folder(out, base, texts, **{**QUICK, **keys})
    return out


def ranks_of(folder: Path) -> Any:
    """The measured chances of candidates, which trees grow from; None where nothing was measured."""
    return artifacts.read_config(folder)["acceptance"].get("ranks")


def small(patch: pytest.MonkeyPatch, prompts: int = 3, tokens: int = 10, only: tuple[str, ...] = ()) -> None:
    """`quick` in a second: few tokens, no distribution (which no artifact changes); or only some checks."""
    patch.setitem(certify.LEVELS, "quick", certify.Size(prompts, tokens, 0))
    patch.setattr(certify, "distribution", lambda *_: Verdict(True, "not run here", {}))
    if only:
        right: Callable[..., dict[str, Any]] = certify._checks

        def some(*arguments: Any) -> dict[str, Any]:
            return {name: check for name, check in right(*arguments).items() if name in only}

        patch.setattr(certify, "_checks", some)


def command(folder: Path, *options: str) -> tuple[Result, dict[str, dict[str, Any]]]:
    """`retrofit certify`, and the checks it wrote by name: none where it wrote no certificate, whatever was there."""
    for left in folder.glob("certificate.json*"):
        left.unlink()
    result = CliRunner().invoke(main, ["certify", str(folder), "--device", "cpu", *options])
    written = folder / "certificate.json"
    content = json.loads(written.read_text()) if written.is_file() else {"checks": []}
    return result, {check["name"]: check for check in content["checks"]}
