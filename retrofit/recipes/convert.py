"""`retrofit convert`: load the base, attach the adapter, train it, measure it, write the artifact.

The base is only read.  The artifact appears whole at the end, or not at all.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retrofit import __version__, artifact
from retrofit.adapters.attach import Attached, attach
from retrofit.adapters.layout import DraftLayout
from retrofit.errors import GateError, ResourceError, UsageError
from retrofit.hub import EMBEDDED, Base, live_fingerprint, load_base
from retrofit.recipes.data import Document, documents, windows
from retrofit.recipes.faults import Skipped
from retrofit.recipes.measure import calibrate_confidence, held_out_acceptance
from retrofit.recipes.regenerate import ResponseCache, regenerate, weights_key
from retrofit.recipes.schema import Recipe, dump_recipe, load_recipe
from retrofit.recipes.train import Trainer, batches, clean_forward, train
from retrofit.runtime.backends.hf import HFBackend, refuse_unsupported, wrap
from retrofit.runtime.engine import Engine

MEASURED = 32
"""Held-out documents that acceptance is measured on; data.held_out may keep more out of training."""

CARD = """---
library_name: peft
base_model: {model}
tags: [retrofit, speculative-decoding, diffusion]
---
# {model}, retrofitted

Adapter for self-speculative decoding of `{model}`, made with retrofit {version} (`pip install retrofit-lm`).
The base weights are untouched: mode `ar` is the original model, mode `self_spec` gives its output with fewer forwards.

```python
import retrofit
engine = retrofit.Engine.load("PATH-OF-THIS-FOLDER")
print(engine.generate(["Once upon a time"], mode="self_spec")[0].text)
```

**Do not load `adapter/` with plain PEFT**: ungated, it changes the output of the original model.

| measured on held-out text, teacher-forced | by slot |
| --- | --- |
| greedy acceptance | {greedy} |
| sampled acceptance, 1 - TV | {sampled} |

