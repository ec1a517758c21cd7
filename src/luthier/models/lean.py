"""Importing transformers, and making its models, without what that brings along for others: half of the time until a
command begins to work.

Its modelling code imports torch's compiler (to mark a few functions for it, and for a class that some masks are made
with), the tensors of FSDP and tensor parallelism, and scipy's optimisers (for a loss of object detection). A model whose
weights will come from a file draws numbers for all of them first, on a device without numbers, where torch asks the
compiler how that would go.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

T = TypeVar("T")
COMPILER = "torch._dynamo"
SYMBOLS = "torch.fx.experimental.symbolic_shapes"
INDEXING = f"{COMPILER}._trace_wrapped_higher_order_op"
# What transformers asks for, and is told is not there.
ABSENT = ("is_torch_distributed_available", "is_torch_flex_attn_available", "is_scipy_available")
MODELS = "models"
WANTED = ("transformers.modeling_utils", "transformers.generation.utils")
Structure: TypeAlias = dict[frozenset[str], dict[str, set[str]]]
"""What the files of a package define, by what must be installed for it and by file."""


def import_lean() -> bool:
    """Import transformers' modelling code by itself; False where it, or the compiler, is imported already.

    For a process that is ours: in it, transformers' own FSDP, tensor parallelism, flex attention and losses of object
    detection do not work afterwards. All of torch does, its compiler too.
    """
    if any(name in sys.modules for name in (*WANTED, COMPILER)):
        return False
    for name, stand_in in STAND_INS.items():
        if name not in sys.modules:
            # Of a part of the compiler it could not be asked without importing that.
            spec = None if stand_in is _Indexing else find_spec(name)
            sys.modules[name] = stand_in(name)
            sys.modules[name].__spec__ = spec
    with _told_absent(), _looked_once(), _kept():
        for name in WANTED:
            import_module(name)
    vars(torch.distributed).setdefault("__getattr__", _part_of_distributed)
    return True


def _part_of_distributed(name: str) -> ModuleType:
    """Others take these parts of torch.distributed to be there, since transformers imports them."""
    if name not in ("tensor", "fsdp", "checkpoint", "device_mesh"):
        raise AttributeError(f"module 'torch.distributed' has no attribute {name!r}")
    return import_module(f"torch.distributed.{name}")


class Undrawn(TorchFunctionMode):
    """Inside, nothing is drawn for weights that have no values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == nn.init.__name__:
            weight = args[0] if args else kwargs["tensor"]
            if weight.is_meta:
                return weight
        return func(*args, **kwargs)


class _Unasked(ModuleType):
    """Stands where a module would be, and answers for it as long as little is asked; for anything else it is imported."""

    package = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and not (name == "__path__" and self.package):
            raise AttributeError(name)
        for one in [one for one, held in sys.modules.items() if isinstance(held, _Unasked)]:
            del sys.modules[one]
        real = import_module(self.__name__)
        vars(self).update(vars(real))  # for those who hold this one
        return getattr(real, name)


class _Compiler(_Unasked):
    """Nothing is compiled yet, so there is nothing to leave alone."""

    package = True

    @staticmethod
    def disable(fn: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        return (lambda marked: marked) if fn is None else fn

    @staticmethod
    def allow_in_graph(fn: Callable[..., Any]) -> Callable[..., Any]:
        return fn

    @staticmethod
    def assume_constant_result(fn: Callable[..., Any]) -> Callable[..., Any]:
        return fn

    @staticmethod
    def graph_break(msg: str = "") -> None:
        pass


class _Indexing(_Unasked):
    """transformers imports a class from here that it may never make."""

    def TransformGetItemToIndex(self) -> Any:
        return self.__getattr__("TransformGetItemToIndex")()


class _Symbols(_Unasked):
    """There are no symbolic numbers until this module is imported, so all that torch asks about are plain."""

    expect_true = guard_or_false = guard_or_true = guard_size_oblivious = statically_known_true = staticmethod(bool)

    @staticmethod
    def guarding_hint_or_throw(number: T) -> T:
        return number

    @staticmethod
    def has_guarding_hint(number: object) -> bool:
        return True

    @staticmethod
    def free_unbacked_symbols(numbers: object) -> frozenset[object]:
        return frozenset()

    @staticmethod
    def is_nested_int(number: object) -> bool:
        return isinstance(number, torch.SymInt) and number.node.is_nested_int()

    @staticmethod
    def sym_and(*found: bool) -> bool:
        return all(found)

    @staticmethod
    def sym_or(*found: bool) -> bool:
        return any(found)

    @staticmethod
    def sym_eq(left: object, right: object) -> bool:
        return bool(left == right)


class _Algebra(_Unasked):
    """No number that torch is asked about is a formula."""

    package = True

    class Basic:
        pass


STAND_INS = {COMPILER: _Compiler, INDEXING: _Indexing, SYMBOLS: _Symbols, "sympy": _Algebra}


@contextmanager
def _kept() -> Iterator[None]:
    """Nothing of what is imported goes away, and looking through it takes a fifth of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()


@contextmanager
def _told_absent() -> Iterator[None]:
    held = [import_module(name) for name in ("transformers.utils", "transformers.utils.import_utils")]
    before = [(one, name, getattr(one, name)) for one in held for name in ABSENT if hasattr(one, name)]
    for one, name, _ in before:
        setattr(one, name, lambda: False)
    try:
        yield
    finally:
        for one, name, answer in before:
            setattr(one, name, answer)


@contextmanager
def _looked_once() -> Iterator[None]:
    """transformers looks through the files of all its models for what they define, and then once more."""
    import transformers.utils.import_utils as utils

    look = utils.define_import_structure

    @lru_cache
    def define_import_structure(module_path: str, prefix: str | None = None) -> Structure:
        models = Path(module_path).parent
        if prefix is not None or models.name != MODELS or models.parent != Path(utils.__file__).parents[1]:
            return look(module_path, prefix)
        return models_structure(look(str(models), MODELS))

    utils.define_import_structure = define_import_structure
    try:
        yield
    finally:
        utils.define_import_structure = look


def models_structure(whole: Structure) -> Structure:
    """Of what transformers defines, what its models do, as they are called among themselves."""
    start = f"{MODELS}."
    return {
        needed: {name.removeprefix(start): set(found) for name, found in files.items() if name.startswith(start)}
        for needed, files in whole.items()
    }
