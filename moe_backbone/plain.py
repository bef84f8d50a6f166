"""Dataclasses from JSON: every value of its field's type, nothing unknown, no code."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Kind = TypeVar("Kind")


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: If it is missing, cannot be read, is no JSON or is nested too deeply.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: {str(error) or type(error).__name__}") from None


def from_plain(kind: type[Kind], data: Any) -> Kind:
    """A dataclass, with dataclasses in it, from what JSON makes of it.

    Fields that are missing have their defaults.

    Raises:
        ValueError: If a value is of another type than its field, or a field is not known or lacks a value.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{kind.__name__} must be an object, got {data!r:.60}")
    hints, known = get_type_hints(kind), {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if wrong := set(data) - known:
        raise ValueError(f"unknown settings {', '.join(sorted(wrong)):.200}")
    values = {name: _value(name, hints[name], value) for name, value in data.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(str(error)) from None


def _value(name: str, hint: Any, value: Any) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return from_plain(hint, value)  # type: ignore[arg-type]
    if origin in (Union, UnionType):
        for one in sorted(inner, key=lambda option: option is not NoneType):
            try:
                return _value(name, one, value)
            except ValueError as error:
                problem = error
        raise problem
    if origin is Literal:
        return _checked(name, value, value in inner, f"one of {', '.join(map(str, inner))}")
    if origin is tuple:
        _checked(name, value, isinstance(value, list | tuple), "a list")
        return tuple(_value(name, inner[0], item) for item in value)
    if hint is Path:
        return Path(_checked(name, value, isinstance(value, str), "a path"))
    kinds = {int: (int,), float: (int, float), bool: (bool,), str: (str,), NoneType: (NoneType,)}
    if hint not in kinds:  # types of other kinds are checked by who uses them
        return value
    right = isinstance(value, kinds[hint]) and (hint is bool or not isinstance(value, bool))
    return _checked(name, value, right, getattr(hint, "__name__", str(hint)))


def _checked(name: str, value: Any, right: bool, rule: str) -> Any:
    if not right:
        raise ValueError(f"{name} must be {rule}, got {value!r:.60}")
    return value
