"""The script's own variables: which of them it may still read, for a drill.

At a safe point the script stands in a `for` line of some function, called by others. A variable
of these functions matters to what comes next only when some way through the code from there reads
it before it is assigned: when it is *live*. That is found from the byte code, by the usual
backward iteration (A. Aho et al., Compilers, "live-variable analysis"). Ways through exception
handlers are not followed.

A module's variables count when some function of the module names them.
"""

from __future__ import annotations

import dis
import sys
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

from ckptd.worker import callsite

_JUMPS: Final = {"JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT", "JUMP_ABSOLUTE"}
_ENDS: Final = {"RETURN_VALUE", "RETURN_CONST", "RAISE_VARARGS", "RERAISE"}


def live(frame: types.FrameType) -> frozenset[str]:
    """The local variables that may be read after the instruction at which a frame stands."""
    return _live_after(frame.f_code, frame.f_lasti)


def user_modules() -> Iterator[types.ModuleType]:
    """The user's modules, the script first."""
    for name, module in [("__main__", sys.modules["__main__"]), *sys.modules.items()]:
        file = getattr(module, "__file__", None)
        is_first = name == "__main__" or module is not sys.modules["__main__"]
        if file is not None and is_first and callsite.is_users(str(Path(file).absolute())):
            yield module


def global_variables(module: types.ModuleType) -> dict[str, Any]:
    """A module's variables that some function of it names."""
    known = vars(module)
    named = _names_in(module.__name__, len(known))
    return {name: known[name] for name in named if name in known}


# ------------------------------------------------------------------ byte code


@cache
def _live_after(code: types.CodeType, offset: int) -> frozenset[str]:
    instructions, following, entering = _analysed(code)
    # Within a call the offset may lie behind the instruction, in its inline cache.
    index = max(i for i, one in enumerate(instructions) if one.offset <= offset)
    found: set[str] = set().union(*(entering[i] for i in following[index]))
    return frozenset(found | set(code.co_cellvars))  # a function inside may read those at any time


@cache
def _analysed(
    code: types.CodeType,
) -> tuple[list[dis.Instruction], list[list[int]], list[set[str]]]:
    """The instructions, the indices of those that can follow each, and the names live before it."""
    instructions = list(dis.get_instructions(code))
    at = {one.offset: i for i, one in enumerate(instructions)}
    following = [_following(one, i, at) for i, one in enumerate(instructions)]
    effects = [_effects(one) for one in instructions]
    entering: list[set[str]] = [set() for _ in instructions]
    changed = True
    while changed:
        changed = False
        for i in reversed(range(len(instructions))):
            after: set[str] = set().union(*(entering[j] for j in following[i]))
            for name, is_read in reversed(effects[i]):
                (after.add if is_read else after.discard)(name)
            if after != entering[i]:
                entering[i], changed = after, True
    return instructions, following, entering


def _following(one: dis.Instruction, index: int, at: dict[int, int]) -> list[int]:
    if one.opname in _ENDS:
        return []
    targets = [at[one.argval]] if one.opcode in (*dis.hasjrel, *dis.hasjabs) else []
    if one.opname in _JUMPS:
        return targets
    return [*targets, *([index + 1] if index + 1 < len(at) else [])]


def _effects(one: dis.Instruction) -> list[tuple[str, bool]]:
    """(name, whether it is read rather than written), in order; newer Pythons join two in one."""
    words = one.opname.split("_")
    kinds = [word == "LOAD" for word in words if word in ("LOAD", "STORE")]
    names = one.argval if isinstance(one.argval, tuple) else (one.argval,)
    is_variable = {"FAST", "DEREF", "NAME", "GLOBAL", "CLOSURE"} & set(words)
    if not is_variable or not all(isinstance(name, str) for name in names):
        return []
    return list(zip(names, kinds, strict=False))


@cache
def _names_in(module_name: str, size: int) -> frozenset[str]:  # noqa: ARG001  # asked again when it grew
    """Every name that functions and methods of a module mention."""
    module = sys.modules[module_name]
    names: set[str] = set()
    todo: list[Any] = list(vars(module).values())
    while todo:
        value = todo.pop()
        if isinstance(value, type) and value.__module__ == module.__name__:
            todo += vars(value).values()
        elif isinstance(value, staticmethod | classmethod):
            todo.append(value.__func__)
        elif isinstance(value, types.FunctionType) and value.__module__ == module.__name__:
            todo.append(value.__code__)
        elif isinstance(value, types.CodeType):
            names.update(value.co_names)
            todo += value.co_consts
    return frozenset(names)
