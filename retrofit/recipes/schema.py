"""What a recipe may say, and the only place where its defaults stand.

A recipe is one YAML file of sections and keys.  Unknown keys, wrong types and values out of range are refused
together, in one `UsageError` that names each key by its dotted path.  A loaded `Recipe` is frozen.  The text under each
field is its help.
Not here: the profile `joint` (`sections.py`), YAML itself (`yaml_text.py`), overrides (`overrides.py`), the wording of
errors (`problems.py`), reading data, loading models, judging whether a recipe fits a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import Field, ValidationError, field_serializer, field_validator, model_validator

from retrofit.artifact.schema import MOST_ALPHA, MOST_RANKS, MOST_ROWS
from retrofit.errors import UsageError
from retrofit.recipes import problems as faults
from retrofit.recipes import yaml_text
from retrofit.recipes.overrides import apply
from retrofit.recipes.sections import MOST, Joint, Section

FOLDER = Path(__file__).parent / "named"

Role = Literal["q", "k", "v", "o", "gate", "up", "down"]


class Base(Section):
    """The original model."""

    model: str = Field("tiny", min_length=1)
    """Hub id, folder, GGUF file (of a Hub id: OWNER/NAME/FILE.gguf), `smollm2-135m`, or `tiny`, which ships inside."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model; null is its default branch."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type the base runs in; `auto` is what `train.precision` says."""
    quantization: Literal["nf4", "int8", "int8wo", "int4wo"] | None = None
    """Few bits a weight for its linear layers: nf4 and int8 of bitsandbytes, int8wo and int4wo of torchao."""


class Adapter(Section):
    """What is added to the base."""

    rank: int = Field(32, ge=1, le=MOST_RANKS)
    """Rank of the gated LoRA."""
    alpha: float = Field(64.0, gt=0, le=MOST_ALPHA)
    """LoRA scale: the update is multiplied by alpha / rank."""
    targets: tuple[Role, ...] = Field(get_args(Role), min_length=1, strict=False)
    """Roles of the projections that get a LoRA: all of them are those the model has; with routed experts q, k, v, o."""
    markov_rank: int = Field(128, ge=0, le=MOST_RANKS)
    """Rank of the Markov head, which tells a draft row the token drafted to its left; 0 leaves it out."""
    markov_init: Literal["base", "zero"] = "base"
    """What that head begins with: what the base expects behind a token, on average over some text, or nothing."""
    confidence: bool = True
    """Train the confidence head, which decides how many drafts are worth verifying."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type the artifact holds LoRA and Markov head in; bfloat16 halves it. They are trained in float32 all the same."""

    @model_validator(mode="after")
    def _roles_once(self) -> Self:
        if len(set(self.targets)) < len(self.targets):
            raise ValueError("adapter.targets: names a role twice; name each once")
        return self


class Draft(Section):
    """The layout of a draft block."""

    block: int = Field(8, ge=1, le=MOST_ROWS)
    """Draft rows per block.  Unit: tokens."""
    input: Literal["mask", "noise"] = "mask"
    """What a draft row reads: the learned mask vector, or a random vocabulary id."""
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    """What a draft row sees of its own block: all of it, or what is to its left."""
    shift: Literal[1, 0] = 1
    """1: a draft row predicts the next position, as base rows do; 0: its own."""
    seed_row: Literal["base", "draft"] = "base"
    """How the newest token goes in: as a base row, which yields a true token, or as the first draft row."""

    @model_validator(mode="after")
    def _slot_one_is_new(self) -> Self:
        if self.shift == 0 and self.block == 1:
            raise ValueError("draft.block: 1 drafts nothing with draft.shift 0; raise draft.block")
        if self.shift == 0 and self.seed_row == "base":
            raise ValueError(
                "draft.shift: 0 does not go with draft.seed_row base, whose own row already predicts what "
                "slot 1 would; set draft.seed_row to draft, or draft.shift to 1"
            )
        return self


