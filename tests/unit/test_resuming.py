"""What a resumed run compares: a rule for every field, the base by samples of its weights, and which checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dora_dist.checkpoint import resuming, run_folder
from dora_dist.checkpoint.manifest import write_manifest
from dora_dist.checkpoint.run_folder import chosen, set_best
from dora_dist.config import RunConfig
from dora_dist.config.fields import field_specs
from dora_dist.data.mixture import SHARES
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import write_json
from dora_dist.weights.safetensors_io import TensorFolder


def test_every_field_of_the_schema_has_one_rule() -> None:
    named = [
        f"{section}.{field}".removeprefix(".")
        for sections in resuming.RULES.values()
        for section, fields in sections.items()
        for field in fields.split()
    ]
    assert sorted(named) == sorted(field_specs(RunConfig))
    assert len(set(named)) == len(named)


def test_a_checkpoint_from_before_a_field_existed_is_compared_without_it(tmp_path: Path) -> None:
    config = RunConfig.from_dict({"model": {"path": "lab/base"}, "data": {"train": "lab/records"}, "plugins": ["mine"]})
    written = json.loads(config.to_json())
    manifest = {"trained_with": {"configuration": written}}
    del written["model"]["storage"], written["adapter"]["method"], written["plugins"]
    resuming.check_settings(tmp_path, manifest, config)
    assert list(resuming._changed(manifest, config)) == []
    written["plugins"] = []
    assert list(resuming._changed(manifest, config)) == [("plugins", [], ["mine"])]


def test_a_change_comes_to_the_same_where_all_that_it_changes_is_compared() -> None:
    cut, named = {"data.cutoff_len": "128 -> 256"}, {"adapter.target_modules": "null -> [q]"}
    same, followed = "data.cutoff_len 128 -> 256 (comes to the same)", "data.cutoff_len 128 -> 256 (followed)"
    assert [*resuming.told(cut, streamed=False)] == [same]
    assert [*resuming.told(cut, streamed=True)] == [followed]
    assert next(iter(resuming.told({**cut, "validation data": "9 -> 8"}, streamed=False))) == followed
    assert [*resuming.told(named, streamed=True)] == ["adapter.target_modules null -> [q] (comes to the same)"]


def test_a_new_run_starts_from_a_checkpoints_adapter_or_from_the_whole_model_that_was_trained(tmp_path: Path) -> None:
    config = RunConfig.from_dict({"model": {"path": "lab/base"}, "data": {"train": "lab/records"}})
    written = json.loads(config.to_json())
    written["training"]["seed"] = 7
    folder = tmp_path / "checkpoint-2"
    with pytest.raises(
        UserError, match=f"`dora-dist consolidate {folder} --output FOLDER`\\) and give --model.path FOLDER"
    ):
        resuming.check_settings(folder, {"trained_with": {"configuration": written}}, config)
    with pytest.raises(UserError, match="was not written by `train`"):
        resuming.check_settings(folder, {"step": 2}, config)
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter/adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=f"from its adapter with --adapter.init_from {folder}/adapter$"):
        resuming.check_settings(folder, {"trained_with": {"configuration": written}}, config)


def test_what_is_here_is_written_with_its_whole_path_and_hub_names_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("base", "records"):
        (tmp_path / folder).mkdir()
    raw = {
        "model": {"path": "base", "tokenizer": "lab/tokenizer"},
        "data": {"train": ["mine.jsonl", "records:all:train", "lab/records:all"], "validation": "other.json"},
    }
    written = resuming.located(RunConfig.from_dict(raw))
    assert (written.model.path, written.model.tokenizer) == (f"{tmp_path}/base", "lab/tokenizer")
    assert written.data.train == [f"{tmp_path}/mine.jsonl", f"{tmp_path}/records:all:train", "lab/records:all"]
    assert written.data.validation == f"{tmp_path}/other.json"
    assert written.data.image_folder is written.adapter.init_from is None
    ranks = {method: RunConfig.from_dict(raw | {"adapter": {"method": method}}) for method in (None, "vera", "full")}
    assert [config.adapter.r for config in ranks.values()] == [16, None, None]
    assert [resuming.located(config).adapter.r for config in ranks.values()] == [16, 256, None]


def digest(folder: Path, *files: dict[str, torch.Tensor]) -> str:
    folder.mkdir()
    for number, tensors in enumerate(files):
        save_file(tensors, folder / f"model-{number}.safetensors")
    if len(files) == 1:
        (folder / "model-0.safetensors").rename(folder / "model.safetensors")
        return resuming.sampled_digest(TensorFolder.open(folder))
    places = {name: f"model-{number}.safetensors" for number, tensors in enumerate(files) for name in tensors}
    write_json(folder / "model.safetensors.index.json", {"weight_map": places})
    return resuming.sampled_digest(TensorFolder.open(folder))


def test_a_base_is_known_by_its_values_and_not_by_its_files(tmp_path: Path) -> None:
    first, second = torch.arange(3000.0).view(60, 50), torch.arange(7.0)
    whole = digest(tmp_path / "whole", {"a": first, "b": second})
    assert digest(tmp_path / "parted", {"b": second}, {"a": first}) == whole
    filled = {row: first.clone().index_fill_(0, torch.tensor([row]), 5.0) for row in (0, 30, 59)}
    others = [digest(tmp_path / f"row-{row}", {"a": tensor, "b": second}) for row, tensor in filled.items()]
    others += [digest(tmp_path / "shape", {"a": first.view(50, 60), "b": second})]
    others += [digest(tmp_path / "type", {"a": first, "b": second.int()})]
    others += [digest(tmp_path / "name", {"a": first, "c": second})]
    assert len({whole, *others}) == 7


def checkpoint(run: Path, step: int) -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "state.safetensors").write_bytes(b"state")
    write_manifest(folder, {"step": step})
    return folder


def test_the_choice_among_checkpoints_in_words(tmp_path: Path) -> None:
    run, command = tmp_path / "run", "evaluate {} --tasks a=b"

    def told() -> str:
        choice = chosen(run)
        assert choice is not None
        return choice.told(command).replace(str(run), "run")

    assert chosen(run) is None
    two = checkpoint(run, 2)
    assert chosen(two) is None  # not a run folder
    assert told() == "run/checkpoint-2, the only checkpoint"
    checkpoint(run, 10)
    assert told() == "run/checkpoint-10, the newest of 2 checkpoints"
    set_best(run, two, 0.41)
    assert told() == (
        "run/checkpoint-2, the best of 2 checkpoints by eval_loss (0.41); "
        "the newest: dora-dist evaluate run/checkpoint-10 --tasks a=b"
    )
    set_best(run, run / "checkpoint-10", 0.9, metric="eval_accuracy")
    assert told() == "run/checkpoint-10, the best of 2 checkpoints by eval_accuracy (0.9), and the newest"
    (run / "checkpoint-10" / "state.safetensors").write_bytes(b"cut")
    (two.with_name("checkpoint-3")).mkdir()
    checkpoint(run, 4)
    assert told() == (
        "run/checkpoint-4, the newest of 2 checkpoints, as checkpoint-10, the best by eval_accuracy (0.9), is gone or "
        "incomplete"
    )
    (run / "best.json").write_text("[]")
    assert told() == "run/checkpoint-4, the newest of 2 checkpoints"


def test_a_run_keeps_its_name_and_one_that_starts_elsewhere_gets_its_own(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    other.mkdir()
    run_folder.name_run(run, None)
    first = run_folder.run_of(run)
    folder = run / "checkpoint-2"
    folder.mkdir()
    write_manifest(folder, {"step": 2, "run": first})
    run_folder.name_run(run, folder)
    assert run_folder.run_of(run) == first
    (run / "run.json").unlink()  # a copy of the checkpoints alone
    run_folder.name_run(run, folder)
    assert run_folder.run_of(run) == first
    run_folder.name_run(other, folder)
    assert run_folder.run_of(other) not in (first, None)
    moved = folder.rename(other / "checkpoint-2")
    with pytest.raises(UserError, match="checkpoint-2 was written by another run than the one in .*other; move it"):
        run_folder.newest_intact(other)
    assert moved.is_dir()  # refused, not set aside


def test_a_change_is_told_without_secrets() -> None:
    raw = {"model": {"path": "lab/base"}, "data": {"train": "lab/records"}}
    keys = [{"deepspeed": {"comet": {"api_key": key, "enabled": False}}} for key in ("first-key", "second-key")]
    before, now = (RunConfig.from_dict({**raw, "engine": engine}) for engine in keys)
    same = {"base": {"weights": "", "config": {}}, "data": {}, "order": {}, "ranks": 1}
    manifest = {"trained_with": {**same, "configuration": json.loads(before.to_json())}}
    told = resuming.changes(Path("checkpoint-2"), manifest, now, ours=same)
    assert list(told) == ["engine.deepspeed"]
    assert "-key" not in told["engine.deepspeed"] and '"api_key": "(not shown)"' in told["engine.deepspeed"]


def test_sources_of_a_mixture_are_compared_by_position_whatever_they_are_called() -> None:
    config = RunConfig.from_dict({"model": {"path": "lab/base"}, "data": {"train": "lab/records"}})
    same = {"base": {"weights": "", "config": {}}, "data": {}, "ranks": 1}
    before = {**same, "configuration": json.loads(config.to_json())}
    named = {SHARES: {"train-00000-of-00001": [7, 9], "train-00000-of-00001-2": [3, 1]}}  # as once written
    for order in (named, {SHARES: [[7, 9], [3, 1]]}):
        manifest = {"trained_with": {**before, "order": order}}
        assert resuming.changes(Path("c"), manifest, config, ours={**same, "order": {SHARES: [[7, 9], [3, 1]]}}) == {}
        with pytest.raises(UserError, match="the order of the data would not continue"):
            resuming.changes(Path("c"), manifest, config, ours={**same, "order": {SHARES: [[7, 8], [3, 2]]}})
