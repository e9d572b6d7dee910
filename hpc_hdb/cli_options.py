"""What commands share: arguments and options, and whether one was typed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import typer

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A TOML file, or a preset's name.")]
MaybeConfig = Annotated[
    str | None, typer.Argument(metavar="[CONFIG]", help="A TOML file, or a preset's name.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a setting; repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def typed_option(context: typer.Context, names: Iterable[str]) -> str | None:
    """The first of the parameters `names` that was typed, as its option is spelt."""
    options = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    for name in names:
        source = context.get_parameter_source(name)
        if source and source.name == "COMMANDLINE":
            return options[name]
    return None
