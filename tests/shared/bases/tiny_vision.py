"""Tiny random vision-language models with processors of their own, and prompts with images for them.

As `tiny_models.py`: built in code, vocabulary 64, fp32, weights lively enough that a wrong position or mask changes
tokens.  One token a character; images are small noise.  Processors that need torchvision are stood in for, around
their own image part.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import repeat
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny_models import SIZES, VOCABULARY, WINDOW, randomize
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    BatchFeature,
    Gemma3Config,
    Gemma3Processor,
    Llama4Config,
    Mistral3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3_5Config,
    Qwen3VLConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

Processor = Callable[..., BatchFeature]
QWEN = {"image": "<|image_pad|>", "video": "<|video_pad|>", "start": "<|vision_start|>", "end": "<|vision_end|>"}
GEMMA = {"boi_token": "<boi>", "image_token": "<img>", "eoi_token": "<eoi>"}
PIXTRAL = ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<boi>{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}{% endfor %}"
)
LETTERS = "abcdefghijklmnopqrstuvwxyz .,?"


def tokenizer(special: list[str], **named: Any) -> PreTrainedTokenizerFast:
    """One token a letter, the special ones behind them, from VOCABULARY - len(special) on."""
    filler = [f"<{n}>" for n in range(VOCABULARY - len(LETTERS) - len(special))]
    ids = {text: n for n, text in enumerate([*LETTERS, *filler, *special])}
    made = Tokenizer(models.WordLevel(ids, unk_token=filler[0]))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token=filler[0], pad_token=filler[1], additional_special_tokens=special, **named
    )


def image(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def _qwen(kind: type[PreTrainedConfig], text: Mapping[str, Any], vision: Mapping[str, Any]) -> PreTrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    tower = {
        "depth": 3, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4,
        "out_hidden_size": 32, "num_position_embeddings": 64,
    }  # fmt: skip
    first = VOCABULARY - len(QWEN)
    return kind(
        text_config={**SIZES, "head_dim": 8, "rope_parameters": rope, **text},
        vision_config={**tower, **vision},
        image_token_id=first,
        video_token_id=first + 1,
        vision_start_token_id=first + 2,
        vision_end_token_id=first + 3,
    )


def _qwen3_vl() -> PreTrainedConfig:
    return _qwen(Qwen3VLConfig, {}, {"deepstack_visual_indexes": [0, 1]})


def _qwen3_5() -> PreTrainedConfig:
    linear = {
        "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "partial_rotary_factor": 1.0,
    }  # fmt: skip
    return _qwen(Qwen3_5Config, linear, {})


def _qwen_processor(**_: Any) -> Processor:
    size = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    pixels = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=size)
    text = tokenizer(list(QWEN.values()))

    def processor(images: list[Image.Image], text_: list[str]) -> BatchFeature:
        made = pixels(images, return_tensors="pt")
        counts = iter((made["image_grid_thw"].prod(1) // 4).tolist())
        found = text(_filled(text_, QWEN["image"], counts), padding=True, padding_side="left", return_tensors="pt")
        kinds = (found["input_ids"] == VOCABULARY - len(QWEN)).int()
        return BatchFeature({**_encoded(found), **made, "mm_token_type_ids": kinds})

    return processor


def _filled(texts: list[str], mark: str, counts: Iterator[int]) -> list[str]:
    """Each mark so many times."""
    return ["".join(part or mark * next(counts) for part in _parts(text, mark)) for text in texts]


def _parts(text: str, mark: str) -> list[str]:
    """The text between the marks, and an empty one for each mark."""
    found: list[str] = []
    for part in text.split(mark):
        found += [part, ""]
    return [part for n, part in enumerate(found[:-1]) if part or n % 2]


def _encoded(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def _gemma3(image_tokens: int = 4) -> PreTrainedConfig:
    side = 4 * int(image_tokens**0.5)
    return Gemma3Config(
        text_config={
            **SIZES, "num_hidden_layers": 3, "head_dim": 12, "query_pre_attn_scalar": 4, "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        vision_config={
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": side, "patch_size": 4,
        },
        mm_tokens_per_image=image_tokens,
        boi_token_index=VOCABULARY - 3,
        image_token_index=VOCABULARY - 2,
        eoi_token_index=VOCABULARY - 1,
        tie_word_embeddings=False,
    )  # fmt: skip


def gemma3_processor(image_tokens: int = 4) -> Gemma3Processor:
    """The model's own, with a chat template."""
    side = 4 * int(image_tokens**0.5)
    images = Gemma3ImageProcessorPil(size={"height": side, "width": side})
    text = tokenizer(list(GEMMA.values()), extra_special_tokens=GEMMA)
    return Gemma3Processor(images, text, image_seq_length=image_tokens, chat_template=TEMPLATE)


