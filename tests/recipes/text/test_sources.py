"""Mixtures, Parquet and streams: which documents they give, in which order, and which are never trained on."""

import errno
import re
import socket
from collections import Counter
from itertools import islice

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from text_sources import CHATML, MESSAGES, TINY, answers, fake_datasets, write_lines
from transformers import AutoTokenizer

from retrofit.errors import DataError, ResourceError, UsageError
from retrofit.recipes.schema import Data
from retrofit.recipes.text.documents import documents
from retrofit.recipes.text.faults import Skipped
from retrofit.recipes.text.sources import SHUFFLE_BUFFER


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = CHATML
    return tokenizer


def read(source, tokenizer, part="train", seed=0, skipped=None, **options):
    data = Data(source=source, **{"held_out": 0, **options})
    return list(documents(data, tokenizer, part=part, seed=seed, skipped=skipped))


def numbered(path, name, count):
    return str(write_lines(path / f"{name}.jsonl", *({"text": f"{name} {number}"} for number in range(count))))


# Mixtures


def mixture(tmp_path, weights=(3, 1), counts=(60, 60, 60)):
    return [
        {"source": numbered(tmp_path, name, count), "weight": weight}
        for name, weight, count in zip("abc", weights, counts, strict=False)
    ]


@pytest.mark.parametrize("weights", [(3, 1), (5, 3, 2)])
def test_any_number_of_documents_has_the_shares_of_the_weights(tokenizer, tmp_path, weights):
    parts = mixture(tmp_path, weights=weights)
    found = read(parts, tokenizer)
    for part, weight in zip(parts, weights, strict=True):
        for count in range(1, 61):
            taken = sum(document.source == part["source"] for document in found[:count])
            assert abs(taken - weight / sum(weights) * count) <= 1.5, count


def test_a_mixture_is_keyed_by_the_seed(tokenizer, tmp_path):
    def ids(seed):
        return [document.id for document in read(mixture(tmp_path), tokenizer, seed=seed)]

    assert ids(0) == ids(0) != ids(1)


def test_an_epoch_reads_every_source_to_its_end_and_repeats_the_small_ones(tokenizer, tmp_path):
    parts = mixture(tmp_path, weights=(1, 1), counts=(40, 9))
    found = read(parts, tokenizer)
    ids = [document.id for document in found]
    assert len(set(ids)) == len(ids), "a repeated document has an id of its own, so other anchors"
    times = Counter(tokenizer.decode(document.tokens) for document in found)
    assert all(times[f"a {number}<|endoftext|>"] == 1 for number in range(40))
    assert {times[f"b {number}<|endoftext|>"] for number in range(9)} <= {4, 5}
    assert "1/b.jsonl:1~1" in ids


