"""Functions of ours that stand as one call where a run of a model's modules is written down.

Not here: who writes it down (`runtime/backends/hf/recorded/`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from torch.overrides import handle_torch_function, has_torch_function_unary

Function = TypeVar("Function", bound=Callable[..., Any])


def one_call(function: Function, plain: Callable[[Any, Any], bool] | None = None) -> Function:
    """Hand the function, whose second argument is a tensor of rows, as a whole to whoever watches torch's calls.

    plain: of its first two arguments, whether it does with them what some of torch's calls do and nothing else; those
    are then seen in its place.
    """

    @wraps(function)
    def call(first: Any, rows: Any, *arguments: Any, **named: Any) -> Any:
        if has_torch_function_unary(rows) and not (plain is not None and plain(first, rows)):
            return handle_torch_function(call, (rows,), first, rows, *arguments, **named)
        return function(first, rows, *arguments, **named)

    call.one_call = True  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


def is_one_call(function: Callable[..., Any]) -> bool:
    return getattr(function, "one_call", False)
