"""What becomes of a run when one of its checkpoints could not be written; what the thread that writes may ask for."""

from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dora_dist.adapters.layer import AdaptedLinear
from dora_dist.adapters.methods import LowRank
from dora_dist.checkpoint.adapter_of_model import _peft_layer
from dora_dist.checkpoint.saving import Saved, _own
from dora_dist.checkpoint.state_writers import _is_large
from dora_dist.config import CheckpointConfig
from dora_dist.runtime.errors import UserError
from dora_dist.training.checkpoints import Checkpoints

FAILED = Saved(Path("run/checkpoint-3"), 0.1, 0.2, "no space left")


class Ended(deque[Saved]):
    """In the place of a Saver: the saves that have ended."""

    @property
    def any_ended(self) -> bool:
        return bool(self)

    def ended(self) -> Saved | None:
        return self.popleft() if self else None


def checkpoints(*saved: Saved, on_failure: str = "stop", first: bool = True) -> Checkpoints:
    """Of a run on the first rank, or on another, whose saves have ended like that."""
    saver: Any = Ended(saved)
    world: Any = SimpleNamespace(first=first)
    options = CheckpointConfig.model_validate({"run_dir": "run", "on_failure": on_failure})
    return Checkpoints(saver, options, world, trained_with={}, metric="loss")


def test_every_rank_has_the_line_of_a_save_that_succeeded() -> None:
    saved = Saved(Path("run/checkpoint-3"), 0.1, 0.2, None)
    expected = {"saved_step": 3.0, "save_stall_seconds": 0.1, "save_seconds": 0.2}
    assert checkpoints(saved).ended() == expected
    assert checkpoints(saved, first=False).ended() == expected
    assert checkpoints().ended() == {}


@pytest.mark.parametrize("first", [True, False])
def test_a_save_that_failed_ends_the_run_on_every_rank_and_says_how_it_could_go_on(first: bool) -> None:
    with pytest.raises(UserError, match=r'checkpoint-3 failed: no space left.*on_failure = "continue" would let'):
        checkpoints(FAILED, first=first).ended()


def test_a_run_that_is_to_go_on_does_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert checkpoints(FAILED, on_failure="continue").ended() == {"save_failed": 1.0}
    assert "training goes on (checkpoint.on_failure)" in capsys.readouterr().err
    assert checkpoints(FAILED, on_failure="continue", first=False).ended() == {"save_failed": 1.0}


@pytest.mark.parametrize("on_failure", ["stop", "continue"])
def test_a_run_does_not_end_well_without_its_last_checkpoint(on_failure: str) -> None:
    with pytest.raises(UserError) as error:
        checkpoints(FAILED, on_failure=on_failure).ended(finishing=True, steps_left=False)
    assert "would let training go on" not in str(error.value)


def test_a_run_ends_well_with_its_last_checkpoint_though_the_one_before_failed() -> None:
    pending = checkpoints(FAILED, Saved(Path("run/checkpoint-4"), 0.1, 0.2, None), on_failure="continue")
    assert pending.ended(finishing=True, steps_left=False) == {"save_failed": 1.0}
    assert pending.ended(finishing=True, steps_left=False)["saved_step"] == 4.0
    assert pending.ended(finishing=True, steps_left=False) == {}


class _Gathering(dict[str, Any]):
    """Parameters as DeepSpeed holds them: looking one up in a forward pass gathers it."""

    def __getitem__(self, name: str) -> Any:
        raise AssertionError(f"{name} was looked up")


def test_the_thread_that_saves_looks_up_no_parameter() -> None:
    layer = AdaptedLinear.from_linear(nn.Linear(5, 3, bias=False), LowRank(2, 4.0))
    masters = {f"layer.{kind}": p.detach() for kind, p in layer.adapter_parameters().items()}
    layer._parameters = _Gathering(layer._parameters)
    saved = _peft_layer(layer, _own("layer", layer, masters))
    assert saved is not None and saved.lora_A is not None
    assert torch.equal(saved.lora_A, masters["layer.lora_A"].t())


def test_neither_a_large_state_nor_one_large_tensor_goes_through_rank_0() -> None:
    head = 128_256 * 2048  # of Llama 3, trained besides adapters: a state of 3.2 GB, a third of which would be gathered
    assert _is_large([head, 1000]) and not _is_large([head // 4, 1000])
    assert _is_large([1 << 26] * 6) and not _is_large([1 << 26] * 5) and not _is_large([])
