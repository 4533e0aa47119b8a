"""Self-speculative decoding with a retrofit adapter by transformers alone; an export holds this file as generate.py.

    model.generate(**inputs, custom_generate=FOLDER, trust_remote_code=True, adapter=FOLDER, max_new_tokens=64)

A cycle is two forwards: one drafts, with the adapter on the draft rows only; one verifies the drafts with the model's
own weights.  The token at every position is y = argmax(log p + g), p what the model's own settings make of its logits,
g Gumbel noise that is a function of (seed, position in the output, token), 0 without `do_sample`; a draft is kept if
it is that token.  So the output is that of decoding token by token, and equal to retrofit's at equal seed.
Prompts are decoded one after another.  It needs torch, safetensors and transformers, and nothing of retrofit.
Not here: several cycles in one forward, trees of drafts, exactness levels; those are retrofit's.
"""

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationMixin

Tensors = dict[str, Tensor]
CONFIG, ADAPTER, HEADS = "retrofit.json", "adapter/adapter_model.safetensors", "heads.safetensors"
OF_PEFT = "base_model.model."
"""What names of the adapter's tensors begin with; the name of a module of the model follows."""
KEYS, TOKEN = (0x9E3779B9, 0x6A09E667), 0xBB67AE85
MULTIPLY_1, MULTIPLY_2, WORD = 0x21F0AAAD, 0xD35A2D97, 0xFFFFFFFF
"""Of the hash that the noise is made of."""


def generate(
    model: Any,
    inputs: Tensor | None = None,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    seed: int = 0,
    **options: Any,
) -> Tensor:
    """What `model.generate` does, decoded with drafts.

    adapter: the folder of an artifact or of this export; seed: of the noise, prompt n has seed + n.  All else as
    `generate` takes it, but that only `attention_mask` says what is padding, and a length does not count it.
    Returns token ids [B, T].  Raises ValueError for beams, streamers, assistants, several outputs of a prompt, inputs
    and outputs that are no token ids, and models it cannot decode.
    """
    ids = inputs if input_ids is None else input_ids
    if ids is None or ids.dtype.is_floating_point:
        raise ValueError("this custom_generate reads token ids: input_ids=")
    other = [name for name in ("streamer", "assistant_model") if options.get(name) is not None]
    if other:
        raise ValueError(f"{other[0]} does not go with this custom_generate; leave it out")
    kept = torch.ones_like(ids) if attention_mask is None else attention_mask
    rows = []
    for n, row in enumerate(ids):
        one = row[kept[n] != 0][None]
        whole = {"attention_mask": torch.ones_like(one), "custom_generate": decode, "seed": seed + n}
        found = GenerationMixin.generate(model, one, **whole, **options)
        rows.append(torch.cat([row, found[0, one.shape[1] :]]))
    return pad_sequence(rows, batch_first=True, padding_value=padding(model, options))


def padding(model: Any, options: dict[str, Any]) -> int:
    """The id behind outputs that end early: that of padding, else of the end."""
    for name in ("pad_token_id", "eos_token_id"):
        for given in (options, vars(options.get("generation_config") or object), vars(model.generation_config)):
            found = given.get(name)
            if found is not None:
                return int(found[0] if isinstance(found, list | tuple) else found)
    return 0


def decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    adapter: str | None = None,
    seed: int = 0,
    **model_kwargs: Any,
) -> Tensor:
    """The decoding loop that transformers calls, all else prepared; [1, P] -> [1, T]."""
    if len(input_ids) != 1 or generation_config.num_beams != 1 or generation_config.return_dict_in_generate:
        raise ValueError("this custom_generate has no beams, one output a prompt, and returns token ids alone")
    rope = (getattr(model.config.get_text_config(), "rope_parameters", None) or {}).get("rope_type")
    if rope in ("longrope", "dynamic"):
        raise ValueError(f"rope_type {rope} turns keys by the length of the text, which drafts would change")
    if adapter is None or not (Path(adapter) / CONFIG).is_file():
        raise ValueError(f"adapter={adapter!r} is no folder of a retrofit artifact; name the one that was exported")
    tokens = input_ids[0].tolist()
    text = Text(tokens, len(tokens), seed, generation_config, logits_processor, stopping_criteria, input_ids.device)
    with drafting(model, str(adapter)) as drafter:
        Decoder(model, drafter, text).run()
    return torch.tensor([text.tokens], device=input_ids.device)


