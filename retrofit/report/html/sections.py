"""How each section of a report looks: a function of what the section found, which gives HTML.

Pictures come first, then every figure in a table; nothing is worked out but where a line ends.  A section that is not
here is shown by `generic.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from retrofit.report.html.answers import compared, losslessness, quality
from retrofit.report.html.bounds import against, other_hardware, speed_of_light
from retrofit.report.html.decoding import acceptance, break_even, cost, diffusion, speed, training

SECTIONS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "compared": compared,
    "losslessness": losslessness,
    "quality": quality,
    "acceptance": acceptance,
    "speed": speed,
    "break_even": break_even,
    "cost": cost,
    "against": against,
    "diffusion": diffusion,
    "speed_of_light": speed_of_light,
    "other_hardware": other_hardware,
    "training": training,
}
