"""Reading a recipe: YAML, environment variables, overrides, and errors that say where, what and what next."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from distill.recipe.experiment import Recipe

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the file, the key, the value and what is allowed."""


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package."""
    try:
        folder = Path(str(resources.files("distill.recipes")))
    except ModuleNotFoundError:  # run from a checkout that is not installed
        folder = Path(__file__).resolve().parents[2] / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """File of a recipe given by path or by the name of a shipped one."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    stem = path.stem if path.suffix in {".yaml", ".yml"} and len(path.parts) == 1 else name
    if stem in shipped:
        return shipped[stem]
    raise RecipeError(f"{name}: no such file, and no shipped recipe of that name; shipped: {', '.join(shipped)}")


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Recipe from a file or a shipped name, with ``key.path=value`` overrides applied (values are YAML)."""
    path = find_recipe(name)
    raw = _read_yaml(path)
    for override in overrides:
        _apply(raw, override, path)
    return parse(_substitute(raw, path, ()), str(path))


def here(run: Path) -> list[str]:
    """Overrides for the recipe in a run's folder, wherever that lies now; its trackers are told nothing."""
    return [f"runs={run.resolve().parent}", f"name={run.resolve().name}", "train.trackers=[]"]


def parse(raw: object, source: str) -> Recipe:
    """Validate an already read recipe; ``source`` names it in errors."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(_explain(error, source)) from None


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML; loading it gives the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text: {error}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: expected keys and values at the top, found {type(raw).__name__}")
    return raw


def _apply(raw: dict[str, Any], override: str, path: Path) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {override!r}: expected key.path=value, for example --set train.lr=1e-4")
    *parents, last = key.strip().split(".")
    node = raw
    for depth, part in enumerate(parents):
        child = node.setdefault(part, {})
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            where = ".".join(parents[: depth + 1])
            raise RecipeError(f"--set {override!r}: {where} in {path} is {child!r}, which has no keys of its own")
        node = child
    try:
        node[last] = _number(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override!r}: the value is not valid YAML: {error}") from None


def _number(value: object) -> object:
    """YAML 1.1 reads 1e-4 as text; a user means the number."""
    if isinstance(value, str):
        try:
            return float(value) if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value) else value
        except ValueError:
            return value
    return value


def _substitute(value: Any, path: Path, where: tuple[str, ...]) -> Any:
    """``${NAME}`` and ``${NAME:-default}`` from the environment, in every text of the recipe."""
    if isinstance(value, Mapping):
        return {key: _substitute(item, path, (*where, str(key))) for key, item in value.items()}
    if isinstance(value, list):
        return [_substitute(item, path, (*where, str(index))) for index, item in enumerate(value)]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        found = os.environ.get(name) or default  # empty counts as not set, as in a shell's ${NAME:-default}
        if found is None:
            key = ".".join(where)
            raise RecipeError(
                f"{path}: {key} is {value!r} but the environment variable {name} is not set; "
                f"set it, or give the value by --set {key}=..."
            )
        return found

    return _number(_VARIABLE.sub(replace, value))


def _explain(error: ValidationError, source: str) -> str:
    lines = [f"{source}: {error.error_count()} thing(s) to change"]
    for item in error.errors(include_url=False):
        path, allowed = _locate(item["loc"])
        where = ".".join(path) or "(whole recipe)"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            lines.append(f"  {where}: unknown key{_hint(path[-1], allowed)}")
        elif item["type"] == "missing":
            lines.append(f"  {where}: missing")
        elif item["type"] == "tuple_type":  # what Python calls it; a recipe has lists
            given = yaml.safe_dump([item["input"]], default_flow_style=True).strip()
            lines.append(f"  {where}: expected a list, such as {given}; found {item['input']!r}")
        elif isinstance(item["input"], Mapping):
            lines.append(f"  {where}: {message}")
        else:
            lines.append(f"  {where}: {message}; found {item['input']!r}")
    return "\n".join(lines)


def _hint(key: str, allowed: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, allowed, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; allowed: {', '.join(allowed)}" if allowed else ""


def _locate(location: Sequence[int | str]) -> tuple[list[str], list[str]]:
    """Keys as the user wrote them, without the union tags that pydantic adds, and those allowed beside the last."""
    path: list[str] = []
    schema: Any = Recipe.model_json_schema()
    definitions, beside = schema["$defs"], schema
    for part in location:
        beside = schema
        mapping = schema.get("discriminator", {}).get("mapping", {})
        if part in mapping:
            schema = _resolve({"$ref": mapping[part]}, definitions)
            continue
        path.append(str(part))
        if isinstance(part, int):
            schema = _resolve(schema.get("items", {}), definitions)
        else:
            inner = schema.get("properties", {}).get(part, schema.get("additionalProperties", {}))
            schema = _resolve(inner if isinstance(inner, dict) else {}, definitions)
    return path, sorted(beside.get("properties", {}))


def _resolve(schema: dict[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    """Follow a reference, or the one model among the choices of an optional value."""
    for choice in schema.get("anyOf", []):
        if "$ref" in choice:
            schema = choice
    if "$ref" in schema:
        found: dict[str, Any] = definitions[schema["$ref"].rsplit("/", 1)[-1]]
        return found
    return schema
