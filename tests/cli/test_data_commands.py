"""`retrofit data`: what it shows is what training runs, and what it counts is what training reads."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from commands import done, refused, run
from decoding import randomise
from saved import TEMPLATE, save_base
from text_sources import CHATML, MESSAGES, write_lines
from tiny_models import VOCABULARY, build
from transformers import AutoTokenizer

from retrofit import progress
from retrofit.adapters.layout import DraftLayout
from retrofit.cli import main as cli
from retrofit.cli.data import _pieces
from retrofit.named_bases import embedded_folder
from retrofit.recipes.dry_run.survey import draft_blocks, survey
from retrofit.recipes.schema import load_recipe
from retrofit.recipes.text.documents import Document, documents
from retrofit.recipes.text.windows import windows
from retrofit.recipes.training.blocks import eligible_anchors
from retrofit.recipes.training.step import Trainer
from retrofit.runtime.engine import Engine

ROWS = [
    {"prompt": "def area(", "response": "radius): return radius * radius"},
    {"text": "class Stack: pass\n" * 4},
    {"prompt": "for item in ", "response": "range(3): print(item)"},
    {"text": "p"},
]
KEYS = ["data.max_length=24", "data.held_out=0", "draft.block=4", "train.anchors=8"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base") / "base", template=TEMPLATE)


@pytest.fixture
def source(tmp_path):
    return write_lines(tmp_path / "rows.jsonl", *ROWS)


def lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


# preview


@pytest.mark.parametrize("layout", [DraftLayout(4), DraftLayout(4, seed_row="draft"), DraftLayout(4, input="noise")])
def test_the_blocks_shown_are_those_that_training_runs(layout, base, source, monkeypatch):
    keys = {"data.source": str(source), "data.max_length": 24, "data.held_out": 0, "train.anchors": 12}
    recipe = load_recipe("default", {**keys, **{f"draft.{name}": value for name, value in layout.to_dict().items()}})
    tokenizer = AutoTokenizer.from_pretrained(base)
    found = list(windows(documents(recipe.data, tokenizer, part="train", seed=0), 24))
    engine = randomise(Engine.from_model(build("llama"), layout=layout))
    trainer = Trainer(engine.attached, engine.backend, recipe)
    groups: list[Any] = []
    run_group = trainer._group

    def watched(group: Any, *rest: Any) -> Any:
        groups.append(group)
        return run_group(group, *rest)

    monkeypatch.setattr(trainer, "_group", watched)
    trainer.step([[(document, 0) for document in found]])
    uniform = groups[0]
    shown = [draft_blocks(document, recipe, VOCABULARY) for document in found]
    assert [[(b["start"], [-1 if i is None else i for i in b["inputs"]]) for b in blocks] for blocks in shown] == [
        [(block.start, list(block.inputs)) for block in blocks] for blocks in uniform.sequences
    ]
    wanted = [
        [int(t) if e else None for t, e in zip(target, eligible, strict=True)]
        for target, eligible in zip(uniform.target, uniform.eligible, strict=True)
    ]
    assert [block["targets"] for blocks in shown for block in blocks] == wanted
    for document, blocks in zip(found, shown, strict=True):
        assert {block["anchor"] for block in blocks} <= set(eligible_anchors(document.response).tolist())


def test_preview_on_a_pipe(base, source):
    text = done("data", "preview", source, *KEYS, "--model", base, "-n", 9, "--blocks", 2)
    assert "\x1b[" not in text
    assert "defarea(«radius):returnradius*radius»" in text.replace(" ", ""), "this tokenizer puts blanks everywhere"
    assert f"==> {source}:1, rows.jsonl:1#0 (17 tokens, 11 of a response) <==" in text
    assert "M M M M, to predict: " in text
    assert text.count("==>") == 5


def test_preview_on_a_terminal_is_coloured(base, source, monkeypatch):
    def shown(**environment):
        with monkeypatch.context() as patch:
            # CliRunner puts its own stream in the place of stdout when it invokes
            patch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda self: True)
            arguments = ["data", "preview", str(source), *KEYS, "--model", str(base), "-n", "9", "--blocks", "2"]
            result = CliRunner(env=environment).invoke(cli.main, arguments, color=True)
        assert result.exit_code == 0, result.stderr
        return result.stdout

    text = shown()
    assert "\x1b[32m" in text and "\x1b[4m" in text, "responses are green, anchors underlined"
    assert "«" not in text
    plain = shown(NO_COLOR="1")
    assert "\x1b[" not in plain and "«" in plain


def test_preview_as_json(base, source):
    found = lines(done("data", "preview", source, *KEYS, "--model", base, "--json", "-n", 2))
    assert len(found) == 2
    tokenizer = AutoTokenizer.from_pretrained(base)
    for row in found:
        assert len(row["tokens"]) == len(row["response"]) <= 24
        assert tokenizer.decode(row["tokens"]) == row["text"]
        assert row["where"].startswith(f"{source}:") and row["source"] == str(source)
        assert all(len(block["inputs"]) <= 4 for block in row["blocks"])


def test_preview_shows_what_the_chat_template_makes(tmp_path):
    folder = save_base(tmp_path / "chat", template=CHATML)
    source = write_lines(tmp_path / "chat.jsonl", {"messages": MESSAGES[3:]})
    text = done("data", "preview", source, "data.held_out=0", "data.max_length=100", "--model", folder)
    assert text.count("«") == 1 and "»" in text
    assert "\n".join(text.splitlines()[1:]).startswith("?")  # of <|im_start|>, which this tokenizer cannot spell


def test_characters_of_several_tokens_stay_whole():
    """Wherever an anchor is underlined, and a run of tokens ends with it."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder())
    text = "x = '\N{SNOWMAN}\N{SNOWMAN}' # \N{GRINNING FACE}"
    tokens = tuple(tokenizer(text)["input_ids"])
    document = Document("a", tokens, (True,) * len(tokens))
    for anchor in range(len(tokens)):
        pieces = list(_pieces(document, tokenizer, {anchor}, 99))
        assert [token for piece, _, _ in pieces for token in piece] == list(tokens)
        assert "".join(tokenizer.decode(piece) for piece, _, _ in pieces) == text


