"""What README and docs say must hold: links, settings, commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hpc_hdb.cli import app
from hpc_hdb.config import Settings, load_settings, preset_names

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not broken


@pytest.mark.parametrize("section", Settings.model_fields)
def test_every_setting_is_documented_with_its_default(section: str) -> None:
    text = (ROOT / "docs/configuration.md").read_text()
    table = text.split(f"## [{section}]")[1].split("\n## ")[0]
    keys = type(getattr(Settings(), section)).model_fields
    documented = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (.*?) \|", table, re.M))))
    assert documented == set(keys)


def test_the_toml_example_is_a_configuration(tmp_path: Path) -> None:
    text = (ROOT / "docs/configuration.md").read_text()
    example = tmp_path / "flowers.toml"
    example.write_text(re.findall(r"```toml\n(.*?)```", text, re.S)[0])
    assert load_settings(str(example)).data.source == "folder"


def documented_commands() -> list[str]:
    """Every hdb command line in the pages, without launcher and comment."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:console|sh|bash)?\n(.*?)```", page.read_text(), re.S):
            lines = block.replace("\\\n", " ").splitlines()
            found += [line for line in lines if re.match(r"(\$ )?(mpirun.* )?hdb ", line)]
    return sorted(set(found))


@pytest.mark.parametrize("line", documented_commands())
def test_every_documented_command_is_one_that_hdb_takes(line: str) -> None:
    words = shlex.split(line, comments=True)
    words = words[words.index("hdb") + 1 :]
    settings = [words[at + 1] for at, word in enumerate(words) if word == "--set"]
    help_text = CliRunner().invoke(app, [words[0], "--help"], terminal_width=200).output
    for option in (word for word in words if word.startswith("--")):
        assert option in help_text
    if settings:
        config = words[1] if words[1] in preset_names() else "digits"
        load_settings(config, settings)
