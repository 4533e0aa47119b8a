"""`convert --dry-run`: nothing is written or downloaded, and its exit codes tell what fits."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from saved import save_tokenizer
from small_recipe import SMALL
from tiny_models import ARCHITECTURES, CONFIGS, CONTEXT, REFUSED_CONFIGS

from retrofit.cli import main as cli
from retrofit.recipes.dry_run import estimate
from retrofit.recipes.dry_run import report as dry_run
from retrofit.recipes.schema import load_recipe
from retrofit.weight_files import weights_here

ESTIMATES = {}
"""Those of the tiny model below, which every command would make anew."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model's configuration and tokenizer, without its weights."""

    def remembered(plan, config, device, around):
        key = plan.model_copy(update={"base": plan.base.model_copy(update={"model": ""})}).model_dump_json()
        known = (key, device, around.stored)
        if known not in ESTIMATES:
            ESTIMATES[known] = estimate.estimate(plan, config, device, around)
        return ESTIMATES[known]

    monkeypatch.setattr(dry_run, "estimate", remembered)
    base = tmp_path / "base"
    CONFIGS["llama"]().save_pretrained(base)
    save_tokenizer(base)
    return base


def run(*arguments):
    given = [str(argument) for argument in arguments]
    keys = {argument.partition("=")[0] for argument in given}
    others = [setting for setting in SMALL if setting.partition("=")[0] not in keys]
    return CliRunner().invoke(cli.main, ["convert", *given, *others, "--device", "cpu"])


def listing(folder: Path):
    return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))


def test_nothing_is_written_and_no_weights_are_needed(folder, monkeypatch, bare_heap):
    monkeypatch.chdir(folder.parent)
    before = listing(folder.parent)
    done = run(folder, "--dry-run", "--json", "-o", folder.parent / "deep" / "out")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert listing(folder.parent) == before
    assert report["weights_here"] is False
    assert report["time"] == {"not_measured": "the weights are not here"}
    assert report["disk"]["download"] == 4 * report["parameters"]["base"]
    assert report["memory"]["peak"]["bytes"] == max(p["bytes"] for p in report["memory"]["phases"].values())
    assert all(sum(p["holds"].values()) == p["bytes"] for p in report["memory"]["phases"].values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_is_planned_for_without_one(folder, bare_heap):
    ARCHITECTURES["llama"]().save_pretrained(folder)
    others = [setting for setting in SMALL if not setting.startswith("base")]
    given = ["convert", str(folder), "--dry-run", "--fit", "24GB", "--device", "cuda", *others]
    done = CliRunner().invoke(cli.main, given)
    assert done.exit_code == 0, done.output
    assert "not measured: no GPU here" in done.stdout and "it fits" in done.stdout
    assert estimate.CUDA in done.stdout


def test_bad_text_is_found_early(folder, bare_heap):
    bad = folder.parent / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"text"\n')
    done = run(folder, "--dry-run", f"data.source={bad}", "-o", folder.parent / "out")
    assert done.exit_code == 1 and "bad.jsonl:2" in done.stderr
    done = run(folder, "--dry-run", "data.source=owner/texts", "--json", "-o", folder.parent / "out")
    assert json.loads(done.stdout)["text"] == {"owner/texts": "not checked: on the Hub"}


def test_time_is_measured_where_the_weights_are(folder, bare_heap):
    ARCHITECTURES["llama"]().save_pretrained(folder)
    before = listing(folder.parent)
    done = run(folder, "--dry-run", "-o", folder.parent / "out")
    assert done.exit_code == 0, done.output
    assert "draft rows" in done.stdout and "not measured" not in done.stdout
    report = dry_run.dry_run(load_recipe("default", [f"base.model={folder}", *SMALL]), folder.parent / "out")
    measured = report["time"]
    assert measured["probe"] == {"steps": dry_run.PROBE_STEPS, "windows": 2, "of": 2}
    assert measured["total"] == pytest.approx(2 * measured["step"] + measured["measuring"], abs=0.2)
    assert report["disk"]["download"] == 0
    assert listing(folder.parent) == before


def test_weights_on_the_hub_stay_there(folder, monkeypatch, bare_heap):
    asked = []

    def snapshot(name, revision, allow_patterns, local_files_only, **more):
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    done = run("owner/model", "--dry-run", "-o", folder.parent / "out")
    assert done.exit_code == 0, done.output
    assert [name for name, _ in asked] == ["owner/model"]
    assert not any("safetensors" in pattern or pattern == "*" for _, patterns in asked for pattern in patterns)
    assert "not measured: the weights are not here" in done.stdout


def test_exit_codes_of_fit(folder, bare_heap):
    out = folder.parent / "out"
    trained = ["adapter.markov_init=zero"]  # else beginning takes most of so small a model's memory
    fits = run(folder, *trained, "--dry-run", "--fit", "900GB", "-o", out)
    assert fits.exit_code == 0 and "it fits" in fits.stdout
    nothing = run(folder, *trained, "--dry-run", "--fit", "1MB", "-o", out)
    assert nothing.exit_code == 4
    assert "the base alone takes" in nothing.stderr and "FSDP" in nothing.stderr
    report = json.loads(run(folder, *trained, "--dry-run", "--json", "-o", out).stdout)
    almost = report["memory"]["peak"]["bytes"] - 1000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dry_run, "resident", lambda: 0)
        not_yet = run(folder, *trained, "--dry-run", "--fit", almost, "-o", out)
        proposed = ["train.batch_size=1", "train.accumulation=2"]
        changed_fits = run(folder, *trained, "--dry-run", "--fit", almost, "-o", out, *proposed)
    assert not_yet.exit_code == 3
    assert f"add {' '.join(proposed)}" in not_yet.stderr
    assert changed_fits.exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-run", "--fit", "much"], "--fit 'much': no amount of memory"),
        (["--fit", "24GB"], "--fit goes with --dry-run"),
        (["--dry-run", f"data.max_length={2 * CONTEXT}"], "data.max_length"),
    ],
)
def test_wrong_usage(folder, arguments, message, bare_heap):
    done = run(folder, *arguments, "-o", folder.parent / "out")
    assert done.exit_code == 2
    assert message in done.stderr


@pytest.mark.parametrize("name", ["rwkv", "falcon", "bloom"])
def test_unsupported_models_are_refused(name, tmp_path, bare_heap):
    REFUSED_CONFIGS[name]().save_pretrained(tmp_path / "base")
    done = run(tmp_path / "base", "--dry-run", "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert done.stderr.count("Error:") == 1


def test_shards_that_are_missing_are_no_weights(tmp_path):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-1.safetensors").touch()
    assert weights_here(tmp_path) == []
    (tmp_path / "model-2.safetensors").touch()
    assert len(weights_here(tmp_path)) == 2
