"""`retrofit inspect` and `retrofit recipes`: what they tell, and that they need no torch."""

import json
import subprocess
import sys
from pathlib import Path

from commands import done

from retrofit.artifact import folder as artifact


def test_inspect_needs_no_torch_and_tells_everything(made):
    code = (
        "import sys; from click.testing import CliRunner; from retrofit.cli.main import main\n"
        f"result = CliRunner().invoke(main, ['inspect', '--json', {str(made)!r}])\n"
        "assert result.exit_code == 0, result.output\n"
        "assert 'torch' not in sys.modules\n"
        "print(result.stdout)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    described = json.loads(finished.stdout)
    config = artifact.read_config(made)
    assert {key: described[key] for key in config} == config
    read = artifact.read(made)
    for name, tensors in (
        ("adapter/adapter_model.safetensors", read.adapter_state),
        ("heads.safetensors", read.heads),
    ):
        counts = {"tensors": len(tensors), "elements": sum(t.numel() for t in tensors.values())}
        assert described["tensors"][name] == counts
    assert described["certificate"] is None
    sizes = {p.relative_to(made).as_posix(): p.stat().st_size for p in made.rglob("*") if p.is_file()}
    assert described["files"] == sizes


def test_inspect_for_people(own):
    assert "certificate  none" in done("inspect", own)
    artifact.add(own, "certificate.json", json.dumps({"ok": True, "level": "quick"}))
    text = done("inspect", own)
    assert "certificate  ok (level quick)" in text
    assert "block 4" in text
    assert "certificate.json" in text
    artifact.add(own, "certificate.json", json.dumps({"ok": False}))
    assert "certificate  NOT OK" in done("inspect", own)


def test_recipes():
    names = [entry["name"] for entry in json.loads(done("recipes", "ls", "--json"))]
    assert [line.split()[0] for line in done("recipes", "ls").splitlines()] == names
    shown = json.loads(done("recipes", "show", "tiny", "train.steps=77", "train.lr=1e-4", "--json"))
    assert shown["train"]["steps"] == 77
    assert shown["train"]["lr"] == 1e-4
    Path("mine.yaml").write_text(done("recipes", "show", "tiny", "train.steps=77", "train.lr=1e-4"))
    assert json.loads(done("recipes", "show", "mine.yaml", "--json")) == shown