@dataclass
class Text:
    """A prompt and what follows it, and what transformers has made of the settings."""

    tokens: list[int]
    prompt: int
    """How many tokens the prompt has."""
    seed: int
    settings: Any
    processors: Any
    criteria: Any
    device: torch.device
    done: bool = False

    @property
    def room(self) -> int:
        """How many tokens may still follow."""
        return int(self.settings.max_length) - len(self.tokens)

    def chosen(self, logits_V: Tensor, drafts: list[int]) -> int:
        """The token after the text and some drafts."""
        path = torch.tensor([self.tokens + drafts], device=self.device)
        scores = self.processors(path, logits_V[None].float())[0]
        if self.settings.do_sample:
            index = len(self.tokens) - self.prompt + len(drafts)
            scores = scores + gumbel(self.seed, index, len(scores), scores.device)
        return int(scores.max(dim=-1).indices)

    def emit(self, token: int) -> None:
        self.tokens.append(token)
        self.done = bool(self.criteria(torch.tensor([self.tokens], device=self.device), None)[0])


@dataclass
class Drafter:
    """An artifact on a model.  first: from which row of a forward on the adapter acts; None: it does not."""

    draft: dict[str, Any]
    heads: dict[str, Tensor]
    first: int | None = None

    def biased(self, logits_V: Tensor, previous: int) -> Tensor:
        """With what the Markov head says of the token before."""
        if "markov_w1" not in self.heads:
            return logits_V.float()
        return logits_V.float() + self.heads["markov_w2"] @ self.heads["markov_w1"][previous]


ENDS = ("max_position_embeddings", "sliding_window", "attention_chunk_size")
"""What a configuration says of how far a layer sees: the mask says nothing of it."""


class Decoder:
    """One text, decoded to its end."""

    def __init__(self, model: Any, drafter: Drafter, text: Text) -> None:
        self.model, self.drafter, self.text = model, drafter, text
        self.cache = DynamicCache()
        """Base K/V of all tokens but the newest, which is the seed of the next forward."""
        config = model.config.get_text_config()
        ends = [getattr(config, name, None) for name in ENDS]
        self.end = min((end for end in ends if end), default=1 << 30)
        """No draft stands here or behind: the context, or what a layer looks back to, which the mask does not say."""

    def run(self) -> None:
        """Prefill, then cycles of drafting and verifying."""
        text = self.text
        text.emit(text.chosen(self.forward(text.tokens, last=True)[-1], []))
        while not text.done:
            drafts = self.drafted()
            if text.done:
                return
            seed = len(text.tokens) - 1
            logits = self.forward([text.tokens[-1], *drafts])
            for n, row in enumerate(logits):
                token = text.chosen(row, [])
                text.emit(token)
                if text.done or n == len(drafts) or token != drafts[n]:
                    self.keep(seed + n + 1)
                    break

    def forward(self, tokens: list[int], last: bool = False) -> Tensor:
        """Base rows behind what is cached, which their K/V join: [N, V].  last: logits of the last one alone."""
        few = last and "logits_to_keep" in inspect.signature(self.model.forward).parameters
        more = {"logits_to_keep": 1} if few else {}
        return self.run_model(self.cache.get_seq_length(), len(tokens), input_ids=self.tensor(tokens)[None], **more)

    def drafted(self) -> list[int]:
        """Run a draft block and choose its tokens; a seed that is a base row yields one true token before them."""
        draft, text, embedding = self.drafter.draft, self.text, self.model.get_input_embeddings()
        anchored = draft["seed_row"] == "base"
        p = len(text.tokens) - 1
        start = p + 1 if anchored else p
        count = min(draft["block"], self.end - start)
        if count < 1 or text.room < 2 + anchored:
            return []
        noisy, vocab = draft["input"] == "noise", self.model.get_output_embeddings().weight.shape[0]
        read = [bits(text.seed, start + i, 0) % vocab if noisy else 0 for i in range(count)]
        read = read if anchored else read[1:]  # there the seed is the block's first row
        embeds = embedding(self.tensor([text.tokens[-1], *read]))
        if not noisy:
            vector = self.drafter.heads["mask_vector"] * float(getattr(embedding, "embed_scale", 1.0))
            embeds[1:] = vector.to(embeds.dtype)
        seen = torch.ones(count, count, dtype=torch.bool, device=embeds.device)
        if draft["attention"] == "causal":
            seen = seen.tril()
        logits = self.draft_rows(embeds, p, int(anchored), seen)
        self.keep(start)
        if anchored:
            text.emit(text.chosen(logits[0], []))
        path = [text.tokens[-1]]
        for row in logits[int(anchored) + (draft["shift"] == 0) :]:
            path.append(text.chosen(self.drafter.biased(row, path[-1]), path[1:]))
        return path[1 : self.end - len(text.tokens) + 1]  # the last of them is verified before the end

    def draft_rows(self, embeds_NH: Tensor, start: int, first: int, seen_DD: Tensor) -> Tensor:
        """Logits [N, V] of rows from `start` on; from row `first` on they are draft rows.

        seen_DD: what each of those sees of the others; all see what is before them.
        """
        N, device = len(embeds_NH), embeds_NH.device
        visible = torch.ones(N, start + N, dtype=torch.bool, device=device).tril(start)
        visible[first:, start + first :] = seen_DD
        mask = torch.zeros(visible.shape, dtype=embeds_NH.dtype, device=device).masked_fill(~visible, float("-inf"))
        self.drafter.first = first
        try:
            return self.run_model(start, N, inputs_embeds=embeds_NH[None], attention_mask=mask[None, None])
        finally:
            self.drafter.first = None

    def run_model(self, start: int, count: int, **inputs: Any) -> Tensor:
        """Logits [N, V] of `count` rows at positions start, start + 1, ..."""
        positions = torch.arange(start, start + count, device=self.text.device)[None]
        out = self.model(**inputs, position_ids=positions, past_key_values=self.cache, use_cache=True)
        logits: Tensor = out.logits[0]
        return logits

    def keep(self, count: int) -> None:
        """Leave the K/V of the first `count` positions."""
        extra = self.cache.get_seq_length() - count
        if extra > 0:
            self.cache.crop(-extra)

    def tensor(self, tokens: list[int]) -> Tensor:
        return torch.tensor(tokens, device=self.text.device)


