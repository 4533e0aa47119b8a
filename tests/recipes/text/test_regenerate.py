"""Responses written by the base: what `ar` writes, in any company; once they are on disk, never again."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SHORT, done, run
from decoding import random_prompts, randomise
from keeping import keeping, prompt_rows
from saved import save_base, texts
from tiny_models import build

from retrofit.adapters.layout import DraftLayout
from retrofit.errors import ResourceError, UsageError
from retrofit.recipes import convert as convert_module
from retrofit.recipes.text import regenerate as module
from retrofit.recipes.text.documents import Document
from retrofit.recipes.text.regenerate import ResponseCache, regenerate, weights_key
from retrofit.recipes.text.rewriting import SHORTEST_PROMPT
from retrofit.recipes.text.sources import stable_hash
from retrofit.recipes.training.order import Order
from retrofit.runtime.engine import Engine

pytestmark = pytest.mark.usefixtures("somewhere")

LENGTHS = (9, 30, 17, 24, 30, 21)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_model(build("llama"), layout=DraftLayout(4))


def document(tokens: list[int], name: str, prompt: int) -> Document:
    flags = tuple(position >= prompt for position in range(len(tokens)))
    return Document(name, tuple(tokens), flags, "source", f"{name}:1")


DOCUMENTS = [
    document(tokens, name, prompt=3 * (number % 2))
    for number, (tokens, name) in enumerate(zip(random_prompts(LENGTHS, seed=4), "abcdef", strict=True))
]


def written(
    engine: Engine, cache: ResponseCache | None = None, documents: list[Document] = DOCUMENTS
) -> list[Document]:
    return list(regenerate(documents, engine, temperature=0.8, seed=5, max_length=28, cache=cache))


def counted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many responses each call of the engine is asked for, from now on."""
    calls: list[int] = []
    stream = Engine.stream

    def count(self: Engine, prompts: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(len(prompts))
        return stream(self, prompts, *arguments, **options)

    monkeypatch.setattr(Engine, "stream", count)
    return calls


def test_responses_are_those_of_ar_alone(engine: Engine) -> None:
    found = written(engine)
    assert [d.id for d in found] == list("abcdef")
    for old, new in zip(DOCUMENTS, found, strict=True):
        prompt = new.response.index(True)
        assert new.tokens[:prompt] == old.tokens[:prompt] and all(new.response[prompt:])
        assert prompt == 3 or (old.id not in "bdf" and prompt <= len(old.tokens) // 2)
        assert len(new.tokens) == min(len(old.tokens), 28)
        assert (new.source, new.where) == (old.source, old.where)
        assert new.tokens != old.tokens[:28]
        assert written(engine, documents=[old]) == [new], "alone, it is the same"


def test_a_response_ends_with_eos(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = written(engine)[1]
    end = whole.tokens[12]
    monkeypatch.setattr(engine.backend, "eos", frozenset([end]))
    cut = written(engine)[1]
    assert cut.tokens == whole.tokens[: len(cut.tokens)] and cut.tokens[-1] == end
    assert cut.response[-1] and len(cut.tokens) <= 13


def conversation(engine: Engine, monkeypatch: pytest.MonkeyPatch, closing: int | None = None) -> Document:
    """Two turns of six response tokens, each after three of a user; the base ends its first one early.

    closing: what the document's own turns end with; None: the token that ends the base's.
    """
    tokens = random_prompts((18,), seed=8)[0]
    flags = tuple(place % 9 >= 3 for place in range(18))
    first = written(engine, documents=[Document("talk", tuple(tokens), flags)])[0]
    end = first.tokens[5]  # its third response token
    monkeypatch.setattr(engine.backend, "eos", frozenset([end]))
    tokens[8] = tokens[17] = end if closing is None else closing
    return Document("talk", tuple(tokens), flags)


def test_a_conversation_is_answered_turn_by_turn(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    old = conversation(engine, monkeypatch)
    new = written(engine, documents=[old])[0]
    second = new.response.index(False, 3) + 3
    answers = new.tokens[3 : second - 3], new.tokens[second:]
    assert new.tokens[:3] == old.tokens[:3] and new.tokens[second - 3 : second] == old.tokens[9:12]
    assert new.response == (False,) * 3 + (True,) * len(answers[0]) + (False,) * 3 + (True,) * len(answers[1])
    for turn, (prompt, answer) in enumerate([(new.tokens[:3], answers[0]), (new.tokens[:second], answers[1])]):
        seed = stable_hash("5 talk" + " turn 1" * turn) % (1 << 31)
        limit = len(old.tokens) - len(prompt)
        want = engine.generate([list(prompt)], mode="ar", temperature=0.8, max_new_tokens=limit, seed=seed)[0]
        assert list(answer) == want.tokens
    assert written(engine, documents=[*DOCUMENTS[:3], old])[3] == new, "in company, it is the same"


def test_a_turn_that_does_not_end_ends_the_document(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    old = conversation(engine, monkeypatch, closing=0)
    new = written(engine, documents=[old])[0]
    assert 0 not in new.tokens[3:]
    assert new.response == (False,) * 3 + (True,) * (len(new.tokens) - 3)
    assert new.tokens[:3] == old.tokens[:3] and len(new.tokens) <= 6


def test_a_window_that_begins_within_an_answer_goes_on_with_the_turns(engine: Engine) -> None:
    tokens = tuple(random_prompts((30,), seed=9)[0])
    flags = tuple(place < 20 or place >= 25 for place in range(30))
    new = written(engine, documents=[Document("late", tokens, flags)])[0]
    prompt = new.response.index(True)
    assert SHORTEST_PROMPT <= prompt <= 15 and new.tokens[:prompt] == tokens[:prompt]


def test_what_leaves_no_room_is_left_out(engine: Engine) -> None:
    long = document(random_prompts((40,))[0], "long", prompt=30)
    assert written(engine, documents=[long, DOCUMENTS[1]]) == written(engine, documents=[DOCUMENTS[1]])


def test_every_prompt_may_have_a_limit_of_its_own(engine: Engine) -> None:
    prompts = random_prompts((3, 4, 5))
    results = engine.generate(prompts, mode="ar", max_new_tokens=[7, 1, 4], temperature=1.0)
    whole = engine.generate(prompts, mode="ar", max_new_tokens=7, temperature=1.0)
    for result, full, limit in zip(results, whole, [7, 1, 4], strict=True):
        assert result.tokens == full.tokens[:limit]
    with pytest.raises(UsageError, match="2 max_new_tokens for 3 prompts"):
        engine.generate(prompts, max_new_tokens=[1, 2])
    with pytest.raises(UsageError, match="max_new_tokens is 0"):
        engine.generate(prompts, max_new_tokens=[1, 0, 1])


# On disk


def test_responses_are_written_once(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = written(engine)
    calls = counted(engine, monkeypatch)
    assert written(engine, ResponseCache("base", 0.8, folder=tmp_path)) == want
    assert written(engine, ResponseCache("base", 0.8, folder=tmp_path)) == want
    assert calls == [6]
    more = [*DOCUMENTS, replace(DOCUMENTS[0], id="g")]
    assert written(engine, ResponseCache("base", 0.8, folder=tmp_path), more)[:6] == want
    assert calls == [6, 1]


@pytest.mark.parametrize("kept", [1, 4])
def test_an_interrupted_run_goes_on_where_it_was(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    want = written(engine)
    put, count = ResponseCache.put, [0]

    def killed(self: ResponseCache, key: str, tokens: list[int]) -> None:
        if count[0] == kept:
            self._file.write(b'{"key": "cut o')  # what a killed process may leave
            raise KeyboardInterrupt
        count[0] += 1
        put(self, key, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(ResponseCache, "put", killed)
        with pytest.raises(KeyboardInterrupt):
            written(engine, ResponseCache("base", 0.8, folder=tmp_path))
    calls = counted(engine, monkeypatch)
    assert written(engine, ResponseCache("base", 0.8, folder=tmp_path)) == want
    assert calls == [6 - kept]
    assert written(engine, ResponseCache("base", 0.8, folder=tmp_path)) == want
    assert calls == [6 - kept], "what was added after the line that was cut short is found"


def test_damaged_lines_are_written_anew(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ResponseCache("base", 0.8, folder=tmp_path)
    want = written(engine, cache)
    lines = cache.path.read_bytes().splitlines(keepends=True)
    lines[1] = b"\xff\x00" + lines[1][2:]
    lines[3] = json.dumps({"key": json.loads(lines[3])["key"], "tokens": ["x"]}).encode() + b"\n"
    cache.path.write_bytes(b"".join(lines))
    calls = counted(engine, monkeypatch)
    assert written(engine, ResponseCache("base", 0.8, folder=tmp_path)) == want
    assert calls == [2]


def test_two_runs_may_share_a_file(engine: Engine, tmp_path: Path) -> None:
    one, two = (ResponseCache("base", 0.8, folder=tmp_path) for _ in range(2))
    for number in range(5):
        one.put(f"a{number}", [number] * 9)
        two.put(f"b{number}", [number] * 5)
    assert [one.get(f"a{number}") for number in range(5)] == [[number] * 9 for number in range(5)]
    assert [two.get(f"b{number}") for number in range(5)] == [[number] * 5 for number in range(5)]
    both = ResponseCache("base", 0.8, folder=tmp_path)
    assert both.get("a4") == [4] * 9 and both.get("b4") == [4] * 5 and both.get("c") is None


def test_other_bases_and_settings_have_files_of_their_own(tmp_path: Path) -> None:
    settings: list[tuple[Any, ...]] = [("base", 0.8), ("other", 0.8), ("base", 0.7), ("base", 0.8, [3])]
    assert len({ResponseCache(*each, folder=tmp_path).path for each in settings}) == 4
    assert ResponseCache("base", 0.8, [3, 4], tmp_path).path == ResponseCache("base", 0.8, [4, 3], tmp_path).path


def test_other_prompts_seeds_and_limits_have_keys_of_their_own() -> None:
    job = module._Job((1, 2, 3), 9, 5)
    others = [job._replace(prompt=(1, 2, 4)), job._replace(limit=8), job._replace(seed=6), job]
    assert len({other.key for other in others}) == 4


def test_the_base_is_told_from_others_by_its_weights_alone(engine: Engine) -> None:
    key = weights_key(engine.attached)
    again = Engine.from_model(build("llama"), layout=DraftLayout(4))
    assert weights_key(again.attached) == key
    assert weights_key(randomise(again).attached) == key, "the adapter is no part of it"
    parameters = [p for n, p in again.attached.peft_model.named_parameters() if "lora_" not in n]
    for parameter in parameters:
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.mul_(1.001)
        assert weights_key(again.attached) != key
        with torch.no_grad():
            parameter.copy_(kept)
    assert weights_key(again.attached) == key


def test_where_responses_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETROFIT_CACHE", str(tmp_path / "mine"))
    assert module.cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("RETROFIT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert module.cache_folder() == Path("~/.cache/retrofit").expanduser()
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="regenerated responses cannot be kept there") as caught:
        ResponseCache("base", 0.8, folder=tmp_path / "file")
    assert "RETROFIT_CACHE" in str(caught.value.hint)


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    cache = ResponseCache("base", 0.8, folder=tmp_path)
    cache._file = Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115
    with pytest.raises(ResourceError, match=r"cannot write 28 bytes \([\d,]+ free\): No space left"):
        cache.put("a", [1])


def test_a_cache_that_cannot_be_written_is_found_out_before_the_base_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RETROFIT_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(convert_module, "open_base", None)
    with pytest.raises(ResourceError, match="file/responses: regenerated responses cannot be kept there"):
        convert_module.convert(str(tmp_path / "base"), "tiny", tmp_path / "out", {"data.responses": "regenerate"})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# In a conversion


def test_a_conversion_trains_and_measures_on_the_bases_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base(tmp_path / "base")
    folder = texts(tmp_path / "texts")
    seen: dict[str, list[Document]] = {"train": [], "held_out": []}
    measure, draw_batch = convert_module.held_out_acceptance, Order.batch

    def measured(backend: Any, attached: Any, documents: list[Document], *rest: Any) -> Any:
        seen["held_out"] += documents
        return measure(backend, attached, documents, *rest)

    def trained(self: Order) -> Any:
        batch = draw_batch(self)
        seen["train"] += [document for document, _ in batch]
        return batch

    monkeypatch.setattr(convert_module, "held_out_acceptance", measured)
    monkeypatch.setattr(Order, "batch", trained)
    order = ["convert", base, f"data.source={folder}", "data.responses=regenerate", *SHORT, "data.held_out=2"]
    result = run(*order, RETROFIT_CACHE=str(tmp_path / "cache"))
    assert result.exit_code == 0, result.stderr
    assert "regenerating" in result.stderr
    engine = Engine.from_model(build("llama"), layout=DraftLayout(4))
    assert len(seen["held_out"]) == 2 and len(seen["train"]) == 2
    for found in seen["held_out"] + seen["train"]:
        prompt = found.response.index(True)
        draw = stable_hash(f"0 {found.id}") % (1 << 31)
        wanted = engine.generate(
            [found.tokens[:prompt]], "ar", temperature=0.8, seed=[draw], max_new_tokens=len(found.tokens) - prompt
        )
        assert list(found.tokens[prompt:]) == wanted[0].tokens
    first = Path("base-retrofit/adapter/adapter_model.safetensors").read_bytes()
    calls = counted(engine, monkeypatch)
    done(*order, "--overwrite", "-q", RETROFIT_CACHE=str(tmp_path / "cache"))
    assert calls == [], "every response was on disk"
    assert Path("base-retrofit/adapter/adapter_model.safetensors").read_bytes() == first


def test_what_documents_share_is_read_once() -> None:
    """Two conversations with one system prompt of 20 tokens, two turns each."""
    keeps, (system, *rest) = keeping("llama"), random_prompts((20, 7, 5, 6, 9, 3, 8))
    documents = []
    for name, (asks, answers, more) in zip("ab", (rest[:3], rest[3:]), strict=True):
        flags = [False] * (20 + len(asks)) + [True] * len(answers) + [False] * len(more) + [True] * 6
        tokens = [*system, *asks, *answers, *more, *answers, 0, 0, 0, 0, 0, 0]
        documents.append(Document(name, tuple(tokens[: len(flags)]), tuple(flags), "source", f"{name}:1"))
    with prompt_rows(keeps) as rows:
        got = list(regenerate(documents, keeps, temperature=0.8, seed=5, max_length=60))
    assert len(rows) >= 2 and rows[0] == 27 and max(rows[1:]) <= 13
    assert keeps.prefixes is not None
    keeps.prefixes = None
    assert list(regenerate(documents, keeps, temperature=0.8, seed=5, max_length=60)) == got
    keeps.close()


@pytest.mark.parametrize(
    ("length", "requests"), [(1, 64), (2048, 64), (2049, 32), (4096, 32), (8192, 16), (131072, 1), (10**6, 1)]
)
def test_the_longer_requests_get_the_fewer_run_together(length: int, requests: int) -> None:
    assert module.together(length) == requests
    kept, tokens = module.most_kept(length)
    most = max(module.together(n) * n for n in {*range(1, min(length, 5000) + 1), length})
    assert kept == module.together(tokens) and kept * tokens == most


def test_responses_are_the_same_in_groups_of_like_length(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, calls = written(engine), counted(engine, monkeypatch)
    monkeypatch.setattr(module, "ROOM", 64)  # 28 tokens: 2 at once, 9 tokens: 4
    assert written(engine) == expected
    assert sorted(calls) == [1, 5]
