"""Makes corruptions from names in a file or on the command line."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import sys

from diffem import safe_yaml
from diffem.errors import DiffemError, suggest

from .base import REGISTRY, Corruption, register_corruption
from .blackbox import BlackBox
from .physics import from_deepinv


def from_config(config: dict, source: str = "corruption") -> Corruption:
    """The corruption that a mapping {name: ..., argument: ...} describes; `chain` is a list of such mappings.

    Arguments:
        config: The mapping: a name, and arguments of the named corruption only.
        source: Where the mapping was found, for error messages.
    """
    arguments = dict(config)
    name = arguments.pop("name", None)
    if name == "BlackBox":
        raise DiffemError(
            f"{source}: a data folder never names code to run; give the function with --corruption package.module:function"
        )
    if name is None:
        raise DiffemError(f"{source}: name: missing; say how y came about, e.g. `name: Mask`{suggest('', REGISTRY)}")
    if not isinstance(name, str) or name not in REGISTRY:
        raise DiffemError(f"{source}: name: unknown corruption {name!r};{suggest(str(name), REGISTRY)}")
    kind = REGISTRY[name]
    known = inspect.signature(kind).parameters
    for key, value in arguments.items():
        if key not in known:
            raise DiffemError(f"{source}: {key}: {name} has no such argument;{suggest(str(key), known)}")
        if key == "chain" and isinstance(value, list):
            links = [link if isinstance(link, dict) else {"name": link} for link in value]
            arguments[key] = [from_config(link, f"{source}: chain") for link in links]
            continue
        annotation = str(known[key].annotation)
        if "str" in annotation:
            continue
        if isinstance(value, str):  # YAML reads 1e-3, without a decimal point, as text
            with contextlib.suppress(ValueError):
                value = arguments[key] = float(value)
        if isinstance(value, str) and value.startswith("[") and "Sequence" in annotation:  # from the command line
            value = arguments[key] = safe_yaml.parse(value, f"{source}: {key}")
        several = isinstance(value, list) and value and "Sequence" in annotation
        if not all(map(_is_number, value if several else [value])):
            raise DiffemError(f"{source}: {key}: must be a number, got {value!r}")
    missing = [k for k, p in known.items() if p.default is p.empty and k not in arguments]
    if missing:
        raise DiffemError(f"{source}: {missing[0]}: {name} needs it")
    try:
        return kind(**arguments)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise DiffemError(f"{source}: {name} cannot be made of {arguments}: {error}") from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2.0**127


def from_path(path: str) -> Corruption | type[Corruption]:
    """Imports 'package.module:name', also from the current directory: a function becomes a black box, an operator of deepinv a
    corruption; a corruption is returned; a subclass of :class:`Corruption` is registered and returned."""
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise DiffemError(f"--corruption {path}: write it as package.module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise DiffemError(f"--corruption {path}: cannot be imported: {error}") from None
    if isinstance(function, type) and issubclass(function, Corruption):
        return register_corruption(function)
    if isinstance(function, Corruption):
        return function
    if "deepinv.physics" in sys.modules and isinstance(function, sys.modules["deepinv.physics"].Physics):
        return from_deepinv(function)
    if not callable(function):
        raise DiffemError(f"--corruption {path}: is not callable")
    return BlackBox(function, path)
