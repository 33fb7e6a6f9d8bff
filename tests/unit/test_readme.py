"""The README says what is there: every field of a run's configuration, every file in its tree."""

import json
import re
from pathlib import Path

from dora_dist.config import RunConfig
from dora_dist.config.fields import REQUIRED, field_specs

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_the_table_has_every_field_with_its_default_and_meaning() -> None:
    for name, spec in field_specs(RunConfig).items():
        default = "required" if spec.default is REQUIRED else f"`{json.dumps(spec.default)}`"
        assert f"| `{name}` | {default} | {spec.description} |" in README


def test_the_tree_names_files_that_are_there() -> None:
    tree = README.split("## What is where")[1].split("```")[1]
    folder = ROOT
    for line in tree.strip().splitlines():
        name = re.match(r"\s*(\S+)", line)[1]
        depth = (len(line) - len(line.lstrip())) // 4
        if depth == 0:
            folder = ROOT
        parent = {0: ROOT, 1: ROOT / "dora_dist"}.get(depth, folder)
        assert (parent / name).exists(), name
        if depth == 1 and name.endswith("/"):
            folder = parent / name
