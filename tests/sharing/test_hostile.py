"""Repositories made to do harm: refused before anything of them is opened, and nothing is left of them."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
from pathlib import Path

import pytest
from artifact_folders import ADAPTER_CONFIG, CONFIG, contents, write
from commands import done
from loopback_hub import Hub

from retrofit import pull, push
from retrofit.artifact import folder as artifact
from retrofit.artifact import safety
from retrofit.artifact.files import json_bytes
from retrofit.artifact.schema import check_adapter_config
from retrofit.errors import ArtifactError

NAME = "stranger/adapter"


class Opened:
    """A pickle that tells when it is opened."""

    def __reduce__(self):
        return (Path("opened").touch, ())


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    return contents(write(tmp_path / "artifact"))


def sealed(files: dict[str, bytes], **changes: bytes) -> dict[str, bytes]:
    """The files with some replaced, and a manifest that is true of them: their writer is who does harm."""
    files = {**files, **changes}
    told = {n: {"sha256": hashlib.sha256(files[n]).hexdigest(), "size": len(files[n])} for n in artifact.LOAD_BEARING}
    return {**files, artifact.MANIFEST: json_bytes({"files": told, "format": artifact.FORMAT})}


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def refused(hub: Hub, files: dict[str, bytes], tmp_path: Path, match: str) -> None:
    hub.add(NAME, files)
    with pytest.raises(ArtifactError, match=match):
        pull(NAME)
    left = [path.name for path in (tmp_path / "cache" / "artifacts").rglob("*") if path.is_file()]
    assert left == ["@default"]


def test_pickles_are_not_fetched(
    hub: Hub, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("adapter/adapter_model.bin", "heads.pt", "eval/report.pkl", "eval/x.json.pkl", "training_args.bin")
    hub.add(NAME, {**files, **dict.fromkeys(names, pickle.dumps(Opened()))})
    found = pull(NAME)
    assert {path.suffix for path in found.rglob("*") if path.is_file()} <= {".json", ".safetensors", ".yaml", ".md"}
    assert not Path("opened").exists()


@pytest.mark.parametrize(
    "name",
    ["../outside.json", "eval/../../outside.json", "/etc/outside.json", "eval\\..\\outside.json", "C:x.json", "a\nb"],
)
def test_names_that_lead_elsewhere(hub: Hub, files: dict[str, bytes], tmp_path: Path, name: str) -> None:
    refused(hub, {**files, name: b"{}"}, tmp_path, "whose name leads elsewhere")
    assert not hub.requests("GET", "/resolve/")


def test_a_link_is_but_text(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    refused(hub, {**files, artifact.CONFIG: b"/etc/passwd"}, tmp_path, r"retrofit\.json: not valid JSON")


def test_a_link_that_leads_out_of_a_pulled_folder(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    hub.add(NAME, files)
    found = pull(NAME)
    (found / "eval").symlink_to(tmp_path)
    with pytest.raises(ArtifactError, match="leads out of the artifact"):
        artifact.read(found)


WEIGHTS = {
    "pickle": pickle.dumps({"x": 1}),
    "empty": b"",
    "huge header": safetensors(b"{}", length=1 << 62),
    "header over the limit": safetensors(b"{}", length=safety.LARGEST_HEADER + 1),
    "header past the end": safetensors(b"{}", length=1000),
    "no JSON": safetensors(b"{" * 4000),
    "deep JSON": safetensors(b'{"a":' * 4000 + b"1" + b"}" * 4000),
    "overflow": safetensors({"x": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 4]}}, b"1234"),
    "absurd": safetensors({"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}, b"1234"),
    "negative": safetensors({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"),
    "overlap": safetensors({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "xy"}, b"1234"),
    "hole": safetensors({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12345678"),
    "more than told": safetensors({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12345678"),
    "unknown type": safetensors({"x": {"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
}


@pytest.mark.parametrize("data", WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_are_none(hub: Hub, files: dict[str, bytes], tmp_path: Path, data: bytes) -> None:
    refused(hub, sealed(files, **{artifact.HEADS: data}), tmp_path, r"heads\.safetensors: no intact safetensors file")


JSON = {
    "deep": b"[" * 100_000,
    "no object": b"[]",
    "not a number": b'{"format": NaN}',
    "many digits": b'{"format": ' + b"9" * 10_000 + b"}",
    "another format": json_bytes({**CONFIG, "format": 99}),
    "no UTF-8": b"\xff\xfe{}",
    "deep in an object": json_bytes({**CONFIG, "training": {"x": json.loads("[" * 40 + "]" * 40)}}),
    "out of range": json.dumps({**CONFIG, "x": "HERE"}).replace('"HERE"', "1e400").encode(),
    "64 bits": json_bytes({**CONFIG, "x": 1 << 63}),
    "another layout": json_bytes({**CONFIG, "draft": {**CONFIG["draft"], "skip": 1}}),
    "huge rank": json_bytes({**CONFIG, "adapter": {**CONFIG["adapter"], "rank": 1 << 40}}),
    "no chances": json_bytes({**CONFIG, "acceptance": {"conditional": {"greedy": [2.0]}}}),
    "no object of chances": json_bytes({**CONFIG, "acceptance": {"ranks": 5}}),
}


@pytest.mark.parametrize("data", JSON.values(), ids=JSON)
def test_configurations_that_are_none(hub: Hub, files: dict[str, bytes], tmp_path: Path, data: bytes) -> None:
    refused(hub, sealed(files, **{artifact.CONFIG: data}), tmp_path, r"retrofit\.json: ")
    assert not hub.requests("GET", "/resolve/.*safetensors")


def test_sizes_are_compared_before_weights_are_fetched(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    refused(hub, {**files, artifact.HEADS: files[artifact.HEADS] + b"0"}, tmp_path, "the manifest says")
    assert not hub.requests("GET", "/resolve/.*safetensors")


def test_a_flipped_bit_is_found(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    data = files[artifact.HEADS]
    refused(hub, {**files, artifact.HEADS: data[:-1] + bytes([data[-1] ^ 1])}, tmp_path, "its sha256 is not")


def test_texts_of_gigabytes_are_not_fetched(
    hub: Hub, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrofit.sharing.pulling.LARGEST_TEXT", 10_000)
    refused(hub, {**files, "eval/report.json": b" " * 10_001}, tmp_path, "more than text of an artifact has")
    monkeypatch.setattr("retrofit.sharing.pulling.MOST_FILES", 20)
    many = {f"eval/{n}.json": b"{}" for n in range(30)}
    refused(hub, {**files, **many}, tmp_path, "more than an artifact has")


# Keys of PEFT that import, run or open something


KEYS = {
    "auto_mapping": {"base_model_class": "x", "parent_library": "os"},
    "megatron_config": {"a": 1},
    "megatron_core": "evil.core",
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 2},
    "corda_config": {"cache_file": "/etc/passwd"},
    "tokenizer_kwargs": {"trust_remote_code": True},
    "modules_to_save": ["embed_tokens"],
    "layer_replication": [[0, 10_000_000]],
    "init_lora_weights": "eva",
    "trainable_token_indices": [1],
    "use_dora": True,
    "new_key_of_a_later_version": 0,
    "r": "2",
    "peft_type": "PREFIX_TUNING",
}


@pytest.mark.parametrize("key", KEYS)
def test_keys_that_are_not_allowed(hub: Hub, files: dict[str, bytes], tmp_path: Path, key: str) -> None:
    data = json_bytes({**ADAPTER_CONFIG, key: KEYS[key]})
    refused(hub, sealed(files, **{artifact.ADAPTER_CONFIG: data}), tmp_path, rf"adapter_config\.json: .*{key}")


def test_what_our_own_adapters_say_is_allowed(made: Path) -> None:
    for folder in (made, Path(__file__).parent.parent / "artifact" / "of_0479a83"):
        path = folder / artifact.ADAPTER_CONFIG
        content = json.loads(path.read_text())
        assert len(content) > 30
        check_adapter_config(content, path)
        check_adapter_config({**content, "new_key_of_a_later_version": None}, path)


def test_a_terminal_is_not_written_to(hub: Hub, files: dict[str, bytes]) -> None:
    config = {**CONFIG, "retrofit": "0.1\x1b[2J\nbase  innocent"}
    hub.add(NAME, sealed(files, **{artifact.CONFIG: json_bytes(config)}))
    told = done("inspect", NAME)
    assert "\x1b" not in told and "0.1?[2J?base" in told


def test_what_was_pulled_can_be_pushed(hub: Hub, files: dict[str, bytes]) -> None:
    hub.add(NAME, files)
    push(pull(NAME), "user/copy", uncertified=True)
    assert hub.repositories["user/copy"].files[artifact.HEADS] == files[artifact.HEADS]