def test_sources_are_told_apart_though_their_files_have_one_name(tokenizer, tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        numbered(tmp_path / folder, "a", 3)
    found = read([str(tmp_path / "x"), str(tmp_path / "y")], tokenizer, "all")
    assert len({document.id for document in found}) == 6
    assert {document.source for document in found} == {str(tmp_path / "x"), str(tmp_path / "y")}


def test_each_source_of_a_mixture_holds_out_its_share(tokenizer, tmp_path):
    parts = mixture(tmp_path, weights=(3, 1))
    held = read(parts, tokenizer, "held_out", held_out=8)
    assert Counter(document.source[-7] for document in held) == {"a": 6, "b": 2}
    train = {document.where for document in read(parts, tokenizer, held_out=8)}
    assert not train & {document.where for document in held}
    assert len(train) == 120 - 8


def test_split_and_field_are_those_of_the_section_unless_given(tokenizer, tmp_path, monkeypatch):
    calls = fake_datasets(monkeypatch, [{"one": "x", "two": "y"}] * 3)
    found = read(["p/p", {"source": "q/q", "split": "test", "field": "two"}], tokenizer, split="valid", field="one")
    assert {(call[0][0], call[1]["split"]) for call in calls} == {("p/p", "valid"), ("q/q", "test")}
    texts = {document.source: tokenizer.decode(document.tokens)[0] for document in found}
    assert texts == {"p/p": "x", "q/q": "y"}


def test_a_bad_source_of_a_mixture_is_named(tokenizer, tmp_path):
    write_lines(tmp_path / "b.jsonl", {"text": "x"}, "{")
    with pytest.raises(DataError, match=r"b\.jsonl:2: not valid JSON"):
        read([numbered(tmp_path, "a", 3), str(tmp_path / "b.jsonl")], tokenizer)


# Parquet


@pytest.fixture
def arrow_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("arrow_cache")
def test_parquet_is_read_like_jsonl(tokenizer, tmp_path):
    rows = [{"messages": MESSAGES}] + [{"messages": MESSAGES[1:3]}] * 4
    (tmp_path / "p").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p" / "a.parquet")
    write_lines(tmp_path / "a.jsonl", *rows)
    table, lines = (read(str(tmp_path / name), tokenizer, "all") for name in ("p", "a.jsonl"))
    assert [d.tokens for d in table] == [d.tokens for d in lines]
    assert [d.response for d in table] == [d.response for d in lines]
    assert [d.id for d in table] == [f"a.parquet:{n}" for n in range(1, 6)]
    assert answers(table[0], tokenizer) == ["a<|im_end|>", "<b> user<|im_end|>"]
    held = read(str(tmp_path / "p" / "a.parquet"), tokenizer, "held_out", held_out=2)
    train = read(str(tmp_path / "p" / "a.parquet"), tokenizer, held_out=2)
    assert {d.id for d in held} | {d.id for d in train} == {d.id for d in table} and len(train) == 3


@pytest.mark.usefixtures("arrow_cache")
def test_bad_parquet_is_named(tokenizer, tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"a\.parquet:1: cannot be read as Parquet"):
        read(str(path), tokenizer)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "x"}, {"text": None}]), path)
    with pytest.raises(DataError, match=r"a\.parquet:2: `text` must be text, not NoneType"):
        read(str(path), tokenizer)
    skipped = Skipped()
    assert len(read(str(path), tokenizer, skipped=skipped)) == 1
    assert skipped.counts() == {"field": 1}
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"]}).slice(0, 0), path)
    with pytest.raises(DataError, match=r"a\.parquet:1: the file is empty"):
        read(str(path), tokenizer)


@pytest.mark.parametrize("problem", ["a file in its place", "no room", "no rights"])
def test_a_cache_that_cannot_hold_a_parquet_file_is_no_fault_of_the_file(tokenizer, tmp_path, monkeypatch, problem):
    path, cache = tmp_path / "a.parquet", tmp_path / "cache"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "x"}] * 3), path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))

    def refused(*arguments, **options):
        errors = {
            "no room": OSError("Not enough disk space. Needed: 12 GB"),
            "no rights": PermissionError(errno.EACCES, "Permission denied", str(cache / "parquet")),
        }
        raise datasets.exceptions.DatasetGenerationError("An error occurred") from errors[problem]

    if problem == "a file in its place":
        cache.write_text("")
    else:
        monkeypatch.setattr(datasets.Dataset, "from_parquet", refused)
    with pytest.raises(ResourceError, match=f"^{re.escape(str(cache))}.*cannot write the rows of {path}") as caught:
        read(str(path), tokenizer, held_out=0)
    assert "HF_DATASETS_CACHE" in str(caught.value.hint)


# Streams


class Counted:
    """Records that say how many were taken."""

    def __init__(self, count):
        self.count, self.taken = count, 0

    def __iter__(self):
        for number in range(self.count):
            self.taken = max(self.taken, number + 1)
            yield {"text": f"t {number}"}


def test_a_hub_source_is_streamed_as_far_as_it_is_needed(tokenizer, monkeypatch):
    records = Counted(100_000)
    calls = fake_datasets(monkeypatch, records)
    stream = documents(Data(source="o/n", held_out=5), tokenizer, part="train", seed=0)
    first = list(islice(stream, 10))
    assert calls[0][1]["streaming"] is True
    assert records.taken <= 5 + SHUFFLE_BUFFER + 10
    assert [d.id for d in first] != sorted(d.id for d in first)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    again = documents(Data(source="o/n", held_out=5), tokenizer, part="train", seed=0)
    assert list(islice(again, 10)) == first, "what the cache holds is read in the same order"
    assert calls[-1][1]["streaming"] is False


