"""What a run of modules calls, in order: torch's functions, and functions of ours that are one call each.

Only what is known to come out alike at any numbers is written down; the rest is refused, never left in as it happened
to be:

    values read by Python     `.item()`, `bool()`, `.tolist()`: what Python then did is not seen
    shapes made of values     `nonzero`, a mask as an index, `torch.where` of one argument
    tensors of elsewhere      neither given, nor made here, nor a weight of the model
    weights written to

Not here: running it again (`program.py`), and when that may be (`steps.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from retrofit.adapters.one_call import is_one_call

SIZES = frozenset(
    (
        "shape",
        "dtype",
        "device",
        "ndim",
        "layout",
        "itemsize",
        "nbytes",
        "requires_grad",
        "is_cpu",
        "is_cuda",
        "is_leaf",
        "is_meta",
        "is_mps",
        "is_nested",
        "is_quantized",
        "is_sparse",
        "is_xla",
        "is_xpu",
        "is_mkldnn",
        "dim",
        "size",
        "numel",
        "nelement",
        "element_size",
        "__len__",
        "is_floating_point",
        "is_complex",
        "is_inference",
        "get_device",
    )
)
"""What Python may read of a tensor: equal at equal shapes."""
BY_VALUE = frozenset(
    (
        "nonzero",
        "argwhere",
        "masked_select",
        "unique",
        "unique_consecutive",
        "bincount",
        "repeat_interleave",
        "set_",
        "resize_",
    )
)
"""Functions whose results' shapes go by values."""
PLAIN: tuple[type, ...] = (int, float, complex, bool, str, bytes, type(None), type(Ellipsis))
PLAIN += (torch.dtype, torch.device, torch.layout, torch.memory_format)
"""What torch may be handed besides tensors."""


class Unrecordable(RuntimeError):
    """Why these modules cannot be written down."""


@dataclass(frozen=True)
class Value:
    """Something that a run is given or makes, by its number."""

    number: int


@dataclass
class Call:
    """One call: `arguments` and `named` hold a `Value` wherever something is that changes from run to run."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    made: Any
    """A `Value`, or a tuple of such and None."""
    ours: bool = False
    """A function of ours: it may write elsewhere, and what it is given besides tensors is its own affair."""
    in_place: bool = False


@dataclass
class Trace:
    given: list[Value] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    result: Value | None = None


class Recorder(TorchFunctionMode):
    """While entered, writes down in `trace` what this thread calls."""

    def __init__(self, given: Iterable[Any], weights: Iterable[Tensor]):
        """given: what changes from run to run; weights: tensors that are read where they are, at every run."""
        super().__init__()
        self.trace = Trace()
        self._numbers: dict[int, Value] = {}
        self._alive: list[Any] = []
        """A number stands for an object by its address, which nothing else may get meanwhile."""
        self._weights = {id(weight) for weight in weights}
        for one in given:
            self.trace.given.append(self._new(one))

    def value_of(self, result: Tensor) -> Value:
        """Raises Unrecordable for a tensor that was not made here."""
        if id(result) not in self._numbers:
            raise Unrecordable("the result is made by nothing that was seen")
        return self._numbers[id(result)]

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        arguments: tuple[Any, ...] = (),
        named: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(named or {})
        result = function(*arguments, **named)
        name = _name(function)
        if not _tensors(result) and (name in SIZES or not _tensors([*arguments, *named.values()])):
            return result
        ours = is_one_call(function)
        if not ours:
            self._refuse(name, arguments, named, result)
        in_place = not ours and _writes(name, named)
        call = Call(
            function,
            tuple(self._noted(a, ours) for a in arguments),
            {key: self._noted(a, ours) for key, a in named.items()},
            None,
            ours,
            in_place,
        )
        if in_place and not isinstance(call.arguments[0], Value):
            raise Unrecordable(f"{name} writes to a weight")
        call.made = self._made(result)
        self.trace.calls.append(call)
        return result

    def _refuse(self, name: str, arguments: tuple[Any, ...], named: Mapping[str, Any], result: Any) -> None:
        if not _tensors(result) and name != "__setitem__":
            raise Unrecordable(f"Python reads values by {name}")
        single = name == "where" and len(arguments) + len(named) == 1
        masked = name in ("__getitem__", "__setitem__") and any(_is_mask(t) for t in _tensors(arguments[1]))
        if name in BY_VALUE or single or masked:
            raise Unrecordable(f"{name} makes shapes of values")
        if "out" in named:
            raise Unrecordable(f"{name} writes to `out`")

    def _noted(self, argument: Any, ours: bool) -> Any:
        """With a `Value` in every place of something that changes.  Raises Unrecordable."""
        if id(argument) in self._numbers:
            return self._numbers[id(argument)]
        if isinstance(argument, Tensor):
            if id(argument) not in self._weights:
                raise Unrecordable(f"a tensor {list(argument.shape)} that comes from nowhere")
            return argument
        if isinstance(argument, (tuple, list)):
            parts = [self._noted(a, ours) for a in argument]
            return parts if isinstance(argument, list) else tuple(parts)
        if isinstance(argument, dict):
            return {key: self._noted(a, ours) for key, a in argument.items()}
        if isinstance(argument, slice):
            parts = [argument.start, argument.stop, argument.step]
            if _tensors(parts):
                raise Unrecordable("Python reads values by an index")
            return argument
        if not ours and not isinstance(argument, PLAIN):
            raise Unrecordable(f"a {type(argument).__name__} is handed to torch")
        return argument

    def _made(self, result: Any) -> Any:
        if isinstance(result, Tensor):
            return self._numbers.get(id(result)) or self._new(result)
        if result is None:
            return None
        if isinstance(result, (tuple, list)):
            return tuple(self._made(one) for one in result)
        raise Unrecordable(f"a {type(result).__name__} is made")

    def _new(self, thing: Any) -> Value:
        value = self._numbers[id(thing)] = Value(len(self._alive))
        self._alive.append(thing)
        return value


def _name(function: Callable[..., Any]) -> str:
    """`shape` of the getter of a tensor's shape, `add` of `torch.Tensor.add` and of `torch.ops.aten.add.Tensor`."""
    name = getattr(function, "__name__", "")
    if name == "__get__":
        return str(function.__self__.__name__)  # type: ignore[attr-defined]
    return str(name).split(".")[0]


def _writes(name: str, named: Mapping[str, Any]) -> bool:
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name == "__setitem__" or bool(named.get("inplace"))


def _is_mask(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.bool, torch.uint8)


def _tensors(thing: Any) -> list[Tensor]:
    if isinstance(thing, Tensor):
        return [thing]
    if isinstance(thing, slice):
        return _tensors((thing.start, thing.stop, thing.step))
    if isinstance(thing, (tuple, list)):
        return [t for one in thing for t in _tensors(one)]
    return []
