"""YAML on one side, the frozen recipe on the other, with line numbers in between.

    recipe.yaml --ruamel--> mapping with positions --overrides--> --pydantic--> Recipe

ruamel.yaml is read in its 1.2 manner: ``1e-4`` is a number and ``no`` a word.
All mistakes of a file are raised together, in the order of its lines.
"""

from __future__ import annotations

import contextlib
import difflib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError

from lorakeet.base.errors import RecipeError
from lorakeet.base.recipe import Recipe


def read_recipe(path: str | Path, *, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file, checked whole.

    A path is looked for beside the recipe first, then from the current folder.

    Args:
        overrides: ``section.key=value`` in YAML's notation, applied in order.

    Raises:
        RecipeError: all unknown keys, wrong values and bad overrides, with lines.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(
            [f"{path}: there is no such recipe. 'lorakeet new {path}' writes a commented one."]
        )
    content = read_yaml(path)
    problems = _apply_overrides(content, overrides)
    return _find_beside(path.parent, _validate(content, str(path), problems))


def recipe_from_dict(content: Mapping[str, Any]) -> Recipe:
    """The recipe of a plain mapping, checked like a file.

    Raises:
        RecipeError: all mistakes together.

    >>> recipe_from_dict({"base": "starter", "data": {"train": "a.jsonl"}}).method.rank
    16
    """
    return _validate(dict(content), "recipe", [])


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain lists, mappings and scalars, every default written out."""
    return recipe.model_dump(mode="json")


def to_yaml(content: Any) -> str:
    """A value as block-style YAML text, long lines unbroken."""
    yaml = YAML()
    yaml.width = 10_000
    yaml.representer.add_representer(
        type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    text = io.StringIO()
    yaml.dump(content, text)
    return text.getvalue()


def to_commented_yaml(recipe: Recipe) -> str:
    """A recipe as YAML with the meaning of each setting and the reason of its default."""
    lines = ["# A Lorakeet recipe. Only 'base' and 'data.train' are needed; the rest are defaults."]
    for name, field in Recipe.model_fields.items():
        value = getattr(recipe, name)
        lines += ["", f"# {field.description}"] if isinstance(value, BaseModel) else []
        lines += _section_lines(name, value, field)
    return "\n".join(lines) + "\n"


def _find_beside(folder: Path, recipe: Recipe) -> Recipe:
    """The recipe with every path that lies beside the recipe file made reachable."""

    def find(name: Any) -> Any:
        if not isinstance(name, str) or Path(name).is_absolute():
            return name
        is_here = (folder / name).exists() or any(folder.glob(name) if "*" in name else ())
        return str(folder / name) if is_here else name

    sources = tuple(
        source.model_copy(update={"path": find(source.path)}) for source in recipe.data.train
    )
    data = recipe.data.model_copy(
        update={
            "train": sources,
            "validation": find(recipe.data.validation),
            "chat_template": find(recipe.data.chat_template),
        }
    )
    questions = {name: find(getattr(recipe.evaluate, name)) for name in ("questions", "general")}
    evaluate = recipe.evaluate.model_copy(update=questions)
    method = recipe.method
    if method.adapter is not None and find(method.adapter) != method.adapter:
        method = method.model_copy(update={"adapter": find(method.adapter)})
    found = {"base": find(recipe.base), "data": data, "method": method, "evaluate": evaluate}
    return recipe.model_copy(update=found)


def _section_lines(name: str, value: Any, field: FieldInfo) -> list[str]:
    """One setting, or one section with its settings indented below it."""
    if not isinstance(value, BaseModel) or name == "early_stopping":
        return [_setting_line(name, value, field)]
    lines = [f"{name}:"]
    for key, inner in type(value).model_fields.items():
        lines.append("  " + _setting_line(key, getattr(value, key), inner))
    return lines


def _setting_line(name: str, value: Any, field: FieldInfo) -> str:
    """``name: value   # meaning; reason of the default``."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    if isinstance(plain, tuple):
        plain = [
            item.model_dump(mode="json", exclude_none=True) if isinstance(item, BaseModel) else item
            for item in plain
        ]
    yaml = YAML()
    yaml.default_flow_style = True
    yaml.width = 10_000
    text = io.StringIO()
    yaml.dump({name: plain}, text)
    entry = text.getvalue().strip()[1:-1].replace(f"{name}: null", f"{name}:")
    entry = entry if not entry.endswith(":") else f"{entry} null"
    why = (field.json_schema_extra or {}).get("why", "")
    return f"{entry:<34} # {field.description}{f'; {why}' if why else ''}"


def read_yaml(path: Path) -> CommentedMap:
    """The mapping at the top of a YAML file, with the line of every key.

    Raises:
        RecipeError: the file is not UTF-8, not YAML, or no mapping.
    """
    try:
        content = YAML().load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(
            [f"{path}: byte {error.start} is not UTF-8. Save the recipe as UTF-8."]
        ) from error
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path} line {mark.line + 1}" if mark else str(path)
        what = getattr(error, "problem", None) or str(error)
        raise RecipeError(
            [f"{place}: this is not YAML: {what}. Check indentation, quotes and colons."]
        ) from error
    if not isinstance(content, CommentedMap):
        raise RecipeError(
            [
                f"{path}: a recipe is a mapping with at least 'base' and 'data'; found "
                f"{'nothing' if content is None else type(content).__name__}."
            ]
        )
    return content


