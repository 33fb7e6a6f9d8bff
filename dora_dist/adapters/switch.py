"""An adapted model without its adapters for a while: the base's own outputs, such as a reference model's."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from dora_dist.adapters.layer import adapted_layers
from dora_dist.runtime.errors import UserError


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within this, forwards of `model` give the base's outputs, without gradients: a reference model at no memory.

    Args:
        model: any module with adapted layers in it: `build_model(...).model`, the engine around it, a trainer's model.
            Whole or sharded; on shards every rank enters, as for every forward. Dropout is the model's own
            (`model.eval()`).

    Norms and kept outputs stay as they are: a forward before, another one off, and a backward of the first give what
    they give without the one in between.

    Under ZeRO-3, weights are fetched ahead once DeepSpeed has recorded a forward and its backward in a row; forwards
    that come between them from the first step on leave it without such a recording for good. Take the first step
    without `adapters_off`, and all later ones fetch ahead; results are the same either way.

    Raises: UserError where more than the adapters is trained (`trained_modules`, `trained_parameters`): without
    adapters such a model is not the base.

    Example::

        with adapters_off(engine):
            reference = engine(**batch).logits
        policy = engine(**batch).logits
    """
    layers = adapted_layers(model)
    own = {id(p) for layer in layers.values() for p in layer.adapter_parameters().values()}
    further = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    if further:
        more = f" and {len(further) - 1:,} more" if len(further) > 1 else ""
        raise UserError(
            f"adapters_off: {further[0]!r}{more} are trained besides the adapters, so without them the model is not "
            "its base; set adapter.trained_modules and adapter.trained_parameters to [], or build the base again"
        )
    before = {name: layer.is_on for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.is_on = False
        with torch.no_grad():
            yield
    finally:
        for name, layer in layers.items():
            layer.is_on = before[name]
