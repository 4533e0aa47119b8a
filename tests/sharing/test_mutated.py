"""Some of the cases of `python -m benchmarks.hostile`: mutated files are refused, or decode as their base does."""

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.hostile import cases
from benchmarks.hostile.reader import small_model, whole_artifact
from retrofit.artifact import folder as artifact

CASES = 60


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    return whole_artifact(tmp_path_factory.mktemp("whole") / "artifact", model)


def test_they_are_refused_or_harmless(model, files, tmp_path: Path):
    found = Counter(cases.case(number, files, model, tmp_path / "mutated") for number in range(CASES))
    assert found["missed"] == 0, found
    assert found["refused"] > CASES / 2 and found["harmless"] > CASES / 20, found


def test_a_whole_artifact_is_harmless_and_a_flipped_bit_is_missed_where_no_hash_tells(model, files, tmp_path: Path):
    whole = cases.put(tmp_path / "whole", files)
    assert cases.outcome(whole, model, allowed=True) == "harmless"
    data = files[artifact.ADAPTER]
    other = {**files, artifact.ADAPTER: data[:-1] + bytes([data[-1] ^ 1])}
    assert cases.outcome(cases.put(tmp_path / "flipped", other), model, allowed=False) == "refused"
    assert cases.outcome(cases.put(tmp_path / "sealed", cases.sealed(other)), model, allowed=False) == "missed"