def _apply_overrides(content: CommentedMap, overrides: Sequence[str]) -> list[str]:
    """Sets each ``section.key=value`` in place; returns what could not be understood."""
    problems = []
    for override in overrides:
        dotted, equals, text = override.partition("=")
        keys = dotted.strip().split(".")
        if not equals or not all(keys):
            problems.append(f"--set {override}: needed section.key=value, such as method.rank=32.")
            continue
        place: Any = content
        for key in keys[:-1]:
            if place.get(key) is None:
                place[key] = CommentedMap()
            place = place[key]
            if not isinstance(place, dict):
                problems.append(f"--set {override}: '{key}' is a value, not a section.")
                break
        else:
            place[keys[-1]] = YAML(typ="safe").load(text)
    return problems


def _validate(content: Mapping[str, Any], name: str, problems: list[str]) -> Recipe:
    """The recipe, or every problem at once in the order of the lines."""
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        found = [_describe(item, content, name) for item in error.errors()]
        problems = problems + [text for _, text in sorted(found, key=lambda pair: pair[0])]
    if problems:
        raise RecipeError(problems)
    return recipe


def _describe(item: Mapping[str, Any], content: Mapping[str, Any], name: str) -> tuple[int, str]:
    """One of pydantic's errors as (line, sentence)."""
    path = tuple(part for part in item["loc"] if isinstance(part, (int, str)))
    path = _existing_path(path, content)
    line = _line_of(path, content)
    place = f"{name} line {line}" if line else name
    dotted = ".".join(str(part) for part in path)
    if item["type"] == "extra_forbidden" and path[-1] == "trust_remote_code":
        return line, (
            f"{place}: '{dotted}' is no setting, as a recipe may come from anyone. Take it out; "
            "who trusts the code that a base brings says --trust-remote-code to the command."
        )
    if item["type"] == "extra_forbidden":
        known = _known_names(path[:-1])
        near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
        guess = f" Did you mean '{near[0]}'?" if near else f" Known are {', '.join(known)}."
        return line, f"{place}: '{dotted}' is no setting.{guess}"
    if item["type"] == "missing":
        return line, f"{place}: '{dotted}' is missing and has no default. Add it."
    reason = item["msg"].removeprefix("Value error, ")
    found = "" if item["type"] == "value_error" else f" (found {item['input']!r})"
    where = f"'{dotted}': " if dotted else ""
    return line, f"{place}: {where}{reason[0].lower()}{reason[1:]}{found}."


def _existing_path(path: tuple[int | str, ...], content: Any) -> tuple[int | str, ...]:
    """A location without the tags that pydantic adds for the members of a union."""
    kept: list[int | str] = []
    for position, part in enumerate(path):
        is_last = position == len(path) - 1
        in_mapping = isinstance(content, Mapping) and part in content
        in_list = isinstance(content, (list, tuple)) and isinstance(part, int)
        if in_mapping or (in_list and part < len(content)):
            kept.append(part)
            content = content[part]
        elif is_last and isinstance(content, Mapping):
            kept.append(part)
    return tuple(kept)


def _line_of(path: tuple[int | str, ...], content: Any) -> int:
    """The line of a key, counted from 1, or of its nearest parent; 0 when unknown."""
    line = 0
    for part in path:
        positions = getattr(content, "lc", None)
        with contextlib.suppress(AttributeError, KeyError, TypeError):
            line = (
                1 + (positions.key(part) if isinstance(content, dict) else positions.item(part))[0]
            )
        try:
            content = content[part]
        except (KeyError, IndexError, TypeError):
            break
    return line


def _known_names(path: tuple[int | str, ...]) -> list[str]:
    """The settings of the section at a path."""
    section: type[BaseModel] = Recipe
    for part in path:
        if isinstance(part, str) and part in section.model_fields:
            section = _section_type(section.model_fields[part].annotation) or section
    return list(section.model_fields)


def _section_type(annotation: Any) -> type[BaseModel] | None:
    """The section inside an annotation such as ``tuple[Source, ...]`` or ``X | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) is not None:
        for inner in get_args(annotation):
            if (found := _section_type(inner)) is not None:
                return found
    return None
