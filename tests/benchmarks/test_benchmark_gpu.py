"""`python -m benchmarks.gpu` where there is no GPU: its dry run, its refusals, what it writes, its oracle."""

import json
import sys
import time
from dataclasses import replace
from math import prod
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from benchmarks.gpu import generate as gpu_generate
from benchmarks.gpu import processes as gpu_processes
from benchmarks.gpu import run as gpu
from benchmarks.gpu.bars import BARS, TITLES
from benchmarks.gpu.bench import TINY, Bench, Found, Sizes
from benchmarks.gpu.models import _shapes, random_checkpoint, transformers_model
from benchmarks.gpu.oracle import Oracle, let_oracle_draft
from benchmarks.gpu.processes import FUSED_TESTS, ROOT, Process
from benchmarks.gpu.steps import tree_of
from retrofit.runtime.kernels.state import State
from retrofit.runtime.rules.sampling import Processing

CPU = torch.device("cpu")


def tiny_bench(minutes: float = 10) -> Bench:
    return Bench(CPU, torch.float32, TINY, True, time.perf_counter() + 60 * minutes)


def run(*arguments: str):
    return CliRunner().invoke(gpu.main, list(arguments))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    result = run()
    assert result.exit_code == 4
    assert "no CUDA GPU" in result.stderr and result.stdout == ""


def test_sections_have_titles_and_modules():
    assert run("--list").stdout.split() == list(gpu.SECTIONS) == list(dict.fromkeys(gpu.SECTIONS))
    assert set(gpu.SECTIONS) == set(TITLES)
    assert len({what for what, _ in BARS.values()}) == len(BARS)


def test_dry_run_writes_what_a_run_would(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path / "not-here"))
    only = ["machine", "ar", "rows", "steps", "attention", "launches"]
    result = run("--dry-run", "--out", str(tmp_path), *(f"--only={name}" for name in only))
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["gpu-dry-run.json"]
    sections = json.loads((tmp_path / "gpu-dry-run.json").read_text())["sections"]
    assert list(sections) == only
    for section in sections.values():
        assert "error" not in section and "skipped" not in section
        assert section["command"].endswith("--dry-run") and section["hardware"]["dry_run"]
        assert section["figures"] and section["bars"]
        for bar in section["bars"]:
            assert set(bar) == {"what", "bar", "figure", "met"} and bar["figure"].endswith("(dry run)")
    judged = {bar["what"] for section in sections.values() for bar in section["bars"] if bar["met"] is not None}
    assert judged == {BARS["ar"][0], BARS["rows"][0]}


def test_products_are_swept_and_a_tile_that_does_not_fit_is_noted(monkeypatch):
    from benchmarks.gpu import kernels as gpu_kernels

    def split_matmul(*args, block_n=None, **options):
        if block_n is not None:
            raise RuntimeError("out of shared memory")
        return torch.zeros(1)

    monkeypatch.setattr(gpu_kernels, "split_matmul", split_matmul)
    found = Found()
    gpu_kernels.gemm(tiny_bench(), found)
    names = {name.split(",")[0] for name in found.figures}
    assert names == {"qkv", "o", "gate_up", "down", "head"}
    for entry in found.figures.values():
        assert entry["library_us"] > 0 and entry["best"] is None
        assert "out of shared memory" in entry["grid"][0]["error"]


def test_without_time_a_section_is_skipped():
    result = gpu.run("ar", tiny_bench(minutes=0), ["ar"], {})
    assert result["skipped"] == "0 s were left, it needs 15" and result["bars"] == []


def test_a_section_that_breaks_keeps_what_it_has(monkeypatch, tmp_path):
    from benchmarks.gpu import steps as gpu_steps

    def ar(bench, found):
        found.state("a figure", "1")
        raise RuntimeError("planted")

    monkeypatch.setattr(gpu_steps, "ar", ar)
    result = run("--dry-run", "--out", str(tmp_path), "--only=ar", "--only=machine")
    assert result.exit_code == 1
    sections = json.loads((tmp_path / "gpu-dry-run.json").read_text())["sections"]
    assert sections["ar"]["bars"][0]["what"] == "a figure" and "planted" in sections["ar"]["error"]
    assert sections["machine"]["bars"]


