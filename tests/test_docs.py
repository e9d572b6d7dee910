"""What README and docs say must hold: links, settings, commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hpc_hdb.cli import app
from hpc_hdb.config import Settings
from hpc_hdb.config_files import load_settings, preset_names, tomllib
from hpc_hdb.report.plan_notes import idle_settings

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *DOCS]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)


def anchors(page: Path) -> set[str]:
    """What a link may name after ``#``: the page's headings, as GitHub and mkdocs spell them."""
    headings = re.findall(r"^#+ (.+)$", without_code(page), re.M)
    words = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"\s", "-", heading) for heading in words}


def leads_somewhere(page: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    return target.exists() and (not anchor or anchor in anchors(target))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(page))
    broken = [link for link in links if "://" not in link and not leads_somewhere(page, link)]
    assert not broken


def test_every_page_is_in_the_sites_navigation() -> None:
    found = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(found) == sorted(str(page.relative_to(ROOT / "docs")) for page in DOCS)


def test_every_module_is_in_the_architecture() -> None:
    """In the list of its folder, and nothing else is."""
    text = (ROOT / "docs/architecture.md").read_text()
    folder, named = "", set()
    for line in re.findall(r"^```\n(.*?)^```", text, re.S | re.M)[0].splitlines():
        name = line.split()[0] if line else ""
        if name.endswith("/"):
            folder = name
        elif name:
            named.add(folder + name)
    modules = {
        str(path.relative_to(ROOT))
        for package in ("hpc_hdb", "dali_pipelines")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    missing, gone = sorted(modules - named), sorted(named - modules)
    assert not missing, f"docs/architecture.md leaves out {', '.join(missing)}"
    assert not gone, f"docs/architecture.md still has {', '.join(gone)}"


@pytest.mark.parametrize("section", Settings.model_fields)
def test_every_setting_is_documented_with_its_default(section: str) -> None:
    text = (ROOT / "docs/configuration.md").read_text()
    table = text.split(f"## [{section}]")[1].split("\n## ")[0]
    documented: dict[str, object] = {}
    for keys, values in re.findall(r"^\| (`.*?) \|(.*?)\|", table, re.M):
        defaults = map(toml_value, re.findall(r"`.*?`|none", values) or [""])
        documented |= dict(zip(re.findall(r"`(\w+)`", keys), defaults, strict=True))
    assert documented == Settings().model_dump(mode="json")[section]


def toml_value(documented: str) -> object:
    """None where it is in words what an absent value means."""
    try:
        return tomllib.loads(f"value = {documented.strip('`')}")["value"]
    except tomllib.TOMLDecodeError:
        return None


def test_the_toml_example_is_a_configuration(tmp_path: Path) -> None:
    text = (ROOT / "docs/configuration.md").read_text()
    example = tmp_path / "flowers.toml"
    example.write_text(re.findall(r"```toml\n(.*?)```", text, re.S)[0])
    assert load_settings(str(example)).data.source == "folder"


METHODS = [page for page in DOCS if page.parent.name == "accuracy" and page.stem != "study"]


@pytest.mark.parametrize("page", METHODS, ids=name_of)
def test_a_method_has_a_page_that_says_how_to_use_it_and_whose_it_is(
    page: Path, tmp_path: Path
) -> None:
    text = page.read_text()
    headings = ["Use", "Suggested values", "Details", "Cost", "Measured", "Source"]
    assert re.findall(r"^## (.+)$", text, re.M) == headings
    assert f"](accuracy/{page.name})" in (ROOT / "docs/accuracy.md").read_text()
    example = tmp_path / "example.toml"
    example.write_text(re.findall(r"```toml\n(.*?)```", text, re.S)[0])
    assert load_settings(str(example)) != Settings()
    for module in re.findall(r"`(hpc_hdb/\w+/\w+\.py)`", text):
        assert (ROOT / module).is_file()


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
        assert not list(idle_settings(load_settings(config, settings)))
