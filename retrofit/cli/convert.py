"""`retrofit convert`, its dry run included, and `retrofit average`: from the command line to the artifact's folder.

Everything slow is imported inside the bodies, so that `--help` answers at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from retrofit.artifact import folder as artifact
from retrofit.cli.options import CONTEXT, Loading, base_option, loading_options, output_options, skip_bad_option
from retrofit.cli.output import be_quiet, emit_json, is_quiet, quieten_libraries, say
from retrofit.cli.tables import facts
from retrofit.errors import GateError, ResourceError, UsageError
from retrofit.gguf_files import SUFFIX
from retrofit.launch import is_launched
from retrofit.locating import expanded

if TYPE_CHECKING:
    from retrofit.recipes.budget.presets import Preset
    from retrofit.recipes.schema import Recipe


@click.command(context_settings=CONTEXT)
@click.argument("items", nargs=-1, metavar="[MODEL] [KEY=VALUE]...")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="Folder to write.  [default: MODEL-retrofit in the current folder]",
)
@click.option("--gguf", metavar="FILE", help="The GGUF file to take of MODEL, a folder or Hub id: as MODEL/FILE.")
@click.option(
    "--recipe",
    metavar="NAME|FILE",
    help="See `retrofit recipes ls`.  [default: tiny for the embedded base, else default]",
)
@click.option(
    "--from",
    "start_from",
    envvar="RETROFIT_FROM",
    metavar="ARTIFACT",
    help="Train its adapter and heads further, with its base and recipe unless others are given; or a checkpoint.",
)
@click.option("--overwrite", is_flag=True, help="Replace an artifact that is there already.")
@click.option("--force-resume", is_flag=True, help="Go on from a checkpoint though the recipe or the text changed.")
@click.option("--restart", is_flag=True, help="Remove the checkpoints and start anew.")
@click.option("--keep-checkpoints", is_flag=True, help="Leave them there when the artifact is complete.")
@click.option("--dry-run", is_flag=True, help="Write nothing: say what it would take of memory, disk and time.")
@click.option("--fit", metavar="SIZE", help="With --dry-run: say what to change to fit into so much, such as 24GB.")
@click.option(
    "--preset",
    type=click.Choice(["fast", "balanced", "best"]),
    help="How much of the recipe's training: less, as it is written, or more.",
)
@click.option("--budget", metavar="TIME", help="Choose preset, steps and block to end within it, such as 30m or 1h30m.")
@click.option("--seed", type=click.IntRange(min=0), help="As train.seed=SEED.")
@skip_bad_option
@click.option(
    "--track",
    type=click.Choice(["trackio", "wandb", "tensorboard"]),
    help="Send the figures of every step there too; tensorboard's files lie in OUT.track.",
)
@loading_options
@output_options
def convert(
    items: tuple[str, ...],
    out: Path | None,
    gguf: str | None,
    recipe: str | None,
    force_resume: bool,
    restart: bool,
    dry_run: bool,
    fit: str | None,
    preset: Preset | None,
    budget: str | None,
    seed: int | None,
    loading: Loading,
    as_json: bool,
    **options: Any,
) -> None:
    """Train an adapter for MODEL and write the artifact.

    MODEL is a Hub id, a folder, a GGUF file, smollm2-135m, or nothing for the base that ships with retrofit. KEY=VALUE
    sets a key of the recipe (`retrofit recipes show` prints them all) and wins over --dtype and --seed.  Prints the
    artifact's folder.  `retrofit data validate` finds bad rows of text; here the first ends the run, unless --skip-bad.

    Checkpoints lie in OUT.checkpoints, every train.save_every steps and on Ctrl-C or SIGTERM (the newest two): the same
    command goes on from the newest that is whole. With schedule constant or wsd train.steps may be raised then.

    --from trains an artifact, a folder or OWNER/NAME on the Hub, further, on MODEL if that is another of its shapes.
    --from OUT.checkpoints/step-N goes on as the run that wrote it would have.

    --preset scales the recipe's training, and KEY=VALUE wins over it. --budget measures a step here, chooses preset,
    steps and block by it, and says what to expect; data.responses=regenerate comes on top. The same command goes on.

    --dry-run downloads configuration and tokenizer alone; time is measured where the weights are here.  It exits with
    3 when it does not fit into --fit, and with 4 when no change makes it fit.

    Several GPUs: put `torchrun --nproc-per-node 8 --no-python` or `accelerate launch --multi_gpu --no_python` before
    the command; the processes divide each batch. `--use_fsdp --fsdp_version 2` splits a base too large for one GPU.

    \b
    Examples:
      retrofit convert
      retrofit convert Qwen/Qwen3-0.6B --recipe qwen3-0.6b --dry-run --fit 24GB
      retrofit convert ./gguf-files --gguf my-model.Q4_K_M.gguf -o my-retrofit
      retrofit convert ./my-model data.source=texts.jsonl draft.block=4 --budget 30m
      retrofit convert --from my-retrofit -o my-retrofit-2 train.steps=500 data.source=more.jsonl
      torchrun --nproc-per-node 8 --no-python retrofit convert Qwen/Qwen3-8B --recipe qwen3-8b
    """
    with _several_processes(loading) as is_main:
        resume = _resume(force_resume, restart)
        if fit is not None and not dry_run:
            raise UsageError("--fit goes with --dry-run", "add --dry-run, or leave --fit out")
        plan = _resolved(items, gguf, recipe, loading, seed, options["start_from"])
        out = out or Path(f"{_name(plan.base.model)}-retrofit")
        artifact.check_writable(out, options["overwrite"], artifact.INSTEAD.format(out))
        plan, chosen = _scaled(plan, preset, budget, items, out, loading, dry_run or restart, options["start_from"])
        if not dry_run:
            made = _convert(plan, out, loading, resume=resume, **options)
        if is_main and dry_run:
            _dry_run(plan, out, fit, loading, options["skip_bad"], as_json, chosen)
        elif is_main:
            _tell(made, as_json, chosen)


def _resume(force_resume: bool, restart: bool) -> Literal["auto", "force", "never"]:
    """What becomes of checkpoints that are there.  Raises UsageError."""
    if force_resume and restart:
        raise UsageError("--force-resume and --restart do not go together", "give one of them")
    return "force" if force_resume else "never" if restart else "auto"


def _scaled(
    plan: Recipe,
    preset: Preset | None,
    budget: str | None,
    items: tuple[str, ...],
    out: Path,
    loading: Loading,
    again: bool,
    start_from: str | None,
) -> tuple[Recipe, dict[str, Any]]:
    """(the recipe as --preset and --budget have it, what --json says of that).  Raises UsageError."""
    if preset is None and budget is None:
        return plan, {}
    quieten_libraries()
    from retrofit.recipes.budget.planning import scaled
    from retrofit.recipes.origin import is_checkpoint

    if start_from is not None and is_checkpoint(start_from):
        given = "--preset" if budget is None else "--budget"
        raise UsageError(
            f"{given} chooses how a training goes, and {start_from} is one that was begun",
            f"leave {given} out, and raise train.steps where its schedule allows; or name the artifact that came of it",
        )
    kept = {item.partition("=")[0] for item in _model_and_overrides(items)[1]}
    place = (loading.device, loading.offline, loading.trust_remote_code)
    return scaled(plan, preset, budget, kept, out, *place, again=again, fresh=start_from is None, say=say)


def _convert(recipe: Recipe, out: Path, loading: Loading, **options: Any) -> artifact.Artifact:
    quieten_libraries()
    import torch

    from retrofit import convert as run
    from retrofit.runtime.backends.threads import most_threads

    torch.set_num_threads(most_threads())  # for the whole process, which is this command's own
    return run(
        recipe=recipe,
        out=out,
        device=loading.device,
        offline=loading.offline,
        trust_remote_code=loading.trust_remote_code,
        quiet=is_quiet(),
        **options,
    )


@contextmanager
def _several_processes(loading: Loading) -> Iterator[bool]:
    """Whether this process is the one that talks.  One that no launcher started imports nothing here."""
    if not is_launched():
        yield True
        return
    # a process whose peer is gone gets an error; the traces that torch prints besides say nothing more
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from retrofit.recipes.processes import joined

    with joined(loading.device) as processes:
        is_main = processes is None or processes.is_main
        if not is_main:
            be_quiet()
        yield is_main


def _tell(made: artifact.Artifact, as_json: bool, chosen: dict[str, Any]) -> None:
    from retrofit.artifact.card import contexts

    parts = {key: made.config[key] for key in ("base", "parameters", "acceptance", "training")}
    if as_json:
        emit_json({"artifact": str(made.folder), **parts, **chosen})
        return
    say(f"measured on held-out text: {facts({'conditional': parts['acceptance']['conditional']}) or 'nothing'}")
    if by_context := parts["acceptance"].get("by_context"):
        say(f"tau {contexts(by_context)}")
    say(f"next: retrofit certify {made.folder}")
    click.echo(made.folder)


def _dry_run(
    recipe: Recipe, out: Path, fit: str | None, loading: Loading, skip_bad: bool, as_json: bool, chosen: dict[str, Any]
) -> None:
    """Raises GateError where it does not fit, ResourceError where it cannot be made to."""
    from retrofit.recipes.dry_run.fit import parse_size, short

    limit = None if fit is None else parse_size(fit)
    quieten_libraries()
    from retrofit.recipes.dry_run.report import dry_run
    from retrofit.recipes.dry_run.table import table

    report = dry_run(
        recipe,
        out,
        device=loading.device,
        limit=limit,
        offline=loading.offline,
        trust_remote_code=loading.trust_remote_code,
        skip_bad=skip_bad,
        say=say,
    )
    if as_json:
        emit_json({**report, **chosen}, indent=2)
    else:
        click.echo(table(report, recipe))
    found = report.get("fit")
    if found is None or found["fits"]:
        return
    over = (
        f"it needs {short(found['needs'])}, {short(found['needs'] - found['limit'])} more than {short(found['limit'])}"
    )
    if found["suggestions"]:
        raise GateError(over, f"add {' '.join(found['suggestions'][0]['overrides'])}")
    least = found["least"]
    raise ResourceError(
        f"{over}; with {' '.join(least['overrides'])} it would still need {short(least['needs'])}",
        f"use more memory; the base alone takes {short(found['base'])}, of which each of N processes that share it "
        "by FSDP would hold an Nth",
    )


def _model_and_overrides(items: Sequence[str]) -> tuple[str | None, list[str]]:
    """Raises UsageError for more than one model."""
    overrides = [item for item in items if "=" in item and not Path(item).exists()]
    models = [item for item in items if item not in overrides]
    if len(models) > 1:
        hint = "a recipe key is set as key.path=value"
        raise UsageError(f"more than one model: {', '.join(models)}", hint)
    return (models[0] if models else None), overrides


def _name(model: str) -> str:
    """The last part of a base's name, of a GGUF file without its suffix."""
    name = expanded(model).resolve().name
    return name[: -len(SUFFIX)] if name.lower().endswith(SUFFIX) else name