def test_long_documents_are_cut_short_in_preview(base, source):
    text = done("data", "preview", source, *KEYS, "--model", base, "--tokens", 5, "--blocks", 0, "-n", 1)
    assert "more tokens" in text and "anchor" not in text


# stats


def test_stats_are_those_of_what_training_reads(base, source):
    report = json.loads(done("data", "stats", source, *KEYS, "--model", base, "--json"))
    recipe = load_recipe("default", {"data.source": str(source), "data.held_out": 0, "data.max_length": 24})
    read = list(documents(recipe.data, AutoTokenizer.from_pretrained(base), part="train", seed=0))
    cut = list(windows(read, 24))
    lengths = sorted(len(document.tokens) for document in read)
    assert report["documents"] == len(ROWS) == len(read)
    assert report["tokens"] == sum(lengths)
    assert report["response_tokens"] == sum(sum(document.response) for document in read)
    assert (report["lengths"]["min"], report["lengths"]["max"]) == (lengths[0], lengths[-1])
    assert report["cut"] == sum(length > 24 for length in lengths) >= 1
    assert report["windows"] == len(cut)
    assert report["anchors"] == sum(len(eligible_anchors(window.response)) for window in cut)
    assert report["unusable"] == 1, "a document of one token without EOS"
    assert "skipped" not in report


