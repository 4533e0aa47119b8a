"""Beside other ways to decode the same original: those of transformers, and other artifacts, on the same prompts.

Greedily, one prompt at a time, which transformers' own ways do not do otherwise.  All take turns, so that a slow moment
of the machine hits them alike.  Forwards are those of the original's size, that of the prompt among them, for
transformers verifies its first drafts in it; a smaller model's are counted apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import GenerationConfig

from retrofit.artifact import folder as artifacts
from retrofit.errors import RetrofitError, UnsupportedModelError
from retrofit.eval.acceptance import looping_share, reference_tokens
from retrofit.eval.speed import REFERENCE, WAYS, in_turn, ratio_of, synchronize
from retrofit.hub import load_base
from retrofit.report.rivals import Rival
from retrofit.report.sections.speed import LOOKUP_TOKENS
from retrofit.report.setting import Data, Earlier, Setting, Skipped
from retrofit.runtime.backends.hf.refused import has_state
from retrofit.runtime.engine import Engine
from retrofit.weight_files import dtype_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Ran(NamedTuple):
    """One prompt, decoded one way.  forwards: of the original, and of a smaller model that drafted."""

    tokens: list[int]
    forwards: int
    small_forwards: int
    seconds: float


Way = Callable[[Setting, list[int]], Ran]


def against(setting: Setting, earlier: Earlier) -> Data:
    """A row for every way; `ratio_to_transformers`: seconds per token over those of plain `generate`."""
    if not setting.against:
        raise Skipped("nothing was named with --against: lookup, assisted=MODEL, or another artifact")
    suite = setting.suite
    prompts = setting.ids(suite.lossless_prompts, suite.speed_tokens)
    skipped: list[Data] = []
    with ExitStack() as open_ones:
        ways = _ways(setting, skipped, open_ones)
        texts, runs = {}, {}
        for way in ways.values():
            way(setting, prompts[0])  # whatever happens only once, happens here
        turns: list[dict[str, list[Ran]]] = []
        for turn in range(suite.repeats):
            order = in_turn(list(ways), turn)
            turns.append({name: [ways[name](setting, prompt) for prompt in prompts] for name in order})
        for name in ways:
            runs[name] = [run for turn in turns for run in turn[name]]
            texts[name] = [run.tokens for run in turns[0][name]]
    per_token = [{name: _seconds_per_token(turn[name]) for name in ways} for turn in turns]
    return {
        "asked": setting.asked("against"),
        "prompts": len(prompts),
        "new_tokens": suite.speed_tokens,
        "repeats": suite.repeats,
        "looping_share": looping_share(texts[REFERENCE]),
        "rows": [
            {
                "way": name,
                **_figures(runs[name]),
                "tokens_per_s": round(1 / median(one[name] for one in per_token), 4),
                "ratio_to_transformers": round(ratio_of(per_token, name, REFERENCE), 4),
                "equal_texts": sum(map(list.__eq__, texts[name], texts[REFERENCE])),
            }
            for name in ways
        ],
        "skipped": skipped,
    }


def _figures(runs: Sequence[Ran]) -> Data:
    tokens = sum(len(run.tokens) for run in runs)
    return {
        "tokens_per_forward": round(tokens / sum(run.forwards for run in runs), 4),
        "small_forwards_per_token": round(sum(run.small_forwards for run in runs) / tokens, 4),
    }


def _seconds_per_token(runs: Sequence[Ran]) -> float:
    return sum(run.seconds for run in runs) / sum(len(run.tokens) for run in runs)


def _ways(setting: Setting, skipped: list[Data], open_ones: ExitStack) -> dict[str, Way]:
    """Every way by name, plain `generate` first; those that cannot run here go into `skipped`."""
    ways: dict[str, Way] = {REFERENCE: by_transformers, "ar": partial(by_engine, setting.engine, "ar")}
    if "self_spec" in setting.modes:
        ways |= {name: partial(by_engine, setting.engine, name) for name in _strategies(setting.engine)}
    for rival in setting.against:
        try:
            if rival.kind != "artifact" and has_state(setting.subject.base(setting.subject.dtype)):
                raise UnsupportedModelError("transformers drafts for no model with a recurrent state")
            if rival.kind == "lookup":
                ways["transformers lookup"] = partial(by_transformers, lookup=LOOKUP_TOKENS)
            elif rival.kind == "assisted":
                ways[f"transformers {rival.name}"] = partial(by_transformers, assistant=_assistant(setting, rival))
            else:
                engine = open_ones.enter_context(_other(setting, rival))
                ways |= {f"{rival.name}, {name}": partial(by_engine, engine, name) for name in _strategies(engine)}
        except RetrofitError as error:
            skipped.append({"what": rival.name, "why": str(error)})
    return ways


def _strategies(engine: Engine) -> tuple[str, str]:
    return "auto", "fused" if engine.layout.anchored else "two_forward"


def _assistant(setting: Setting, rival: Rival) -> PreTrainedModel:
    """Raises RetrofitError for a model with other tokens, and as `load_base` does."""
    subject = setting.subject
    model = load_base(
        str(rival.place), dtype=dtype_name(subject.dtype), device=str(subject.device), offline=True,
        trust_remote_code=subject.trust_remote_code, need_tokenizer=False,
    ).model  # fmt: skip
    model.generation_config = GenerationConfig()
    own, other = (one.config.get_text_config().vocab_size for one in (subject.base(subject.dtype), model))
    if own != other:
        raise RetrofitError(f"its vocabulary has {other} tokens and the base's {own}: it cannot draft for it")
    return model


def _other(setting: Setting, rival: Rival) -> Engine:
    """Another artifact's engine, set as this one is.  Raises RetrofitError for one of another base."""
    assert rival.place is not None
    own = setting.engine.config.get("base", {}).get("fingerprint")
    theirs = artifacts.read_config(rival.place)["base"].get("fingerprint")
    if own is not None and own != theirs:
        raise RetrofitError("it was made of another base; nothing of it can be compared token by token")
    subject, backend = setting.subject, setting.engine.backend
    return Engine.load(
        rival.place, str(subject.device), dtype_name(subject.dtype), backend.exact, backend.name,
        packed=bool(getattr(backend, "packed", False)), offline=True, trust_remote_code=subject.trust_remote_code,
        base=None if subject.checkpoint is None else str(subject.checkpoint),
    )  # fmt: skip


