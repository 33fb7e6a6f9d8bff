"""The container recipes and environment.yml say what the project says; building them takes a base image."""

import fnmatch
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILE = (ROOT / "containers/Dockerfile").read_text()
DEFINITION = (ROOT / "containers/dora_dist.def").read_text()
INSTALL = (ROOT / "containers/install.sh").read_text()
PAGE = (ROOT / "docs/how-to/containers.md").read_text()
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())
EXTRAS = set(PROJECT["optional-dependencies"])


def copied(dockerfile: str = DOCKERFILE) -> set[str]:
    """The sources of all COPY lines."""
    return {name for line in re.findall(r"^COPY (.+) \S+$", dockerfile, re.MULTILINE) for name in line.split()}


def let_through(name: str) -> bool:
    """Whether .dockerignore lets a file in: the last pattern that matches it, or a folder above it, decides."""
    allowed = True
    above = [name, *(str(folder) for folder in Path(name).parents)]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            patterns = {pattern, pattern.removeprefix("**/")}
            if any(fnmatch.fnmatch(part, one) for one in patterns for part in above):
                allowed = line.startswith("!")
    return allowed


def test_both_images_have_one_base_and_it_fits_the_pinned_torch() -> None:
    base = re.search(r"^ARG BASE=(\S+)$", DOCKERFILE, re.MULTILINE)[1]
    assert re.search(r"^From: (\S+)$", DEFINITION, re.MULTILINE)[1] == base
    assert f"`{base}`" in PAGE
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-devel-ubuntu24\.04", base)  # its Python is 3.12
    torch = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    for text in (DOCKERFILE, PAGE.replace("\n", " ")):
        said = re.search(r"torch (\S+) from the Python package index is built for(?:\n#)? CUDA (\d+\.\d+)", text)
        assert said[1] == torch, "look up which CUDA this torch is built for, and choose the base that fits"
        assert base.startswith(f"nvidia/cuda:{said[2]}.")


def test_both_images_hold_the_same_files_and_nothing_else_reaches_the_builder() -> None:
    files = re.search(r"^%files\n((?:    .+\n)+)", DEFINITION, re.MULTILINE)[1]
    pairs = [line.split() for line in files.splitlines()]
    assert {source for source, _ in pairs} == copied()
    assert all(target == f"/opt/dora_dist/{source}" for source, target in pairs)
    for name in copied():
        assert (ROOT / name).exists() and let_through(name), name
    assert let_through("dora_dist/cli/entry.py") and let_through("configs/llama7b_dora.json")
    for name in (
        ".env",
        ".git/config",
        "runs/mine/config.json",
        "data/train.jsonl",
        "dora_dist/cli/__pycache__/a.pyc",
        "launch/x.py",
    ):
        assert not let_through(name), name


def test_the_project_can_be_built_of_what_is_copied() -> None:
    needed = {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], "dora_dist", "constraints.txt"}
    assert needed <= copied()


def test_the_installation_is_the_makefiles() -> None:
    options = re.search(r"^PIP := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    command = re.search(r'^    (DS_BUILD_OPS=.+) "\$@"$', INSTALL, re.MULTILINE)[1]
    assert command.replace('"$venv/bin/python"', "$(BIN)/python").replace(" --no-cache-dir", "") == options
    assert "--no-build-isolation" in INSTALL and "bash tools/system_packages.sh python3" in INSTALL
    for recipe in (DOCKERFILE, DEFINITION):
        steps = re.findall(r"bash containers/install\.sh (\w+)", recipe)
        assert steps == ["system", "torch", "project"]


def test_extras_and_entry_are_there() -> None:
    chosen = [
        *re.findall(r"^ARG EXTRAS=(\S+)$", DOCKERFILE, re.MULTILINE),
        *re.findall(r"install\.sh project \S+ ([\w,-]+)$", DEFINITION + INSTALL, re.MULTILINE),
        *re.findall(r"EXTRAS=([\w,-]+)", PAGE),
        *re.findall(r"\.\[([\w,-]+)\]", str(CONDA)),
    ]
    assert len(chosen) >= 4
    assert {extra for line in chosen for extra in line.split(",")} <= EXTRAS
    assert list(PROJECT["scripts"]) == ["dora-dist"]
    assert 'ENTRYPOINT ["dora-dist"]' in DOCKERFILE and 'exec dora-dist "$@"' in DEFINITION


def test_conda_brings_what_pip_cannot_and_pip_the_pinned_versions() -> None:
    *packages, pip = CONDA["dependencies"]
    names = {package.split("=")[0] for package in packages}
    # Debian's names in tools/system_packages.sh, for those that nothing, or only mpirun and deepspeed, need
    assert names == {"python", "pip", "cxx-compiler", "numactl", "openmpi"}
    for debian in ("g++", "numactl", "openmpi-bin"):
        assert f"+=({debian})" in (ROOT / "tools/system_packages.sh").read_text(), debian
    python = next(package for package in packages if package.startswith("python="))
    oldest = tuple(map(int, PROJECT["requires-python"].removeprefix(">=").split(".")))
    assert tuple(map(int, python.removeprefix("python=").split("."))) >= oldest
    assert "--constraint constraints.txt" in pip["pip"]


def test_a_slurm_job_runs_python_in_the_container_that_is_named(tmp_path: Path) -> None:
    """As far as the first use of Python, with no such config file. `apptainer` here writes down how it was called."""
    program = tmp_path / "apptainer"
    program.write_text('#!/usr/bin/env bash\necho "$@" >>"$SAID"\nshift 3\nexec "$@"\n')
    program.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment |= {
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "1",
        "CONTAINER": "/an image.sif",
        "SAID": str(tmp_path / "said"),
        "PYTHONPATH": str(ROOT),
    }
    command = ["bash", str(ROOT / "slurm/multinode.sh"), "missing.json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "missing.json" in done.stderr, done.stderr
    assert (tmp_path / "said").read_text().startswith("exec --nv /an image.sif python - missing.json")
