"""Give an open-weight language model two more ways of decoding, and leave the first as it was, bit for bit.

`convert` makes the artifact, `average` one of several, `Engine` runs it in the modes `ar`, `diffusion` and `self_spec`
with `SamplingParams`, `certify` proves it lossless, `evaluate` measures it beside its original.  Importing this package
imports neither torch nor anything else that is slow: these names are looked up on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retrofit.errors import (
        ArtifactError,
        DataError,
        GateError,
        ResourceError,
        RetrofitError,
        TrainingError,
        UnsupportedModelError,
        UsageError,
    )
    from retrofit.eval.certify import certify
    from retrofit.exporting.export import export
    from retrofit.importing.import_adapter import import_adapter
    from retrofit.recipes.average import average
    from retrofit.recipes.convert import convert
    from retrofit.report.evaluate import Report, evaluate
    from retrofit.runtime.engine import Engine
    from retrofit.runtime.params import SamplingParams
    from retrofit.runtime.results import Event, Result
    from retrofit.sharing.pulling import pull
    from retrofit.sharing.pushing import push

__version__ = "0.1.0"
__all__ = [
    "ArtifactError",
    "DataError",
    "Engine",
    "Event",
    "GateError",
    "Report",
    "ResourceError",
    "Result",
    "RetrofitError",
    "SamplingParams",
    "TrainingError",
    "UnsupportedModelError",
    "UsageError",
    "__version__",
    "average",
    "certify",
    "convert",
    "evaluate",
    "export",
    "import_adapter",
    "pull",
    "push",
]

_ERRORS = (
    *("ArtifactError", "DataError", "GateError", "ResourceError", "RetrofitError", "TrainingError"),
    *("UnsupportedModelError", "UsageError"),
)
_HOMES = {
    **dict.fromkeys(_ERRORS, "retrofit.errors"),
    "Engine": "retrofit.runtime.engine",
    "Event": "retrofit.runtime.results",
    "Report": "retrofit.report.evaluate",
    "Result": "retrofit.runtime.results",
    "SamplingParams": "retrofit.runtime.params",
    "average": "retrofit.recipes.average",
    "certify": "retrofit.eval.certify",
    "convert": "retrofit.recipes.convert",
    "evaluate": "retrofit.report.evaluate",
    "export": "retrofit.exporting.export",
    "import_adapter": "retrofit.importing.import_adapter",
    "pull": "retrofit.sharing.pulling",
    "push": "retrofit.sharing.pushing",
}

if not TYPE_CHECKING:  # a type checker that saw this would let every misspelled attribute pass

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
