"""The tokenizer of the embedded base, with and without a chat template."""

import pytest
from text_sources import CHATML, TINY
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture
def chat_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = CHATML
    return tokenizer
