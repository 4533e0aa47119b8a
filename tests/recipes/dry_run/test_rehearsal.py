"""The rehearsal of `convert --dry-run` against the real thing, without memory."""

import pytest
import torch
from small_recipe import SMALL
from tiny_models import ARCHITECTURES, CONFIGS, CONTEXT, VOCABULARY, build
from torch.profiler import ProfilerActivity, profile
from training_pieces import document
from transformers import AutoModelForCausalLM

from retrofit.adapters.attach import attach, count
from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.roles import ROLES
from retrofit.errors import UsageError
from retrofit.hub import Base
from retrofit.recipes.dry_run import estimate
from retrofit.recipes.dry_run.rehearsal import Holdings, rehearsal
from retrofit.recipes.schema import load_recipe
from retrofit.recipes.text.regenerate import most_kept
from retrofit.recipes.training.clean.pairs import begin_with_pairs
from retrofit.recipes.training.joint.trainer import trainer_for
from retrofit.recipes.training.prepare import attached_to
from retrofit.runtime.rules.sampling import gumbel_noise

MODELS = ["llama", "qwen3_moe", "deepseek_v3"]


def small(*overrides):
    return load_recipe("default", [*SMALL, *overrides])


def real_trainer(name, plan):
    model = ARCHITECTURES[name]()
    attached, backend = attached_to(Base(model, None, name, None, None, {}), plan)
    return trainer_for(attached, backend, plan)


def real_peak(trainer, plan):
    """Bytes that PyTorch's allocator gave out at most during the gradients of a second step, beyond those before."""
    for step in range(2):
        batch = [(document, step) for document in estimate.windows_of(plan, VOCABULARY, step)]
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            trainer.gradients([batch])
        trainer.update()
    return most_of(profiled)


def most_of(profiled):
    total = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            most = max(most, total)
    return most


def rehearsed_peak(name, plan):
    """The same of a rehearsal."""
    found = estimate.estimate(plan, CONFIGS[name]())
    rest = {estimate.BASE, estimate.ADAPTER, estimate.MOMENTS, estimate.TEXT, estimate.ORIGINAL}
    in_step = [estimate.BUFFERS, estimate.CLEAN_FORWARD, estimate.FORWARD, estimate.CHUNKS, estimate.BACKWARD]
    in_step += [estimate.CLEAN_AGAIN] if plan.profile == "joint" else []
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


@pytest.mark.parametrize("weights", ["lora", "full"])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_training_the_base_along_is_rehearsed_too(name, weights, bare_heap):
    plan = small("profile=joint", f"joint.weights={weights}", "joint.rank=4")
    assert rehearsed_peak(name, plan) == pytest.approx(real_peak(real_trainer(name, plan), plan), rel=0.05)
    found = estimate.estimate(plan, CONFIGS[name]())
    assert found.parameters.trained == count(real_trainer(name, plan).trained)
    assert found.phases[estimate.MEASURING].holds[estimate.ORIGINAL] > 0


def test_what_the_markov_head_begins_with_is_rehearsed(bare_heap, monkeypatch):
    """Where that is most of it: many tokens, each another one."""
    config, tokens = CONFIGS["llama"](), 2000
    config.vocab_size = tokens + 1
    plan = small("adapter.markov_rank=8")
    monkeypatch.setattr(estimate, "TOKENS", tokens)
    held = estimate.estimate(plan, config).phases[estimate.PAIRS].holds
    attached, backend = attached_to(Base(AutoModelForCausalLM.from_config(config), None, "", None, None, {}), plan)
    text = list(range(tokens + 1))
    documents = [document(tuple(text[n : n + 101])) for n in range(0, tokens, 100)]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        begin_with_pairs(attached.heads, backend, documents)
    assert held[estimate.OTHER] == pytest.approx(most_of(profiled), rel=0.1)
    without = estimate.estimate(small("adapter.markov_init=zero"), config).phases
    assert estimate.PAIRS not in without


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


def test_layers_that_tell_too_little_are_not_extrapolated_from(monkeypatch):
    """A phase is fullest at one moment, whatever the layers, until another outgrows it, which grows with them."""
    config = CONFIGS["llama"]()
    config.num_hidden_layers = 30
    rehearsed = []

    def whole(plan, config, *_):
        layers = config.num_hidden_layers
        rehearsed.append(layers)
        moments = [{"heads": 500, "layers": 10 * layers}, {"heads": 50, "layers": 160 * layers}]
        moment = estimate.Moment(max(moments, key=lambda holds: sum(holds.values())))
        return estimate.Estimate("cpu", {"backward": moment}, estimate.Parameters(0, 0, 0, 0, 0, 0, {}), 0, 0, 0)

    monkeypatch.setattr(estimate, "_whole", whole)
    assert estimate.estimate(small(), config).phases["backward"].holds == {"heads": 50, "layers": 4800}
    assert rehearsed == [2, 4, 4, 8]
    monkeypatch.setattr(estimate, "FEW_LAYERS", ((2, 4),))
    assert estimate.estimate(small(), config).phases["backward"].holds == {"heads": 50, "layers": 4800}
    assert rehearsed[-1] == 30, "all of them, where no pair tells"


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
    assert holds[estimate.FILES] == 2 * sum(p.numel() for p in build("llama").parameters())
    assert found.base >= 2 * holds[estimate.FILES]
    assert holds[estimate.TEXT] > 1000


def test_regenerated_responses_count_their_cache(bare_heap):
    plan, config = small("data.responses=regenerate"), CONFIGS["llama"]()
    requests, tokens = most_kept(plan.data.max_length)
    assert tokens <= 256 and requests == 64
    writing = estimate.estimate(plan, config).phases[estimate.WRITING]
    rows = requests * 256  # the cache grows in steps of so many positions
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


def test_few_bits_a_weight_are_counted_as_they_are_held():
    """As many parameters, in fewer bytes, of which the linear layers hold what their kind says."""
    config = CONFIGS["llama"]()
    plain, few = (
        estimate.estimate(small(f"base.quantization={kind}"), config, "cpu", estimate.Surroundings("float32", 0))
        for kind in ("null", "int8")
    )
    assert few.parameters == plain.parameters
    linear = plain.parameters.base - 2 * VOCABULARY * 32 - 5 * 32  # embedding, projection to it, and norms
    assert plain.base - few.base == pytest.approx(3 * linear, rel=0.01)
