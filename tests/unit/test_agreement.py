"""What is compared between ranks, and how differences are put into words. On real ranks: tests/distributed."""

from pathlib import Path

import pytest
import torch

from dora_dist.config import RunConfig
from dora_dist.config.fields import field_specs
from dora_dist.runtime import plugins
from dora_dist.runtime.agreement import differences, of_code, where
from dora_dist.runtime.hub import wanted
from dora_dist.training.agreement import OWN_TO_A_NODE, of_configuration, of_model_folder, of_plugins
from tests import toy

RECIPE = Path(__file__).parents[2] / "configs/llama7b_dora.json"


def test_ranks_with_their_hosts() -> None:
    hosts = ["a"] * 4 + ["b"] * 4
    assert where([0], hosts) == "rank 0 (a)"
    assert where([0, 1, 2, 3, 5, 7], hosts) == "ranks 0-3 (a), 5, 7 (b)"
    assert where(range(30), [f"n{i}" for i in range(30)]).endswith("7 (n7) and others")


def test_differences_name_field_values_and_ranks() -> None:
    everyone = [("a", {"x": "1", "y": "1"}), ("a", {"x": "2", "y": "1"}), ("b", {"y": "1"})]
    assert differences(everyone) == ["x: 1 on rank 0 (a); 2 on rank 1 (a); missing on rank 2 (b)"]
    many = [("a", {str(i): "1" for i in range(20)}), ("b", {str(i): "2" for i in range(20)})]
    assert len(differences(many)) == 9 and differences(many)[-1] == "and 12 more"


def test_every_field_is_compared_but_places_and_logging() -> None:
    compared = of_configuration(RunConfig.load(RECIPE))
    left_out = {name for name in field_specs(RunConfig) if name not in compared}
    assert left_out == OWN_TO_A_NODE | {name for name in field_specs(RunConfig) if name.startswith("logging.")}
    assert compared["adapter.r"] == "32"


def test_code_is_every_python_file_of_the_package() -> None:
    package = RECIPE.parents[1] / "dora_dist"
    files = {f"dora_dist/{path.relative_to(package)}" for path in package.rglob("*.py")}
    assert files < set(of_code())
    assert of_code()["torch"] == torch.__version__


def test_a_models_code_counts_where_it_is_to_run(tmp_path: Path) -> None:
    base = toy.base_model(tmp_path / "base")
    (base / "modeling_toy.py").write_text("pass")
    (base / "pytorch_model.bin").write_text("a pickle")
    assert of_model_folder("base", base).keys() == of_model_folder("base", base, patterns=wanted(False)).keys()
    more = of_model_folder("base", base, patterns=wanted(True)).keys() - of_model_folder("base", base).keys()
    assert more == {"base: modeling_toy.py"}


def test_weights_count_by_header_unless_the_whole_file_is_asked_for(tmp_path: Path) -> None:
    base = toy.base_model(tmp_path / "base")
    header, whole = of_model_folder("base", base), of_model_folder("base", base, whole=True)
    file = base / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # one bit of one weight
    file.write_bytes(content)
    assert of_model_folder("base", base) == header
    assert differences([("a", whole), ("a", of_model_folder("base", base, whole=True))])[0].startswith(
        "base: model.safetensors: "
    )


def test_a_plugins_code_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name, file in (("one_file", "one_file.py"), ("a_package", "a_package/__init__.py"), ("", "a_package/part.py")):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("")
        if name:
            plugins.load([name])
    before = of_plugins(["one_file", "a_package"])
    assert of_plugins([]) == {}
    (tmp_path / "a_package/part.py").write_text("changed = True")
    after = of_plugins(["one_file", "a_package"])
    assert [name for name in before if before[name] != after[name]] == ["plugins: a_package"]