def test_a_section_measured_before_outlives_one_that_was_skipped(tmp_path):
    path, bars = tmp_path / "folder" / "gpu-x.json", [{"what": "a", "bar": "b", "figure": "c", "met": None}]
    gpu.write(path, "rows", {"bars": bars})
    gpu.write(path, "machine", {"bars": [], "skipped": "no time"})
    gpu.write(path, "rows", {"bars": [], "skipped": "no time"})
    assert json.loads(path.read_text()) == {
        "sections": {"machine": {"bars": [], "skipped": "no time"}, "rows": {"bars": bars}}
    }


def test_the_file_is_named_after_the_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.file_for({"gpu": "NVIDIA H200"}, None, False) == tmp_path / "gpu-nvidia-h200.json"
    monkeypatch.delenv("OUT")
    assert gpu.file_for({"gpu": "NVIDIA H200"}, None, False) == ROOT / "results" / "gpu-nvidia-h200.json"
    assert gpu.file_for({"gpu": None}, None, True) is None


def test_a_section_knows_what_those_after_it_need(monkeypatch):
    from benchmarks.gpu import machine as gpu_machine

    bench = tiny_bench()
    monkeypatch.setattr(gpu_machine, "machine", lambda bench, found: None)
    gpu.run("machine", bench, ["machine", "rows", "gemm"], {})
    assert bench.reserved == gpu.SECTIONS["rows"].needs + gpu.SECTIONS["gemm"].needs


def test_whole_files_run_on_the_gpu_and_each_once(monkeypatch):
    bench = tiny_bench()
    bench.dry = False
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    environments = []

    def start(cls, command, folder, environment):
        environments.append(environment)
        return command

    monkeypatch.setattr(Process, "start", classmethod(start))
    commands = gpu_processes.start_tests(bench)
    files = [word for command in commands.values() for word in command if word.endswith(".py")]
    assert len(files) == len(set(files)) and {
        *FUSED_TESTS,
        "runtime/kernels/test_kernel_gemm.py",
        "runtime/rules/test_sampling.py",
    } <= set(files)
    assert all((ROOT / "tests" / name).is_file() for name in files)
    assert "gpu" not in commands["tests of the fused backend"] and "gpu" in commands["tests marked gpu"]
    assert not any("TRITON_INTERPRET" in environment for environment in environments)


def test_what_a_test_run_lacks_is_counted():
    output = "3 passed, 2 errors in 1.2s"
    bench, found = tiny_bench(), Found()
    bench.tests = {"some": Process.start([sys.executable, "-c", f"print('{output}'); exit(1)"], ROOT, {})}
    gpu_processes.tests(bench, found)
    assert found.bars == [
        {"what": BARS["tests"][0], "bar": "all pass", "figure": "some: 3 passed, 2 error", "met": False}
    ]


class Echo:
    """Stands for an engine: the tokens of a request are a function of its seed, but for planted mistakes."""

    def __init__(self, wrong=lambda options: False):
        self.backend, self.limits = SimpleNamespace(head=SimpleNamespace(vocab=64)), None
        self.layout = SimpleNamespace(drafts=2)
        self.wrong, self.calls = wrong, []

    def generate(self, prompts, mode="self_spec", **options):
        self.calls.append({"mode": mode, "prompts": len(prompts), **options})
        seeds = options.get("seed") or range(len(prompts))
        return [
            SimpleNamespace(tokens=[seed, int(self.wrong({**options, "mode": mode, "seed": seed}))]) for seed in seeds
        ]


def with_echo(monkeypatch, echo: Echo, minutes: float = 10) -> Bench:
    bench = tiny_bench(minutes)
    bench.dry = False
    monkeypatch.setattr(bench, "engine", lambda *args, **kwargs: echo)
    monkeypatch.setattr(gpu_generate, "drop_cache", lambda engine: None)
    monkeypatch.setattr(gpu_generate, "let_oracle_draft", lambda *args, **kwargs: None)
    known = dict.fromkeys(("tpf", "tau", "rows_per_token", "most_rows", "forwards_by_kind", "accept_cond"))
    monkeypatch.setattr(gpu_generate, "summary", lambda results: known)
    return bench


