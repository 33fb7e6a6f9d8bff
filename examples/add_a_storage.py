"""Add a way to hold frozen weights: eight bits a number, in blocks of 64 with a scale each.

A storage says how the frozen weight of an adapted layer is kept in memory. This one takes half of bf16's memory, and
so half of the bytes that ZeRO-3 gathers. Put the file where Python finds modules (`PYTHONPATH=examples`), and name both
the module and the storage in a run's configuration:

    {"plugins": ["add_a_storage"], "model": {"path": "base", "storage": "eight_bits"}, ...}

Everything else follows. Each rank reads its own bytes of the base, encodes them and holds them as its shard; row norms
are computed from shards; checkpoints hold what trains, as ever. The adapter that is saved says which storage it was
trained on, and is merged into the weights as training saw them:

    dora-dist consolidate runs/mine --plugins add_a_storage --output merged/

Run the file itself to see what rounding costs: `python examples/add_a_storage.py`.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dora_dist.adapters.storage import PackedStorage, StoredTensor, register

BLOCK = 64
SCALE_BYTES = 2


class EightBits(PackedStorage):
    """A record is a block of 64 numbers: 64 codes of one byte, then the block's scale, in two bytes (bfloat16).

    A weight's elements are counted row by row, and cut into records of `record` elements. Shards of ZeRO-3 end where
    records end, so a rank can decode its share by itself. That is why the scale lies beside its codes, and not in a
    tensor of its own that every rank would hold whole. (Several tensors are possible: each gets an entry in `tensors`,
    and is sharded like the others. The trained parameters of a layer, its bias, and `weight` in other storages are
    such members of the layer too, so a further tensor needs another name than theirs.)
    """

    name = "eight_bits"
    record = BLOCK
    tensors: Mapping[str, StoredTensor] = {"weight": StoredTensor(BLOCK + SCALE_BYTES, torch.uint8)}

    def encode(self, values: Tensor) -> Sequence[Tensor]:
        """values (n, 64) fp32 -> one tensor of bytes (n, 66). A weight's last block comes padded with zeros."""
        scale = (values.abs().amax(dim=1, keepdim=True) / 127).to(torch.bfloat16)
        divisor = torch.where(scale > 0, scale.float(), 1.0)  # a block of zeros has scale 0, and codes 0
        codes = (values / divisor).round().clamp(-127, 127).to(torch.int8)
        return [torch.cat([codes.view(torch.uint8), scale.view(torch.uint8)], dim=1)]

    def decode(self, tensors: Sequence[Tensor]) -> Tensor:
        """The reverse: (n, 66) bytes -> (n, 64) fp32, on whatever device the bytes are."""
        [records] = tensors
        codes, scale = records.split([BLOCK, SCALE_BYTES], dim=1)
        return codes.view(torch.int8).float() * scale.contiguous().view(torch.bfloat16).float()

    # `PackedStorage` makes all that the package asks of a storage out of these two: loading, any range of the weight
    # in fp32, and the products with activations, for which it decodes the layer's whole weight. A storage with a
    # kernel of its own overrides `project` and `project_back`.


register(EightBits())


if __name__ == "__main__":
    weight = torch.randn(4096, 4096) * 0.02
    error = EightBits().round_trip(weight.flatten()).view_as(weight) - weight
    print(f"bits a number: {8 * (BLOCK + SCALE_BYTES) / BLOCK:.2f}")
    print(f"relative error (root mean square): {error.norm() / weight.norm():.2%}")