def _resolved(
    items: Sequence[str],
    gguf: str | None,
    recipe: str | None,
    loading: Loading,
    seed: int | None,
    start_from: str | None,
) -> Recipe:
    """The recipe of the words and options on the command line.  Raises UsageError."""
    model, overrides = _model_and_overrides(items)
    if gguf is not None:
        if model is None:
            raise UsageError("--gguf names a file of MODEL, and there is none", "give the folder or Hub id it is in")
        model = f"{model.rstrip('/')}/{gguf}"
    flags = [f"base.dtype={loading.dtype}"] if loading.dtype else []
    flags += [f"train.seed={seed}"] if seed is not None else []
    if start_from is None:
        return _recipe(model, recipe, [*flags, *overrides])
    return _recipe_from(start_from, model, recipe, [*flags, *overrides], loading.offline)


def _recipe_from(start_from: str, model: str | None, name: str | None, overrides: list[str], offline: bool) -> Recipe:
    """The resolved recipe of a conversion that begins with an artifact or a checkpoint.  Raises UsageError."""
    quieten_libraries()
    from retrofit.recipes.origin import check_recipe, plan_of, read

    _refuse_twice(model, overrides)
    origin = read(start_from, offline)
    plan = plan_of(origin, model, overrides) if name is None else _recipe(model, name, overrides)
    check_recipe(origin, plan)
    return plan


