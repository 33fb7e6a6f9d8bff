"""`push`: what goes to the hub and what does not, to a stand-in that speaks what the hub's own library asks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dora_dist import cli
from dora_dist.cli.push import _with_base
from dora_dist.runtime.errors import UserError
from dora_dist.runtime.exit_codes import USERS_MISTAKE
from tests.hub_server import Hub, folder_files

TOKEN = "hf_thisMayNotBeShown"
MERGED = {"config.json": "{}", "model.safetensors": "weights", "tokenizer.json": "{}", "README.md": "# card"}
MERGED |= {"spiece.model": "m", "special_tokens_map.json": "{}"}
OTHERS = {"state.safetensors": "moments", "trainer_state.json": "{}", "run.log": "", "data.jsonl": "{}", "a.bin": ""}
OTHERS |= {"token.json": "{}", "hf_token.json": "{}"}


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    folder = tmp_path / "merged"
    folder.mkdir()
    for name, text in {**MERGED, **OTHERS}.items():
        (folder / name).write_text(text)
    return folder


def pushed(hub: Hub, *words: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    known = {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    line = [sys.executable, "-m", "dora_dist", "push", *words]
    return subprocess.run(line, env={**os.environ, **known}, capture_output=True, text=True)


def test_what_belongs_to_a_model_is_uploaded_privately_and_nothing_else(merged: Path) -> None:
    with Hub(writers={TOKEN}) as hub:
        found = pushed(hub, str(merged), "org/mine")
        assert found.returncode == 0, found.stderr
        assert hub.private == {"org/mine": True}
        sent = folder_files(merged)
        assert hub.files("org/mine") == {name: sent[name] for name in MERGED}
        assert f"{hub.url}/org/mine/commit/" in found.stdout
        assert TOKEN not in found.stdout + found.stderr
        assert pushed(hub, str(merged), "org/open", "--public").returncode == 0
        assert hub.private["org/open"] is False
        refused = pushed(hub, str(merged), "org/mine", token="hf_ofAnother")
        assert refused.returncode == USERS_MISTAKE
        assert "does not let us write there" in refused.stderr and "hf_of" not in refused.stderr
        assert "Traceback" not in refused.stderr


def test_a_dry_run_lists_and_asks_no_hub(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["push", str(merged), "org/mine", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in MERGED) and not any(name in said for name in OTHERS)
    assert "nothing was uploaded (--dry-run): 6 files" in said
    assert cli.main(["push", str(merged), "org/mine"]) == USERS_MISTAKE  # tests are offline
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err


def test_of_a_checkpoint_the_adapter_is_uploaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_text("weights")
    (tmp_path / "state.safetensors").write_text("moments")
    assert cli.main(["push", str(tmp_path), "org/mine", "--dry-run"]) == 0
    assert "state.safetensors" not in capsys.readouterr().out
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    assert cli.main(["push", str(tmp_path), "org/mine", "--dry-run"]) == USERS_MISTAKE
    assert "merge a run first (dora-dist consolidate)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "field"),
    [("adapter_config.json", "base_model_name_or_path"), ("dora_dist_adapter.json", "base_model")],
)
def test_no_folder_of_this_machine_is_uploaded_as_an_adapters_base(
    name: str, field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {field: "/home/alice/models/small", "r": 2}
    (tmp_path / name).write_text(json.dumps(config))
    [alone] = _with_base(tmp_path, None).values()
    assert json.loads(alone) == {field: "small", "r": 2}
    assert "without its folder; --base ORG/NAME names one of the hub" in capsys.readouterr().err
    assert json.loads(_with_base(tmp_path, "org/small")[name])[field] == "org/small"
    with pytest.raises(UserError, match="is no name of the hub"):
        _with_base(tmp_path, "./small")
    (tmp_path / name).write_text(json.dumps({field: "org/base"}))
    assert _with_base(tmp_path, None) == {}
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match="is no adapter"):
        _with_base(tmp_path, "org/small")