def _gemma3_processor(image_tokens: int = 4) -> Processor:
    made = gemma3_processor(image_tokens)

    def processor(images: list[Image.Image], text_: list[str]) -> BatchFeature:
        given = iter(images)
        nested = [[next(given) for _ in range(one.count(GEMMA["boi_token"]))] for one in text_]
        return made(images=nested, text=text_, padding=True, padding_side="left", return_tensors="pt")

    return processor


def _mistral3() -> PreTrainedConfig:
    return Mistral3Config(
        text_config={"model_type": "mistral", **SIZES, "head_dim": 8, "sliding_window": None},
        vision_config={
            "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 32, "patch_size": 4,
        },
        image_token_index=VOCABULARY - 3,
        tie_word_embeddings=False,
    )  # fmt: skip


def _pixtral_processor(**_: Any) -> Processor:
    pixels = PixtralImageProcessorPil(patch_size={"height": 8, "width": 8}, size={"longest_edge": 32})
    text = tokenizer(PIXTRAL)

    def processor(images: list[Image.Image], text_: list[str]) -> BatchFeature:
        made = pixels(images, return_tensors="pt")
        counts = iter([int(height) // 8 * (int(width) // 8) for height, width in made["image_sizes"]])
        found = text(_filled(text_, PIXTRAL[0], counts), padding=True, padding_side="left", return_tensors="pt")
        return BatchFeature({**_encoded(found), **made})

    return processor


def _llama4() -> PreTrainedConfig:
    return Llama4Config(
        text_config={
            **SIZES, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 4,
            "attention_chunk_size": WINDOW, "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0], "floor_scale": 4, "attn_scale": 0.5,
        },
        vision_config={
            "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 16, "patch_size": 4, "projector_input_dim": 16, "projector_output_dim": 16,
            "vision_output_dim": 16,
        },
        image_token_index=VOCABULARY - 1,
    )  # fmt: skip


def _llama4_processor(**_: Any) -> Processor:
    """One tile an image: of 4 x 4 patches, four to a token."""
    text = tokenizer(["<|image|>"])

    def processor(images: list[Image.Image], text_: list[str]) -> BatchFeature:
        marked = _filled(text_, "<|image|>", repeat(4))
        found = text(marked, padding=True, padding_side="left", return_tensors="pt")
        tiles = [np.asarray(one.resize((16, 16)), dtype=np.float32) / 127.5 - 1 for one in images]
        return BatchFeature({**_encoded(found), "pixel_values": torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2)})

    return processor


CONFIGS: Mapping[str, Callable[..., PreTrainedConfig]] = {
    "qwen3_vl": _qwen3_vl,
    "qwen3_5": _qwen3_5,
    "gemma3": _gemma3,
    "mistral3": _mistral3,
    "llama4": _llama4,
}
PROCESSORS: Mapping[str, Callable[..., Processor]] = {
    "qwen3_vl": _qwen_processor,
    "qwen3_5": _qwen_processor,
    "gemma3": _gemma3_processor,
    "mistral3": _pixtral_processor,
    "llama4": _llama4_processor,
}
MARKS = {
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_5": "<|vision_start|><|image_pad|><|vision_end|>",
    "gemma3": "<boi>",
    "mistral3": "[IMG]",
    "llama4": "<|image|>",
}
"""What stands for an image in a text."""


def build(name: str, seed: int = 0, **sizes: int) -> PreTrainedModel:
    """The tiny model `name`, a key of CONFIGS."""
    config = CONFIGS[name](**sizes)
    for part in (config, config.get_text_config()):
        part.eos_token_id = part.bos_token_id = part.pad_token_id = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    randomize(model, seed)
    model.generation_config.pad_token_id = 0
    return model


def inputs(name: str, texts: list[str], sizes: list[tuple[int, int]], **options: Any) -> BatchFeature:
    """What the processor makes of texts in which `@` is an image, of these sizes (width, height) in turn."""
    images = [image(*size, seed=n) for n, size in enumerate(sizes)]
    return PROCESSORS[name](**options)(images, [text.replace("@", MARKS[name]) for text in texts])
