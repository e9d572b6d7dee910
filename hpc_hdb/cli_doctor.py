"""The ``doctor`` command."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from hpc_hdb.report.terminal import find_console
from hpc_hdb.run.doctor import CHECKS, Finding

_STYLES = {"works": "green", "broken": "red", "not here": "dim"}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Try what is installed here: MPI, launcher, fault tolerance, Horovod, DALI, GPUs, Slurm.

    Exit status 1 where something is missing that every run needs.
    """
    console = find_console()
    findings: list[Finding] = []
    with console.status("") as status:
        for check in CHECKS:
            status.update(f"trying {check.__name__.removeprefix('check_').replace('_', ' ')} ...")
            findings.append(check())
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        console.print(_table(findings))
        for finding in findings:
            if finding.advice:
                line = f"{finding.part}: {finding.advice}"
                console.print(line, soft_wrap=True)
    if any(finding.needed and finding.state != "works" for finding in findings):
        raise typer.Exit(1)


def _table(findings: list[Finding]) -> Table:
    table = Table("part", "", "found")
    for finding in findings:
        state = Text(finding.state, style=_STYLES[finding.state])
        table.add_row(Text(finding.part), state, Text(finding.found))
    return table
