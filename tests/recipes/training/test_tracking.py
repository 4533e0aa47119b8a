"""Trackers get what metrics.jsonl gets, go on where they were, and stop nothing when they fail."""

import importlib.util
import json
import struct
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tiny_conversion import interrupted, learned, run

from retrofit.cli import main as cli
from retrofit.errors import ResourceError
from retrofit.recipes import convert
from retrofit.recipes.training import tracking
from retrofit.recipes.training.checkpoint import folder_of
from retrofit.recipes.training.tracking import flat

OPTIONS = {"train__steps": 4, "train__probe_every": 2, "train__probe_tokens": 4, "train__probe_prompts": 1}


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def events(folder: Path) -> Iterator[Event]:
    """Of the event files directly in a folder, oldest first.  A record: length, its crc, an Event, its crc."""
    for path in sorted(folder.glob("events.*"), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            length = struct.unpack("<Q", data[:8])[0]
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def scalars(folder: Path) -> dict[int, dict[str, float]]:
    """By step; what was written last wins."""
    found: dict[int, dict[str, float]] = {}
    for event in events(folder):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found.setdefault(event.step, {})[value.tag] = value.simple_value
    return found


def test_tensorboard_gets_every_figure_and_a_resumed_run_goes_on_in_it(tmp_path: Path, texts: Path) -> None:
    out = tmp_path / "out"
    run(tmp_path / "plain", texts, **OPTIONS)
    interrupted(out, texts, 3, **OPTIONS, track="tensorboard")
    run(out, texts, **OPTIONS, track="tensorboard")
    assert learned(out) == learned(tmp_path / "plain")
    (folder,) = (tmp_path / "out.track").iterdir()
    assert folder.name.startswith("out-")
    assert not folder_of(out).exists(), "the checkpoints are gone, the track is not"
    found = scalars(folder)
    assert list(found) == [1, 2, 3, 4]
    for record in records(out / "metrics.jsonl"):
        assert found[record["step"]] == {key: pytest.approx(value) for key, value in flat(record).items()}
    begins = [event.step for event in events(folder) if event.session_log.status == SessionLog.START]
    assert begins == [4], "of what an earlier run wrote, steps from here on are hidden"
    hparams = [path.read_text() for path in folder.rglob("hparams.yml")]
    assert len(hparams) == 2
    assert all("train.steps: 4\n" in text and "draft.block: 4\n" in text for text in hparams)


def test_a_restarted_conversion_is_another_run(tmp_path: Path, texts: Path) -> None:
    for _ in range(2):
        run(tmp_path / "out", texts, train__steps=1, train__warmup=0, track="tensorboard", overwrite=True)
    assert len(list((tmp_path / "out.track").iterdir())) == 2


def test_a_record_as_flat_numbers() -> None:
    record = {
        "step": 7,
        "loss": {"total": 2.5, "ar": 1.0},
        "accept": {"sampled": [0.5, 0.25], "greedy": [0.75]},
        "tau": 1.5,
        "lr": 0.01,
        "gradient_norm": 3.0,
        "rows": {"clean": 10, "draft": 40},
        "seconds": 2.0,
        "probe": {"tau": 1.25, "tpf": 1.125, "accepted": [3, 1], "tokens": 9, "forwards": 8, "seconds": 0.5},
    }
    assert flat(record) == {
        "loss/total": 2.5, "loss/ar": 1.0, "rows/clean": 10, "rows/draft": 40,
        "accept/sampled/1": 0.5, "accept/sampled/2": 0.25, "accept/greedy/1": 0.75,
        "tau": 1.5, "lr": 0.01, "gradient_norm": 3.0, "seconds": 2.0,
        "rows/clean_per_second": 5.0, "rows/draft_per_second": 20.0,
        "probe/tau": 1.25, "probe/tpf": 1.125, "probe/accepted/0": 3, "probe/accepted/1": 1,
        "probe/tokens": 9, "probe/forwards": 8, "probe/seconds": 0.5,
    }  # fmt: skip


# Packages that are not there


@pytest.mark.parametrize(
    ("name", "package"), [("trackio", "trackio"), ("wandb", "wandb"), ("tensorboard", "tensorboardX")]
)
def test_a_missing_package_is_told_before_the_base_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    right = importlib.util.find_spec
    absent = tracking.PACKAGES[name]
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda n: None if n in absent else right(n))
    monkeypatch.setattr(convert, "open_base", None)
    result = CliRunner().invoke(cli.main, ["convert", "-o", str(tmp_path / "out"), "--track", name])
    assert result.exit_code == 4
    assert f"--track {name}: the package `{package}` is not installed\nhint: pip install {package}\n" in result.stderr
    assert list(tmp_path.iterdir()) == []


# Packages that are not installed here, by what accelerate calls of them


class Stub(ModuleType):
    """`init` as trackio and wandb have it; what was asked of it."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.inits: list[dict[str, Any]] = []
        self.settings: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0
        self.fails_at = 99
        self.config = self

    def init(self, **options: Any) -> "Stub":
        self.inits.append(options)
        return self

    def update(self, values: dict[str, Any], allow_val_change: bool) -> None:
        self.settings = values

    def log(self, values: dict[str, float], step: int) -> None:
        if step >= self.fails_at:
            raise ConnectionError("no route to host")
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture(params=["trackio", "wandb"])
def stub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Stub:
    made = Stub(request.param)
    monkeypatch.setitem(sys.modules, request.param, made)
    return made


def test_a_run_is_opened_told_every_step_and_taken_up_again(tmp_path: Path, texts: Path, stub: Stub) -> None:
    out = tmp_path / "out"
    interrupted(out, texts, 3, **OPTIONS, track=stub.__name__)
    run(out, texts, **OPTIONS, track=stub.__name__)
    first, second = stub.inits
    assert first == second
    assert (first["project"], first["resume"]) == ("retrofit", "allow")
    assert first["name"].startswith("out-")
    assert [step for step, _ in stub.logged] == [1, 2, 3, 4]
    assert stub.logged == [(record["step"], flat(record)) for record in records(out / "metrics.jsonl")]
    assert (stub.settings["train.steps"], stub.settings["adapter.targets"]) == (4, '["q", "down"]')
    assert stub.finished == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_tracker_that_fails_is_given_up_with_one_word(
    tmp_path: Path, texts: Path, stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.fails_at = 2
    run(tmp_path / "out", texts, **OPTIONS, track=stub.__name__, quiet=False)
    assert [step for step, _ in stub.logged] == [1]
    assert len(records(tmp_path / "out" / "metrics.jsonl")) == 4
    warning = f"warning: --track {stub.__name__} failed and is given up, training goes on (ConnectionError: no route"
    assert capsys.readouterr().err.count(warning) == 1


def test_one_that_does_not_start_is_refused(tmp_path: Path, texts: Path, stub: Stub) -> None:
    def init(**options: Any) -> None:
        raise RuntimeError("not logged in")

    stub.init = init  # type: ignore[assignment, method-assign]
    with pytest.raises(ResourceError, match=f"--track {stub.__name__}: cannot be started: RuntimeError: not logged in"):
        run(tmp_path / "out", texts, **OPTIONS, track=stub.__name__)
    assert list(tmp_path.iterdir()) == []


def test_a_stray_rank_does_not_turn_tracking_off(
    tmp_path: Path, texts: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    run(tmp_path / "out", texts, **OPTIONS, track=stub.__name__)
    assert len(stub.inits) == 1 and stub.finished == 1
