"""`evaluate` on VL-BART's tasks: what is refused before a weight is read; the names of the metrics."""

from pathlib import Path

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
    with pytest.raises(UserError, match='data.train: "dev" is no task of vision_text records; use "vqa", "gqa"'):
        evaluate(folder / "model", {"dev": files["vqa"]}, fields={"features": pictures}, progress=False)
    with pytest.raises(UserError, match="data.features is not set; give an HDF5 file"):
        evaluate(folder / "model", {"vqa": files["vqa"]}, progress=False)
    words = ["evaluate", str(folder / "model"), "--tasks", *(f"{task}={file}" for task, file in files.items())]
    words += ["--features", pictures, "--cutoff-len", "40", "--num-beams", "2", "--max-new-tokens", "4"]
    assert cli.main(words) == 0
    assert {"vqa_accuracy", "nlvr2_accuracy", "loss"} <= set(capsys.readouterr().out.splitlines()[0].split())
