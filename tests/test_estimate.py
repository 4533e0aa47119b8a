"""`convert --dry-run`: the rehearsal against the real thing, what fits, and that nothing is written or downloaded."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from test_cli import save_tokenizer
from tiny_models import ARCHITECTURES, CONFIGS, CONTEXT, REFUSED_CONFIGS, VOCABULARY
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from retrofit.adapters.attach import attach, count
from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.roles import ROLES
from retrofit.cli import main as cli
from retrofit.errors import UsageError
from retrofit.hub import Base
from retrofit.recipes.dry_run import estimate
from retrofit.recipes.dry_run import report as dry_run
from retrofit.recipes.dry_run.fit import changed, parse_size, short, steps_down, suggestions
from retrofit.recipes.dry_run.rehearsal import Holdings, rehearsal
from retrofit.recipes.schema import FIELDS, load_recipe
from retrofit.recipes.training.prepare import attached_to
from retrofit.recipes.training.step import Trainer
from retrofit.runtime.rules.sampling import gumbel_noise
from retrofit.weight_files import weights_here

SMALL = (
    *("train.precision=float32", "train.batch_size=2", "train.anchors=4", "train.steps=2", "train.warmup=0"),
    "train.save_every=0",  # else the 16 MiB through which a checkpoint is written are the peak of so small a model
    *("adapter.rank=4", "adapter.markov_rank=8", "data.max_length=48", "data.held_out=2", "draft.block=4"),
)
MODELS = ["llama", "qwen3_moe", "deepseek_v3"]


def small(*overrides):
    return load_recipe("default", [*SMALL, *overrides])


@pytest.fixture
def bare_heap(monkeypatch):
    """Count what is alive, and not the share more that the C library keeps."""
    monkeypatch.setattr(estimate, "FREED", 0.0)
    monkeypatch.setattr(estimate, "STEPS", 1)


def real_trainer(name, plan):
    model = ARCHITECTURES[name]()
    attached, backend = attached_to(Base(model, None, name, None, None, {}), plan)
    return Trainer(attached, backend, plan)


def real_peak(trainer, plan):
    """Bytes that PyTorch's allocator gave out at most during the gradients of a second step, beyond those before."""
    for step in range(2):
        batch = [(document, step) for document in estimate.windows_of(plan, VOCABULARY, step)]
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            trainer.gradients([batch])
        trainer.update()
    total = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            most = max(most, total)
    return most


def rehearsed_peak(name, plan):
    """The same of a rehearsal."""
    found = estimate.estimate(plan, CONFIGS[name]())
    rest = {estimate.BASE, estimate.ADAPTER, estimate.MOMENTS, estimate.TEXT}
    in_step = (estimate.BUFFERS, estimate.CLEAN_FORWARD, estimate.FORWARD, estimate.CHUNKS, estimate.BACKWARD)
    phases = [found.phases[phase].holds for phase in in_step]
    return max(sum(size for kind, size in holds.items() if kind not in rest) for holds in phases)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_attached_model(name):
    def attached_to(model):
        return attach(model, DraftLayout(block=4), rank=4, alpha=8, targets=ROLES, markov_rank=8, confidence=True)

    with rehearsal("cpu"):
        found = estimate._parameters(attached_to(AutoModelForCausalLM.from_config(CONFIGS[name]())))
    attached = attached_to(ARCHITECTURES[name]())
    lora = [p for n, p in attached.peft_model.named_parameters() if "lora_" in n]
    assert found.trained == count(attached.parameters())
    assert found.lora == count(lora)
    assert found.base == count(attached.peft_model.parameters()) - count(lora)
    assert sum(found.modules.values()) * 2 == len(lora)


@pytest.mark.parametrize("name", MODELS)
def test_rehearsal_takes_what_training_takes(name, bare_heap):
    plan = small()
    # A real step masks some of the diffusion blocks' tokens, a rehearsed one all; real blocks lie in their own places.
    assert rehearsed_peak(name, plan) == pytest.approx(real_peak(real_trainer(name, plan), plan), rel=0.04)


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.batch_size=1", "data.max_length=100"),
        ("adapter.rank=64", "adapter.markov_rank=0", "adapter.confidence=false"),
        ("objective.diffusion_share=0.0", "objective.draft_loss=kl"),
        ("train.checkpointing=true", "train.anchors=16"),
    ],
    ids=["long", "rank", "kl", "recomputed"],
)
def test_recipes_are_followed(overrides, bare_heap):
    plan = small(*overrides)
    assert rehearsed_peak("qwen3", plan) == pytest.approx(
        real_peak(real_trainer("qwen3", plan), plan), rel=0.07 if plan.train.checkpointing else 0.04
    )


