"""Answers after each evaluation on two ranks: what `generate` says of the checkpoint, and no trace in the training."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from transformers import TrainerCallback

from dora_dist import generate
from dora_dist.checkpoint import run_folder
from dora_dist.config import RunConfig
from dora_dist.data.reading import held_out
from tests import toy
from tests.distributed.training_runs import config
from tests.ranks import RankError, run_ranks

STEPS = 2
NOISY = {"max_steps": STEPS, "eval_every": 1, "neftune_alpha": 5.0, "activation_checkpointing": True}


class FailsAtTheSecondToken(TrainerCallback):
    """Breaks each forward of one token in a layer whose weight is gathered, on all ranks; nothing may be left of it."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        [layer] = [layer for name, layer in kwargs["model"].named_modules() if name.endswith("layers.1.mlp.up_proj")]
        layer.register_forward_pre_hook(self.fail)

    @staticmethod
    def fail(module: Any, inputs: tuple[Any, ...]) -> None:
        if inputs[0].shape[1] == 1:
            raise ValueError("this model cannot write")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 1:
            return  # evaluations without answers leave what DeepSpeed leaves
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

        states = {name: p.ds_status.name for name, p in kwargs["model"].named_parameters() if not p.ds_persist}
        assert not [name for name, status in states.items() if status != "NOT_AVAILABLE"]
        assert len(FWD_MODULE_STACK) == 1


class FailsOnOneRank(FailsAtTheSecondToken):
    """The same, while the other rank waits in a gather."""

    @staticmethod
    def fail(module: Any, inputs: tuple[Any, ...]) -> None:
        if dist.get_rank() == 1:
            FailsAtTheSecondToken.fail(module, inputs)


def failing_alone(folder: Path) -> None:
    from dora_dist.training import samples
    from dora_dist.training.run import train

    samples.PATIENCE = timedelta(seconds=3)
    raw = config(
        folder / "base",
        folder / "data.json",
        folder / "alone",
        training=NOISY,
        data={"cutoff_len": 500},
        logging={"samples": 1, "sample_tokens": 3},
    )
    train(RunConfig.from_dict(raw), [FailsOnOneRank()])


def three_runs(folder: Path) -> None:
    """Without samples, with three, and with three of a model that fails to write them."""
    from accelerate.state import AcceleratorState

    from dora_dist.training.run import train
    from dora_dist.zero3 import gather

    gather.IN_PLACE_BYTES = 4096
    for name, samples in (("without", 0), ("with", 3), ("failing", 3)):
        AcceleratorState._reset_state(reset_partial_state=True)
        raw = config(
            folder / "base",
            folder / "data.json",
            folder / name,
            training=NOISY,
            model={"storage": "int8"},
            adapter={"dropout": 0.1},
            data={"cutoff_len": 500},
            logging={"samples": samples, "sample_tokens": 5},
        )
        train(RunConfig.from_dict(raw), [FailsAtTheSecondToken()] if name == "failing" else [])


def test_answers_are_the_checkpoint_s_and_leave_no_trace(tmp_path: Path) -> None:
    toy.training_folder(tmp_path)
    run_ranks(three_runs, 2, tmp_path)
    lines = {name: run_folder.metrics(tmp_path / name) for name in ("without", "with", "failing")}
    losses = {
        name: [(line["step"], line.get("loss"), line.get("eval_loss")) for line in found if line["event"] != "save"]
        for name, found in lines.items()
    }
    assert losses["without"] == losses["with"] == losses["failing"]  # to the last bit

    said = [line["samples"] for line in lines["with"] if line["event"] == "evaluation"]
    records = toy.records(25)
    first = [records[i] for i in sorted(held_out(25, 5, 42))[:3]]
    assert len(said) == STEPS
    assert [each["expected"] for each in said[0]] == [record["output"] for record in first]
    asked = [{"instruction": record["instruction"]} for record in first]
    how: dict[str, Any] = {"dtype": "fp32", "max_new_tokens": 5, "progress": False}
    answered = generate(tmp_path / "with", asked, **how)
    assert [each["answer"] for each in said[-1]] == [each["answer"] for each in answered]
    assert [each["prompt"] for each in said[-1]] == [each["prompt"] for each in answered]
    assert said[-1] != said[0]  # it has learnt something else to say
    printed = (tmp_path / "with" / "run.log").read_text(encoding="utf-8")
    assert "sample 3: " in printed and f"(expected: {first[2]['output'][:8]}" in printed

    assert not any("samples" in line for name in ("without", "failing") for line in lines[name])
    printed = (tmp_path / "failing" / "run.log").read_text(encoding="utf-8")
    assert printed.count("no answers of this run are recorded") == 1 and "this model cannot write" in printed


def test_a_rank_that_fails_alone_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    toy.training_folder(tmp_path)
    with pytest.raises(RankError) as failed:
        run_ranks(failing_alone, 2, tmp_path)
    assert "generating samples failed, on this rank alone: this model cannot write" in str(failed.value)