def test_windows_without_response_are_counted(base, tmp_path):
    source = write_lines(tmp_path / "a.jsonl", {"prompt": "d" * 40, "response": "e" * 10})
    report = json.loads(done("data", "stats", source, "data.max_length=16", "--model", base, "--json"))
    assert report["documents"] == 1, "nothing is held out when all is counted"
    assert report["windows"] + report["dropped_windows"] == -(-report["tokens"] // 16)
    assert report["dropped_windows"] >= 1


def test_stats_of_a_mixture(base, tmp_path):
    a = write_lines(tmp_path / "a.jsonl", *[{"text": "d" * 30}] * 4)
    b = write_lines(tmp_path / "b.jsonl", *[{"text": "d" * 10}] * 6)
    order = ["data", "stats", f"data.source=[{{source: {a}, weight: 3}}, {b}]", "--model", base]
    report = json.loads(done(*order, "--json"))
    first, second = report["sources"][str(a)], report["sources"][str(b)]
    assert (first["documents"], second["documents"]) == (4, 6)
    assert report["tokens"] == first["tokens"] + second["tokens"]
    assert (first["weight"], second["weight"]) == (0.75, 0.25)
    mean = {name: found["tokens"] / found["documents"] for name, found in report["sources"].items()}
    assert first["token_share"] == pytest.approx(
        0.75 * mean[str(a)] / (0.75 * mean[str(a)] + 0.25 * mean[str(b)]), abs=1e-4
    )
    text = done(*order)
    assert "weight 75.0%" in text and "holds 6 documents" in text


def test_token_shares_are_those_of_training(base, tmp_path):
    a = write_lines(tmp_path / "a.jsonl", *[{"text": "d" * 30}] * 90)
    b = write_lines(tmp_path / "b.jsonl", *[{"text": "d" * 10}] * 90)
    recipe = load_recipe("default", {"data.source": [{"source": str(a), "weight": 1}, {"source": str(b), "weight": 2}]})
    tokenizer = AutoTokenizer.from_pretrained(base)
    report = survey(documents(recipe.data, tokenizer, part="all"), recipe)
    train = list(documents(recipe.data, tokenizer, part="train", seed=3))
    share = sum(len(d.tokens) for d in train if d.source == str(a)) / sum(len(d.tokens) for d in train)
    assert report["sources"][str(a)]["token_share"] == pytest.approx(share, abs=0.01)


def test_stats_for_people(base, source):
    text = done("data", "stats", source, *KEYS, "--model", base)
    assert text.startswith("documents  4\ntokens ") and "longer than data.max_length 24" in text


def test_progress_goes_to_stderr_and_not_with_q(base, source, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    order = ["data", "stats", source, *KEYS, "--model", base, "--json"]
    shown, quiet = run(*order), run(*order, "-q")
    assert shown.stderr.startswith("counting: 1 documents, 0:00:0")
    assert quiet.stderr == ""
    assert json.loads(shown.stdout) == json.loads(quiet.stdout)
    assert run(*order).stderr != "", "what -q asked for ends with its command"


def test_bad_rows_stop_stats_and_preview_unless_skipped(base, tmp_path):
    source = write_lines(tmp_path / "a.jsonl", *ROWS, "{")
    for command in ("stats", "preview"):
        order = ["data", command, source, *KEYS, "--model", base]
        assert f"{source}:5: not valid JSON" in refused(run(*order), 1)
        result = run(*order, "--skip-bad")
        assert result.exit_code == 0 and "skipped 1 bad row (1 not a JSON object)" in result.stderr
        assert run(*order, "--skip-bad", "-q").stderr == ""
    report = json.loads(done("data", "stats", source, *KEYS, "--model", base, "--skip-bad", "--json"))
    assert report["skipped"] == {"json": 1}


# What they are about


def test_without_a_source_it_is_the_recipes(tmp_path, source):
    Path("mine.yaml").write_text(f"data: {{source: {source}, held_out: 0}}\n")
    assert json.loads(done("data", "stats", "--recipe", "mine.yaml", "--json"))["documents"] == 4
    assert json.loads(done("data", "stats", "--limit", 3, "--json"))["documents"] == 3, "the standard library"
    assert json.loads(done("data", "validate", "--limit", 2, "--json"))["good"] == 2


def test_the_recipe_is_the_one_convert_would_take(base, source):
    long = write_lines(Path("long.jsonl"), {"text": "d " * 300})
    assert json.loads(done("data", "stats", long, "--json"))["windows"] > 1, "the tiny recipe cuts at 256"
    assert json.loads(done("data", "stats", long, "--model", base, "--json"))["windows"] == 1, "default cuts at 2048"


BAD = {
    "two sources": (["a.jsonl", "b.jsonl"], 2, "more than one source: a.jsonl, b.jsonl"),
    "no such source": (["nowhere.jsonl"], 2, "nowhere.jsonl: no such file"),
    "unknown key": (["data.max_lenght=3"], 2, "did you mean `data.max_length`"),
    "no such model": (["--model", "./nowhere"], 2, "no folder or file ./nowhere"),
    "no tokenizer": (["--model", "mute"], 2, "no tokenizer"),
    "empty": (["empty.jsonl"], 1, "empty.jsonl:1: the file is empty"),
}


@pytest.mark.parametrize("command", ["preview", "stats"])
@pytest.mark.parametrize("case", BAD)
def test_refused(case, command):
    Path("empty.jsonl").write_text("")
    build("llama").save_pretrained("mute")
    arguments, code, message = BAD[case]
    assert message in refused(run("data", command, *arguments), code)


def test_weights_are_not_read(base, source, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (base / name).exists():
            (tmp_path / "light").mkdir(exist_ok=True)
            (tmp_path / "light" / name).write_bytes((base / name).read_bytes())
    assert done("data", "validate", source, "--model", tmp_path / "light") == ""
