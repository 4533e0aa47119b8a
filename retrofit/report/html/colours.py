"""One colour for each mode, on paper and on a dark screen, and the way of decoding that has it.

matplotlib draws in the colours of paper; each then becomes a variable of the page's style, so that a picture follows
the screen.
"""

from __future__ import annotations

COLOURS = {
    "base": ("#646c75", "#9aa4af"),
    "ar": ("#2f6fb7", "#7fb3f0"),
    "self-spec": ("#1a7f4e", "#57c98f"),
    "diffusion": ("#a0439a", "#dd94d7"),
    "lookup": ("#9a5b00", "#f0ab4d"),
    "ink": ("#1f2328", "#e6edf3"),
    "faint": ("#59636e", "#9da7b1"),
    "rule": ("#d1d9e0", "#3a434d"),
    "paper": ("#ffffff", "#0d1117"),
    "card": ("#f6f8fa", "#161c24"),
    "bad": ("#c2293f", "#ff8090"),
}
"""Name -> (on paper, on a dark screen)."""
MODES = {
    "ar": "ar",
    "auto": "self-spec",
    "fused": "self-spec",
    "two_forward": "self-spec",
    "hybrid": "self-spec",
    "self_spec": "self-spec",
    "prompt_lookup": "lookup",
    "transformers_prompt_lookup": "lookup",
    "transformers lookup": "lookup",
    "diffusion": "diffusion",
    "transformers": "base",
    "the base against itself": "base",
}
"""Way of decoding -> the colour of its mode; prompt lookup has one of its own, for it drafts without the adapter."""
WAYS = {
    "ar": "ar",
    "auto": "self_spec, auto",
    "fused": "self_spec, fused",
    "two_forward": "self_spec, two_forward",
    "hybrid": "self_spec, hybrid",
    "prompt_lookup": "prompt lookup",
    "diffusion": "diffusion",
    "transformers": "the base, by transformers",
    "transformers_prompt_lookup": "prompt lookup, by transformers",
    "transformers lookup": "prompt lookup, by transformers",
}
"""What a way is called beside its bar or its line."""
MAIN = ("auto", "transformers")
"""Ways that a picture is about; the others stand beside them."""


def colour(way: str) -> str:
    """The colour's name; of `fused, batch 8` and of `another artifact, fused` that of `fused`.

    A model that drafts for the base (`transformers assisted=...`) has that of the base; a way that nobody
    knows has `ink`.
    """
    for name in (way, *way.split(", "), way.partition(" ")[0]):
        if name in MODES:
            return MODES[name]
    return "ink"


def paper(name: str) -> str:
    return COLOURS[name][0]


def variables(dark: bool) -> str:
    """Every colour as a variable of CSS."""
    return " ".join(f"--{name}: {pair[dark]};" for name, pair in COLOURS.items())


def painted(style: str) -> str:
    """A style of SVG in which every colour of paper is its variable."""
    for name, (light, _) in COLOURS.items():
        style = style.replace(light, f"var(--{name})")
    return style