@pytest.mark.parametrize("bar", ["lossless", "small"])
def test_lossless_says_how_many_prompts_ran(monkeypatch, bar):
    bench, found = with_echo(monkeypatch, echo := Echo()), Found()
    gpu_generate.compare_tokens(bench, found, "any", bar, all_alone=bar == "small")
    assert [(entry["what"], entry["met"]) for entry in found.bars] == [
        (BARS[f"{bar}_{level}"][0], True) for level in ("bucket", "invariant")
    ]
    part = "2 prompts at batch 2: fused 2/2, two_forward 2/2, 1 prompts at batch 1: ar 1/1, tree 1/1, "
    part += "2 prompts at batch 1: fused 2/2, two_forward 2/2"
    assert found.bars[0]["figure"] == f"T = 0, {part}; T = 0.8, {part}"
    ways = {(call["mode"], call.get("strategy"), call.get("tree"), call["batch_size"]) for call in echo.calls}
    chains = {("self_spec", "fused", 0), ("self_spec", "two_forward", None)}
    assert ways >= {(*way, batch) for way in chains for batch in (1, 2)}
    assert {call["temperature"] for call in echo.calls} == {0.0, 0.8}


def test_lossless_is_missed_by_one_token_of_one_prompt_at_batch_1(monkeypatch):
    def wrong(options):
        batch, strategy = options["batch_size"], options.get("strategy")
        return (batch, strategy, options["seed"], options["temperature"]) == (1, "two_forward", 1, 0.8)

    bench, found = with_echo(monkeypatch, Echo(wrong)), Found()
    gpu_generate.compare_tokens(bench, found, "any", "lossless", all_alone=False)
    assert [entry["met"] for entry in found.bars] == [False, False]
    assert "fused 2/2, two_forward 1/2" in found.bars[0]["figure"].split("; ")[1]
    (difference,) = found.figures["bucket, T = 0.8"]["two_forward, batch 1"]["differences"]
    assert difference == {"prompt": 1, "at": 1, "expected": 0, "found": 1}


def test_prompts_at_batch_1_end_with_their_time(monkeypatch):
    bench, found = with_echo(monkeypatch, Echo()), Found()
    bench.reserved = 1e6
    bench.sizes = replace(TINY, alone_seconds=0.0)
    gpu_generate.compare_tokens(bench, found, "any", "lossless", all_alone=False)
    assert all(entry["met"] for entry in found.bars)
    assert found.bars[0]["figure"].endswith("1 prompts at batch 1: ar 1/1, tree 1/1, fused 1/1, two_forward 1/1")
    found = Found()
    gpu_generate.compare_tokens(bench, found, "any", "small", all_alone=True)
    assert "2 prompts at batch 1: fused 2/2" in found.bars[0]["figure"]


def test_without_time_nothing_is_claimed_and_a_difference_is_not_hidden(monkeypatch):
    bench, found = with_echo(monkeypatch, Echo(), minutes=0), Found()
    gpu_generate.compare_tokens(bench, found, "any", "lossless", all_alone=False)
    assert [(entry["figure"], entry["met"]) for entry in found.bars] == [("nothing", None)] * 2
    found = Found()
    for complete, met in ((True, True), (False, True), (False, False)):
        gpu_generate.judge(found, "auto", "1", met, complete)
    assert [entry["met"] for entry in found.bars] == [True, None, False]
    assert [entry["what"] == BARS["auto"][0] for entry in found.bars] == [True, False, True]


@pytest.mark.parametrize(("slower", "met"), [(1.01, True), (1.03, False)])
def test_auto_is_held_to_ar_in_turn(monkeypatch, slower, met):
    bench, found = with_echo(monkeypatch, echo := Echo()), Found()
    bench.sizes = replace(TINY, auto_batches=(1, 2))

    def wall(run):
        result = run()
        call = echo.calls[-1]
        late = (call["mode"], call["batch_size"]) == ("self_spec", 2)
        return (0.1 * slower if late else 0.1), result

    monkeypatch.setattr(bench, "wall", wall)
    gpu_generate.auto_beside_ar(bench, found, "any", "auto")
    *rates, judged = found.bars
    assert [entry["met"] for entry in rates] == [None] * 4
    assert rates[0]["what"] == "tokens/s, batch 1, any shape, bucket"
    assert rates[0]["figure"] == "ar 20; auto, untrained 20; auto, oracle 0.8 20"
    assert (judged["what"], judged["met"]) == (BARS["auto"][0], met)
    batches = [
        f"{level}, batch {n}: {1 if n == 1 else slower:.3f}" for level in ("bucket", "invariant") for n in (1, 2)
    ]
    assert judged["figure"] == "; ".join(batches)


def test_titles_name_the_numbers_that_run():
    sizes = Sizes()
    for level in ("bucket", "invariant"):
        assert f"{sizes.prompts} prompts at batch 1 and {sizes.lossless_batch}" in BARS[f"small_{level}"][0]
        assert f"{sizes.prompts} prompts at batch {sizes.lossless_batch}" in BARS[f"lossless_{level}"][0]
    for name in ("auto", "auto_small"):
        assert "batch {} and {}".format(*sizes.auto_batches) in BARS[name][0]
        assert BARS[name][1] == f"<= {gpu_generate.AUTO_AT_MOST}"


