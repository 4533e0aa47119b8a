"""What `retrofit.json` and the adapter's configuration have to say, checked by hand: no pydantic, no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from retrofit.artifact.safety import AGAIN
from retrofit.errors import ArtifactError

FORMATS = {"frozen": 1, "joint": 2}
"""Profile -> format of its artifacts: one with a model of its own is more than an earlier retrofit knows."""
FORMAT = FORMATS["frozen"]
MOST_ROWS, MOST_RANKS, MOST_ALPHA = 128, 1024, 8192
"""Of `draft.block`, of ranks, and of alpha: what a recipe may ask for, too."""


def _text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _text_or_none(value: Any) -> bool:
    return value is None or _text(value)


def _texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_text, value))


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) in (int, float) for one in value)


def _chances(value: Any) -> bool:
    return _numbers(value) and all(0 <= one <= 1 for one in value)


def _lists_of_chances(value: Any) -> bool:
    return isinstance(value, list) and all(map(_chances, value))


def _count_to(most: int, least: int = 1) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")


def _figure(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < float("inf")


def _each(tests: Mapping[str, Callable[[Any], bool]]) -> Callable[[Any], bool]:
    """Whether something is a list of objects that have these keys and pass these tests."""
    return lambda value: (
        isinstance(value, list)
        and all(
            isinstance(one, dict) and all(name in one and test(one[name]) for name, test in tests.items())
            for one in value
        )
    )


def _one_of(*choices: Any) -> Callable[[Any], bool]:
    return lambda value: any(type(value) is type(choice) and value == choice for choice in choices)


def _tokens(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(type(one) is int for one in value))


ADAPTER_CONFIG: dict[str, Callable[[Any], bool]] = {
    "peft_type": lambda value: value == "LORA",  # before it is written, a member of PEFT's enumeration
    "task_type": _one_of("CAUSAL_LM", None),
    "r": lambda value: _count(value) and value >= 1,
    "lora_alpha": _positive,
    "lora_dropout": lambda value: type(value) in (int, float) and 0 <= value < 1,
    "target_modules": _texts,
    "target_parameters": lambda value: value is None or _texts(value),
    "init_lora_weights": _one_of(True, False),
    "inference_mode": _one_of(True, False),
    "fan_in_fan_out": _one_of(True, False),
    "bias": _one_of("none"),
    "base_model_name_or_path": _text_or_none,
    "revision": _text_or_none,
    "peft_version": _text_or_none,
    "alora_invocation_tokens": _tokens,
    "megatron_core": _one_of("megatron.core", None),
    "qalora_group_size": _count,
}
"""What the keys of a LoRA's configuration may say; any other has to say nothing: null, false or empty.