def test_recomputed_layers_take_less(bare_heap):
    config, many = CONFIGS["llama"](), ("train.anchors=32", "data.max_length=100")
    kept, again = (estimate.estimate(small(*many, *more), config) for more in ((), ("train.checkpointing=true",)))
    assert again.phases[estimate.CHUNKS].total < kept.phases[estimate.CHUNKS].total
    assert again.phases[estimate.FORWARD].holds[estimate.DRAFT] < kept.phases[estimate.FORWARD].holds[estimate.DRAFT]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_few_layers_stand_for_many(device, monkeypatch, bare_heap):
    config = CONFIGS["llama"]()
    config.num_hidden_layers = 9
    monkeypatch.setattr(estimate, "MANY_LAYERS", 9)
    whole = estimate.estimate(small(), config, device)
    assert not estimate._alike(config)
    monkeypatch.setattr(estimate, "MANY_LAYERS", 8)
    few = estimate.estimate(small(), config, device)
    assert estimate._alike(config)
    assert few.parameters == whole.parameters
    assert (few.base, few.weights, few.moments) == (whole.base, whole.weights, whole.moments)
    assert few.peak == pytest.approx(whole.peak, rel=0.01)
    assert all(few.phases[name].total == pytest.approx(m.total, rel=0.03) for name, m in whole.phases.items())


def test_a_gpu_updates_all_at_once_in_blocks_of_its_allocator(bare_heap):
    plan, config = small("train.anchors=32"), CONFIGS["llama"]()
    on_gpu = estimate.estimate(plan, config, "cuda")
    loss, step = estimate.CHUNKS, estimate.STEP
    assert on_gpu.phases[step].holds[estimate.OTHER] > 0.9 * on_gpu.weights
    assert all(size % 512 == 0 for size in on_gpu.phases[loss].holds.values() if size != estimate.CUDA_CONTEXT)
    assert estimate.FILES not in {kind for moment in on_gpu.phases.values() for kind, n in moment.holds.items() if n}


def test_rehearsal_leaves_no_tensor_without_memory_behind():
    with rehearsal("cpu"):
        gumbel_noise(torch.tensor([3]), torch.tensor([3]), 77)
    where = torch.tensor([3])
    noise = gumbel_noise(where, where, 77)
    assert type(noise) is torch.Tensor and torch.equal(noise, gumbel_noise(where, where, 78)[:, :77])


def test_more_of_anything_takes_more(bare_heap):
    config = CONFIGS["llama"]()
    least = estimate.estimate(small(), config)
    more = estimate.estimate(small("train.anchors=12", "adapter.rank=32", "train.precision=bfloat16"), config)
    assert more.peak > least.peak and more.weights > least.weights
    assert more.base == pytest.approx(least.base / 2, rel=0.01)  # but for the frequencies of RoPE
    assert estimate.FILES not in least.phases[estimate.LOADING].holds


def test_weights_stored_in_another_type_are_there_twice_while_loading(bare_heap):
    found = estimate.estimate(small(), CONFIGS["llama"](), around=estimate.Surroundings("bfloat16", 1000))
    holds = found.phases[estimate.LOADING].holds
    assert holds[estimate.FILES] == found.base // 2
    assert holds[estimate.TEXT] > 1000


def test_regenerated_responses_count_their_cache(bare_heap):
    plan, config = small("data.responses=regenerate"), CONFIGS["llama"]()
    writing = estimate.estimate(plan, config).phases[estimate.WRITING]
    rows = estimate.BATCH * 256  # the cache grows in steps of so many positions
    assert writing.holds[estimate.CLEAN] >= rows * config.num_hidden_layers * 2 * 2 * 8 * 4


def test_freed_memory_is_a_share_of_the_heap(monkeypatch):
    monkeypatch.setattr(estimate, "STEPS", 1)
    found = estimate.estimate(small(), CONFIGS["llama"]())
    on_gpu = estimate.estimate(small(), CONFIGS["llama"](), "cuda")
    with monkeypatch.context() as bare:
        bare.setattr(estimate, "FREED", 0.0)
        alive = estimate.estimate(small(), CONFIGS["llama"]())
    assert found.phases.keys() == alive.phases.keys()
    for name, moment in alive.phases.items():
        mapped = sum(moment.holds.get(kind, 0) for kind in (estimate.BASE, estimate.FILES, estimate.TEXT))
        assert found.phases[name].total == moment.total + round(estimate.FREED * (moment.total - mapped))
    assert estimate.KEPT not in found.phases[estimate.LOADING].holds  # nothing but the pages of the base's file
    assert found.phases[found.fullest].holds[estimate.KEPT] > 0
    assert not any(estimate.KEPT in moment.holds for moment in on_gpu.phases.values())  # CUDA gives it back


def test_what_converting_refuses_is_refused():
    with pytest.raises(UsageError, match="the context of"):
        estimate.estimate(small(f"data.max_length={2 * CONTEXT}"), CONFIGS["llama"]())


def test_fullest_moment_of_a_phase_is_kept():
    holdings = Holdings()
    for phase, sizes in (("a", [5, 7, -9]), ("b", [1]), ("a", [4, 1])):
        holdings.begin(phase)
        for size in sizes:
            holdings.change("x", size)
    assert holdings.fullest["a"] == {"x": 12}
    assert holdings.fullest["b"] == {"x": 4}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9),
        ("24GiB", 24 << 30),
        ("0.5 gb", 5 * 10**8),
        ("800M", 8 * 10**8),
        ("1.5KiB", 1536),
        ("123456", 123456),
        ("7B", 7),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "24 parsecs", "-3GB", "1e9", "24GBs", "0", "0.1B", "12,5GB", "nan"])
