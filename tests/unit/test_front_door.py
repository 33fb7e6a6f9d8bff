"""What `import dora_dist` gives: names and the version, without waiting for torch."""

import subprocess
import sys
from pathlib import Path

import pytest

import dora_dist

ROOT = Path(__file__).resolve().parents[2]


def test_the_names_are_these() -> None:
    functions = ["adapters_off", "build_model", "consolidate", "evaluate", "export_gguf", "export_lora"]
    functions += ["generate", "save_adapter", "train"]
    assert dora_dist.__all__ == ["RunConfig", "__version__", *functions]
    for name in dora_dist.__all__:
        assert getattr(dora_dist, name) is not None
        assert name in dir(dora_dist)
    with pytest.raises(AttributeError, match="does not define 'tain'; it defines RunConfig"):
        _ = dora_dist.tain


def test_importing_it_imports_neither_torch_nor_a_schema() -> None:
    seen = "import sys, dora_dist; print(*[n for n in ('torch', 'pydantic', 'transformers') if n in sys.modules])"
    assert _printed(seen) == ""
    assert _printed(f"{seen}; dora_dist.RunConfig; print('torch' in sys.modules)") == "False"


def test_each_name_says_what_it_takes_and_raises_and_shows_an_example() -> None:
    for name in ("build_model", "consolidate", "evaluate", "export_gguf", "export_lora", "generate", "train"):
        text = getattr(dora_dist, name).__doc__
        for part in ("Args:", "Raises", "Example::"):
            assert part in text, (name, part)


def test_the_version_is_the_package_s_own_and_its_types_are_for_use() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project
    assert 'version = { attr = "dora_dist.__version__" }' in project
    assert 'dora_dist = ["py.typed"' in project
    assert (ROOT / "dora_dist" / "py.typed").exists()


def _printed(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
