"""`evaluate` on VL-BART's tasks: what is refused before a weight is read; the names of the metrics."""

import json
from pathlib import Path

import h5py
import pytest

from dora_dist import cli
from dora_dist.evaluation import evaluate
from dora_dist.runtime.errors import UserError
from tests import subtasks, summaries, vl_bart


def test_a_models_folder_is_evaluated_by_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = subtasks.features(tmp_path, 3)
    text = summaries.tokenizer(subtasks.texts(), size=500)
    vl_bart.model(vocab_size=len(text), feature_dim=subtasks.WIDTH).save_pretrained(folder / "model")
    text.save_pretrained(folder / "model")
    files = subtasks.write(folder, 3, ("vqa", "nlvr2"))
    pictures = str(folder / "pictures.h5")
    with pytest.raises(UserError, match='data.train: "dev" is not a task of vision_text records; use "vqa", "gqa"'):
        evaluate(folder / "model", {"dev": files["vqa"]}, fields={"features": pictures}, progress=False)
    with pytest.raises(UserError, match="data.features is not set; give an HDF5 file"):
        evaluate(folder / "model", {"vqa": files["vqa"]}, progress=False)
    words = ["evaluate", str(folder / "model"), "--tasks", *(f"{task}={file}" for task, file in files.items())]
    words += ["--features", pictures, "--cutoff-len", "40", "--num-beams", "2", "--max-new-tokens", "4"]
    assert cli.main(words) == 0
    assert {"vqa_accuracy", "nlvr2_accuracy", "loss"} <= set(capsys.readouterr().out.splitlines()[0].split())


def test_features_that_cannot_be_read_are_an_error_or_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = subtasks.features(tmp_path, 3)
    text = summaries.tokenizer(subtasks.texts(), size=500)
    vl_bart.model(vocab_size=len(text), feature_dim=subtasks.WIDTH).save_pretrained(folder / "model")
    text.save_pretrained(folder / "model")
    with h5py.File(folder / "pictures.h5", "a") as file:
        file["p1/features"][:] = float("nan")
    words = ["evaluate", str(folder / "model"), "--tasks", f"vqa={subtasks.write(folder, 3, ('vqa',))['vqa']}"]
    words += ["--features", str(folder / "pictures.h5"), "--cutoff-len", "40", "--max-new-tokens", "4"]
    assert cli.main(words) == 2
    shown = capsys.readouterr().err
    assert "record 2: " in shown and "the features of 'p1' hold NaN or infinity" in shown
    assert "(1 of vqa cannot be read in all); fix it, or leave such records out with --bad-images skip" in shown
    result = folder / "result.json"
    assert cli.main([*words, "--bad-images", "skip", "--output", str(result)]) == 0
    assert "warning: left out: " in capsys.readouterr().err
    assert json.loads(result.read_text())["tasks"]["vqa"]["total"] == 2