def _refuse_twice(model: str | None, overrides: list[str]) -> None:
    if model is not None and any(override.startswith("base.model=") for override in overrides):
        raise UsageError(f"the model is given twice: {model} and base.model=...", "give one of them")


def _recipe(model: str | None, name: str | None, overrides: list[str]) -> Recipe:
    """The resolved recipe of a conversion, and a note where a better one ships.  Raises UsageError."""
    from retrofit.named_bases import EMBEDDED
    from retrofit.recipes.schema import load_recipe, recipe_names

    if model is None:
        return load_recipe(name, overrides)
    _refuse_twice(model, overrides)
    if name is None and model != EMBEDDED:
        name = "default"
        for shipped in recipe_names():
            if load_recipe(shipped).base.model == model:
                say(f"note: --recipe {shipped} was written for this model")
    return load_recipe(name, [f"base.model={_quoted(model)}", *overrides])


def _quoted(text: str) -> str:
    """Text as a YAML value, whatever is in it."""
    return "'" + text.replace("'", "''") + "'"


@click.command(context_settings=CONTEXT)
@click.argument("items", nargs=-1, required=True, metavar="ARTIFACT ARTIFACT... [KEY=VALUE]...")
@click.option("-o", "--out", metavar="FOLDER", required=True, help="Folder to write.")
@click.option("--weights", metavar="W,W...", help="How much each counts, such as 1,2; else all count alike.")
@base_option
@click.option("--overwrite", is_flag=True, help="Replace an artifact that is there already.")
@loading_options
@output_options
def average(
    items: tuple[str, ...],
    out: str,
    weights: str | None,
    base: str | None,
    overwrite: bool,
    loading: Loading,
    as_json: bool,
) -> None:
    """Write the mean of several ARTIFACTs of one base as an artifact.

    ARTIFACT is a folder, OWNER/NAME on the Hub, or a checkpoint, OUT.checkpoints/step-N. All have to have the same
    base, adapter and layout of drafts; of the profile joint, artifacts of one original. The recipe is the first one's,
    and KEY=VALUE sets a key of it, such as another data.source to measure on. Each of them and their mean are measured
    on held-out text, unless data.held_out=0: checkpoints of one run may be better together, adapters trained apart are
    not. Prints the artifact's folder.

    \b
    Examples:
      retrofit average a-retrofit b-retrofit -o both
      retrofit average my.checkpoints/step-001750 my.checkpoints/step-002000 my-retrofit --weights 1,1,2 -o mean
    """
    quieten_libraries()
    from retrofit import average as run

    overrides = [item for item in items if "=" in item and not Path(item).exists()]
    overrides += [f"base.dtype={loading.dtype}"] if loading.dtype else []
    made = run(
        [item for item in items if item not in overrides],
        out,
        overrides,
        weights=None if weights is None else _numbers(weights),
        base=base,
        device=loading.device,
        overwrite=overwrite,
        offline=loading.offline,
        trust_remote_code=loading.trust_remote_code,
        say=say,
    )
    if as_json:
        parts = {key: made.config[key] for key in ("base", "averaged", "parameters", "acceptance")}
        emit_json({"artifact": str(made.folder), **parts})
        return
    say(f"next: retrofit certify {made.folder}")
    click.echo(made.folder)


def _numbers(text: str) -> list[float]:
    """Raises UsageError."""
    try:
        return [float(one) for one in text.split(",")]
    except ValueError:
        raise UsageError(f"--weights is {text}; it must be numbers with commas between them", "1,2") from None