def by_engine(engine: Engine, way: str, setting: Setting, prompt: list[int]) -> Ran:
    """way: of `eval.speed.WAYS`.  Kept prefixes are cleared, for the prompts come again and again."""
    if engine.prefixes is not None:
        engine.prefixes.clear()
    begin = setting.clock()
    options: dict[str, Any] = {"max_new_tokens": setting.suite.speed_tokens, "ignore_eos": True}
    (result,) = engine.generate([prompt], **WAYS[way], original_settings=False, **options)
    synchronize(engine)
    return Ran(result.tokens, 1 + result.stats.decode_forwards, 0, setting.clock() - begin)


def by_transformers(
    setting: Setting, prompt: list[int], lookup: int | None = None, assistant: PreTrainedModel | None = None
) -> Ran:
    """`generate` of the original; lookup, assistant: as `reference_tokens` takes them."""
    base = setting.subject.base(setting.subject.dtype)
    with _counted(base) as own, _counted(assistant) as small:
        begin = setting.clock()
        (tokens,) = reference_tokens(
            base, [prompt], max_new_tokens=setting.suite.speed_tokens, lookup=lookup, assistant=assistant
        )
        synchronize(setting.engine)
        seconds = setting.clock() - begin
    return Ran(tokens, len(own), len(small), seconds)


@contextmanager
def _counted(model: PreTrainedModel | None) -> Iterator[list[None]]:
    """As many items as the model has run forwards inside."""
    ran: list[None] = []
    if model is None:
        yield ran
        return
    handle = model.register_forward_pre_hook(lambda *_: ran.append(None))
    try:
        yield ran
    finally:
        handle.remove()