def test_nonsense_sizes_are_refused(text):
    with pytest.raises(UsageError, match="--fit"):
        parse_size(text)


def test_sizes_are_written_short():
    assert [short(size) for size in (999, 1_660_000_000, 24_000_000_000)] == ["999 bytes", "1.66 GB", "24 GB"]


def weigh(plan):
    """A peak that every change lowers."""
    train, adapter = plan.train, plan.adapter
    rows = train.batch_size * (plan.data.max_length + 10 * train.anchors)
    return rows * (2 if train.precision == "float32" else 1) + 100 * (adapter.rank + adapter.markov_rank) + 1000


def applied(plan, suggestion):
    """The recipe as it is with the suggestion on the command line."""
    written = [f"{key}={value}" for key, value in flat(plan).items()]
    return load_recipe("default", [*written, *suggestion.overrides])


def flat(plan):
    return {key: value for key, value in json.loads(json.dumps(dict(_items(plan)))).items() if key in CHANGED}


CHANGED = {
    *("train.batch_size", "train.accumulation", "train.precision", "train.anchors", "data.max_length"),
    *("adapter.rank", "adapter.markov_rank", "draft.block"),
}


def _items(plan):
    for section, content in plan.model_dump(mode="json").items():
        if isinstance(content, dict):
            yield from ((f"{section}.{key}", value) for key, value in content.items())


WIDE = load_recipe("default", ["train.batch_size=8", "train.precision=float32", "data.max_length=1024"])


@pytest.mark.parametrize("limit", [40_000, 30_000, 25_000, 22_000, 20_000, 19_000, 10_000, 5_000, 3_500])
def test_suggestions_fit_and_are_the_mildest(limit):
    assert weigh(WIDE) > limit
    found, _ = suggestions(WIDE, limit, weigh)
    assert found
    for one in found:
        plan = applied(WIDE, one)
        assert weigh(plan) == one.peak <= limit
        documents = plan.train.batch_size * plan.train.accumulation
        assert documents == WIDE.train.batch_size * WIDE.train.accumulation
    kinds = steps_down(WIDE)
    if len({tuple(sorted(key.partition("=")[0] for key in one.overrides)) for one in found}) > 1 or any(
        weigh(changed(WIDE, kind[-1])) <= limit for kind in kinds
    ):
        singles = [next((c for c in kind if weigh(changed(WIDE, c)) <= limit), None) for kind in kinds]
        assert [one.peak for one in found] == [weigh(changed(WIDE, c)) for c in singles if c is not None]
    else:  # several changes together: none of them can be left out
        (one,) = found
        for kind in kinds:
            rest = [o for o in one.overrides if o.partition("=")[0] not in kind[0]]
            if len(rest) < len(one.overrides):
                assert weigh(applied(WIDE, type(one)(tuple(rest), 0))) > limit


def test_nothing_fits():
    found, least = suggestions(WIDE, 1000, weigh)
    assert found == []
    assert least.peak == weigh(applied(WIDE, least)) > 1000


def test_checkpointing_is_proposed_where_it_can_be_set():
    proposed = [set(kind[0]) for kind in steps_down(WIDE)]
    assert ({"train.checkpointing"} in proposed) == ("train.checkpointing" in FIELDS)
    assert proposed[0] == {"train.batch_size", "train.accumulation"}


# The command


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

    def snapshot(name, revision, allow_patterns, local_files_only):
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
    fits = run(folder, "--dry-run", "--fit", "900GB", "-o", out)
    assert fits.exit_code == 0 and "it fits" in fits.stdout
    nothing = run(folder, "--dry-run", "--fit", "1MB", "-o", out)
    assert nothing.exit_code == 4
    assert "the base alone takes" in nothing.stderr and "FSDP" in nothing.stderr
    report = json.loads(run(folder, "--dry-run", "--json", "-o", out).stdout)
    almost = report["memory"]["peak"]["bytes"] - 1000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dry_run, "resident", lambda: 0)
        not_yet = run(folder, "--dry-run", "--fit", almost, "-o", out)
        proposed = ["train.batch_size=1", "train.accumulation=2"]
        changed_fits = run(folder, "--dry-run", "--fit", almost, "-o", out, *proposed)
    assert not_yet.exit_code == 3
    assert f"add {' '.join(proposed)}" in not_yet.stderr
    assert changed_fits.exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-run", "--fit", "much"], "--fit much: no amount of memory"),
        (["--fit", "24GB"], "--fit goes with --dry-run"),
        (["--dry-run", f"data.max_length={2 * CONTEXT}"], "data.max_length"),
        (["--dry-run", "profile=joint"], "profile joint"),
    ],
)
def test_wrong_usage(folder, arguments, message, bare_heap):
    done = run(folder, *arguments, "-o", folder.parent / "out")
    assert done.exit_code == 2
    assert message in done.stderr


@pytest.mark.parametrize("name", ["mamba", "gpt_oss", "bloom"])
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