class Objective(Section):
    """The loss: L_AR + alpha L_diff + beta L_draft + gamma L_conf."""

    alpha: float = Field(0.3, ge=0, le=100)
    """Weight of L_diff, the cross-entropy of partly masked blocks to the data."""
    beta: float = Field(1.0, ge=0, le=100)
    """Weight of L_draft, the distance of all-masked blocks from the base's own distribution."""
    gamma: float = Field(1.0, ge=0, le=100)
    """Weight of L_conf, which trains the confidence head alone."""
    diffusion_share: float = Field(0.0, ge=0, le=1)
    """Share of the blocks that train L_diff, the others train L_draft.  Drafts and mode `diffusion` do better at 0."""
    infill_share: float = Field(0.0, ge=0, le=1)
    """Share of L_diff's rows in blocks that see the text behind a gap: `retrofit generate --suffix` needs some."""
    draft_loss: Literal["tv_ce", "tv", "kl", "lk", "ce"] = "tv_ce"
    """`tv_ce` is 0.9 total variation + 0.1 cross-entropy to the base's most likely token, `lk` that cross-entropy + a
    blend of `kl` and `tv` that leans to `tv` as drafts get better, `ce` the cross-entropy to the text."""
    slot_weights: Literal["dpace", "exponential", "uniform", "reached"] = "dpace"
    """How the slots of a block share L_draft; `dpace` by how likely the drafts before are all accepted, `reached` only
    up to the first one that is not the base's most likely token."""


class Ingredient(Section):
    """One source of a mixture."""

    source: str = Field(min_length=1)
    """As `data.source`, where that is one source."""
    weight: float = Field(1.0, gt=0)
    """Its documents are this part of the sum of all weights."""
    split: str | None = Field(None, min_length=1)
    """Split of a `datasets` source; null is `data.split`."""
    field: str | None = None
    """Column to read; null is `data.field`."""


class Data(Section):
    """The text to train on."""

    source: str | tuple[Ingredient, ...] = "stdlib"
    """`stdlib` (of the running interpreter), `prompts:everyday` or `prompts:reasoning-gym` (for the base to answer), a
    text, JSONL, JSON, CSV or Parquet file, a folder of them, or a `datasets` id; or a mixture: a list of
    `{source, weight, split, field}`, all but the first optional."""
    split: str = Field("train", min_length=1)
    """Split of a `datasets` source."""
    field: str | None = None
    """Column of the rows to read: text or a list of chat messages; null finds it."""
    responses: Literal["keep", "regenerate"] = "keep"
    """Train on the responses as they are, or let the base write them anew first: such text drafts better, and prompts
    alone will do.  They are kept in RETROFIT_CACHE, by default ~/.cache/retrofit."""
    max_new_tokens: int | None = Field(None, ge=1, le=MOST)
    """Most tokens of each regenerated response; null: as many as the row's own text had, 512 for a prompt alone."""
    ask: Literal["chat", "text"] = "chat"
    """A `prompt` alone is what a user says, put through the chat template where there is one; or the beginning of a
    text."""
    template: dict[str, Any] = Field({})
    """Arguments of the chat template, such as `data.template.enable_thinking=false`; of a list of values each document
    has one."""
    prompts: int = Field(1000, ge=1, le=MOST)
    """Prompts that `prompts:reasoning-gym` makes."""
    tasks: tuple[str, ...] = Field((), strict=False)
    """Its tasks by name, in equal shares; none named are 50 that are quickly made."""
    seed: int = Field(0, ge=0, le=(1 << 31) - 1)
    """Keys what those prompts are, and which document has which template argument."""
    temperature: float = Field(0.8, ge=0, le=5)
    """Sampling temperature of regenerated responses; 0 is greedy."""
    max_length: int = Field(2048, ge=2, le=1 << 20)
    """Longer documents are cut into windows of this length.  Unit: tokens."""
    lengths: tuple[int, ...] = Field((), strict=False)
    """Lengths that windows have instead, mixed: `[512, 2048, 8192]` draws one for each, so that short and long contexts
    are learned alike; a length named twice comes twice as often.  Documents have to be as long.  Unit: tokens."""
    held_out: int = Field(64, ge=0, le=MOST)
    """Documents kept out of training, to measure on; `stdlib` brings its own list.  Unit: documents."""

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        wrong = [length for length in self.lengths if not 2 <= length <= self.max_length]
        if wrong:
            raise ValueError(
                f"data.lengths: {wrong[0]} is not between 2 and data.max_length {self.max_length}; "
                "change it or raise data.max_length"
            )
        return self

    @field_validator("template")
    @classmethod
    def _values_to_draw(cls, value: dict[str, Any]) -> dict[str, Any]:
        empty = next((name for name, values in value.items() if isinstance(values, list) and not values), None)
        if empty is not None:
            raise ValueError(
                f"data.template.{empty}: a list of values to draw from must not be empty; give one or more"
            )
        return value

    @field_validator("source", mode="plain")
    @classmethod
    def _one_or_several(cls, value: Any) -> str | tuple[Ingredient, ...]:
        if isinstance(value, str) and value:
            return value
        if not isinstance(value, list | tuple) or not value:
            quote = "; quote it" if isinstance(value, bool | int | float) else ""
            raise ValueError(f"data.source: must be text or a list of sources, not {faults.kind_of(value)}{quote}")
        keys = Ingredient.model_fields.items()
        known = {f"data.source[{number}].{key}": field for number in range(len(value)) for key, field in keys}
        problems, parts = [], []
        for number, item in enumerate(value):
            try:
                item = {"source": item} if isinstance(item, str) else item
                parts.append(Ingredient.model_validate(item))
            except ValidationError as error:
                for detail in error.errors():
                    at = (f"data.source[{number}]", *detail["loc"])
                    problems += faults.explain({**detail, "loc": at}, known)
        if problems:
            raise ValueError("\n".join(problems))
        return tuple(parts)

    @field_serializer("source")
    def _plain(self, source: str | tuple[Ingredient, ...]) -> Any:
        return source if isinstance(source, str) else [one.model_dump() for one in source]


