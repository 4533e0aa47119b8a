"""A base and an artifact as files, made in no time: what the tests of commands share."""

from pathlib import Path
from typing import Any

import torch
from tiny_models import VOCABULARY, build
from tokenizers import Tokenizer, models, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.cpu.subjects import write_artifact
from retrofit.adapters.attach import attach
from retrofit.adapters.layout import DraftLayout
from retrofit.hub import file_fingerprint

TEXT = "def area(radius): return radius * radius\nclass Stack: pass\nfor item in range(3): print(item)\n"
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
ADAPTER = {"rank": 2, "alpha": 2.0, "targets": ["q", "v"], "markov_rank": 2, "confidence": True}


def save_tokenizer(folder: Path, template: str | None = None) -> None:
    """A character-level tokenizer of less than VOCABULARY entries."""
    tokenizer = Tokenizer(models.BPE(unk_token="?"))
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["?"], show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="?", chat_template=template, clean_up_tokenization_spaces=False
    ).save_pretrained(folder)


def save_base(folder: Path, seed: int = 0, template: str | None = None) -> Path:
    build("llama", seed=seed).save_pretrained(folder)
    save_tokenizer(folder, template)
    return folder


def save_artifact(folder: Path, base: Path, **more: Any) -> Path:
    """An artifact for `base` with a random adapter, as `convert` would write it but in no time.

    more: what else its configuration holds.
    """
    model = build("llama")
    attached = attach(model, DraftLayout(block=4), **ADAPTER)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.normal_(std=0.05)
    fingerprint = file_fingerprint(base, model.config.to_dict())
    return write_artifact(folder, str(base), fingerprint, model, attached, ADAPTER, **more)


def texts(folder: Path) -> Path:
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text(TEXT * 2)
    return folder
