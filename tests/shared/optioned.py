"""An engine whose tokens show as text, and when its results say the same: for tests of the options of an output."""

import math
from functools import lru_cache
from typing import Any

from decoding import randomise
from tiny_models import VOCABULARY, build
from tokenizers import Tokenizer, decoders
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from retrofit.adapters.layout import DraftLayout
from retrofit.runtime.engine import Engine

EOS = 5


@lru_cache(maxsize=1)
def engine() -> Engine:
    model = build("llama")
    model.generation_config.eos_token_id = EOS
    return randomise(Engine.from_model(model, words(), layout=DraftLayout(block=3)))


def words() -> PreTrainedTokenizerFast:
    """Token n is `n.`, but for EOS, which is special."""
    named = {"<end>" if n == EOS else f"{n}.": n for n in range(VOCABULARY)}
    inner = Tokenizer(tokenizer_models.BPE(vocab=named, merges=[]))
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", clean_up_tokenization_spaces=False)


def close(mine: Any, other: Any) -> bool:
    """Log-probabilities within rounding: as many tokens, and the same ones but for near ties."""
    if mine is None or other is None:
        return mine is other
    if len(mine) != len(other):
        return False
    for a, b in zip(mine, other, strict=True):
        if a is None or b is None:
            if a is not b:
                return False
            continue
        if next(iter(a)) != next(iter(b)) or len(a) != len(b):
            return False
        if not all(math.isclose(x, y, abs_tol=1e-4) for x, y in zip(a.values(), b.values(), strict=True)):
            return False
    return True
