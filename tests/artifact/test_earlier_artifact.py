"""An artifact that an earlier commit wrote loads, and decodes what that commit decoded.

of_0479a83/ was written there by `retrofit convert adapter.rank=4 adapter.alpha=8 adapter.markov_rank=8 train.steps=12
train.warmup=2 train.batch_size=4 train.anchors=16`, but for the base's folder in adapter_config.json, which is short;
of_0479a83.json holds what its `Engine.generate` gave, in fp32 on a CPU, with seed 3.
"""

import json
from pathlib import Path

import pytest

from retrofit import Engine

ARTIFACT = Path(__file__).parent / "of_0479a83"
RECORDED = json.loads(ARTIFACT.with_suffix(".json").read_text())


@pytest.fixture(scope="module")
def engine():
    with Engine.load(ARTIFACT, device="cpu") as engine:
        yield engine


WAYS = [way for way in RECORDED["ways"] if way["options"].get("mode") != "diffusion"]
"""Mode `diffusion` decodes by other rules than it did then."""


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(map(str, way["options"].values())))
def test_an_earlier_artifact_decodes_the_same_tokens(engine, way):
    results = engine.generate(RECORDED["prompts"], seed=3, max_new_tokens=40, batch_size=2, **way["options"])
    assert [result.tokens for result in results] == way["tokens"]
    assert [result.text for result in results] == way["text"]
