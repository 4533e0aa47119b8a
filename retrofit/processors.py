"""A base's own processor: messages with images in, what its `generate` takes out.

Not here: what the model makes of it (`runtime/backends/hf/given/`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retrofit.errors import ResourceError, RetrofitError, UsageError, out_of_memory
from retrofit.gguf_files import is_gguf
from retrofit.hub import Base

NEEDED = "pip install pillow torchvision"


def image_prompt(
    base: Base | None,
    text: str,
    images: Sequence[Path],
    system: str | None = None,
    template: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> Mapping[str, Any]:
    """A user's message of images and text, through the base's processor and its chat template.

    template: arguments of the template.  Raises UsageError for a base without one, a file that is no image, or what the
    processor refuses; ResourceError where a package for images is missing.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ResourceError("images need the package pillow", NEEDED) from error
    processor = _processor(base, trust_remote_code)
    content: list[dict[str, Any]] = []
    for path in images:
        try:
            content.append({"type": "image", "image": Image.open(path).convert("RGB")})
        except FileNotFoundError as error:
            raise UsageError(f"no file {path}") from error
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            raise UsageError(f"{path} is no image that can be read: {error}") from error
    content.append({"type": "text", "text": text})
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    try:
        found: Mapping[str, Any] = processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **(template or {}),
        )
    except Exception as error:  # the template is the model's own program, and may raise anything
        raise _refused("the base's processor refuses this message", error) from error
    return found


def _processor(base: Base | None, trust_remote_code: bool) -> Any:
    from transformers import AutoProcessor

    place = None if base is None else base.place
    if base is None or place is None or is_gguf(place):
        raise UsageError("images need the processor of a base that is a folder or a Hub id")
    try:
        processor = AutoProcessor.from_pretrained(place, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _refused(f"the processor of {base.name} cannot be loaded", error) from error
    if getattr(processor, "image_processor", None) is None:
        raise UsageError(f"{base.name} takes text alone: it has no processor for images")
    return processor


def _refused(what: str, error: Exception) -> RetrofitError:
    if isinstance(error, ImportError):
        return ResourceError(f"{what}: a package is missing: {_first_line(error)}", NEEDED)
    return out_of_memory(error) or UsageError(f"{what}: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
