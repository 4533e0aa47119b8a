"""Damaged artifacts: whichever command reads one names the file."""

import struct
from pathlib import Path

import pytest
from commands import PROMPT, refused, run


def truncate(own):
    path = own / "adapter/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    return path


def flip(own):
    path = own / "heads.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return path


def huge_header(own):
    path = own / "heads.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])
    return path


def pickled(own):
    path = own / "adapter/adapter_model.bin"
    path.write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")
    return path


def newer(own):
    path = own / "retrofit.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    return path


def remove(own):
    path = own / "recipe.yaml"
    path.unlink()
    return path


def not_json(own):
    path = own / "retrofit.json"
    path.write_text("{")
    return path


@pytest.mark.parametrize(
    "command", [["generate", PROMPT], ["inspect"], ["certify"], ["chat"], ["doctor", "--json"]], ids=lambda c: c[0]
)
@pytest.mark.parametrize("damage", [truncate, flip, huge_header, pickled, newer, remove, not_json])
def test_damaged_artifacts_are_refused_and_the_file_named(own, command, damage):
    path = damage(own)
    assert str(path) in refused(run(command[0], own, *command[1:]), 1)
    assert not Path("executed").exists()
    assert not (own / "certificate.json").exists()
