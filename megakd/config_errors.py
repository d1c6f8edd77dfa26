"""What pydantic finds wrong with a recipe, said as field, value, rule and fix.

Knows no section by name: it follows the models' fields, so that a new objective or stage needs nothing here.
"""

from __future__ import annotations

import difflib
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from megakd.errors import ConfigError

_NEAR = 0.65  # how alike a known name has to be to be offered (difflib's ratio)

_TYPE_RULES = {
    "int_": "a whole number", "float_": "a number", "finite_number": "a finite number", "bool_": "true or false",
    "string_type": "text (quote a number)", "path_": "a path",
}  # fmt: skip
_LIMITS = {
    "greater_than_equal": "at least", "greater_than": "more than", "less_than_equal": "at most",
    "less_than": "less than",
}  # fmt: skip


def as_config_error(error: ValidationError, root: type[BaseModel], raw: dict[str, Any], whole: str) -> ConfigError:
    """The first finding of pydantic.

    Args:
        error: what it raised.
        root: the model that it was to make.
        raw: the values that it was given.
        whole: what a missing setting has to be added to.
    """
    first = error.errors()[0]
    parts, section, tag = _locate(first["loc"], root, raw)
    field, value, kind = ".".join(parts), first["input"], first["type"]
    fix = "Correct the value"
    match kind:
        case "extra_forbidden":
            rule = f"{'there is' if tag is None else f'the kind {tag!r} has'} no such setting"
            fix = _nearest(parts[-1], list(section.model_fields))
        case "missing":
            value, rule, fix = None, "has to be set and is not", f"Add {parts[-1]!r} to {whole}"
        case "union_tag_not_found":
            field, value, rule = f"{field}.kind", None, "has to be set and is not"
            fix = f"Write one of {', '.join(_kinds(first['loc'], section))}"
        case "union_tag_invalid":
            field, value, rule = f"{field}.kind", first["ctx"]["tag"], "there is no such kind"
            fix = _nearest(value, _kinds(first["loc"], section))
        case "literal_error":
            rule, fix = "is not one of the known values", f"Write {first['ctx']['expected']}"
        case "invalid_key":
            rule, fix = "a setting's name has to be text", "Correct or quote it"
        case "string_pattern_mismatch":
            rule, fix = "it becomes the name of a file or folder", "Use letters, digits, _ and - only"
        case "model_type" | "model_attributes_type" | "dict_type":
            rule, fix = "has to be a section of settings", f"Write its settings below `{parts[-1]}:`"
        case "tuple_type":
            rule, fix = "has to be a list", f"Write `{parts[-1]}: [...]`"
        case "too_short" | "string_too_short":
            least = first["ctx"]["min_length"]
            rule = "must not be empty" if least == 1 else f"has to hold at least {least}"
            fix = "Fill it" if least == 1 else "Add more"
        case _ if kind in _LIMITS:
            [limit] = first["ctx"].values()
            rule = f"has to be {_LIMITS[kind]} {limit}"
        case _:
            types = [name for beginning, name in _TYPE_RULES.items() if kind.startswith(beginning)]
            rule = f"has to be {types[0]}" if types else first["msg"]
    return ConfigError(field, value, rule, fix)


def _locate(
    location: tuple[int | str, ...], root: type[BaseModel], raw: Any
) -> tuple[list[str], type[BaseModel], str | None]:
    """The name of the setting at pydantic's location, in parts; the section that it stands in; and that one's kind,
    where the section comes in several kinds.

    An item of a list that has a name goes by it. Behind a section that comes in kinds, pydantic's location has the one
    that it chose; it is no part of the name.
    """
    parts: list[str] = []
    section, tag, value = root, None, raw
    choices: list[type[BaseModel]] = []
    for number, part in enumerate(location):
        if len(choices) > 1 and isinstance(part, str):
            section, tag, choices = _of_kind(choices, part), part, []
            continue
        if isinstance(value, list):
            value = value[int(part)]
            if isinstance(value, dict) and "name" in value and isinstance(value["name"], str):
                parts.append(value["name"])
            else:
                parts[-1] += f"[{part}]"
            continue
        if part == "[key]":  # pydantic's word for a mapping's key itself, which comes before it
            continue
        parts.append(str(part))
        value = value[part] if isinstance(value, dict) and part in value else None
        if number < len(location) - 1 and part in section.model_fields:
            choices = _sections(section.model_fields[str(part)].annotation)
            if len(choices) == 1:
                [section], tag = choices, None
    return parts, section, tag


def _kinds(location: tuple[int | str, ...], section: type[BaseModel]) -> list[str]:
    """The kinds that the section at a location may have."""
    field = next(part for part in reversed(location) if isinstance(part, str))
    choices = _sections(section.model_fields[field].annotation)
    return [kind for choice in choices for kind in get_args(choice.model_fields["kind"].annotation)]


def _of_kind(choices: list[type[BaseModel]], kind: str) -> type[BaseModel]:
    return next(choice for choice in choices if kind in get_args(choice.model_fields["kind"].annotation))


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field's type names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _sections(argument)]


def _nearest(name: str, known: list[str]) -> str:
    """The fix that offers the known name nearest to one that is not known."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=_NEAR)
    return f"Did you mean {near[0]!r}?" if near else f"Write one of {', '.join(known)}"
