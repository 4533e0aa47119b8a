"""Requests on a fused engine with planted drafts: what the tests of the device loop share."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from decoding import random_prompts, tokens_of
from fused_models import VOCABULARY, WIDE, Planted, pair, planted, small

from retrofit.adapters.layout import DraftLayout
from retrofit.runtime.auto.policy import AutoPolicy
from retrofit.runtime.engine import Engine
from retrofit.runtime.rules.tree import fixed_tree

PROMPTS = random_prompts((9, 3, 5), vocab=VOCABULARY)
NEW = 10
WAYS: dict[str, dict[str, Any]] = {
    "two_forward": {"strategy": "two_forward"},
    "all": {"strategy": "fused"},
    "last": {"strategy": "fused", "prepare": "last"},
    "number": {"strategy": "fused", "prepare": 2},
    "tree": {"strategy": "fused", "tree": 6},
    "tree_number": {"strategy": "fused", "tree": 6, "prepare": 2},
    "auto": {"strategy": "auto"},
}
HOT = {"temperature": 0.8}
RANKS = {"ranks": {kind: [[0.5, 0.3]] * 3 for kind in ("greedy", "sampled")}}


@lru_cache(maxsize=4)
def engines(name: str, layout: DraftLayout = WIDE, **options: Any) -> tuple[Engine, Engine]:
    return pair(small(name, num_hidden_layers=1), layout, **options)


@lru_cache(maxsize=8)
def truth(name: str, new: int = NEW + 6, **options: Any) -> list[list[int]]:
    """Tokens of the `hf` backend, one by one; longer than what is asked for."""
    return tokens_of(engines(name)[1], PROMPTS, "ar", max_new_tokens=new, **options)


def oracle(
    engine: Engine, way: str, tokens: Sequence[Sequence[int]], mistakes: float = 0.25, hot: bool = False
) -> Engine:
    """The engine with planted drafts; request i has seed i."""
    options = WAYS[way]
    tree = None
    if "tree" in options:
        tree = fixed_tree(engine.layout, {}, options.get("prepare", "all"), options["tree"], hot)
    engine.device_policy = AutoPolicy(engine.layout, RANKS)
    return planted(engine, Planted(dict(enumerate(tokens)), mistakes, tree=tree))


def fresh(name: str = "llama", layout: DraftLayout = WIDE, eos: Sequence[int] = (), **changes: Any) -> Engine:
    return pair(small(name, eos, num_hidden_layers=1, **changes), layout)[0]
