"""The options that several commands share, and what is made of them.

Not here: what a command does with them.  This file imports nothing heavy.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from retrofit.cli.output import quieten_libraries, say
from retrofit.errors import UsageError
from retrofit.progress import silent
from retrofit.quantised.methods import ASKED, other_precision

if TYPE_CHECKING:
    from retrofit.runtime.engine import Engine

CONTEXT = {"auto_envvar_prefix": "RETROFIT", "help_option_names": ["-h", "--help"], "max_content_width": 110}
"""Of every command, so that RETROFIT_DEVICE sets --device wherever there is one."""

MODES = ["ar", "diffusion", "self_spec"]
STRATEGIES = ["auto", "fused", "two_forward", "prompt_lookup", "hybrid"]
BACKENDS = ["auto", "hf", "fused"]
EXACT = ["auto", "off", "bucket", "invariant"]
QUANTIZATION = list(ASKED)
PACKED: dict[str, bool | str] = {"auto": "auto", "on": True, "off": False}
"""--packed, as `Engine.load` takes it."""


def _remember(ctx: click.Context, parameter: click.Parameter, value: bool) -> bool:
    if value:
        ctx.meta[f"retrofit.{parameter.name}"] = True
        if parameter.name == "quiet":
            ctx.with_resource(silent())
    return value


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def add(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return add


output_options = _options(
    click.option("--json", "as_json", is_flag=True, envvar="RETROFIT_JSON", help="Print JSON on stdout."),
    click.option("-q", "--quiet", is_flag=True, callback=_remember, expose_value=False,
                 help="No talk and no progress on stderr, errors only."),
    click.option("-v", "--verbose", is_flag=True, callback=_remember, expose_value=False,
                 help="Show the traceback of an error, and warnings of libraries."),
)  # fmt: skip


@dataclass(frozen=True)
class Loading:
    """The options that say how a model is loaded."""

    device_name: str
    dtype: str | None
    offline: bool
    trust_remote_code: bool
    backend: str = "auto"
    exact: str = "auto"
    packed: str = "auto"
    quantization: str = "auto"
    prefix_cache: str = "auto"

    @property
    def device(self) -> str:
        """The device by name; `auto` is resolved here.  Imports torch."""
        from retrofit.hub import resolved_device

        return resolved_device(self.device_name)

    @property
    def keywords(self) -> dict[str, Any]:
        """As `Engine.load`, `certify` and `diagnose` take them.  Imports torch."""
        return {
            "device": self.device,
            "dtype": self.dtype or "auto",
            "backend": self.backend,
            "exact": self.exact,
            "packed": PACKED[self.packed],
            "quantization": self.quantization,
            "offline": self.offline,
            "trust_remote_code": self.trust_remote_code,
        }

    def engine(self, artifact: str, base: str | None) -> Engine:
        """Load an artifact.  Raises what `Engine.load` raises."""
        place = found_artifact(artifact, self.offline)
        quieten_libraries()
        from retrofit import Engine

        engine = Engine.load(place, base=base, prefix_cache=self.prefix_cache, **self.keywords)
        assert engine.base is not None
        say_other_precision(other_precision(engine.config["base"].get("quantization"), engine.base.precision))
        for setting in engine.not_honoured:
            say(f"note: of the base's generation_config {setting} is not followed")
        return engine


def say_other_precision(found: str | None) -> None:
    """Say what `other_precision` found, if anything."""
    if found is not None:
        say(f"note: {found}")


def found_artifact(name: str, offline: bool) -> Path:
    """The folder of an artifact; what is none is refused before anything slow is imported.

    Raises what `local_folder` and `read_config` raise.
    """
    from retrofit.artifact.folder import read_config
    from retrofit.sharing.pulling import local_folder

    place = local_folder(name, offline)
    read_config(place)
    return place


def say_differences(engine: Engine, template: dict[str, Any] | None) -> None:
    """Say in which ways conversations are put otherwise than in training.  template: its arguments."""
    from retrofit.runtime.chat_template import differences

    for line in differences(engine.config.get("template"), engine.tokenizer, template):
        say(f"note: {line}")


def loading_options(function: Any) -> Any:
    """Adds --device, --dtype, --offline, --trust-remote-code; the command gets them as `loading`."""

    @wraps(function)
    def run(
        *arguments: Any,
        device: str,
        dtype: str | None,
        offline: bool,
        trust_remote_code: bool,
        **options: Any,
    ) -> Any:
        return function(*arguments, loading=Loading(device, dtype, offline, trust_remote_code), **options)

    return _options(
        click.option("--device", default="auto", show_default=True,
                     help="cpu, cuda, cuda:N, or auto: a GPU where there is one."),
        click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
                     help="Type the base's weights are held in; auto is an artifact's, else the file's own."),
        click.option("--offline", is_flag=True, help="Use no network, only what is on this machine."),
        click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with a model."),
    )(run)  # fmt: skip


def engine_options(function: Any) -> Any:
    """`loading_options` of a command that decodes: --backend, --exact and --packed too."""

    @wraps(function)
    def run(
        *arguments: Any, loading: Loading, backend: str, exact: str, packed: str, quantization: str, **options: Any
    ) -> Any:
        loading = replace(loading, backend=backend, exact=exact, packed=packed, quantization=quantization)
        return function(*arguments, loading=loading, **options)

    added = _options(
        click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True,
                     help="hf is transformers' own modules, fused our kernels (GPU); auto is fused where it can run."),
        click.option("--exact", type=click.Choice(EXACT), default="auto", show_default=True,
                     help="Whether a row's bits may depend on the rows beside it; see `retrofit doctor`."),
        click.option("--packed", type=click.Choice(list(PACKED)), default="auto", show_default=True,
                     help="Hold weights as a CPU multiplies them fastest; auto is on where this machine can."),
        click.option("--quantization", type=click.Choice(QUANTIZATION), default="auto", show_default=True,
                     help="Few bits a weight for the base's linear layers; auto is as the adapter was trained."),
    )(run)  # fmt: skip
    return loading_options(added)


def answering_options(function: Any) -> Any:
    """`engine_options` of a command that answers prompts: --prefix-cache too."""

    @wraps(function)
    def run(*arguments: Any, loading: Loading, prefix_cache: str, **options: Any) -> Any:
        return function(*arguments, loading=replace(loading, prefix_cache=prefix_cache), **options)

    added = _options(
        click.option("--prefix-cache", default="auto", show_default=True, metavar="SIZE",
                     help="K/V to keep for prompts that begin alike, such as 512MB; 0 is off, auto 8,192 tokens'."),
    )(run)  # fmt: skip
    return engine_options(added)


GENERATION = (
    *("mode", "strategy", "prepare", "tree", "threshold", "tolerance", "max_new_tokens", "min_new_tokens", "stop"),
    "stop_token_ids",
    *("ignore_eos", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "logit_bias", "logprobs", "original_settings", "template"),
)


OF_DIFFUSION = (
    click.option("--threshold", type=click.FloatRange(0, 1),
                 help="Of diffusion: confidence from which a token is filled in.  [default: 0]"),
    click.option("--tolerance", type=click.FloatRange(min=0), metavar="NATS",
                 help="Of diffusion: by how much, in log-probability, a token may fall short of the original's "
                      "own choice to be kept; 0 gives the text of ar, inf keeps all.  [default: 0.1]"),
)  # fmt: skip


def generation_options(function: Any) -> Any:
    """Adds the options of `Engine.generate` that `chat` takes too; the command gets them as `options`.

    Defaults are those of `Engine.generate`, which cannot be asked without importing torch; a test compares.
    """
    declared = (
        click.option("--mode", type=click.Choice(MODES), default="self_spec", show_default=True,
                     help="How to decode; self_spec gives the output of ar in fewer forwards."),
        click.option("--strategy", type=click.Choice(STRATEGIES),
                     help="Of self_spec: which forwards draft and verify; auto takes what is fastest here.  "
                          "[default: auto]"),
        click.option("--prepare", metavar="all|last|N|none",
                     help="Of fused: for which accept lengths to draft ahead. Of hybrid: none drafts and verifies in "
                          "turn, in fewer rows.  [default: all]"),
        click.option("--tree", type=click.IntRange(min=0), metavar="N",
                     help="Of fused: draft tokens to verify as a tree; 0 is one chain. Of hybrid: in as many rows, and "
                          "with prepare none as many drafts.  [default: fills 96 rows; 15 with prepare none]"),
        click.option("--max-new-tokens", type=click.IntRange(min=1), metavar="N",
                     help="Most tokens to emit.  [default: the base's own, else 128]"),
        click.option("--min-new-tokens", type=click.IntRange(min=0), metavar="N",
                     help="Neither EOS nor a --stop-token-id comes before so many.  [default: the base's own]"),
        click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True,
                     help="0 is greedy; never taken from the base's settings, nor are top-k and top-p."),
        click.option("--top-k", type=click.IntRange(min=1), help="Sample from the K likeliest tokens only."),
        click.option("--top-p", type=click.FloatRange(0, 1, min_open=True),
                     help="Sample from the likeliest tokens that make up P only."),
        click.option("--min-p", type=click.FloatRange(0, 1),
                     help="Sample from tokens at least P times as likely as the likeliest only, such as 0.05."),
        click.option("--repetition-penalty", type=click.FloatRange(min=0, min_open=True),
                     help="Above 1: makes tokens that were there less likely; 1 is off.  [default: the base's own]"),
        click.option("--presence-penalty", type=click.FloatRange(-2, 2), default=0.0, show_default=True,
                     help="Above 0: makes tokens that the output holds already less likely."),
        click.option("--frequency-penalty", type=click.FloatRange(-2, 2), default=0.0, show_default=True,
                     help="The same, once for each time that the output holds them."),
        click.option("--logit-bias", multiple=True, metavar="ID=V",
                     help="Make a token likelier by V, or less likely: 50256=-100 bans it; may be repeated."),
        click.option("--stop", multiple=True,
                     help="Text to stop before, special tokens included; may be given several times."),
        click.option("--stop-token-id", "stop_token_ids", type=click.IntRange(min=0), multiple=True, metavar="ID",
                     envvar="RETROFIT_STOP_TOKEN_ID", help="Token to stop before; may be given several times."),
        click.option("--ignore-eos", is_flag=True, help="Go on after EOS."),
        click.option("--logprobs", type=click.IntRange(min=0), metavar="K",
                     help="With --json: log-probabilities of each token and the K likeliest, before processing."),
        click.option("--template", multiple=True, metavar="NAME=V",
                     help="Argument of the chat template, such as enable_thinking=false; may be repeated."),
        click.option("--original-settings/--no-original-settings", default=True, show_default=True,
                     help="Follow the base's generation_config in what it forbids, forces and penalises."),
        *OF_DIFFUSION,
    )  # fmt: skip

    @wraps(function)
    def run(*arguments: Any, **given: Any) -> Any:
        options = _parsed({name: given.pop(name) for name in GENERATION})
        if options["logprobs"] is not None and not given["as_json"]:
            raise UsageError("--logprobs is shown with --json only", "add --json")
        return function(*arguments, options=options, **given)

    for option in reversed(declared):
        run = option(run)
    return run


def _parsed(options: dict[str, Any]) -> dict[str, Any]:
    """Options as the engine takes them, where the command line has them as text.  Raises UsageError."""
    prepare = options["prepare"]
    number = prepare is not None and prepare.isdecimal() and len(prepare) < 10
    bias = dict(map(_bias, options["logit_bias"])) or None
    template = dict(map(_argument, options["template"])) or None
    return {**options, "prepare": int(prepare) if number else prepare, "logit_bias": bias, "template": template}


def _bias(text: str) -> tuple[int, float]:
    """`ID=V`.  Raises UsageError."""
    token, _, added = text.partition("=")
    try:
        return int(token), float(added)
    except ValueError:
        raise UsageError(f"--logit-bias is {text}; it must be ID=V, a token id and a number", "50256=-2.5") from None


def _argument(text: str) -> tuple[str, Any]:
    """`NAME=V`, V in JSON or as it stands.  Raises UsageError."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise UsageError(f"--template is {text}; it must be NAME=V", "enable_thinking=false")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


artifact_argument = click.argument("folder", metavar="ARTIFACT")
system_option = click.option("--system", metavar="TEXT", help="What the model is told before the conversation.")
skip_bad_option = click.option("--skip-bad", is_flag=True,
                               help="Leave out rows that cannot be used, and say at the end how many.")  # fmt: skip
base_option = click.option("--base", metavar="MODEL", help="Hub id, folder or GGUF file of the base, if it has moved.")
seed_option = click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
                           help="Of the sampling; equal seeds give equal output.")  # fmt: skip
