"""Experiment trackers: the real ones, all at once, on a tiny run; one that fails or hangs holds nothing up."""

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainingArguments

from dora_dist.checkpoint import run_folder
from dora_dist.checkpoint.manifest import MANIFEST
from dora_dist.config import RunConfig
from dora_dist.runtime.secrets import redacted
from dora_dist.training import trackers
from tests import toy
from tests.distributed.training_runs import config, run
from tests.ranks import run_ranks

ALL = ["tensorboard", "wandb", "mlflow"]
SECRET = "key-that-nobody-may-see"


def tracked(folder: Path) -> dict[str, Any]:
    """Two steps with every tracker, and what each has of them."""
    import os

    import mlflow

    os.environ.pop("WANDB_API_KEY", None)
    os.environ["NETRC"] = str(folder / "none")
    os.environ["MLFLOW_TRACKING_URI"] = f"file:{folder / 'mlruns'}"
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    changes: dict[str, Any] = {"training": {"max_steps": 2}, "logging": {"trackers": ALL, "tensorboard": True}}
    changes["engine"] = {"deepspeed": {"comet": {"enabled": False, "api_key": SECRET}}}
    run(config(folder / "base", folder / "data.json", folder / "run", **changes))
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("dora_dist")
    runs = client.search_runs([experiment.experiment_id])
    losses = [metric.value for metric in client.get_metric_history(runs[0].info.run_id, "loss")]
    return {"runs": len(runs), "losses": losses, "status": runs[0].info.status, "params": runs[0].data.params}


def test_real_trackers_get_the_numbers_and_the_configuration_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    toy.training_folder(tmp_path)
    [mlflow] = run_ranks(tracked, 1, tmp_path)
    log = (tmp_path / "run" / run_folder.LOG).read_text()
    assert "logging.trackers: no API key of wandb here: recorded offline" in log
    assert "failed, and the run goes on" not in log and "did not end" not in log, log
    losses = [line["loss"] for line in run_folder.metrics(tmp_path / "run") if line["event"] == "log"]
    assert (mlflow["runs"], mlflow["status"]) == (1, "FINISHED")
    assert mlflow["losses"] == pytest.approx(losses) and mlflow["params"]["adapter.r"] == "4"
    [events] = (tmp_path / "run" / run_folder.TENSORBOARD).glob("events*")
    board = EventAccumulator(str(events)).Reload()
    assert [scalar.value for scalar in board.Scalars("train/loss")] == pytest.approx(losses)
    assert board.Scalars("train/tokens_per_second")
    [offline] = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"tokens_per_second" in offline.read_bytes() and b"adapter.r" in offline.read_bytes()
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert {path.name for path in kept} <= {run_folder.CONFIG, run_folder.DEEPSPEED, MANIFEST}, kept


class Stands(threading.Event):
    """A callback that waits for ever."""

    def on_train_begin(self, *_: object, **__: object) -> None:
        self.wait()

    on_log = on_train_end = on_train_begin


class Fails:
    """A callback that cannot reach its server."""

    def on_train_begin(self, *_: object, **__: object) -> None:
        raise OSError("401 for key abcdef-secret at https://me:pass@host/x")


def test_a_tracker_that_fails_or_hangs_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "_CALLBACKS", {"wandb": Fails, "mlflow": Stands})
    monkeypatch.setattr(trackers, "CLOSING_S", 0.1)
    monkeypatch.setattr(trackers, "MOST_WAITING", 5)
    for name in ("WANDB_PROJECT", "WANDB_DIR", "WANDB_CONSOLE", "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_LOG_MODEL"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "x")
    monkeypatch.setenv("WANDB_API_KEY", "abcdef-secret")
    changes: dict[str, Any] = {"logging": {"trackers": ["wandb", "mlflow"]}}
    raw = config(tmp_path / "base", tmp_path / "data.json", tmp_path / "run", **changes)
    model = SimpleNamespace(config=SimpleNamespace(to_dict=dict, to_json_string=lambda: json.dumps({})))
    state = SimpleNamespace(global_step=1)
    with trackers.Trackers(RunConfig.from_dict(raw), first=True) as sent:
        sent.begin(SimpleNamespace(deepspeed=None), state, model, parameters=1)
        assert sent._threads[0].ended(60.0)  # before lines can fill its queue, which would be another reason
        for _ in range(20):
            sent.log(SimpleNamespace(), state, {"loss": 1.0})
    said = capsys.readouterr().err
    assert said.count("wandb failed, and the run goes on without it (OSError: 401 for key (not shown)") == 1
    assert "//(not shown)@host" in said and "abcdef" not in said
    assert "mlflow failed, and the run goes on without it (5 lines wait for it)" in said
    assert "mlflow did not end within 0.1 s" in said


class Keeps:
    """A callback that keeps what it is given, all of which Hugging Face's send."""

    given: tuple[Any, Any]

    def on_train_begin(self, args: Any, *_: object, model: Any) -> None:
        Keeps.given = args, model

    def on_train_end(self, *_: object) -> None:
        pass


def test_no_secret_of_the_engine_reaches_a_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_CALLBACKS", {"mlflow": Keeps})
    comet = {"comet": {"enabled": True, "api_key": "abcdef"}, "more": [{"token": "abcdef"}]}
    changes: dict[str, Any] = {"logging": {"trackers": ["mlflow"]}, "engine": {"deepspeed": comet}}
    config_ = RunConfig.from_dict(config(tmp_path / "base", tmp_path / "data.json", tmp_path / "run", **changes))
    model = SimpleNamespace(config=SimpleNamespace(to_dict=dict, to_json_string=lambda: "{}"))
    args = TrainingArguments(output_dir=str(tmp_path), report_to=[])
    args.deepspeed = comet
    with trackers.Trackers(config_, first=True) as sent:
        sent.begin(args, SimpleNamespace(), model, parameters=7)
    theirs, described = Keeps.given
    sent_whole = f"{theirs.to_dict()} {theirs.to_json_string()} {described.config.to_dict()}"
    assert "abcdef" not in sent_whole + described.config.to_json_string()
    assert theirs.to_dict()["deepspeed"]["comet"] == {"enabled": True, "api_key": "(not shown)"}
    assert args.deepspeed == comet  # the engine's own
    assert described.num_parameters() == 7


def test_a_netrc_that_cannot_be_read_is_no_key_and_a_server_of_ones_own_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not trackers._has_wandb_key()
    (tmp_path / "netrc").write_text("machine board.firm.com login user password k")
    assert not trackers._has_wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://board.firm.com:8080")
    assert trackers._has_wandb_key()

    def refused(*_: object, **__: object) -> str:
        raise PermissionError("netrc")

    monkeypatch.setattr(Path, "read_text", refused)
    assert not trackers._has_wandb_key()


def test_what_no_secret_is_stays_in_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "abcdef")
    assert redacted("false: abcdef") == "false: (not shown)"
