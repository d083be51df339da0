"""The configuration of a run from its three sources: flag over environment variable over preset.

Every field of the configuration is a flag: `matrix_lr` is `--matrix-lr`, a boolean `cuda_graphs` is `--cuda-graphs` and
`--no-cuda-graphs`, a tuple `keep_fp16` takes names with commas between them.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import click
from rich.console import Console
from rich.table import Table

from model.config import Config, field_types
from model.environment import read_environment
from model.presets import get_preset, preset_names


@dataclass(frozen=True)
class Settings:
    """A resolved configuration and where it came from."""

    config: Config
    taken: dict[str, str] = field(default_factory=dict)  # environment variable -> what it did
    weights: str | None = None  # weights for the later stages, instead of training (EVAL_ONLY_PATH)


def resolve(preset: str, flags: Mapping[str, Any], environ: Mapping[str, str]) -> Settings:
    """The preset, with the variables of `environ` over it, with `flags` (field -> value) over them.

    Raises ConfigError naming the variable or field, its value and what was wanted.
    """
    base = get_preset(preset)
    environment = read_environment(base, environ)
    config = base.replace(**{**environment.changes, **flags})
    return Settings(config, environment.taken, environment.weights)


def config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `--preset` and a flag for every field to a click command. Flags that are not given arrive as None."""
    for name, kind in reversed(field_types().items()):
        command = _option(name, kind)(command)
    return click.option(
        "--preset", type=click.Choice(preset_names()), default="pr1530", show_default=True, help="Where to start from."
    )(command)


def section_options(section: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds a flag for every field of one section, such as "eval", to a click command."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for name, kind in reversed(field_types().items()):
            if _sections()[name] == section:
                command = _option(name, kind)(command)
        return command

    return decorate


def _option(name: str, kind: Any) -> Callable[..., Any]:
    flag = "--" + name.replace("_", "-")
    text = f"{_meanings().get(name, '')} ({_sections()[name]})".strip()
    if kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=text)
    if typing.get_origin(kind) is Literal:
        return click.option(flag, name, type=_Choice(typing.get_args(kind)), help=text)
    if typing.get_origin(kind) is tuple:
        return click.option(flag, name, metavar="NAME,...", callback=_split, help=text)
    return click.option(flag, name, type=kind, help=text)


@cache
def _meanings() -> dict[str, str]:
    """Field -> what the comment behind it in the source says. A packed script has no comments."""
    return dict(re.findall(r"^    (\w+): .+  # (.+)$", Path(inspect.getfile(Config)).read_text("utf-8"), re.M))


class _Choice(click.ParamType):
    """One of a Literal's values, which may be numbers."""

    name = "choice"

    def __init__(self, values: tuple[Any, ...]) -> None:
        self._values = {str(value): value for value in values}

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return "[" + "|".join(self._values) + "]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if str(value) not in self._values:
            self.fail(f"got {value!r}, wanted one of {', '.join(self._values)}", param, ctx)
        return self._values[str(value)]


def _split(context: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    return None if value is None else tuple(filter(None, value.split(",")))


def _sections() -> dict[str, str]:
    return {name: section for section, name, _ in Config().items()}


def given_flags(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields among a command's arguments that were given on its line."""
    return {name: values[name] for name in field_types() if values.get(name) is not None}


def print_settings(settings: Settings, console: Console | None = None) -> None:
    """The whole configuration as a table, fields that differ from the preset marked, and the variables taken."""
    console = console or Console()
    base = {name: value for _, name, value in get_preset(settings.config.preset).items()}
    table = Table(title=f"preset {settings.config.preset}", title_justify="left", show_header=False, box=None)
    section_before = ""
    for section, name, value in settings.config.items():
        changed = f"(preset: {base[name]})" if base[name] != value else ""
        table.add_row(section if section != section_before else "", name, str(value), changed)
        section_before = section
    console.print(table)
    for name, effect in settings.taken.items():
        console.print(f"environment: {name} -> {effect}", markup=False, highlight=False)