class Train(Section):
    """The training run."""

    steps: int = Field(4000, ge=1, le=MOST)
    """Optimizer steps."""
    batch_size: int = Field(8, ge=1, le=1 << 16)
    """Sequences per forward, of all processes together."""
    accumulation: int = Field(1, ge=1, le=1 << 16)
    """Forwards per optimizer step."""
    anchors: int = Field(64, ge=1, le=1 << 16)
    """Draft blocks per sequence."""
    curriculum: tuple[int, ...] = Field((), strict=False)
    """Rising lengths that blocks have before `draft.block`, each for an equal share of the steps, and in such numbers
    that the draft rows stay as many.  Unit: tokens."""
    lr: float = Field(2e-4, gt=0, le=1)
    """Peak learning rate."""
    warmup: int = Field(100, ge=0, le=MOST)
    """Steps over which the learning rate rises from 0."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """How the learning rate falls after the warm-up; with `wsd` in the last steps only, and with it or `constant`
    train.steps may be raised when a conversion goes on."""
    decay: int | None = Field(None, ge=1, le=MOST)
    """Steps at the end over which it falls with `wsd`; null is a fifth of train.steps."""
    clip: float = Field(1.0, gt=0)
    """Largest gradient norm; larger ones are scaled down."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Type the forwards compute in; trained weights and losses stay in float32."""
    checkpointing: bool = False
    """Compute the draft rows' activations again in the backward pass instead of keeping them: less memory, about a
    third more time."""
    seed: int = Field(0, ge=0, le=(1 << 32) - 1)
    """Keys initial weights, order of documents, anchors, masks and noise."""
    save_every: int = Field(250, ge=0, le=MOST)
    """Steps between checkpoints, of which the newest two are kept; 0 saves on Ctrl-C and SIGTERM only."""
    probe_every: int = Field(0, ge=0, le=MOST)
    """Steps between probes, which decode held-out prompts and record tau and TPF; 0 never probes."""
    probe_prompts: int = Field(8, ge=1, le=256)
    """Held-out documents whose beginnings are decoded from, if there are so many."""
    probe_tokens: int = Field(64, ge=1, le=1 << 16)
    """New tokens of each.  Unit: tokens."""
    patience: int = Field(0, ge=0, le=MOST)
    """Probes in a row without a better TPF after which training stops; 0 never stops early."""
    publish: Literal["last", "best"] = "last"
    """Which weights the artifact holds: the last step's, or those of the probed step with the best TPF."""

    @model_validator(mode="after")
    def _steps_suffice(self) -> Self:
        if problem := faults.steps_fault(self.steps, self.warmup, self.schedule, self.decay):
            raise ValueError(problem)
        for key, wanted in (("patience", self.patience > 0), ("publish", self.publish == "best")):
            if wanted and not self.probe_every:
                value = getattr(self, key)
                raise ValueError(f"train.{key}: {value} goes by probes, and there are none; set train.probe_every")
        return self