PEFT imports modules, runs code and opens files by the word of some of its keys, and every version has more of them.
"""

# key -> (test, what it wants)
SCHEMA: dict[str, tuple[Callable[[Any], bool], str]] = {
    "retrofit": (_text, "the version that wrote it"),
    "base.model": (_text, "the base's id or folder"),
    "base.revision": (_text_or_none, "text or null"),
    "base.architecture": (_text, "the name of the base's model class"),
    "base.fingerprint.config": (_text, "a sha256"),
    "base.fingerprint.headers": (_text_or_none, "a sha256 or null"),
    "base.fingerprint.norms": (_text_or_none, "a sha256 or null"),
    "profile": (_one_of("frozen", "joint"), "frozen or joint"),
    "draft.block": (_count_to(MOST_ROWS), f"a whole number from 1 to {MOST_ROWS}"),
    "draft.input": (_one_of("mask", "noise"), "mask or noise"),
    "draft.attention": (_one_of("bidirectional", "causal"), "bidirectional or causal"),
    "draft.shift": (_one_of(0, 1), "0 or 1"),
    "draft.seed_row": (_one_of("base", "draft"), "base or draft"),
    "adapter.rank": (_count_to(MOST_RANKS), f"a whole number from 1 to {MOST_RANKS}"),
    "adapter.alpha": (lambda value: _positive(value) and value <= MOST_ALPHA, f"a number up to {MOST_ALPHA}, above 0"),
    "adapter.targets": (_texts, "a list of roles"),
    "adapter.modules": (_texts, "a list of module names"),
    "adapter.markov_rank": (_count_to(MOST_RANKS, least=0), f"a whole number from 0 to {MOST_RANKS}"),
    "adapter.confidence": (_one_of(True, False), "true or false"),
    "parameters.adapter": (_count, "a whole number from 0"),
    "parameters.heads": (_count, "a whole number from 0"),
    "parameters.base": (_count, "a whole number from 0"),
    "acceptance": (lambda value: isinstance(value, dict), "an object"),
    "training": (lambda value: isinstance(value, dict), "an object"),
}
OPTIONAL: dict[str, tuple[Callable[[Any], bool], str]] = {
    "template.sha256": (_text, "the sha256 of the chat template it was trained with"),
    "template.arguments": (
        lambda value: isinstance(value, dict),
        "an object: each argument of the template, and the value it had in training or a list of those that were mixed",
    ),
    "base.quantization": (_text, "what the base's linear layers were held in"),
    "base.gguf.file": (_text, "the name of a file"),
    "base.gguf.sha256": (_text, "a sha256"),
    "base.gguf.kind": (_text, "the type most of its weights are stored in"),
    "imported.style": (_text, "the recipe that says how another program drafts with it"),
    "imported.repository": (_text_or_none, "the repository it was imported from, or null for a folder"),
    "imported.commit": (_text_or_none, "its commit, or null for a folder"),
    "imported.sha256": (_text, "the sha256 of its adapter_model.safetensors there"),
    "acceptance.conditional": (lambda value: isinstance(value, dict), "an object"),
    "acceptance.conditional.greedy": (_chances, "a list of numbers from 0 to 1"),
    "acceptance.conditional.sampled": (_chances, "a list of numbers from 0 to 1"),
    "acceptance.ranks": (lambda value: isinstance(value, dict), "an object"),
    "acceptance.ranks.greedy": (_lists_of_chances, "a list for each slot of numbers from 0 to 1"),
    "acceptance.ranks.sampled": (_lists_of_chances, "a list for each slot of numbers from 0 to 1"),
    "infill.rows": (
        _count_to(4 * MOST_ROWS, least=4),
        f"a whole number from 4 to {4 * MOST_ROWS}: rows of the blocks that learned to fill a gap before known text",
    ),
    "from.kind": (_one_of("artifact", "checkpoint"), "artifact or checkpoint, which its training began with"),
    "from.sha256": (_text, "the sha256 of that one's manifest"),
    "from.base": (_text, "what the base of that artifact is called"),
    "from.steps": (_count, "the optimizer steps behind it"),
    "original.model": (_text, "what the model it was trained from is called"),
    "original.revision": (_text_or_none, "text or null"),
    "original.fingerprint": (lambda value: isinstance(value, dict), "an object of hashes"),
    "drift.kl": (_figure, "a number from 0: nats per token"),
    "drift.agreement": (lambda value: _figure(value) and value <= 1, "a number from 0 to 1"),
    "drift.perplexity": (_positive, "a number above 0"),
    "drift.original_perplexity": (_positive, "a number above 0"),
    "drift.tokens": (_count, "a whole number from 0"),
    "averaged": (
        _each({"kind": _text, "sha256": _text, "steps": _count, "weight": _positive}),
        "a list of objects with `kind`, `sha256`, `steps` and `weight`, whose mean its weights are",
    ),
    "acceptance.by_context": (
        _each({"up_to": _count, "blocks": _count, "tau": _positive, "greedy": _numbers, "sampled": _numbers}),
        "a list of objects with `up_to`, `blocks`, `tau`, `greedy` and `sampled`",
    ),
}
"""Keys that artifacts may lack: those written before there was such a key, or without a reason for it."""
OWN = tuple(key for key in OPTIONAL if key.startswith(("original.", "drift.")))
"""Of those, the keys that an artifact of the profile `joint` has and no other."""


def check_adapter_config(content: Mapping[str, Any], path: Path) -> None:
    """Raises ArtifactError for an adapter that is no LoRA, and for a key that ADAPTER_CONFIG does not allow."""
    if content.get("peft_type") != "LORA":
        raise ArtifactError(f"{path}: `peft_type` must be LORA, not {content.get('peft_type')!r}", AGAIN)
    for key, value in not_allowed(content, ADAPTER_CONFIG).items():
        raise ArtifactError(f"{path}: {key!r} is not to be {value} in an artifact", "do not use it")


def not_allowed(content: Mapping[str, Any], tests: Mapping[str, Callable[[Any], bool]]) -> dict[str, str]:
    """Keys whose values, as they are shown, do not pass their tests; one without a test has to say nothing."""
    wrong = {}
    for key, value in content.items():
        test = tests.get(key)
        if not (test(value) if test else value is None or value is False or value in ([], {}, "")):
            wrong[key] = _shown(value)
    return wrong


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def check_config(content: Mapping[str, Any], path: Path) -> None:
    """Refuse a `retrofit.json` of another format, or without a key of SCHEMA; it may have OPTIONAL ones and more."""
    version = content.get("format")
    if not _one_of(*FORMATS.values())(version):
        newer = type(version) is int and version > max(FORMATS.values())
        hint = "upgrade retrofit" if newer else AGAIN
        known = " and ".join(str(one) for one in FORMATS.values())
        raise ArtifactError(f"{path}: format {version!r}; this retrofit reads format {known}", hint)
    profile = content.get("profile")
    if isinstance(profile, str) and FORMATS.get(profile, version) != version:
        raise ArtifactError(f"{path}: `profile` {profile} does not go with format {version}", AGAIN)
    needed = {*SCHEMA, *(OWN if version == FORMATS["joint"] else ())}
    for key, (test, wanted) in {**SCHEMA, **OPTIONAL}.items():
        value: Any = content
        there = True
        for part in key.split("."):
            there = isinstance(value, dict) and part in value
            if not there:
                break
            value = value[part]
        if not there and key in needed:
            raise ArtifactError(f"{path}: `{key}` is missing", AGAIN)
        if there and not test(value):
            raise ArtifactError(f"{path}: `{key}` must be {wanted}, not {_shown(value)}", AGAIN)
    unknown = sorted(key for key in content["draft"] if f"draft.{key}" not in SCHEMA)
    if unknown:  # a layout that this version does not know
        raise ArtifactError(f"{path}: `draft` has an unknown key, {_shown(unknown[0])}", "upgrade retrofit")
