"""`retrofit serve`: the command it makes, and what it refuses, without an engine."""

import json
import shlex
import subprocess
import sys
from itertools import pairwise

import pytest
from artifact_folders import CONFIG, trained_on, write
from commands import refused, run

from retrofit.artifact import engines
from retrofit.errors import ResourceError, UnsupportedModelError, UsageError
from retrofit.named_bases import embedded_folder
from retrofit.serving.vllm import plugin, versions
from retrofit.sharing import pulling
from retrofit.sharing.pulling import local_folder

pytestmark = pytest.mark.usefixtures("somewhere")


@pytest.fixture
def known_vllm(monkeypatch):
    monkeypatch.setattr("retrofit.serving.starting.installed", lambda: "0.32.0")


def serve(made, *options):
    return run("serve", made, "--engine", "vllm", "--offline", "--print", *options)


@pytest.mark.usefixtures("known_vllm")
def test_the_command_names_base_artifact_and_drafter(made, base):
    result = serve(made, "--port", "8001", "--served-model-name", "mine")
    assert result.exit_code == 0, result.stderr
    words = shlex.split(result.stdout)
    told = dict(pairwise(words))
    block = json.loads((made / "retrofit.json").read_text())["draft"]["block"]
    assert words[:5] == [sys.executable, "-m", "retrofit.serving.vllm.start", "serve", str(base)]
    assert json.loads(told["--additional-config"]) == {plugin.KEY: str(made)}
    assert json.loads(told["--speculative-config"])["num_speculative_tokens"] == block + 1
    assert words[-4:] == ["--port", "8001", "--served-model-name", "mine"]


@pytest.mark.usefixtures("known_vllm")
def test_another_precision_of_the_base_is_said_and_the_artifact_read_once(made, tmp_path, monkeypatch):
    reads = []
    monkeypatch.setattr(pulling, "local_folder", lambda *named: reads.append(named) or local_folder(*named))
    for folder, told in ((trained_on("nf4", tmp_path / "few-bits", made), True), (made, False)):
        result = serve(folder)
        assert ("trained on nf4, running on plain weights" in result.stderr) is told and result.exit_code == 0
    assert len(reads) == 2


@pytest.mark.usefixtures("known_vllm")
@pytest.mark.parametrize(
    "option", ["--worker-cls=x", "--worker_cls", "-sc", "--speculative_config.method=x", "--enable-lora"]
)
def test_options_that_are_ours_are_refused(made, option):
    assert "cannot be given" in refused(serve(made, option), 2)


def test_no_vllm_and_another_vllm_are_refused(made, monkeypatch):
    monkeypatch.setattr(versions, "DISTRIBUTIONS", ("no-such-distribution",))
    assert "vLLM is not installed" in refused(serve(made), 4)
    monkeypatch.setattr(versions, "DISTRIBUTIONS", ("click",))
    assert "retrofit drafts in vLLM 0.32 and 0.33" in refused(serve(made), 4)


@pytest.mark.parametrize(("found", "good"), [("0.32.0", 1), ("0.33.1+cpu", 1), ("0.3.2", 0), ("0.34.0", 0), ("dev", 0)])
def test_versions(found, good):
    if good:
        versions.check(found)
    else:
        with pytest.raises(ResourceError, match=r"0\.32 and 0\.33"):
            versions.check(found)


def changed(key, value):
    section, _, name = key.partition(".")
    return {**CONFIG, section: {**CONFIG[section], name: value} if name else value}


def test_what_vllm_can_draft_with():
    engines.refuse_unfit("a", CONFIG, "vllm")
    engines.refuse_unfit("a", changed("draft.input", "noise"), "vllm")
    engines.refuse_unfit("a", changed("draft.attention", "causal"), "vllm")


