"""``docs/keys.md``: every key of every config that a user writes, made from the configs' own JSON schemas.

``make docs`` writes the page; ``test_keys.py`` holds it to the code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sfd_deploy.adopt.config import AdoptConfig, TextAdoptConfig
from sfd_deploy.config import StageConfig
from sfd_deploy.export.config import ExportConfig, TextExportConfig
from sfd_deploy.measure.foreign.adopt import KINDS
from sfd_deploy.policy.plan import Policy
from sfd_deploy.probes import Probes
from sfd_deploy.serving.config import ServingConfig
from sfd_deploy.training.config import TrainConfig
from sfd_deploy.training.judge import JudgeConfig
from sfd_deploy.training.teacher import TeacherConfig
from sfd_deploy.training.text_config import TextTrainConfig
from sfd_deploy.training.text_teacher.config import TextTeacherConfig

PAGE = Path(__file__).resolve().parents[1] / "docs" / "keys.md"
HEAD = """# Config keys

Made from the code by `make docs`; do not edit. What is said of a key is its `description` in the config's class.

- A key within a mapping has a dot (`monitor.every`), as in error messages; `<name>` is a name that you choose.
- A key without a default is **required**; within a mapping, where that mapping is written at all.
- *official* is the code of arXiv 2409.11219, `score-forgetting-distillation`; phi, psi and theta are the teacher, the
  fake score and the generator ([training.md](training.md)). Complete configs to start from: `sfd_deploy/presets`.
- Which keys fit together is checked when a config is read, and said there."""

Schema = Mapping[str, Any]
NOUNS = {
    "string": "text", "integer": "integer", "number": "number", "boolean": "true or false", "null": "null",
    "array": "list", "object": "mapping",
}  # fmt: skip
BOUNDS = {  # in the order in which they are told
    "minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}",
    "minLength": "≥ {} characters", "minItems": "≥ {} items", "maxItems": "≤ {} items",
    "minProperties": "≥ {} entries", "multipleOf": "a multiple of {}", "pattern": "`{}`",
}  # fmt: skip
INSIDE = {"items": " of ", "prefixItems": " of ", "additionalProperties": " to "}
NO_BOUND = {"type", "title", "default", "description", *INSIDE}  # said elsewhere, or not worth it


class Key(NamedTuple):
    """A row of a table."""

    name: str
    default: str
    kind: str
    what: str


class Section(NamedTuple):
    """A config, and where it is written."""

    title: str
    written: str
    config: type[StageConfig]


OF_TEXT, ADOPTED = "`kind: text-to-image`", "`sfd-deploy judge --adopt MODEL --config FILE`"
SECTIONS = (
    Section("train, class labels", "`sfd-deploy train --config FILE`, without `kind`.", TrainConfig),
    Section("train, text-to-image", f"`sfd-deploy train --config FILE`, with {OF_TEXT}.", TextTrainConfig),
    Section("teacher, class labels", "`sfd-deploy teacher --config FILE`, without `kind`.", TeacherConfig),
    Section("teacher, text-to-image", f"`sfd-deploy teacher --config FILE`, with {OF_TEXT}.", TextTeacherConfig),
    Section("judge", "`sfd-deploy judge --config FILE`.", JudgeConfig),
    *(Section(f"judge, adopted: {kind}", f"{ADOPTED}, with `kind: {kind}`.", model) for kind, model in KINDS.items()),
    Section("audit, policy", "`sfd-deploy audit --policy FILE`.", Policy),
    Section("audit, probes", "`sfd-deploy audit --probes FILE`, of prompts.", Probes),
    Section(
        "export, class labels",
        "No file: `opset` and the batches are options of `sfd-deploy export`, the rest is for Python.",
        ExportConfig,
    ),
    Section("export, text-to-image", "As for class labels.", TextExportConfig),
    Section("adopt, class labels", "No file: options of `sfd-deploy adopt`; `source` is its argument.", AdoptConfig),
    Section("adopt, text-to-image", "As for class labels.", TextAdoptConfig),
    Section("serve", "No file, and no options: for Python.", ServingConfig),
)


def page() -> str:
    """The whole page as Markdown."""
    return "\n\n".join([HEAD, *map(_section, SECTIONS)]) + "\n"


def _section(section: Section) -> str:
    about = _line(section.config.model_json_schema().get("description", ""))
    return f"## {section.title}\n\n{section.written} {about}\n\n{table(section.config)}"


def table(config: type[StageConfig]) -> str:
    """Every key of a config as a Markdown table."""
    lines = [Key("key", "default", "range or kind", "what it is"), Key(*["---"] * 4)]
    rows = [key._replace(name=f"`{key.name}`") for key in keys_of(config)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [*lines, *rows])


def keys_of(config: type[StageConfig]) -> list[Key]:
    """Every key of a config, those of configs within it behind their own."""
    schema = config.model_json_schema()
    return list(_keys(schema, schema.get("$defs", {}), before=""))


def _keys(schema: Schema, models: Schema, before: str) -> Iterator[Key]:
    for name, field in schema["properties"].items():
        key = f"{before}{name}"
        within = [(place, models[model]) for place, model in _models_in(key, field)]
        # The docstring of a config speaks for the key that holds it, but not for a key that holds many by name.
        said = [field.get("description"), *(model.get("description") for place, model in within if place == key)]
        what = _line(". ".join(filter(None, said)))
        yield Key(key, _default(field, [model for _, model in within]), kind_of(field), what)
        for place, model in within:
            yield from _keys(model, models, f"{place}.")


def _models_in(place: str, field: Schema) -> Iterator[tuple[str, str]]:
    """The configs that a field holds: where their keys stand, and their names."""
    if "$ref" in field:
        yield place, field["$ref"].rpartition("/")[2]
    for choice in field.get("anyOf", ()):
        yield from _models_in(place, choice)
    for inside, step in (("items", "[]"), ("additionalProperties", ".<name>")):
        if inside in field:
            yield from _models_in(f"{place}{step}", field[inside])


def _default(field: Schema, models: list[Schema]) -> str:
    if "default" not in field:
        return "**required**"
    value = field["default"]
    if models and value == {name: inner.get("default") for name, inner in models[0]["properties"].items()}:
        return "as below"
    if isinstance(value, float):
        return f"`{value:.6g}`"
    return f"`{value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}`"


def kind_of(field: Schema) -> str:
    """The values that a field takes, in words.

    Raises:
        KeyError, ValueError: its schema says a thing that there are no words for.
    """
    if "$ref" in field:
        return "mapping"
    if "anyOf" in field:
        return " or ".join(map(kind_of, field["anyOf"]))
    if choices := field.get("enum", [field["const"]] if "const" in field else []):
        return " or ".join(f"`{choice}`" for choice in choices)
    bounded = sorted(field.keys() - NO_BOUND, key=list(BOUNDS).index)
    bounds = [BOUNDS[key].format(field[key]) for key in bounded]
    inside = "".join(word + _kinds(field[key]) for key, word in INSIDE.items() if key in field)
    return NOUNS[field["type"]] + (f" ({', '.join(bounds)})" if bounds else "") + inside


def _kinds(inside: Schema | list[Schema]) -> str:
    fields = inside if isinstance(inside, list) else [inside]
    return " or ".join(dict.fromkeys(map(kind_of, fields)))


def _line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
