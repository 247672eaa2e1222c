"""Stage configurations: YAML to a frozen, closed model, with the nearest valid key in each error.

A config is named by a preset (``fashion-mnist``) or a file path. Unknown, missing and mistyped keys
are one-line ``ConfigError``s.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from sfd_deploy.errors import ConfigError

PRESETS = "sfd_deploy.presets"


class StageConfig(BaseModel):
    """Base of every stage's config: frozen, closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)

    def resolved(self) -> dict[str, Any]:
        """The config as plain JSON values, as manifests record it."""
        return self.model_dump(mode="json")

    @classmethod
    def from_mapping(cls, values: Any, source: str) -> Self:
        """Build from parsed YAML.

        Raises:
            ConfigError: naming the key and, for an unknown one, the nearest valid key.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"{source}: expected a mapping of keys", "write `key: value` lines")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise _one_line(cls, error, source) from None

    @classmethod
    def load(cls, name_or_file: str, stage: str) -> Self:
        """Load a preset by name or a YAML file by path; ``stage`` is the preset's folder."""
        return cls.from_mapping(*read_values(name_or_file, stage))


def differing(old: Mapping[str, Any], new: Mapping[str, Any], most: int = 5) -> str:
    """The keys at which two configs differ, in words: "alpha, seed and 3 more"; empty if they are the same."""
    keys = sorted(key for key in old.keys() | new.keys() if key not in old or key not in new or old[key] != new[key])
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def preset_names(stage: str) -> list[str]:
    """Names of the presets shipped for a stage."""
    folder = resources.files(PRESETS) / stage
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def read_values(name_or_file: str, stage: str) -> tuple[Any, str]:
    """What a preset or a file says, as parsed YAML, and its display name.

    Raises:
        ConfigError: there is none, or it is not YAML.
    """
    text, source = read_named(name_or_file, stage)
    try:
        repeated = _repeated_key(yaml.compose(text, Loader=yaml.SafeLoader), set())
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # 2020-13-45 is a ValueError, [[[[… the other
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}" if where is not None else ""
        raise ConfigError(f"{source}:{line} is not valid YAML", "mend the syntax there") from None
    if repeated is not None:
        place = f"line {repeated.start_mark.line + 1}"
        raise ConfigError(f"{source}: {place}: key `{repeated.value}` is there twice", "keep one of them")
    return values, source


def _repeated_key(node: yaml.Node | None, seen: set[int]) -> yaml.Node | None:
    """The first key that its mapping holds twice: YAML lets the last one win, without a word.

    ``seen`` are nodes looked at already: aliases lead to one again, and may lead round.
    """
    if id(node) in seen:
        return None
    seen.add(id(node))
    children: list[yaml.Node] = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        pairs: list[tuple[yaml.Node, yaml.Node]] = node.value
        keys = [key.value for key, _ in pairs]
        for key, _ in pairs:
            if keys.count(key.value) > 1:
                return key
        children = [value for _, value in pairs]
    return next((found for child in children if (found := _repeated_key(child, seen)) is not None), None)


def read_named(name_or_file: str, stage: str) -> tuple[str, str]:
    """Text and display name of a preset or a file."""
    if name_or_file in preset_names(stage):
        item = resources.files(PRESETS) / stage / f"{name_or_file}.yaml"
        return item.read_text(encoding="utf-8"), f"preset {name_or_file}"
    path = Path(name_or_file)
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except (FileNotFoundError, NotADirectoryError):
        known = preset_names(stage)
        near = difflib.get_close_matches(name_or_file, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"presets: {', '.join(known)}"
        raise ConfigError(f"{name_or_file}: no such file or preset", hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({_reason(error)})", "give a readable YAML file") from None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__


def _one_line(model: type[BaseModel], error: ValidationError, source: str) -> ConfigError:
    # A misspelt key also leaves another missing: name the misspelling.
    first = min(error.errors(include_url=False), key=lambda found: found["type"] != "extra_forbidden")
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _keys_at(model, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.5)
        mend = f"did you mean `{near[0]}`?" if near else f"valid keys: {', '.join(sorted(known))}"
        return ConfigError(f"{source}: unknown key `{path}`", mend)
    if first["type"] == "missing":
        return ConfigError(f"{source}: key `{path}` is missing", f"add `{path}`")
    message = first["msg"].removeprefix("Value error, ")
    where = f"`{path}`: " if path else ""
    # A whole mapping as what was found says nothing.
    found = "mend it there" if isinstance(first["input"], dict) else f"found {first['input']!r}"
    return ConfigError(f"{source}: {where}{message}", found[:160])


def _keys_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for part in location:
        field = model.model_fields.get(str(part))
        nested = [] if field is None else [kind for kind in _alternatives(field.annotation) if _is_model(kind)]
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) or (annotation,)


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