@pytest.mark.parametrize(("key", "value"), [("draft.shift", 0), ("draft.seed_row", "draft")])
def test_what_vllm_cannot_draft_with_is_refused_with_the_change(key, value):
    with pytest.raises(UsageError, match=key) as error:
        engines.refuse_unfit("a", changed(key, value), "vllm")
    assert f"{key}={engines.WANTED['vllm'][key]}" in error.value.hint


def test_other_bases_are_refused():
    with pytest.raises(UnsupportedModelError, match="GemmaForCausalLM"):
        engines.refuse_unfit("a", changed("base.architecture", "GemmaForCausalLM"), "vllm")
    with pytest.raises(UsageError, match="GGUF"):
        engines.refuse_unfit("a", changed("base.gguf", {"file": "x.gguf"}), "sglang")


def test_sglang_is_told_all_that_is_to_be_changed():
    with pytest.raises(UsageError) as error:
        engines.refuse_unfit("a", CONFIG, "sglang")
    assert error.value.hint.split(" with ")[1].split() == [
        *("draft.input=noise", "draft.attention=causal", "adapter.markov_rank=0", "adapter.confidence=false"),
    ]


def test_sglangs_command(tmp_path, base):
    uno = {"input": "noise", "attention": "causal", "shift": 1, "seed_row": "base", "block": 7}
    config = changed("draft", uno)
    config["adapter"] = {**config["adapter"], "markov_rank": 0, "confidence": False}
    config["base"] = {**config["base"], "model": "owner/name", "revision": "abc"}
    artifact = write(tmp_path / "uno", config=config)
    assert "--uno-lora-path is missing" in refused(run("serve", artifact, "--engine", "sglang"), 2)
    result = run("serve", artifact, "--engine", "sglang", "--uno-lora-path", "out", "--port", "1")
    assert result.exit_code == 0 and "running on" not in result.stderr, result.stderr
    assert result.stdout.split()[1:] == [
        *(
            "-m",
            "sglang.launch_server",
            "--model-path",
            "owner/name",
            "--revision",
            "abc",
            "--attention-backend",
            "fa3",
        ),
        *("--speculative-algorithm", "UNO", "--speculative-num-draft-tokens", "8"),
        *("--uno-lora-path", "out", "--port", "1"),
    ]


def test_sglang_is_given_the_folder_of_the_base_that_ships(tmp_path):
    config = changed("draft", {**CONFIG["draft"], "input": "noise", "attention": "causal"})
    config["adapter"] = {**config["adapter"], "markov_rank": 0, "confidence": False}
    artifact = write(tmp_path / "uno", config=config)
    told = shlex.split(run("serve", artifact, "--engine", "sglang", "--uno-lora-path", "out").stdout)
    assert told[told.index("--model-path") + 1] == str(embedded_folder())


FAKE = """
class VllmConfig:
    def __init__(self, additional_config):
        self.additional_config, self.num_speculative_tokens = additional_config, 5
    num_lookahead_tokens = property(lambda self: 0)
"""


def test_slots_are_reserved_in_servers_of_an_artifact_and_in_no_other(tmp_path, monkeypatch):
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "config.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    from vllm.config import VllmConfig

    plugin.register()
    plugin.register()
    assert VllmConfig({plugin.KEY: "folder"}).num_lookahead_tokens == 5
    assert VllmConfig({}).num_lookahead_tokens == VllmConfig(object()).num_lookahead_tokens == 0
    for name in ("vllm", "vllm.config"):
        monkeypatch.delitem(sys.modules, name)


def test_vllm_is_not_imported_before_it_is_started(tmp_path, made):
    """A vLLM that cannot be imported is in nobody's way: the command line's, or that of what makes a command."""
    (tmp_path / "vllm.py").write_text("raise SystemExit('imported')")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import retrofit, retrofit.cli.main, retrofit.serving.starting, retrofit.serving.vllm.plugin\n"
        "import retrofit.serving.vllm.rows, retrofit.serving.vllm.updates, retrofit.serving.vllm.drafts\n"
        "import retrofit.serving.vllm.sampler, retrofit.serving.vllm.start"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
