"""Add an adapter method: VeRA (Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation", arXiv 2310.11454).

LoRA trains two factors per layer. VeRA draws both at random, freezes them, and trains two vectors that scale them:

    ΔW = diag(b)·B·diag(d)·Aᵀ        d (r,) starts at 0.1, b (out,) at 0

Put the file where Python finds modules (`PYTHONPATH=examples`), and name the module and the method in a run's
configuration:

    {"plugins": ["add_a_method"], "adapter": {"method": "vera", "r": 64, "settings": {"projection_seed": 7}}, ...}

Everything else follows. Both vectors are sharded, saved and resumed like any trained parameter; a run's adapter folder
is a LoRA that PEFT and `dora-dist consolidate` read. With `adapter.weight_decomposed`, which is the default, there is a
magnitude over it (DVoRA, section 5.2 of Liu et al., arXiv 2402.09353), whose row norms are computed from shards.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dora_dist.adapters.method import Initial, Shape, Tensors, register
from dora_dist.adapters.methods.factored import Factored


@register  # from here on, adapter.method may say "vera"
@dataclass(frozen=True)
class Vera(Factored):
    """One object serves every layer of a run. It holds settings: `r` and `dropout` are those of the adapter section,
    and further fields are what `adapter.settings` may set.
    """

    name = "vera"
    titles = ("VeRA", "DVoRA")  # without and with a magnitude over it
    r: int = 256
    projection_seed: int = 0

    scaling = 1.0  # LoRA's lora_alpha / r; here d and b do it

    def parameters(self, shape: Shape) -> dict[str, Initial]:
        """What trains in a layer whose weight is (out, in), in the order of registration, with its first values.

        A name becomes an attribute of the layer, so it must differ from `weight`, `bias` and `magnitude_offset`.
        """
        out_features, _ = shape
        return {"vera_d": Initial((self.r,), value=0.1), "vera_b": Initial((out_features,))}

    def factors(self, shape: Shape, parameters: Tensors) -> tuple[Tensor, Tensor]:
        """A (in, r) and B (out, r) with ΔW = scaling·B·Aᵀ, as a function of the parameters.

        This is the whole method. `Factored` multiplies activations by the factors, without ever building ΔW, has
        autograd carry the factors' gradients on to the parameters, and computes row norms and PEFT's form from the
        factors. A method for which that is not fast enough overrides single steps, as `DynamicRank` does.
        """
        d, b = parameters["vera_d"], parameters["vera_b"]
        A = projection("A", shape[1], self.r, seed=self.projection_seed, device=d.device, dtype=d.dtype)
        B = projection("B", shape[0], self.r, seed=self.projection_seed, device=d.device, dtype=d.dtype)
        return A, b[:, None] * B * d


@lru_cache(maxsize=64)  # also because copies from host to device in every product would make each one wait
def projection(which: str, features: int, r: int, *, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A frozen factor (features, r). Layers of one size share it; drawn on the CPU, it is the same on every rank."""
    generator = torch.Generator().manual_seed(seed * 2 + (which == "B"))
    drawn = torch.randn(features, r, generator=generator) / math.sqrt(features if which == "A" else r)
    return drawn.to(device, dtype)