@lru_cache(maxsize=1)
def read(folder: str, written: int, device: torch.device) -> tuple[dict[str, Any], Tensors, Tensors]:
    """`retrofit.json`, the adapter's tensors and those of the heads.  written: when, so that others are read anew."""
    root = Path(folder)
    config = json.loads((root / CONFIG).read_text(encoding="utf-8"))
    return config, load_file(root / ADAPTER, device=str(device)), load_file(root / HEADS, device=str(device))


@contextmanager
def drafting(model: Any, folder: str) -> Iterator[Drafter]:
    """The model with the adapter of a folder on it, gated by row; afterwards as it was."""
    config, adapter, heads = read(folder, (Path(folder) / ADAPTER).stat().st_mtime_ns, model.device)
    drafter = Drafter(config["draft"], heads)
    scale = config["adapter"]["alpha"] / config["adapter"]["rank"]
    hooks = []
    try:
        for name in (name for name in adapter if name.endswith(".lora_A.weight")):
            place = name.removeprefix(OF_PEFT).removesuffix(".lora_A.weight")
            down, up = adapter[name], adapter[name.replace(".lora_A.", ".lora_B.")]
            hooks.append(model.get_submodule(place).register_forward_hook(adding(drafter, down, up, scale)))
        yield drafter
    finally:
        for hook in hooks:
            hook.remove()


def adding(drafter: Drafter, down: Tensor, up: Tensor, scale: float) -> Any:
    """A forward hook that adds scale B A x to the rows on which the adapter acts."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if drafter.first is not None:
            rows = inputs[0][..., drafter.first :, :].to(down.dtype)
            out[..., drafter.first :, :] += (rows @ down.T @ up.T * scale).to(out.dtype)
        return out

    return hook


def bits(seed: int, index: int, token: Any) -> Any:
    """32 noise bits of a token or, int64 [V], of several: retrofit's `hash_bits_plain`, its specification."""

    def mix(x: Any) -> Any:
        x = (x ^ x >> 16) * MULTIPLY_1 & WORD
        x = (x ^ x >> 15) * MULTIPLY_2 & WORD
        return x ^ x >> 15

    def key(start: int) -> int:
        x = (seed + start) & WORD
        x = (x ^ x >> 16) * MULTIPLY_1 & WORD ^ (seed >> 32 & WORD)
        x = (x ^ x >> 15) * MULTIPLY_2 & WORD ^ (index & WORD)
        return int(mix(x))

    x = mix((token + TOKEN) & WORD) ^ key(KEYS[0])
    x = (x ^ x >> 16) * MULTIPLY_1 & WORD ^ key(KEYS[1])
    x = (x ^ x >> 15) * MULTIPLY_2 & WORD
    return x ^ x >> 15


def gumbel(seed: int, index: int, vocab: int, device: torch.device) -> Tensor:
    """Standard Gumbel noise of every token, fp32 [V]: -log(-log((top 23 bits + 0.5) 2^-23))."""
    top = bits(seed, index, torch.arange(vocab, device=device)) >> 9
    return -(-((top.float() + 0.5) * 2.0**-23).log()).log()
