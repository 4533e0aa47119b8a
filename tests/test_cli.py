"""The command line: what goes to stdout and what to stderr, exit codes, and one line for every bad input."""

import dataclasses
import inspect
import json
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from tiny_models import CONTEXT, VOCABULARY, build
from tokenizers import Tokenizer, models, trainers
from transformers import PreTrainedTokenizerFast

import retrofit
from retrofit.adapters.attach import attach
from retrofit.adapters.layout import DraftLayout
from retrofit.artifact import folder as artifact
from retrofit.cli import console
from retrofit.cli import convert as convert_command
from retrofit.cli import main as cli
from retrofit.errors import GateError, ResourceError
from retrofit.eval import certify
from retrofit.hub import file_fingerprint
from retrofit.runtime import engine, loading
from retrofit.runtime import options as engine_options
from retrofit.runtime.backends import interface
from retrofit.runtime.backends.fused import self_test as exact
from retrofit.runtime.backends.hf import exact_products
from retrofit.runtime.backends.levels import EXACT
from retrofit.runtime.params import SamplingParams

PROMPT = "def area(radius):"
TEXT = "def area(radius): return radius * radius\nclass Stack: pass\nfor item in range(3): print(item)\n"
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
ADAPTER = {"rank": 2, "alpha": 2.0, "targets": ["q", "v"], "markov_rank": 2, "confidence": True}
MEMORY = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def save_tokenizer(folder: Path, template: str | None = None) -> None:
    """A character-level tokenizer of less than VOCABULARY entries."""
    tokenizer = Tokenizer(models.BPE(unk_token="?"))
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["?"], show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="?", chat_template=template, clean_up_tokenization_spaces=False
    ).save_pretrained(folder)


def save_base(folder: Path, seed: int = 0, template: str | None = None) -> Path:
    build("llama", seed=seed).save_pretrained(folder)
    save_tokenizer(folder, template)
    return folder


