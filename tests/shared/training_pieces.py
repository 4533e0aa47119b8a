"""A document and an engine to be trained on it: what the tests of training rows share."""

from collections.abc import Sequence

from decoding import randomise
from tiny_models import build

from retrofit.adapters.layout import DraftLayout
from retrofit.recipes.text.documents import Document
from retrofit.runtime.engine import Engine


def document(tokens: Sequence[int], name: str = "a", prompt: int = 0) -> Document:
    return Document(name, tuple(tokens), tuple(i >= prompt for i in range(len(tokens))))


def engine_for(name: str, layout: DraftLayout) -> Engine:
    return randomise(Engine.from_model(build(name), layout=layout), seed=3)
