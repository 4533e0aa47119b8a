"""Training text made up: rows, conversations and a Hub that is not there, shared by tests of what is read."""

import json
from pathlib import Path

from retrofit.recipes.schema import Data
from retrofit.recipes.text import library
from retrofit.recipes.text.documents import documents

TINY = Path(library.__file__).parents[1] / "tiny"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THOUGHT_LAST = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MESSAGES = [
    {"role": "system", "content": "You are a"},
    {"role": "user", "content": "assistant"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "answer <b>"},
    {"role": "assistant", "content": "<b> user"},
]


def write_lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def answers(document, tokenizer):
    """Text of every run of response tokens."""
    runs, run = [], []
    for token, is_response in zip(document.tokens, document.response, strict=True):
        if is_response:
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return [*runs, tokenizer.decode(run)] if run else runs


def fake_datasets(monkeypatch, outcome):
    import datasets

    calls = []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options))
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def read(source, tokenizer, part="train", seed=0, data_seed=0, **options):
    options = {"held_out": 0, "seed": data_seed, **options}
    return list(documents(Data(source=str(source), **options), tokenizer, part=part, seed=seed))
