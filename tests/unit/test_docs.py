"""The documents say what is there: every field, command, exit code, package and file; and the site builds by itself."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import generate
import pytest

from dora_dist.cli import build_parser
from dora_dist.config import RunConfig
from dora_dist.config.fields import REQUIRED, field_specs
from dora_dist.config.names import DATA_SUFFIXES, GZIP
from dora_dist.runtime import exit_codes

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TOP = ("dora_dist", "launch", "configs", "containers", "slurm", "examples", "benchmarks", "tools", "docs", "tests")


def test_the_table_has_every_field_with_its_default_and_meaning() -> None:
    table = generate.configuration()
    for name, spec in field_specs(RunConfig).items():
        default = "required" if spec.default is REQUIRED else f"`{json.dumps(spec.default)}`"
        meaning = spec.description.replace("|", r"\|").replace("<", "&lt;").replace("*", r"\*")
        assert meaning
        assert f"| `{name}` | {default} | {meaning} |" in table


def test_every_command_is_described_and_the_fields_are_not_described_twice() -> None:
    text = generate.command_line()
    for command in ("train", "validate", "schema", "consolidate", "import-gguf", "assemble-llava", "evaluate", "env"):
        assert f"\n## {command}\n" in text
        assert f"usage: dora-dist {command}" in text
    assert "--adapter.r INT" not in text


def test_every_exit_code_is_in_the_table_with_its_meaning() -> None:
    codes = {name: code for name, code in vars(exit_codes).items() if name.isupper()}
    rows = re.findall(r"^\| (\d+) \| `([A-Z_]+)` \| (\S.*) \|$", generate.exit_codes(), re.MULTILINE)
    assert {name: int(code) for code, name, _ in rows} == codes


def test_the_tree_has_every_package_and_module_with_what_it_is() -> None:
    tree = generate.tree()
    for module in (ROOT / "dora_dist").rglob("*.py"):
        if module.name == "__init__.py":
            assert re.search(rf"^### {module.parent.relative_to(ROOT)}/\n\n\S", tree, re.MULTILINE), module
        else:
            assert re.search(rf"^\| `{module.name}` \| \S", tree, re.MULTILINE), module


def test_extras_kinds_of_data_and_how_tos_are_named_where_users_look() -> None:
    readme, data = (ROOT / "README.md").read_text(), (ROOT / "docs/tutorials/own-data.md").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    of_developers = {"demo", "demo-llava", "demo-vlbart", "bench", "docs", "hooks", "test"}
    table = "".join(line.split("|")[1] for line in data.splitlines() if line.startswith("| `"))
    assert {extra for extra in extras if f"`{extra}`" not in table} == of_developers
    for text in (readme, data, (ROOT / "docs/reference/files.md").read_text()):
        for kind in DATA_SUFFIXES:
            assert (GZIP if kind.endswith(GZIP) else kind.removeprefix(".")) in text.lower()
    for page in sorted((ROOT / "docs/how-to").glob("*.md")):
        if page.stem not in ("full", "features", "vl-bart"):  # of the lead, and of the tutorials
            assert f"docs/how-to/{page.name})" in readme.partition("| do one thing |")[2].partition("\n")[0], page


def test_the_drawing_has_every_package_of_the_contract() -> None:
    drawing = generate.layers()
    for package in (ROOT / "dora_dist").glob("*/__init__.py"):
        assert f">{package.parent.name}</text>" in drawing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_files_make_targets_and_commands_that_are_there(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(rf"`((?:{'|'.join(TOP)})/[\w./-]*)`", text):
        assert (ROOT / name).exists(), name
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), link
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z-]+)", text) + re.findall(r"^    make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    known = field_specs(RunConfig)
    for option in re.findall(r"--([a-z_]+\.[a-z_]+)", text.replace("section.field", "adapter.r")):
        assert option in known, option
    for line in re.findall(r"^    (dora-dist .+)$", text.replace("\\\n", ""), re.MULTILINE):
        build_parser().parse_args(shlex.split(line, comments=True)[1:])


def test_one_oldest_python_wherever_it_is_said() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    oldest = project["project"]["requires-python"].removeprefix(">=")
    assert project["tool"]["mypy"]["python_version"] == oldest
    assert project["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")
    assert f"sys.version_info < ({oldest.replace('.', ', ')})" in (ROOT / "tools/system_packages.sh").read_text()
    assert f"(Python {oldest} and newer)" in (ROOT / "constraints.txt").read_text()
    for page in PAGES:
        assert set(re.findall(r"Python\W{1,4}(3\.\d+)", page.read_text())) <= {oldest}, page


def test_the_site_builds_without_a_warning_and_asks_no_network(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        text = page.read_text()
        assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=\"(?:https?:)?//", text), page
        assert 'class="arithmatex"' not in text, page  # a formula that stayed LaTeX
        assert "{{" not in text, page


def test_every_example_is_shown_on_a_page_and_run_by_a_test() -> None:
    pages = "".join(page.read_text() for page in PAGES)
    tests = "".join(test.read_text() for test in (ROOT / "tests").rglob("test_*.py") if test != Path(__file__))
    for example in (ROOT / "examples").glob("*.py"):
        assert f'--8<-- "examples/{example.name}"' in pages
        assert re.search(rf"\b{example.stem}\b", tests), example