Draft block {block}; adapter and heads {added:,} parameters, {share:.2%} of the base.
"""


def convert(
    model: str | Path | PreTrainedModel | None = None,
    recipe: str | Path | Recipe | None = None,
    out: str | Path = "retrofit-artifact",
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    device: str = "cpu",
    overwrite: bool = False,
    offline: bool = False,
    trust_remote_code: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quiet: bool = False,
    skip_bad: bool = False,
) -> artifact.Artifact:
    """Convert a model into an artifact folder and return it.

    model: Hub id, local folder or live model; None takes the recipe's.  recipe: name, YAML file or `Recipe`; None is
    the embedded base's for no model, else the defaults.  A live model gets its adapter taken off again at the end.
    skip_bad: leave out rows of text that cannot be used, and count them in `config["training"]["skipped"]`.
    Raises UsageError, DataError, ResourceError, UnsupportedModelError; nothing is written then.  Raises GateError if
    the base's own loss moved, which would mean that training touched it.
    """
    model = str(model) if isinstance(model, Path) else model
    plan = resolve(model, recipe, overrides)
    out = Path(out)
    out = out.resolve() if out.name in ("", "..") else out
    artifact.check_writable(out, overwrite)
    _check_parent(out)
    started = time.perf_counter()
    base = _base(model, plan, device, offline, trust_remote_code, tokenizer)
    plan = plan.model_copy(update={"base": plan.base.model_copy(update={"model": base.name})})
    layout = DraftLayout(**plan.draft.model_dump())
    refuse_unsupported(base.model)
    context = int(base.model.config.get_text_config().max_position_embeddings)
    if layout.block >= context:
        raise UsageError(f"draft.block is {layout.block}, the context of {base.name} is {context}", "lower draft.block")
    if plan.data.max_length > context:
        raise UsageError(
            f"data.max_length is {plan.data.max_length}, the context of {base.name} is {context}",
            f"add data.max_length={context}",
        )
    attached, backend = wrap(
        base.model,
        lambda: attach(
            base.model,
            layout,
            rank=plan.adapter.rank,
            alpha=plan.adapter.alpha,
            targets=plan.adapter.targets,
            markov_rank=plan.adapter.markov_rank,
            confidence=plan.adapter.confidence,
            seed=plan.train.seed,
        ),
    )
    try:
        if plan.data.max_length > (backend.rope_boundary or backend.context_length):
            raise UsageError(
                f"data.max_length is {plan.data.max_length}, beyond the position where {base.name} changes its RoPE",
                f"add data.max_length={backend.rope_boundary or backend.context_length}",
            )
        skipped = Skipped() if skip_bad else None
        return _convert(plan, base, attached, backend, out, overwrite, quiet, started, skipped)
    finally:
        backend.close()
        if isinstance(model, PreTrainedModel):
            attached.detach()


def resolve(
    model: str | PreTrainedModel | None,
    recipe: str | Path | Recipe | None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
) -> Recipe:
    """The recipe of a conversion with everything filled in.  Raises UsageError."""
    if isinstance(recipe, Recipe):
        if overrides:
            raise UsageError("a Recipe and overrides were both given", "put the values into the Recipe")
        plan = recipe
    else:
        name = str(recipe) if recipe is not None else (None if model is None else "default")
        plan = load_recipe(name, overrides)
    if isinstance(model, str):
        plan = plan.model_copy(update={"base": plan.base.model_copy(update={"model": model})})
    if plan.profile == "joint":
        raise UsageError("profile joint is not built yet", "use profile=frozen, which keeps the base bit-identical")
    for key in ("save_every", "probe_every"):
        if getattr(plan.train, key):
            raise UsageError(f"train.{key}: checkpoints and live probes are not built yet", f"leave train.{key} at 0")
    return plan


def _base(
    model: str | PreTrainedModel | None,
    plan: Recipe,
    device: str,
    offline: bool,
    trust_remote_code: bool,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Base:
    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise UsageError("a live model needs tokenizer=")
        name = model.config._name_or_path or type(model).__name__
        return Base(model, tokenizer, name, None, None, live_fingerprint(model))
    dtype = plan.train.precision if plan.base.dtype == "auto" else plan.base.dtype
    return load_base(
        plan.base.model,
        plan.base.revision,
        dtype=dtype,
        device=device,
        offline=offline,
        trust_remote_code=trust_remote_code,
    )


def _convert(
    plan: Recipe,
    base: Base,
    attached: Attached,
    backend: HFBackend,
    out: Path,
    overwrite: bool,
    quiet: bool,
    started: float,
    skipped: Skipped | None,
) -> artifact.Artifact:
    seed = plan.train.seed
    rewritten = _rewriter(plan, base, attached, backend, quiet)
    held_out = _held_out(plan, base, attached, rewritten, skipped)
    source = batches(_epochs(plan, base, attached, rewritten, skipped), plan.train.batch_size, seed)
    first = next(source)
    probe = [document for document, _ in first]
    before = _probe_hash(backend, probe)
    trainer = Trainer(attached, backend, plan)
    say = _say(quiet)
    say(
        f"base {base.name} ({_count(_base_parameters(attached)):,} parameters), "
        f"training {_count(trainer.trained):,} ({_share(attached):.2%})"
    )
    metrics = _metrics_file(out)
    try:
        with tqdm(total=plan.train.steps, unit="step", disable=quiet, file=sys.stderr, dynamic_ncols=True) as bar:
            history = train(trainer, _chain(first, source), metrics, _progress(bar, trainer))
        if _probe_hash(backend, probe) != before:
            raise GateError("the base model's own logits moved during training", "this is a bug; please report it")
        measured = held_out_acceptance(backend, attached, held_out, plan.train.anchors, seed)
        calibrate_confidence(attached, measured)
        conditional = measured.conditional()
        acceptance: dict[str, Any] = {"conditional": history[-1]["accept"]}
        if len(measured.eligible):
            acceptance = {"conditional": conditional, "ranks": measured.rank_chances()}
        config = _config(plan, base, attached, acceptance, history, time.perf_counter() - started)
        if skipped is not None:
            config["training"]["skipped"] = skipped.counts()
        card = CARD.format(
            model=base.name,
            version=__version__,
            greedy=conditional["greedy"] if len(measured.eligible) else "not measured",
            sampled=conditional["sampled"] if len(measured.eligible) else "not measured",
            block=attached.layout.block,
            added=_count(trainer.trained),
            share=_share(attached),
        )
        folder = artifact.write(
            out,
            adapter_config=attached.adapter_config(),
            adapter_state=attached.adapter_state(),
            heads=attached.heads_state(),
            config=config,
            recipe_yaml=dump_recipe(plan),
            card=card,
            overwrite=overwrite,
        )
        artifact.add(folder, "metrics.jsonl", metrics.read_bytes())
    finally:
        shutil.rmtree(metrics.parent, ignore_errors=True)
    if skipped is not None:
        say(skipped.line())
    say(f"wrote {folder} in {time.perf_counter() - started:.0f} s")
    return artifact.read(folder)


Rewriter = Callable[[Iterable[Document]], Iterator[Document]]


def _rewriter(plan: Recipe, base: Base, attached: Attached, backend: HFBackend, quiet: bool) -> Rewriter:
    """Documents with the base's own responses, where the recipe wants those; else as they are."""
    if plan.data.responses == "keep":
        return iter
    engine = Engine(backend, attached.layout, base.tokenizer, attached=attached)
    cache = ResponseCache(weights_key(attached), plan.data.temperature, backend.eos)
    return partial(
        regenerate,
        engine=engine,
        temperature=plan.data.temperature,
        seed=plan.train.seed,
        max_length=plan.data.max_length,
        cache=cache,
        quiet=quiet,
    )


