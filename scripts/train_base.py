"""Train the embedded base, or measure one.

    python scripts/train_base.py --out FOLDER
    python scripts/train_base.py --eval-only retrofit/recipes/tiny

The model is the Llama of the embedded base's `config.json`, the tokenizer a byte-level BPE of its own.
Muon (Jordan et al. 2024) moves the hidden matrices, AdamW embeddings and norms.  Another Python has another
standard library, so compare bases under one version only.  `torch.optim.Muon` multiplies in bfloat16: most of
a step's time on a CPU without instructions for it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from retrofit.errors import RetrofitError, UsageError
from retrofit.progress import progress, tracked
from retrofit.recipes.schema import Data
from retrofit.recipes.text.documents import documents
from retrofit.recipes.text.library import HELD_OUT_LIST, stdlib_texts
from retrofit.recipes.text.sources import Part

TINY = HELD_OUT_LIST.parent
EOS = "<|endoftext|>"  # id 0; also padding
LENGTH = 256  # tokens per sequence
BATCH = 8  # sequences per step
STEPS = 8337
LR_MUON, LR_ADAM = 4e-3, 3e-3
WARMUP = 50  # steps
FLAT = 0.6  # the learning rate is constant up to this share of the steps,
FLOOR = 0.02  # then falls linearly to this share of its peak
CLIP = 1.0  # gradient norm


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write; must not exist.")
@click.option("--steps", type=click.IntRange(1), default=STEPS, show_default=True, help="Optimizer steps.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--eval-only", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Measure this base.")
@click.option("--windows", type=click.IntRange(1), help="Measure on the first so many windows only.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def main(
    out: Path | None,
    steps: int,
    device: str,
    seed: int,
    eval_only: Path | None,
    windows: int | None,
    as_json: bool,
) -> None:
    """Train the embedded base into --out, or measure --eval-only, on the held-out files."""
    try:
        if (out is None) == (eval_only is None):
            raise UsageError("give either --out or --eval-only")
        if out is not None:
            train(out, steps, device, seed)
        result = evaluate(out or eval_only, device, windows)
    except RetrofitError as error:
        click.echo(f"Error: {error}" + (f"\n{error.hint}" if error.hint else ""), err=True)
        raise SystemExit(error.exit_code) from None
    if as_json:
        click.echo(json.dumps(result))
    else:
        line = "held out: {nats:.4f} nats per token, next-token accuracy {accuracy:.2%}, {windows} windows"
        click.echo(line.format(**result))


def train(out: Path, steps: int, device: str, seed: int) -> None:
    """Train tokenizer and model from nothing and save them in the new folder `out`, weights in bfloat16."""
    if out.exists():
        raise UsageError(f"{out}: exists already", "choose another folder")
    torch.manual_seed(seed)
    config = LlamaConfig.from_pretrained(TINY)
    tokenizer = train_tokenizer(config.vocab_size)
    tokens = torch.tensor(token_stream(tokenizer, "train"))
    model = new_model(config).to(device).train()
    optimizers = new_optimizers(model)
    batches = sequences(tokens, random.Random(seed))
    optimise(model, optimizers, (rows.to(device) for rows in batches), steps, "training")
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    GenerationConfig(eos_token_id=0, pad_token_id=0).save_pretrained(out)


def optimise(
    model: PreTrainedModel,
    optimizers: Sequence[torch.optim.Optimizer],
    batches: Iterator[Tensor],
    steps: int,
    title: str,
) -> None:
    """Train on next tokens."""
    with progress(title, "step", steps) as shown:
        for step in range(steps):
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * lr_share(step, steps)
            loss = next_token_loss(model, next(batches))[0].mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            shown.advance(text=f"loss {loss.item():.3f}" if step % 10 == 0 else None)


@torch.inference_mode()
def evaluate(folder: Path, device: str = "cpu", windows: int | None = None) -> dict[str, Any]:
    """Next-token loss (nats) and accuracy, in float32, on the held-out files in windows of LENGTH tokens.

    The files follow each other in the order of their list.  `windows`: measure only the first so many, whose
    mean depends much on which files come first.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    tokens = torch.tensor(token_stream(tokenizer, "held_out"))
    rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)[:windows]
    loss, hits = 0.0, 0
    for batch in tracked(rows.split(BATCH), "held out", "batch", -(-len(rows) // BATCH)):
        losses, right = next_token_loss(model, batch.to(device))
        loss += losses.double().sum().item()
        hits += int(right.sum())
    count = len(rows) * (LENGTH - 1)
    return {"nats": loss / count, "accuracy": hits / count, "windows": len(rows), "tokens": len(tokens)}


def train_tokenizer(entries: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with `entries` entries, EOS among them, trained on the text the model trains on."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stdlib_texts("train"), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=LlamaConfig.from_pretrained(TINY).max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, part: Part) -> list[int]:
    """All documents of a part of the standard library, one after the other."""
    return [token for document in documents(Data(), tokenizer, part=part) for token in document.tokens]


def new_model(config: LlamaConfig) -> LlamaForCausalLM:
    """A fresh model in float32.  Projections into the residual stream begin smaller, by GPT-2's rule."""
    model = LlamaForCausalLM(config).float()
    std = config.initializer_range / (2 * config.num_hidden_layers) ** 0.5
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.normal_(weight, std=std)
    return model


def new_optimizers(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices and AdamW for the rest; `peak` of a group is its peak learning rate."""
    named = list(model.named_parameters())
    hidden = [weight for name, weight in named if weight.ndim == 2 and "embed" not in name and "lm_head" not in name]
    rest = [weight for _, weight in named if all(weight is not other for other in hidden)]
    muon = torch.optim.Muon(
        [{"params": hidden, "peak": LR_MUON}], lr=LR_MUON, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW([{"params": rest, "peak": LR_ADAM}], lr=LR_ADAM, betas=(0.9, 0.95), weight_decay=0.0)
    return [muon, adam]


def lr_share(step: int, steps: int) -> float:
    """Share of the peak learning rate at a step: warm-up, constant, then linear to FLOOR."""
    fall = max(0.0, (step / steps - FLAT) / (1 - FLAT))
    return min(1.0, (step + 1) / WARMUP) * (1 - (1 - FLOOR) * fall)


def sequences(tokens: Tensor, rng: random.Random) -> Iterator[Tensor]:
    """Batches [BATCH, LENGTH] without end; every epoch has its own offset and order."""
    while True:
        offset = rng.randrange(LENGTH)
        starts = list(range(offset, len(tokens) - LENGTH + 1, LENGTH))
        rng.shuffle(starts)
        for first in range(0, len(starts) - BATCH + 1, BATCH):
            yield torch.stack([tokens[start : start + LENGTH] for start in starts[first : first + BATCH]])


def next_token_loss(model: PreTrainedModel, rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [B, T] -> loss of every next token [B, T-1] in nats, and whether the likeliest is right."""
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
    targets = rows[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return losses, logits.argmax(-1) == targets


if __name__ == "__main__":
    main()
