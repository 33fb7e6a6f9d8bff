"""Losses are judged without reading them: only an error message does that."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dora_dist.training.finiteness import StepLosses


def test_the_first_loss_that_is_not_finite_is_found_with_its_samples() -> None:
    losses = StepLosses()
    assert losses.not_finite(torch.device("cpu")) == 0
    losses.add(torch.tensor(1.0), torch.arange(20).view(2, 10))
    assert losses.not_finite(torch.device("cpu")) == 0
    assert losses.first_not_finite() is None
    losses.add(torch.tensor(float("inf")), torch.arange(20, 40).view(2, 10))
    losses.add(torch.tensor(float("nan")), torch.arange(3)[None])
    assert losses.not_finite(torch.device("cpu")) == 1
    assert losses.first_not_finite() == {"loss": float("inf"), "first_tokens": [[*range(20, 28)], [*range(30, 38)]]}
    assert [len(sample) for sample in losses.samples()] == [8, 8, 8, 8, 3]
    losses.clear()
    assert losses.samples() == []


def test_nothing_is_read_of_a_loss_while_training_goes_on() -> None:
    with FakeTensorMode():  # a tensor here has no value: reading it is an error
        losses = StepLosses()
        losses.add(torch.empty(()), torch.zeros(2, 10, dtype=torch.long))
        assert losses.not_finite(torch.device("cpu")).shape == ()