def test_a_stream_gives_every_record_once_and_holds_out_the_first(tokenizer, monkeypatch):
    fake_datasets(monkeypatch, Counted(SHUFFLE_BUFFER + 50))
    held = [d.id for d in read("o/n", tokenizer, "held_out", held_out=5)]
    assert held == [f"o/n:{number}" for number in range(5)]
    train = [d.id for d in read("o/n", tokenizer, held_out=5)]
    assert sorted(train, key=lambda name: int(name[4:])) == [f"o/n:{n}" for n in range(5, SHUFFLE_BUFFER + 50)]
    assert train != [d.id for d in read("o/n", tokenizer, seed=1, held_out=5)]


def test_a_stream_with_nothing_left(tokenizer, monkeypatch):
    fake_datasets(monkeypatch, Counted(5))
    with pytest.raises(DataError, match=r"o/n: nothing left to train on"):
        read("o/n", tokenizer, held_out=5)
    fake_datasets(monkeypatch, Counted(0))
    with pytest.raises(DataError, match=r"o/n.*no records"):
        read("o/n", tokenizer)


def test_offline_reads_what_the_cache_holds_and_no_network(tokenizer, tmp_path, monkeypatch):
    """The real package; its cache is filled from a file and then given the name that a Hub id has there."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_lines(tmp_path / "a.jsonl", *({"text": f"t {number}"} for number in range(9)))
    datasets.load_dataset("json", data_files=str(tmp_path / "a.jsonl"))
    (tmp_path / "cache" / "json").rename(tmp_path / "cache" / "o___n")
    (cached,) = (tmp_path / "cache" / "o___n").iterdir()
    for arrow in list(cached.rglob("json-*.arrow")):
        arrow.rename(arrow.with_name(arrow.name.replace("json-", "n-")))
    cached.rename(cached.with_name("default"))
    reached = []

    def connect(*arguments, **options):
        reached.append(arguments)
        raise OSError("network is down")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    found = list(documents(Data(source="o/n", held_out=2), tokenizer, part="train", offline=True))
    assert sorted(d.id for d in found) == [f"o/n:{number}" for number in range(2, 9)]
    for missing in ({"source": "o/other"}, {"source": "o/n:another"}):
        with pytest.raises(ResourceError, match=f"{missing['source']}: offline, and not in the cache") as caught:
            documents(Data(held_out=0, **missing), tokenizer, part="train", offline=True)
        assert str(tmp_path / "cache") in str(caught.value) and "--offline" in str(caught.value.hint)
    assert reached == []
    assert not datasets.config.HF_HUB_OFFLINE


def test_a_network_that_fails_midway_is_told(tokenizer, monkeypatch):
    def broken():
        yield {"text": "x"}
        yield {"text": "y"}
        raise ConnectionError("reset\nby peer")

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: broken())
    stream = documents(Data(source="o/n", held_out=0), tokenizer, part="all")
    assert next(stream).id == "o/n:0"
    with pytest.raises(ResourceError, match="o/n: reset by peer"):
        list(stream)


def test_streams_of_the_real_package(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    load = datasets.load_dataset

    def found(name, configuration, split, streaming):
        return load("json", data_files=str(path), split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", found)
    write_lines(path, *({"text": f"t {number}"} for number in range(30)))
    ids = [document.id for document in read("o/n", tokenizer, held_out=3)]
    assert sorted(ids) == sorted(f"o/n:{number}" for number in range(3, 30)) and ids != sorted(ids)
    path.write_bytes(b'{"text": "a"}\n{"text": \n')
    with pytest.raises(DataError, match=r"o/n \(train\), before the first record: JSON parse error"):
        read("o/n", tokenizer)
    write_lines(path, {"text": "a"})
    with pytest.raises(UsageError, match="Bad split"):
        read("o/n", tokenizer, split="tset")


def test_bad_records_of_a_stream_are_skipped_and_counted_once(tokenizer, monkeypatch):
    fake_datasets(monkeypatch, [{"text": "x"}, {"txet": "y"}, {"text": "z"}])
    skipped = Skipped()
    for _ in range(2):
        assert len(read("o/n", tokenizer, skipped=skipped)) == 2
    assert skipped.counts() == {"field": 1}
    assert list(skipped.rows) == ["o/n (train) record 1"]