def _epochs(
    plan: Recipe, base: Base, attached: Attached, rewritten: Rewriter, skipped: Skipped | None
) -> Callable[[int], Iterator[Document]]:
    """Training windows of an epoch."""

    def epoch(number: int) -> Iterator[Document]:
        seed, vocab = plan.train.seed + number, attached.heads.vocab
        read = documents(plan.data, base.tokenizer, part="train", seed=seed, skipped=skipped, vocab=vocab)
        return rewritten(windows(read, plan.data.max_length))

    return epoch


def _held_out(
    plan: Recipe, base: Base, attached: Attached, rewritten: Rewriter, skipped: Skipped | None
) -> list[Document]:
    """First windows of held-out documents, MEASURED at most; errors in the data show here, before training."""
    if plan.data.held_out == 0:
        return []
    read = documents(plan.data, base.tokenizer, part="held_out", skipped=skipped, vocab=attached.heads.vocab)
    first = (next(windows([document], plan.data.max_length), None) for document in read)
    return list(rewritten(islice((window for window in first if window is not None), MEASURED)))


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _progress(bar: tqdm[Any], trainer: Trainer) -> Callable[[int, dict[str, Any]], None]:
    begin, tokens = time.perf_counter(), [0]

    def show(step: int, record: dict[str, Any]) -> None:
        tokens[0] += record["rows"]["clean"]
        loss, accept = record["loss"], record["accept"]["sampled"]
        bar.set_postfix_str(
            f"loss {loss['total']:.3f} (ar {loss['ar']:.2f} diff {loss['diff']:.2f} draft {loss['draft']:.3f} "
            f"conf {loss['conf']:.2f}) accept {' '.join(f'{a:.2f}' for a in accept)} tau {record['tau']:.2f} "
            f"{tokens[0] / (time.perf_counter() - begin):,.0f} tokens/s",
            refresh=False,
        )
        bar.update()

    return show


def _config(
    plan: Recipe,
    base: Base,
    attached: Attached,
    acceptance: dict[str, Any],
    history: list[dict[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    lora = _count([p for n, p in attached.peft_model.named_parameters() if "lora_" in n])
    return {
        "format": artifact.FORMAT,
        "retrofit": __version__,
        "base": {
            "model": _lasting_name(base),
            "revision": base.revision,
            "dtype": str(attached.model.dtype).removeprefix("torch."),
            "fingerprint": base.fingerprint,
            "architecture": type(attached.model).__name__,
        },
        "profile": plan.profile,
        "draft": attached.layout.to_dict(),
        "adapter": {
            "rank": plan.adapter.rank,
            "alpha": plan.adapter.alpha,
            "targets": list(plan.adapter.targets),
            "modules": sorted(attached.adapter_config()["target_modules"]),
            "markov_rank": plan.adapter.markov_rank,
            "confidence": plan.adapter.confidence,
        },
        "parameters": {
            "adapter": lora,
            "heads": _count(attached.heads.parameters()),
            "base": _count(_base_parameters(attached)),
        },
        "acceptance": acceptance,
        "training": {
            "steps": plan.train.steps,
            "seconds": round(seconds, 1),
            "clean_rows": sum(r["rows"]["clean"] for r in history),
            "draft_rows": sum(r["rows"]["draft"] for r in history),
            "loss": history[-1]["loss"] if history else {},
        },
    }


def _lasting_name(base: Base) -> str:
    """The base's name as it will be understood from any folder."""
    if base.name == EMBEDDED or base.folder is None or not Path(base.name).is_dir():
        return base.name
    return str(Path(base.name).resolve())


def _check_parent(out: Path) -> None:
    """Find out before hours of training, not after.  Raises ResourceError."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(out.parent, os.W_OK)
    except OSError as error:
        raise ResourceError(
            f"{out.parent}: cannot be made ({error.strerror})", "choose another place with -o"
        ) from error
    if not writable:
        raise ResourceError(f"{out.parent}: not writable", "choose another place with -o")


def _metrics_file(out: Path) -> Path:
    """metrics.jsonl of a running conversion, in a hidden folder beside the artifact to be."""
    out.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f".{out.name}-training-", dir=out.parent)) / "metrics.jsonl"


def _probe_hash(backend: HFBackend, probe: list[Document]) -> str:
    """Hash of the base rows' logits on a fixed batch: L_AR must not move in the frozen profile, not by a bit."""
    _, hidden = clean_forward(backend, probe)
    with torch.no_grad():
        logits = backend.head(hidden[:64]).float().cpu().contiguous()
    return hashlib.sha256(logits.numpy().tobytes()).hexdigest()


def _base_parameters(attached: Attached) -> list[torch.nn.Parameter]:
    return [p for n, p in attached.peft_model.named_parameters() if "lora_" not in n]


def _share(attached: Attached) -> float:
    return _count(attached.parameters()) / _count(_base_parameters(attached))


def _count(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)


def _say(quiet: bool) -> Callable[[str], None]:
    return (lambda message: None) if quiet else (lambda message: print(message, file=sys.stderr))