def save_artifact(folder: Path, base: Path) -> Path:
    """An artifact for `base` with a random adapter, as `convert` would write it but in no time."""
    model = build("llama")
    attached = attach(model, DraftLayout(block=4), **ADAPTER)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.normal_(std=0.05)
    count = sum(p.numel() for n, p in attached.peft_model.named_parameters() if "lora_" in n)
    config = {
        "format": artifact.FORMAT,
        "retrofit": retrofit.__version__,
        "base": {
            "model": str(base),
            "revision": None,
            "fingerprint": file_fingerprint(base, model.config.to_dict()),
            "architecture": type(model).__name__,
        },
        "profile": "frozen",
        "draft": attached.layout.to_dict(),
        "adapter": {**ADAPTER, "modules": ["q_proj", "v_proj"]},
        "parameters": {
            "adapter": count,
            "heads": sum(p.numel() for p in attached.heads.parameters()),
            "base": sum(p.numel() for p in model.parameters()) - count,
        },
        "acceptance": {"conditional": {"greedy": [0.5] * 4, "sampled": [0.5] * 4}},
        "training": {"steps": 2},
    }
    return artifact.write(
        folder,
        adapter_config=attached.adapter_config(),
        adapter_state=attached.adapter_state(),
        heads=attached.heads_state(),
        config=config,
        recipe_yaml="profile: frozen\n",
        card="# card\n",
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def made(tmp_path_factory, base):
    return save_artifact(tmp_path_factory.mktemp("artifacts") / "made", base)


@pytest.fixture
def own(tmp_path, base):
    """An artifact of this test's own, to be damaged."""
    return save_artifact(tmp_path / "own", base)


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    """Nothing is written into the checkout; one device everywhere; nothing of the caller's environment."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("RETROFIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RETROFIT_DEVICE", "cpu")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def run(*arguments, stdin=None, **environment):
    return CliRunner(env=environment).invoke(cli.main, [str(a) for a in arguments], input=stdin)


def done(*arguments, **options):
    """stdout of a command that succeeds."""
    result = run(*arguments, **options)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def refused(result, code):
    """The message: stderr without traceback, of one line and perhaps a hint; nothing on stdout.

    Several problems of one recipe come as a list, indented.
    """
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    message, *more = result.stderr.strip().splitlines()
    hint = [line for line in more if not (line.startswith("  ") and "recipe" in message)]
    assert message.startswith("Error: "), result.stderr
    assert len(hint) <= 1, result.stderr
    assert all(line.startswith("hint: ") for line in hint)
    return result.stderr


def walk(command=cli.main, path=()):
    yield path, command
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from walk(inner, (*path, name))


COMMANDS = dict(walk())


# Help


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_help_has_an_example(path):
    text = done(*path, "--help")
    assert "Example" in text
    assert "retrofit" in text.split("Example", 1)[1]
    assert "..." not in text.split("Commands:", 1)[-1] or not isinstance(COMMANDS[path], click.Group)


@pytest.mark.parametrize("path", [("generate",), ("chat",)], ids=" ".join)
def test_defaults_and_choices_are_the_engines(path):
    given = COMMANDS[path].make_context(path[0], ["ARTIFACT"]).params
    wanted = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
    wanted |= {name: p.default for name, p in inspect.signature(engine.Engine.stream).parameters.items()}
    options = {name: value for name, value in given.items() if name in wanted and value != ()}
    assert options == {name: wanted[name] for name in options}
    assert {"mode", "strategy", "prepare", "max_new_tokens", "temperature", "threshold", "seed"} <= set(options)
    assert tuple(console.MODES) == engine_options.MODES
    assert tuple(console.STRATEGIES) == engine_options.STRATEGIES
    assert tuple(console.BACKENDS) == loading.BACKENDS
    assert tuple(console.EXACT) == ("auto", *EXACT)


def test_common_options_are_the_same_everywhere():
    seen = {}
    for path, command in COMMANDS.items():
        if isinstance(command, click.Group):
            continue
        options = {o.name: (o.opts, str(o.type), o.help) for o in command.params if isinstance(o, click.Option)}
        assert {"as_json", "quiet", "verbose"} <= set(options), path
        common = {"as_json", "quiet", "verbose", "device", "dtype", "offline", "trust_remote_code", "backend", "exact"}
        assert ("backend" in options) == (path[0] in ("generate", "chat", "certify", "doctor"))
        for name in common & set(options):
            assert seen.setdefault(name, options[name]) == options[name]


def test_the_readme_lists_every_command():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    table = readme.split("## Command line")[1].split("\n## ")[0]
    commands = [" ".join(path) for path, command in COMMANDS.items() if not isinstance(command, click.Group)]
    assert [name for name in commands if f"`retrofit {name}" not in table] == []


def test_version():
    assert done("--version") == f"retrofit {retrofit.__version__}\n"


# generate


def test_generated_text_is_on_stdout_and_talk_on_stderr(made):
    result = run("generate", made, PROMPT, "--mode", "ar", "--max-new-tokens", 8)
    assert result.exit_code == 0, result.stderr
    model = engine.Engine.load(made)
    expected = model.generate([PROMPT], mode="ar", max_new_tokens=8)[0].text
    assert result.stdout == f"{expected}\n"
    assert "8 tokens in" in result.stderr
    assert "tokens/s" in result.stderr
    assert "TPF 1.00" in result.stderr
    assert result.stderr.endswith("; hf in float32, exact=off\n")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "more",
    [["--strategy", "two_forward"], ["--strategy", "fused"], ["--strategy", "fused", "--prepare", "2"], []],
    ids=["two_forward", "fused", "prepare 2", "auto"],
)
def test_self_spec_prints_what_ar_prints(made, more):
    options = ["--max-new-tokens", 12, "--temperature", 0.8, "--seed", 3]
    spec = run("generate", made, PROMPT, *options, *more)
    assert spec.stdout == done("generate", made, PROMPT, *options, "--mode", "ar")
    assert "TPF" in spec.stderr


def test_quiet_is_quiet(made):
    assert run("generate", made, PROMPT, "-q", "--max-new-tokens", 2).stderr == ""


def test_json_is_one_line_per_prompt_in_their_order(made):
    prompts = [PROMPT, "class Stack:", "for item in"]
    options = ["--json", "--batch-size", 2, "--max-new-tokens", 6]
    results = [json.loads(line) for line in done("generate", made, *prompts, *options).splitlines()]
    expected = engine.Engine.load(made).generate(prompts, max_new_tokens=6)
    assert [r["tokens"] for r in results] == [r.tokens for r in expected]
    assert [r["text"] for r in results] == [r.text for r in expected]
    assert [r["index"] for r in results] == [0, 1, 2]
    assert all(r["finish_reason"] == "length" and r["stats"]["tpf"] > 0 for r in results)


def test_several_prompts_are_printed_under_headers(made):
    text = done("generate", made, PROMPT, "class Stack:", "--max-new-tokens", 2)
    assert "==> prompt 1 <==" in text
    assert "==> prompt 2 <==" in text


@pytest.mark.parametrize("arguments", [(), ("-",)], ids=["none", "dash"])
def test_prompt_from_stdin(made, arguments):
    options = ["--max-new-tokens", 4]
    assert done("generate", made, *arguments, *options, stdin=PROMPT) == done("generate", made, PROMPT, *options)


def test_options_from_the_environment(made):
    text = done("generate", made, PROMPT, RETROFIT_JSON="1", RETROFIT_MAX_NEW_TOKENS="3", RETROFIT_MODE="ar")
    assert len(json.loads(text)["tokens"]) == 3


def test_backend_and_exact_reach_the_engine(made, monkeypatch):
    seen = {}

    def load(folder, **options):
        seen.update(options)
        raise ResourceError("seen")

    monkeypatch.setattr(engine.Engine, "load", load)
    refused(run("generate", made, PROMPT, "--backend", "fused", RETROFIT_EXACT="invariant"), 4)
    assert (seen["backend"], seen["exact"]) == ("fused", "invariant")


# chat


def test_chat_from_a_pipe(made):
    lines = "/mode ar\ndef area\n\n/seed 4\n/stats\n/reset\n/help\nclass\n/exit\nnever reached\n"
    result = run("chat", made, "--max-new-tokens", 4, stdin=lines)
    assert result.exit_code == 0, result.stderr
    assert "no chat template" in result.stderr
    assert result.stderr.count("[ar: 4 tokens in") == 2
    assert "1 answers, 4 tokens" in result.stderr
    assert result.stdout == "".join(done("generate", made, p, "--max-new-tokens", 4) for p in ("def area", "class"))


def test_chat_without_a_template_continues_the_text(made):
    first = done("generate", made, "def area", "--max-new-tokens", 4)[:-1]
    lines = [
        json.loads(line)
        for line in done("chat", made, "--json", "--max-new-tokens", 4, stdin="def area\nfor\n").splitlines()
    ]
    assert lines[0]["text"] == first
    assert lines[1]["text"] == done("generate", made, f"def area{first}\nfor", "--max-new-tokens", 4)[:-1]


def test_chat_sends_the_conversation_through_the_template(tmp_path):
    base = save_base(tmp_path / "talker", template=TEMPLATE)
    made = save_artifact(tmp_path / "talker-retrofit", base)
    result = run("chat", made, "--json", "--max-new-tokens", 4, stdin="def\nfor\n")
    assert result.exit_code == 0, result.stderr
    assert "no chat template" not in result.stderr
    answers = [json.loads(line)["text"] for line in result.stdout.splitlines()]
    talk = [{"role": "user", "content": "def"}, {"role": "assistant", "content": answers[0]}]
    model = engine.Engine.load(made)
    assert model.generate([talk[:1]], max_new_tokens=4)[0].text == answers[0]
    talk.append({"role": "user", "content": "for"})
    assert model.generate([talk], max_new_tokens=4)[0].text == answers[1]


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talker")
    return save_artifact(folder / "talker-retrofit", save_base(folder / "talker", template=TEMPLATE))


def test_a_system_message_begins_every_conversation(talker):
    told = [{"role": "system", "content": "import"}, {"role": "user", "content": "def"}]
    model = engine.Engine.load(talker)
    (want,) = model.generate([told], max_new_tokens=4)
    options = ["--system", "import", "--json", "--max-new-tokens", 4]
    answers = [json.loads(line) for line in done("chat", talker, *options, stdin="def\n/reset\ndef\n").splitlines()]
    assert [a["tokens"] for a in answers] == [want.tokens] * 2
    assert json.loads(done("generate", talker, "def", *options))["tokens"] == want.tokens
    (bare,) = model.generate([told[1:]], max_new_tokens=4)
    assert json.loads(done("generate", talker, "def", "--chat", *options[2:]))["tokens"] == bare.tokens != want.tokens


def test_a_system_message_needs_a_template(made):
    for command in ("generate", "chat"):
        assert "chat template" in refused(run(command, made, "--system", "import", stdin="def\n"), 2)


def test_chat_leaves_out_what_a_mode_does_not_know(talker):
    lines = "def\n/mode ar\ndef\n/mode diffusion\ndef\n"
    assert done("chat", talker, "--strategy", "fused", "--max-new-tokens", 4, stdin=lines).count("\n") >= 3
    result = run("chat", talker, "--strategy", "fused", "--mode", "ar", stdin=lines)
    assert "strategy means nothing in mode ar" in refused(result, 2)


def test_every_option_of_an_output_reaches_the_engine(made):
    given = [
        "--min-p",
        0.02,
        "--presence-penalty",
        1,
        "--frequency-penalty",
        -0.5,
        "--logit-bias",
        "3=2.5",
        "--logit-bias",
    ]
    given += [
        "4=-1",
        "-n",
        2,
        "--min-new-tokens",
        3,
        "--ignore-eos",
        "--logprobs",
        1,
        "--temperature",
        0.9,
        "--seed",
        7,
    ]
    lines = done("generate", made, PROMPT, "class", *given, "--json", "--max-new-tokens", 6).splitlines()
    want = engine.Engine.load(made).generate(
        [PROMPT, "class"], min_p=0.02, presence_penalty=1.0, frequency_penalty=-0.5, logit_bias={3: 2.5, 4: -1.0}, n=2,
        min_new_tokens=3, ignore_eos=True, logprobs=1, temperature=0.9, seed=7, max_new_tokens=6,
    )  # fmt: skip
    results = [json.loads(line) for line in lines]
    assert [(r["index"], r["sample"], r["tokens"]) for r in results] == [(r.index, r.sample, r.tokens) for r in want]
    assert [r["stop_reason"] for r in results] == [None] * 4
    told = [[dict(zip(map(int, step), step.values(), strict=True)) for step in r["logprobs"]] for r in results]
    for mine, result in zip(told, want, strict=True):
        assert [list(step) for step in mine] == [list(step) for step in result.logprobs]
    text = done("generate", made, PROMPT, "-n", 2, "--temperature", 0.9, "--seed", 7, "--max-new-tokens", 2)
    assert "==> prompt 1, output 1 <==" in text and "==> prompt 1, output 2 <==" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--logit-bias", "3"], "--logit-bias is 3; it must be ID=V"),
        (["--logprobs", 1], "--logprobs is shown with --json only"),
        (["--threshold", 0.5], "threshold means nothing in mode self_spec"),
        (["--prepare", "last"], "prepare means nothing with strategy auto"),
        (["--mode", "ar", "--tree", 4], "tree means nothing in mode ar"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_options_that_mean_nothing_are_refused(made, options, message):
    assert message in refused(run("generate", made, PROMPT, *options), 2)


@pytest.mark.parametrize("line", ["/mode fast", "/seed x", "/unknown"])
def test_chat_refuses_wrong_commands(made, line):
    result = run("chat", made, "-q", stdin=f"{line}\n")
    assert line.split()[0] in refused(result, 2)


# doctor


def test_doctor_where_kernels_cannot_run(base, monkeypatch):
    monkeypatch.setattr(exact, "self_test", None)
    options = ("--base", base, "--dtype", "bfloat16")
    text = done("doctor", *options, TRITON_INTERPRET="0")
    for fact in (torch.__version__, retrofit.__version__, "Hub cache", "our kernels need a CUDA GPU", "hf backend"):
        assert fact in text
    found = json.loads(done("doctor", *options, "--json", TRITON_INTERPRET="0"))
    assert found["environment"]["torch"] == torch.__version__
    assert found["environment"]["cpu"]["cores"] >= 1
    assert found["environment"]["HF_HUB_OFFLINE"] == "1"
    assert found["backend"] == "hf"
    assert [level["level"] for level in found["levels"]] == ["off", "invariant", "bucket"]
    assert all((level["seconds"] is not None) == level["holds"] for level in found["levels"])
    cheapest = next((level for level in found["levels"][1:] if level["holds"]), found["levels"][0])
    assert found["exact"] == cheapest["level"] and f"{found['exact']} is kept: " in found["verdict"]
    assert found["holds"] is (True if found["exact"] != "off" else None)
    assert {"attention", "decoder", "vocabulary"} <= {check["what"] for check in found["checks"]}


def test_doctor_says_that_a_level_does_not_hold(base, monkeypatch):
    """A library that treats every number of rows in its own way."""
    monkeypatch.setattr(exact_products, "_differing", lambda *_: (exact_products.COUNTS, 1))
    result = run("doctor", "--base", base, "--exact", "invariant", TRITON_INTERPRET="0")
    assert result.exit_code == 3, result.output
    assert "invariant does NOT hold on this machine" in result.stdout
    assert re.search(r"invariant +no\n", result.stdout)
    assert "a row's bits depend on the rows beside it" in result.stderr


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--backend", "hf"], 0, "the hf backend was asked for"),
        (["--backend", "fused"], 4, "our kernels need a CUDA GPU"),
        (["--exact", "off"], 0, "our kernels need a CUDA GPU"),
        (["--device", "cuda"], 4, "no CUDA GPU"),
        (["--device", "cuda", "--backend", "hf"], 4, "no CUDA GPU"),
        (["--device", "gpu"], 2, "unknown device"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_doctor_ends_with_what_is_missing(monkeypatch, options, code, message):
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr(exact, "self_test", None)
    result = run("doctor", *options, TRITON_INTERPRET="0")
    assert result.exit_code == code, result.output
    assert ["torch", torch.__version__] in [line.split()[:2] for line in result.stdout.splitlines()]
    assert message in (result.stderr if code else result.stdout)
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the interpreter")
def test_doctor_tests_an_artifact(made, monkeypatch):
    monkeypatch.setattr(interface, "BUCKET_ROWS", 14)
    found = json.loads(done("doctor", made, "--json"))
    assert found["holds"] is True
    assert (found["backend"], found["exact"], found["bucket"]) == ("fused", "bucket", 14)
    shapes = {check["what"]: check["shape"] for check in found["checks"]}
    # Two roles of rank 2 beneath q (32) | k (16) | v (16).
    assert shapes["qkv"] == "[70, 32]"
    assert {"decoder", "attention"} < set(shapes)


DOCTORED = [
    exact.Check("qkv", "[8, 8]", "ours", "1, 5 of 8", True),
    exact.Check("o", "[8, 8]", "library", "1, 5 of 8", True),
    exact.Check("decoder", "2 layers", "library", "a tree", False),
]


@pytest.mark.parametrize(
    ("options", "checks", "code", "verdict"),
    [
        ([], 2, 0, "bucket holds on this machine: every row of a forward of 128 rows keeps its bits"),
        (["--exact", "invariant"], 2, 0, "invariant holds on this machine"),
        (["--exact", "off"], 3, 0, "off: nothing is promised; of 3 checks 1 differ"),
        ([], 3, 3, "bucket does NOT hold on this machine: of 3 checks 1 differ"),
        (["--exact", "invariant"], 3, 3, "invariant does NOT hold"),
    ],
)
@pytest.mark.parametrize("subject", ["artifact", "base alone"])
def test_doctor_says_what_holds(made, base, monkeypatch, options, checks, code, verdict, subject):
    asked = []

    def self_test(backend, drafts):
        asked.append((backend.exact, drafts, backend.weights.layers[0].qkv.up is not None))
        return DOCTORED[:checks]

    monkeypatch.setattr(exact, "self_test", self_test)
    given = [made] if subject == "artifact" else ["--base", base]
    result = run("doctor", *given, *options, TRITON_INTERPRET="1")
    assert result.exit_code == code, result.output
    assert verdict in result.stdout
    assert asked == [(options[-1] if options else "bucket", 4 if given == [made] else 8, given == [made])]
    lines = result.stdout.splitlines()
    cells = re.split(r"  +", next(line for line in lines if line.startswith("qkv")))
    assert cells == ["qkv", "[8, 8]", "ours", "1, 5 of 8", "equal"]
    assert sum(line.endswith("DIFFER") for line in lines) == checks - 2
    assert ("Our kernel stands in for the library's at qkv [8, 8]." in result.stdout) == (not options and code == 0)
    if code:
        assert result.stderr.startswith("Error: decoder 2 layers: ")
    else:
        assert result.stderr == ""


def test_doctor_names_what_our_kernels_cannot_run(tmp_path):
    build("phi3").save_pretrained(tmp_path / "phi")
    options = ["--base", tmp_path / "phi"]
    assert "model type 'phi3' is not one of" in done("doctor", *options, TRITON_INTERPRET="1")
    result = run("doctor", *options, "--backend", "fused", "-q", TRITON_INTERPRET="1")
    assert (result.exit_code, "phi3" in result.stderr) == (1, True)


def test_doctor_help_needs_no_torch():
    code = (
        "import sys; from click.testing import CliRunner; from retrofit.cli.main import main\n"
        "assert 'bit for' in CliRunner().invoke(main, ['doctor', '--help']).output\n"
        "assert not {'torch', 'transformers', 'triton'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# inspect, recipes


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


# convert

SHORT = [
    *("train.steps=2", "train.batch_size=1", "train.anchors=2", "train.warmup=0", "train.precision=float32"),
    *("adapter.rank=2", "adapter.markov_rank=2", "draft.block=4", "data.max_length=32", "data.held_out=1"),
]


def texts(folder: Path) -> Path:
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text(TEXT * 2)
    return folder


def test_convert_prints_the_folder_and_its_artifact_runs(base, tmp_path):
    source = texts(tmp_path / "texts")
    result = run("convert", base, f"data.source={source}", *SHORT, "--seed", 5)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "base-retrofit\n"
    assert "measured on held-out text: conditional" in result.stderr
    assert "next: retrofit certify base-retrofit" in result.stderr
    assert json.loads(done("recipes", "show", "base-retrofit/recipe.yaml", "--json"))["train"]["seed"] == 5
    options = ["--max-new-tokens", 8]
    spec = done("generate", "base-retrofit", PROMPT, "--strategy", "fused", *options)
    assert spec == done("generate", "base-retrofit", PROMPT, "--mode", "ar", *options)
    before = Path("base-retrofit/retrofit.json").read_bytes()
    assert "overwrite" in refused(run("convert", base, f"data.source={source}", *SHORT), 2)
    assert Path("base-retrofit/retrofit.json").read_bytes() == before
    again = run("convert", base, f"data.source={source}", *SHORT, "--json", "-q", "--overwrite")
    assert json.loads(again.stdout)["artifact"] == "base-retrofit"
    assert again.stderr == ""


def test_a_file_with_an_equals_sign_is_a_model_not_an_override(tmp_path):
    (tmp_path / "a=b").mkdir()
    assert convert_command._model_and_overrides(["a=b", "train.steps=3"]) == ("a=b", ["train.steps=3"])


@pytest.mark.parametrize(
    ("model", "recipe", "name"),
    [
        (None, None, "tiny"),
        ("tiny", None, "tiny"),
        ("some/model", None, "default"),
        ("a/b", "qwen3-8b", "qwen3-8b"),
    ],
)
def test_which_recipe(model, recipe, name):
    from retrofit.recipes.schema import load_recipe

    with click.Context(cli.convert):
        found = convert_command._recipe(model, recipe, ["train.steps=321"])
    overrides = {"train.steps": 321, **({"base.model": model} if model else {})}
    assert found == load_recipe(name, overrides)


CONVERT_BAD = {
    "unknown model": (["./nowhere"], 2, "no folder ./nowhere"),
    "unknown Hub id": (["nobody/nothing", "--offline"], 4, "nobody/nothing"),
    "two models": (["a/b", "train.steps"], 2, "more than one model"),
    "model twice": (["BASE", "base.model=x"], 2, "given twice"),
    "unknown key": (["BASE", "train.stpes=3"], 2, "did you mean `train.steps`"),
    "value out of range": (["BASE", "draft.block=0"], 2, "draft.block: 0 is out of range"),
    "unknown role": (["BASE", "adapter.targets=[q_prj]"], 2, "adapter.targets"),
    "unknown recipe": (["BASE", "--recipe", "tinny"], 2, "did you mean `tiny`"),
    "recipe is not YAML": (["BASE", "--recipe", "bad.yaml"], 2, "bad.yaml"),
    "block and context": (
        ["BASE", "draft.block=128", "data.max_length=256"],
        2,
        f"context of BASE is {CONTEXT}",
    ),
    "data too long": (["BASE", f"data.max_length={2 * CONTEXT}"], 2, f"context of BASE is {CONTEXT}"),
    "no data": (["BASE", "data.source=nowhere.jsonl"], 2, "nowhere.jsonl"),
    "empty data": (["BASE", "data.source=empty.jsonl"], 1, "empty.jsonl:1: the file is empty"),
    "malformed data": (["BASE", "data.source=bad.jsonl"], 1, "bad.jsonl:3"),
    "malformed text": (["BASE", "data.source=bad.txt", "data.held_out=0"], 1, "bad.txt:2: not UTF-8"),
    "out is a file": (["BASE", "-o", "bad.txt"], 2, "bad.txt"),
    "out holds other things": (["BASE", "-o", "full"], 2, "full"),
    "unknown device": (["BASE", "--device", "gpu"], 2, "gpu"),
}


@pytest.mark.parametrize("case", CONVERT_BAD)
def test_convert_refuses(case, base, tmp_path):
    arguments, code, message = CONVERT_BAD[case]
    Path("empty.jsonl").write_text("\n")
    Path("bad.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"text": \n')
    Path("bad.txt").write_bytes(b"fine\nnot \xff fine\n")
    Path("bad.yaml").write_text("train: [1\n")
    Path("full").mkdir()
    Path("full/notes.md").write_text("mine")
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    given = [a.replace("BASE", str(base)) for a in arguments]
    overrides = [o for o in SHORT if not any(a.split("=")[0] == o.split("=")[0] for a in given)]
    result = run("convert", *given, *overrides)
    assert message.replace("BASE", str(base)) in refused(result, code)
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before


def test_convert_refuses_roles_that_match_nothing(tmp_path):
    build("qwen3_moe").save_pretrained(tmp_path / "experts")
    save_tokenizer(tmp_path / "experts")
    overrides = [f"data.source={texts(tmp_path / 'texts')}", *SHORT, "adapter.targets=[gate, up]"]
    message = refused(run("convert", tmp_path / "experts", *overrides), 2)
    assert "adapter.targets" in message
    assert "hint: on mixture-of-experts models the roles are q, k, v, o" in message
    assert not Path("experts-retrofit").exists()


def test_convert_refuses_a_model_without_tokenizer(tmp_path):
    build("llama").save_pretrained(tmp_path / "mute")
    assert "no tokenizer" in refused(run("convert", tmp_path / "mute", *SHORT), 2)
    assert not Path("mute-retrofit").exists()


# Bad prompts and options

GENERATE_BAD = {
    "no such artifact": (["nowhere", PROMPT], 2, "nowhere: no such artifact"),
    "prompt beyond the context": (["MADE", "d e f " * CONTEXT], 2, f"context is {CONTEXT}"),
    "empty prompt": (["MADE", ""], 2, "prompt 0 is empty"),
    "prepare": (["MADE", PROMPT, "--prepare", "some"], 2, "prepare"),
    "no GPU": (["MADE", PROMPT, "--device", "cuda"], 4, "no CUDA GPU"),
    "no base": (["MADE", PROMPT, "--base", "./gone"], 2, "no folder ./gone"),
}


@pytest.mark.parametrize("case", GENERATE_BAD)
def test_generate_refuses(case, made):
    if case == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is one")
    arguments, code, message = GENERATE_BAD[case]
    assert message in refused(run("generate", *[str(made) if a == "MADE" else a for a in arguments]), code)


@pytest.mark.parametrize(
    "options",
    [
        *(["--mode", "fast"], ["--temperature", "-1"], ["--top-p", "1.5"], ["--top-k", "0"], ["--no-such"]),
        *(["--max-new-tokens", "0"], ["--seed", "x"], ["--dtype", "int8"], ["--threshold", "2"]),
    ],
    ids=" ".join,
)
def test_wrong_options_are_usage_errors(made, options):
    result = run("generate", made, PROMPT, *options)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert options[0] in result.stderr
    assert "Traceback" not in result.stderr


def test_generate_refuses_bytes_that_are_no_text(made):
    assert "not UTF-8" in refused(run("generate", made, stdin=b"\xff\xfe\xff"), 1)


def test_text_needs_a_tokenizer(tmp_path):
    build("llama").save_pretrained(tmp_path / "mute")
    made = save_artifact(tmp_path / "mute-retrofit", tmp_path / "mute")
    assert "tokenizer" in refused(run("generate", made, PROMPT), 2)


def test_an_adapter_for_another_base(made, tmp_path):
    other = save_base(tmp_path / "other", seed=1)
    assert "belongs to another base" in refused(run("generate", made, PROMPT, "--base", other), 1)


# certify


def test_certify_writes_the_certificate_and_prints_the_checks(own, monkeypatch):
    monkeypatch.setitem(certify.LEVELS, "quick", certify.Size(prompts=2, tokens=8, samples=0))
    monkeypatch.setattr(certify, "distribution", lambda *_: certify.Verdict(True, "not run here", {}))
    result = run("certify", own, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    content = json.loads((own / "certificate.json").read_text())
    assert content["ok"] is True
    assert [line.split()[:2] for line in result.stdout.splitlines()] == [
        ["passed", check["name"]] for check in content["checks"]
    ]
    assert result.stderr == (
        f"certified was the hf backend, exact={content['exact']}, in float32 on cpu\nwrote {own / 'certificate.json'}\n"
    )
    artifact.check(own)
    assert "certificate  ok" in done("inspect", own)


@pytest.mark.parametrize("status", ["failed", "skipped"])
def test_certify_ends_with_3_when_a_check_is_not_met(own, monkeypatch, status):
    checks = [certify.Check("gate", "passed", "fine"), certify.Check("greedy-fp32", status, "1 of 8")]
    certificate = certify.Certificate({}, {}, "quick", checks, "today")
    monkeypatch.setattr(retrofit, "certify", lambda *arguments, **options: certificate, raising=False)
    result = run("certify", own, "--json", "-q")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["ok"] is False
    assert result.stderr == f"Error: not certified: greedy-fp32 {status}\n"
    assert "NOT OK" in done("inspect", own)


# Bad artifacts


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


# How a command ends


def ending(monkeypatch, error, *options):
    """What `recipes ls` does when its work raises `error`."""

    def raises(*arguments, **more):
        raise error

    monkeypatch.setattr(console.json, "dumps", raises)
    return run("recipes", "ls", "--json", *options)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (GateError("not met", "look"), 3, "Error: not met\nhint: look\n"),
        (ResourceError("no disk"), 4, "Error: no disk\n"),
        (MEMORY, 4, "Error: out of GPU memory\nhint: "),
        (MemoryError(), 4, "Error: out of memory\nhint: "),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 bytes"), 4, "Error: out of memory\n"),
        (RuntimeError("one\ntwo"), 1, "Error: RuntimeError: one\nhint: not foreseen"),
        (KeyError(), 1, "Error: KeyError\nhint: "),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_end_with_their_code_and_one_line(monkeypatch, error, code, message):
    assert refused(ending(monkeypatch, error), code).startswith(message)


def test_interrupted(monkeypatch):
    result = ending(monkeypatch, KeyboardInterrupt())
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize("error", [RuntimeError("odd"), GateError("not met")], ids=["unforeseen", "known"])
def test_verbose_shows_the_traceback(monkeypatch, error):
    result = ending(monkeypatch, error, "-v")
    assert "Traceback" in result.stderr
    assert f"{error}" in result.stderr.splitlines()[-1]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"])
def test_signals_unwind_and_end_with_their_code(number, code):
    program = (
        "import os, retrofit.cli.console as console, retrofit.cli.main as cli\n"
        "def dumps(*a, **k):\n"
        "    try: os.kill(os.getpid(), NUMBER); __import__('time').sleep(30)\n"
        "    finally: print('cleaned up')\n"
        "console.json.dumps = dumps\n"
        "cli.main(['recipes', 'ls', '--json'])"
    )
    command = [sys.executable, "-c", program.replace("NUMBER", str(int(number)))]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (finished.returncode, finished.stdout) == (code, "cleaned up\n")
    assert "Traceback" not in finished.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
def test_a_reader_that_leaves_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "retrofit.cli.main", "recipes", "show", "tiny"]
    finished = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert finished.stderr == ""
