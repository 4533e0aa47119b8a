"""Artifact folders of a few bytes: what the tests of the folder share."""

import errno
import json

import torch

from retrofit.artifact import folder as artifact
from retrofit.artifact.files import sha256

CONFIG = {
    "format": 1,
    "retrofit": "0.1.0",
    "base": {
        "model": "tiny",
        "revision": None,
        "fingerprint": {"config": "c0", "headers": None, "norms": "d1"},
        "architecture": "LlamaForCausalLM",
    },
    "profile": "frozen",
    "draft": {"block": 4, "input": "mask", "attention": "bidirectional", "shift": 1, "seed_row": "base"},
    "adapter": {
        "rank": 2,
        "alpha": 4.0,
        "targets": ["q", "v"],
        "modules": ["q_proj", "v_proj"],
        "markov_rank": 2,
        "confidence": True,
    },
    "parameters": {"adapter": 12, "heads": 3, "base": 100},
    "acceptance": {"slots": [0.5, 0.25]},
    "training": {"steps": 1},
}
ADAPTER_CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    state = {f"layer.{i}.lora_A.weight": torch.randn(2, 3, generator=generator) for i in range(2)}
    heads = {"mask_vector": torch.randn(3, generator=generator).bfloat16(), "empty": torch.zeros(0, 3)}
    return state, heads


def write(folder, seed=0, **changes):
    state, heads = tensors(seed)
    arguments = {
        "adapter_config": ADAPTER_CONFIG,
        "adapter_state": state,
        "heads": heads,
        "config": CONFIG,
        "recipe_yaml": "profile: frozen\n",
        "card": "# card\n",
    }
    return artifact.write(folder, **{**arguments, **changes})


def trained_on(precision, folder, made):
    """An artifact like another, that says it was trained on a base held so."""
    read = artifact.read(made)
    return artifact.write(
        folder, config={**read.config, "base": {**read.config["base"], "quantization": precision}},
        recipe_yaml="profile: frozen\n", card="# It\n", adapter_config=read.adapter_config,
        adapter_state=read.adapter_state, heads=read.heads,
    )  # fmt: skip


def certify(folder, ok=True, **more):
    """Put a certificate for what is in the folder there."""
    content = {"ok": ok, "level": "quick", "manifest_sha256": sha256(folder / artifact.MANIFEST), **more}
    artifact.add(folder, "certificate.json", json.dumps(content))


def same(left, right):
    """Bitwise: NaN equals itself, 0.0 does not equal -0.0."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and torch.equal(left[name].flatten().view(torch.uint8), right[name].flatten().view(torch.uint8))
        for name in left
    )


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def failing(real, after, error):
    """`real`, until the call number `after`."""
    calls = []

    def call(*arguments, **options):
        calls.append(arguments)
        if len(calls) > after:
            raise error
        return real(*arguments, **options)

    return call


FULL = OSError(errno.ENOSPC, "No space left on device")
