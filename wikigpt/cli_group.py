"""The class of `wikigpt` and its groups of subcommands: what holds for each of them stands here once."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from . import threads


def _use(count: int | None) -> int | None:
    if count:
        threads.use(count)
    return count


def _options(
    # Eager: it is read, and torch told of it, before another option's value could need torch.
    threads: int | None = typer.Option(
        None, min=0, callback=_use, is_eager=True, expose_value=False, help="CPU threads (0: one per core)"
    ),
) -> None: ...


def _common_options() -> list[Any]:
    """The options as typer makes them of a function's parameters."""
    app = typer.Typer(add_completion=False)
    app.command()(_options)
    return typer.main.get_command(app).params


class Group(TyperGroup):
    """Takes --threads, as each of its subcommands does; Ctrl-C ends in one line and status 130."""

    def __init__(self, **attributes: Any):
        super().__init__(**attributes)
        for command in (self, *self.commands.values()):
            if not any("--threads" in parameter.opts for parameter in command.params):
                command.params.extend(_common_options())

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from None
