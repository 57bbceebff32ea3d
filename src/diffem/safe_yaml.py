"""YAML that may come from a stranger: plain values only, of a limited size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from diffem import reading
from diffem.errors import DiffemError

LARGEST_TEXT = 2**20  # bytes of a YAML file


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # a few lines of them can stand for billions of values
            raise yaml.YAMLError("it holds an alias (*); write the value itself")
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def parse(text: str, where: str) -> Any:
    """The content of YAML text, which makes plain values only; `where` is its name in errors."""
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # not only of YAML: a date or a number that is none, or too deep a nesting
        what = (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
            what = f"line {error.problem_mark.line + 1}: {error.problem}"
        raise DiffemError(f"{where}: is not YAML: {what}") from None


def read(file: Path) -> Any:
    """The content of a YAML file."""
    try:
        return parse(reading.read(file, LARGEST_TEXT).decode(), str(file))
    except UnicodeDecodeError:
        raise DiffemError(f"{file}: is not YAML: it is not text in UTF-8") from None


def dump(content: Any) -> bytes:
    """YAML that :func:`read` reads."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False).encode()