class Recipe(Section):
    """Everything `retrofit convert` is told, and nothing it finds out for itself."""

    base: Base = Base()
    profile: Literal["frozen", "joint"] = "frozen"
    """`frozen` leaves the base bit-identical; `joint` trains it along, and the artifact holds it: its output is its own
    and no longer the original's (section `joint`)."""
    adapter: Adapter = Adapter()
    draft: Draft = Draft()
    objective: Objective = Objective()
    data: Data = Data()
    train: Train = Train()
    joint: Joint = Joint()

    @property
    def dtype(self) -> str:
        """Type the base runs in."""
        return self.train.precision if self.base.dtype == "auto" else self.base.dtype

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        problems = []
        shortest = min(self.data.lengths, default=self.data.max_length)
        key = "lengths" if self.data.lengths else "max_length"
        if self.draft.block >= shortest:
            problems.append(
                f"draft.block: {self.draft.block} does not fit into windows of data.{key} "
                f"{shortest} tokens; lower draft.block or raise data.{key}"
            )
        if self.draft.block == 1 and self.objective.diffusion_share > 0:
            problems.append(
                "objective.diffusion_share: a block of 1 has nothing to mask, as slot 1 is always known; "
                "set it to 0 or raise draft.block"
            )
        weights = self.objective
        problems += faults.infill_faults(weights.infill_share, weights.diffusion_share, self.draft)
        problems += faults.curriculum_faults(self.train.curriculum, self.draft.block, self.draft.shift)
        problems += faults.nothing_trained(
            weights.alpha, weights.beta, weights.diffusion_share, self.train.anchors, self.draft.block
        )
        if self.train.probe_every and not self.data.held_out:
            problems.append(
                "train.probe_every: probes decode held-out documents, and data.held_out is 0; "
                "raise data.held_out or set train.probe_every to 0"
            )
        if self.profile == "joint" and not self.data.held_out:
            problems.append("data.held_out: 0 leaves no text to measure drift on, which profile joint does; raise it")
        if problems:
            raise ValueError("\n".join(problems))
        return self


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Recipe.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}
FIELDS: dict[str, Any] = {
    path: field
    for name, field in Recipe.model_fields.items()
    for path, field in (
        [(f"{name}.{key}", inner) for key, inner in SECTIONS[name].model_fields.items()]
        if name in SECTIONS
        else [(name, field)]
    )
}
"""Every key by its dotted path, in file order: annotation, default, limits and help (`description`)."""


def by_key(recipe: Recipe) -> dict[str, Any]:
    """Every value by its dotted path, as JSON has it."""
    found = {}
    for name, value in recipe.model_dump(mode="json").items():
        found.update({f"{name}.{key}": inner for key, inner in value.items()} if name in SECTIONS else {name: value})
    return found


def recipe_names() -> list[str]:
    """Names of the recipes that ship with retrofit, sorted."""
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))


def load_recipe(
    name_or_path: str | Path | None, overrides: Sequence[str | tuple[str, Any]] | Mapping[str, Any] = ()
) -> Recipe:
    """Read a recipe, apply overrides, validate.

    `name_or_path`: a name of `recipe_names()`, a YAML file, or None for `tiny`.
    `overrides`: `key.path=value` strings whose values are read as YAML, (path, value) pairs, or a mapping.
    Raises UsageError that lists every problem found; checks between keys run once those keys are valid.
    """
    label, text = _find("tiny" if name_or_path is None else str(name_or_path))
    try:
        content = yaml_text.parse(text)
    except ValueError as error:
        raise UsageError(f"recipe `{label}` is not valid YAML: {error}") from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise UsageError(f"recipe `{label}` must hold sections such as `train:`, not {faults.kind_of(content)}")
    content = {key: value for key, value in content.items() if value is not None or key not in SECTIONS}
    problems = apply(content, overrides, FIELDS)
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        problems += [line for detail in error.errors() for line in faults.explain(detail, FIELDS)]
    if problems:
        raise UsageError(faults.listed(f"recipe `{label}`", problems), "`retrofit recipes show` prints every key")
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every key written out; `load_recipe` reads it back equal."""
    return yaml_text.written(recipe.model_dump(mode="json"))


def _find(name: str) -> tuple[str, str]:
    """(label for messages, YAML text) of a shipped name or a file."""
    if name in recipe_names():
        return name, (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    path = Path(name)
    if path.is_dir():
        raise UsageError(f"recipe `{name}` is a folder", "name the YAML file in it, such as its recipe.yaml")
    try:
        return name, path.read_text(encoding="utf-8")
    except FileNotFoundError:
        names = recipe_names()
        message = f"recipe `{name}` does not exist{faults.did_you_mean(name, names)}"
        raise UsageError(message, f"name a YAML file or one of {', '.join(names)}") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        raise UsageError(f"recipe `{name}` cannot be read: {error}") from None
