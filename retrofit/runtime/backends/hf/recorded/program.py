"""A trace as one straight function of Python.

What is left out changes no bit: calls whose results nobody reads, a call with the arguments of one before it, and a
change of type to the type that is there.  Where something is written in place, only the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from retrofit.runtime.backends.hf.recorded.trace import Call, Trace, Value

CONVERSIONS = frozenset(("to", "float", "half", "bfloat16", "double", "type", "type_as", "dropout"))
"""They return what they are given where there is nothing to do, and go by type alone."""

Program = Callable[..., Any]


def program(trace: Trace) -> Program:
    """A function of what the trace was given, which returns its result."""
    calls = trace.calls
    if not any(call.in_place for call in calls):
        calls, same = _once(calls)
        result = same.get(trace.result, trace.result)
    else:
        result = trace.result
    assert result is not None
    return _function(trace.given, _needed(calls, result), result)


def _once(calls: list[Call]) -> tuple[list[Call], dict[Any, Any]]:
    """The calls without repeated ones and empty conversions, and which value stands for which."""
    same: dict[Any, Any] = {}
    seen: dict[Any, Any] = {}
    kept = []
    for call in calls:
        call = Call(
            call.function,
            tuple(_replaced(a, same) for a in call.arguments),
            {name: _replaced(a, same) for name, a in call.named.items()},
            call.made,
            call.ours,
        )
        given_back = isinstance(call.made, Value) and same.get(call.made, call.made) in values_in(call.arguments)
        if given_back and call.function.__name__ in CONVERSIONS:
            continue
        if not call.ours:
            key = (call.function, _key(call.arguments), _key(call.named))
            if key in seen:
                same |= dict(zip(values_in(call.made), values_in(seen[key]), strict=True))
                continue
            seen[key] = call.made
        kept.append(call)
    return kept, same


def _needed(calls: list[Call], result: Value) -> list[Call]:
    """The calls that the result depends on, and those of ours."""
    wanted, kept = {result}, []
    for call in reversed(calls):
        if call.ours or call.in_place or not wanted.isdisjoint(values_in(call.made)):
            wanted.update(values_in((call.arguments, call.named)))
            kept.append(call)
    return kept[::-1]


def _function(given: list[Value], calls: list[Call], result: Value) -> Program:
    """Local variables are used again as soon as what they hold is read no more, so nothing is held for longer."""
    last: dict[Value, int] = {result: len(calls)}
    for number, call in reversed(list(enumerate(calls))):
        for value in values_in((call.made, call.arguments, call.named)):
            last.setdefault(value, number)
    places = {value: f"v{n}" for n, value in enumerate(given)}
    free: list[str] = []
    constants: dict[str, Any] = {}
    lines = [f"def run({', '.join(places[value] for value in given)}):"]
    for number, call in enumerate(calls):
        text = _called(call, places, constants)
        ending = {v for v in values_in((call.arguments, call.named)) if last[v] == number}
        free += [places.pop(value) for value in ending]
        new = [value for value in values_in(call.made) if value not in places]
        for value in new:
            places[value] = free.pop() if free else f"v{len(places) + len(free)}"
        lines.append(f"    {_target(call.made, places)} = {text}" if call.made is not None else f"    {text}")
        free += [places.pop(value) for value in new if last[value] == number]
    lines.append(f"    return {places[result]}")
    exec(compile("\n".join(lines), "<recorded>", "exec"), constants)
    run: Program = constants["run"]
    return run


def _called(call: Call, places: Mapping[Value, str], constants: dict[str, Any]) -> str:
    arguments = [_text(a, places, constants) for a in call.arguments]
    arguments += [f"{name}={_text(a, places, constants)}" for name, a in call.named.items()]
    return f"{_constant(call.function, constants)}({', '.join(arguments)})"


def _text(argument: Any, places: Mapping[Value, str], constants: dict[str, Any]) -> str:
    if isinstance(argument, Value):
        return places[argument]
    if not any(True for _ in values_in(argument)):
        return _constant(argument, constants)
    if isinstance(argument, dict):
        return "{" + ", ".join(f"{k!r}: {_text(a, places, constants)}" for k, a in argument.items()) + "}"
    parts = "".join(f"{_text(a, places, constants)}, " for a in argument)
    return f"[{parts}]" if isinstance(argument, list) else f"({parts})"


def _constant(thing: Any, constants: dict[str, Any]) -> str:
    if thing is None or isinstance(thing, (bool, int)):
        return repr(thing)
    name = f"c{id(thing)}"
    constants[name] = thing
    return name


def _target(made: Any, places: Mapping[Value, str]) -> str:
    if made is None:
        return "_"
    return places[made] if isinstance(made, Value) else "(" + "".join(f"{_target(m, places)}, " for m in made) + ")"


def values_in(thing: Any) -> Iterator[Value]:
    if isinstance(thing, Value):
        yield thing
    elif isinstance(thing, dict):
        for one in thing.values():
            yield from values_in(one)
    elif isinstance(thing, (tuple, list)):
        for one in thing:
            yield from values_in(one)


def _replaced(thing: Any, same: Mapping[Any, Any]) -> Any:
    if isinstance(thing, Value):
        return same.get(thing, thing)
    if isinstance(thing, dict):
        return {name: _replaced(one, same) for name, one in thing.items()}
    if isinstance(thing, (tuple, list)) and any(True for _ in values_in(thing)):
        return type(thing)(_replaced(one, same) for one in thing)
    return thing


def _key(thing: Any) -> Any:
    """Equal for equal arguments."""
    if isinstance(thing, dict):
        return tuple((name, _key(one)) for name, one in thing.items())
    if isinstance(thing, (tuple, list)):
        return type(thing), tuple(_key(one) for one in thing)
    if isinstance(thing, slice):
        return slice, _key((thing.start, thing.stop, thing.step))
    if isinstance(thing, (Value, str, int)):
        return type(thing), thing
    if isinstance(thing, (float, complex)):
        return repr(thing)  # 0.0 is not -0.0
    return id(thing)
