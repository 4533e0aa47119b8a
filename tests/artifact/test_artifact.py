"""The artifact folder: what is written is read back; nothing damaged or unsafe gets through."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from artifact_folders import ADAPTER_CONFIG, CONFIG, contents, same, tensors, write

from retrofit.artifact import folder as artifact
from retrofit.errors import ArtifactError, UsageError


def test_loaded_is_saved_bitwise(tmp_path):
    state, heads = tensors(0)
    state["odd"] = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
    found = artifact.read(write(tmp_path / "a", adapter_state=state, heads=heads))
    assert same(found.adapter_state, state)
    assert same(found.heads, heads)
    assert found.config == CONFIG
    assert found.adapter_config == ADAPTER_CONFIG
    assert (tmp_path / "a" / "recipe.yaml").read_text() == "profile: frozen\n"


def test_the_same_artifact_has_the_same_bytes(tmp_path):
    assert contents(write(tmp_path / "a")) == contents(write(tmp_path / "b"))


def test_no_heads_and_new_parent_folders(tmp_path):
    assert artifact.read(write(tmp_path / "new" / "folders" / "a", heads={})).heads == {}


def test_adapter_stands_in_a_subfolder_and_the_manifest_covers_what_is_loaded(folder):
    assert set(contents(folder)) == {*artifact.LOAD_BEARING, "manifest.sha256.json", "README.md"}
    files = json.loads((folder / "manifest.sha256.json").read_text())["files"]
    for name, entry in files.items():
        data = (folder / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_importing_and_reading_the_config_needs_no_torch(folder):
    use = f"artifact.check({str(folder)!r})"
    code = f"import sys; from retrofit.artifact import folder as artifact; {use}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", [*artifact.LOAD_BEARING, "manifest.sha256.json"])
def test_a_flipped_bit_anywhere_is_caught_and_the_file_named(folder, name):
    path = folder / name
    data = path.read_bytes()
    for position in range(0, len(data), 1 if len(data) < 200 else 3):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        # a damaged manifest may disagree with a file that is whole
        with pytest.raises(ArtifactError, match=".*" if name == "manifest.sha256.json" else path.name):
            artifact.check(folder)


@pytest.mark.parametrize("name", [*artifact.LOAD_BEARING, "manifest.sha256.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=name):
        artifact.read(folder)


@pytest.mark.parametrize("name", [*artifact.LOAD_BEARING, "manifest.sha256.json"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_named(folder, name, keep):
    path = folder / name
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(ArtifactError, match=path.name):
        artifact.check(folder)


def header(content, body=b""):
    text = json.dumps(content).encode() if not isinstance(content, bytes) else content
    return len(text).to_bytes(8, "little") + text + body


BAD_SAFETENSORS = {
    "empty": b"",
    "short": b"\x01\x00",
    "length_beyond_file": (1000).to_bytes(8, "little") + b"{}",
    "length_absurd": b"\xff" * 8 + b"{}",
    "pickle_renamed": b"\x80\x05\x95\x00\x00\x00\x00\x00\x00\x00.",
    "no_json": header(b"{nope"),
    "no_object": header([1]),
    "entry_no_object": header({"a": 3}),
    "unknown_type": header({"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 1]}}, b"x"),
    "type_no_text": header({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, b"xxxx"),
    "negative_shape": header({"a": {"dtype": "U8", "shape": [-1], "data_offsets": [0, 1]}}, b"x"),
    "offsets_outside": header({"a": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}}, b"x"),
    "size_not_shape": header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"xxxx"),
    "one_offset": header({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}, b"x"),
    "hole": header({"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}, b"xx"),
    "overlap": header(
        {n: {"dtype": "U8", "shape": [2], "data_offsets": [i, i + 2]} for i, n in enumerate("ab")}, b"xxx"
    ),
    "nested_deeply": header(b"[" * 100_000),
    "size_overflows": header({"a": {"dtype": "U8", "shape": [1 << 32] * 3, "data_offsets": [0, 0]}}),
    "trailing": header({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"xx"),
}


@pytest.mark.parametrize("data", BAD_SAFETENSORS.values(), ids=BAD_SAFETENSORS.keys())
def test_a_safetensors_header_is_checked_even_if_the_manifest_agrees(folder, data):
    path = folder / "heads.safetensors"
    path.write_bytes(data)
    renew_manifest(folder)
    with pytest.raises(ArtifactError, match=r"heads\.safetensors: no intact safetensors file"):
        artifact.check(folder)


def renew_manifest(folder):
    files = {}
    for name in artifact.LOAD_BEARING:
        data = (folder / name).read_bytes()
        files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    text = json.dumps({"files": files, "format": 1}, indent=2, sort_keys=True) + "\n"
    (folder / "manifest.sha256.json").write_text(text)


def test_a_renewed_manifest_is_accepted(folder):
    """So the tests that renew it fail for the reason they name."""
    renew_manifest(folder)
    artifact.check(folder)


@pytest.mark.parametrize(
    "text",
    [
        '["LORA"]',
        '{"peft_type": "IA3"}',
        "{}",
        "{",
        '{"peft_type": ["LORA"]}',
        "null",
        '{"peft_type": "LORA", "r": NaN}',
    ],
)
def test_an_adapter_config_other_than_lora_is_refused(folder, text):
    (folder / "adapter" / "adapter_config.json").write_text(text)
    renew_manifest(folder)
    with pytest.raises(ArtifactError, match=r"adapter_config\.json"):
        artifact.read(folder)


OPENED: list[str] = []
AUDITING: list[bool] = []


def _audit(event, arguments):
    if AUDITING and event == "open" and isinstance(arguments[0], str | os.PathLike):
        OPENED.append(os.fspath(arguments[0]))


sys.addaudithook(_audit)  # cannot be removed; quiet unless AUDITING
PICKLES = [
    "pytorch_model.bin",
    "adapter/adapter_model.bin",
    "a.pt",
    "a.PTH",
    "eval/x.pkl",
    "a.ckpt",
    "a.npy",
    "a.npz",
]


@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.parametrize("use", [artifact.check, artifact.read])
def test_a_pickle_is_refused_unread(folder, name, use):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    OPENED.clear()
    AUDITING.append(True)
    try:
        with pytest.raises(ArtifactError, match=f"{path.name}: may be a pickle"):
            use(folder)
    finally:
        AUDITING.clear()
    assert str(path) not in OPENED
    # not even the rest of the folder was opened: with a pickle in it, none of it is to be trusted
    assert not [opened for opened in OPENED if opened.startswith(str(folder) + os.sep)]


def test_the_audit_hook_sees_what_is_opened(folder):
    OPENED.clear()
    AUDITING.append(True)
    try:
        artifact.check(folder)
    finally:
        AUDITING.clear()
    assert str(folder / "heads.safetensors") in OPENED


@pytest.mark.parametrize("name", ["heads.safetensors", "retrofit.json", "adapter", "other.txt"])
def test_a_link_that_leads_outside_is_refused(folder, tmp_path, name):
    outside, path = tmp_path / "outside", folder / name
    if path.exists():
        path.rename(outside)
    else:
        outside.write_text("x")
    path.symlink_to(outside)
    with pytest.raises(ArtifactError, match=f"{name}: a link that leads out"):
        artifact.check(folder)


def test_links_inside_and_to_the_folder_are_fine(folder, tmp_path):
    (folder / "heads.safetensors").rename(folder / "real.safetensors")
    (folder / "heads.safetensors").symlink_to("real.safetensors")
    (tmp_path / "link").symlink_to(folder)
    artifact.check(tmp_path / "link")


def changed(path, value):
    config = json.loads(json.dumps(CONFIG))
    *parents, key = path.split(".")
    at = config
    for parent in parents:
        at = at[parent]
    if value is None:
        del at[key]
    else:
        at[key] = value
    return config


BAD_CONFIG = [
    ("format", 2),
    ("format", True),
    ("format", None),
    ("base", []),
    ("base.model", 3),
    ("base.fingerprint.norms", None),
    ("profile", "melted"),
    ("draft.block", 0),
    ("draft.block", True),
    ("draft.shift", 2),
    ("draft.shift", True),
    ("draft.input", "msk"),
    ("adapter.alpha", "4"),
    ("adapter.alpha", 0),
    ("adapter.targets", "qv"),
    ("adapter.modules", [1]),
    ("adapter.confidence", 1),
    ("parameters.heads", -1),
    ("training", []),
]


@pytest.mark.parametrize(("key", "value"), BAD_CONFIG)
def test_a_bad_config_names_file_and_key_in_reading_and_in_writing(folder, tmp_path, key, value):
    config = changed(key, value)
    (folder / "retrofit.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=key.split(".")[0]) as caught:
        artifact.read_config(folder)
    assert "retrofit.json" in str(caught.value)
    with pytest.raises(ArtifactError):
        write(tmp_path / "new", config=config)
    assert not (tmp_path / "new").exists()


def test_a_newer_format_says_upgrade(folder):
    (folder / "retrofit.json").write_text(json.dumps({"format": 3}))
    with pytest.raises(ArtifactError, match="format 3") as caught:
        artifact.check(folder)
    assert "upgrade" in caught.value.hint


def test_keys_beyond_the_schema_are_kept(tmp_path):
    config = {**CONFIG, "note": "hello"}
    assert artifact.read_config(write(tmp_path / "a", config=config)) == config


def test_no_artifact(tmp_path):
    for use in (artifact.check, artifact.read, artifact.read_config):
        with pytest.raises(UsageError, match="no such artifact"):
            use(tmp_path / "none")
        with pytest.raises(ArtifactError, match=r"retrofit\.json"):
            use(tmp_path)