def test_a_process_ends_with_its_time():
    begin = time.perf_counter()
    script = "import sys, time; print('begun', flush=True); time.sleep(60)"
    process = Process.start([sys.executable, "-c", script], ROOT, {})
    code, output = process.finish(3)
    assert code is None and output == "begun\n" and time.perf_counter() - begin < 30
    assert Process.start([sys.executable, "-c", "print(1)"], ROOT, {}).finish(60) == (0, "1\n")


@pytest.mark.parametrize(("shape", "billions"), [("llama-3.1-8b", 8.030), ("qwen3-8b", 8.191), ("qwen3-0.6b", 0.596)])
def test_shapes_are_the_published_ones(shape, billions):
    assert round(sum(map(prod, _shapes(shape, False).values())) / 1e9, 3) == billions


def test_both_models_hold_the_same_values():
    checkpoint = random_checkpoint("qwen3-0.6b", CPU, torch.float32, tiny=True)
    model = transformers_model("qwen3-0.6b", CPU, torch.float32, tiny=True)
    names = [name for name, _ in model.named_parameters()]
    assert len(names) > 10 and "lm_head.weight" not in names
    assert all(torch.equal(parameter, checkpoint(name)) for name, parameter in model.named_parameters())
    with pytest.raises(KeyError):
        checkpoint("model.layers.0.self_attn.q_proj.bias")


def drafts_of(oracle: Oracle, length: int) -> torch.Tensor:
    """[requests, nodes] after `length` tokens of output, prompts having 7."""
    requests = len(oracle.truth)
    state = State.empty(requests + 1, 64, 20, [], CPU)
    state.origin.fill_(7)
    state.length.fill_(7 + length)
    state.seed[:requests] = torch.arange(requests)
    oracle(state)
    assert int(state.drafts.min()) >= 0 and int(state.drafts.max()) < oracle.vocab
    return state.drafts[:requests, : len(oracle.ahead)]


def test_the_oracle_is_right_as_often_as_stated():
    truth = torch.randint(0, 50, (400, 60))
    oracle = Oracle(truth, 0.8, 50, range(1, 9), [0] * 8)
    right = torch.stack([drafts_of(oracle, at) == truth[:, at : at + 8] for at in range(0, 48, 8)])
    assert right.float().mean() == pytest.approx(0.8, abs=0.01)
    assert torch.equal(drafts_of(oracle, 5)[:, 1:], drafts_of(oracle, 6)[:, :-1])
    assert torch.equal(drafts_of(oracle, 59)[:, 0] == truth[:, 59], drafts_of(oracle, 58)[:, 1] == truth[:, 59])


def test_of_a_tree_one_candidate_at_most_is_true():
    truth = torch.randint(0, 50, (400, 60))
    oracle = Oracle(truth, 0.6, 50, [1, 1, 1, 2], [0, 1, 2, 0])
    drafts = drafts_of(oracle, 3)
    right = drafts[:, :3] == truth[:, 3:4]
    assert (right.sum(1) <= 1).all()
    assert right.float().mean(0).tolist() == pytest.approx([0.6, 0.2, 0.0], abs=0.06)
    assert all(len(set(row)) == 3 for row in drafts[:, :3].tolist())


@pytest.mark.parametrize("tree", [0, 3])
def test_generate_takes_its_drafts_from_the_oracle(tree):
    bench = tiny_bench()
    engine = bench.engine()
    prompts, options = bench.prompts(1, 3, 64), {"max_new_tokens": 8, "batch_size": 1, "ignore_eos": True}
    truth = [result.tokens for result in engine.generate(prompts, "ar", **options)]
    grown = tree_of(bench) if tree else None
    let_oracle_draft(engine, truth, 1.0, batch=1, longest=11, params=Processing(), tree=grown)
    (result,) = engine.generate(prompts, strategy="fused", tree=tree, **options)
    assert result.tokens == truth[0]
    deep = max(grown.depths) if grown else 2
    # The first step only drafts; then each accepts all, until too few tokens are left.
    assert result.stats.accepted[0] == deep
    assert result.stats.forwards["draft"] == 1 and result.stats.decode_forwards == 1 + -(-6 // (deep + 1))
