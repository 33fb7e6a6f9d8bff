"""Add an adapter method: LoHa (Hyeon-Woo et al., "FedPara: Low-Rank Hadamard Product", ICLR 2022, arXiv 2108.06098).

LoRA's update has rank r. LoHa multiplies two such updates element by element, and the product's rank is up to r²:

    ΔW = s·(B1·A1ᵀ)⊙(B2·A2ᵀ)        B2 starts at 0, the others at random; s = lora_alpha / r

Put the file where Python finds modules (`PYTHONPATH=examples`), and name the module and the method in a run's
configuration:

    {"plugins": ["add_a_method"], "adapter": {"method": "loha", "r": 4, "settings": {"spread": 0.5}}, ...}

Everything else follows. All four factors are sharded, saved and resumed like any trained parameter; a run's adapter
folder is a LoRA that PEFT and `dora-dist consolidate` read. With `adapter.weight_decomposed`, which is the default,
there is a magnitude over it, whose row norms are computed from shards.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from dora_dist.adapters.method import Initial, Shape, Tensors, register
from dora_dist.adapters.methods.factored import Factored


@register  # from here on, adapter.method may say "loha"
@dataclass(frozen=True)
class LoHa(Factored):
    """One object serves every layer of a run. It holds settings: `r`, `lora_alpha` and `dropout` are those of the
    adapter section, and further fields are what `adapter.settings` may set.
    """

    name = "loha"
    titles = ("LoHa", "DoRA with LoHa")  # without and with a magnitude over it
    r: int = 8
    lora_alpha: float = 8.0
    spread: float = 1.0  # of the random factors' first values, in units of LoRA's

    @property
    def scaling(self) -> float:
        return self.lora_alpha / self.r

    def parameters(self, shape: Shape) -> dict[str, Initial]:
        """What trains in a layer whose weight is (out, in), in the order of registration, with its first values.

        A name becomes an attribute of the layer, so it must differ from `weight`, `bias` and `magnitude_offset`.
        """
        out_features, in_features = shape
        A = Initial((in_features, self.r), bound=self.spread / math.sqrt(in_features))
        B = Initial((out_features, self.r), bound=self.spread / math.sqrt(self.r))
        return {"loha_A1": A, "loha_B1": B, "loha_A2": A, "loha_B2": Initial((out_features, self.r))}

    def factors(self, shape: Shape, parameters: Tensors) -> tuple[Tensor, Tensor]:
        """A (in, r²) and B (out, r²) with ΔW = scaling·B·Aᵀ, as a function of the parameters.

        This is the whole method: the product of two sums, Σ_i B1_i·A1_iᵀ and Σ_j B2_j·A2_jᵀ, is one sum over all pairs
        (i, j). `Factored` multiplies activations by the factors, without ever building ΔW, has autograd carry the
        factors' gradients on to the parameters, and computes row norms and PEFT's form from the factors. A method for
        which that is not fast enough overrides single steps, as `DynamicRank` does.
        """
        own = parameters
        return pairs(own["loha_A1"], own["loha_A2"]), pairs(own["loha_B1"], own["loha_B2"])


def pairs(first: Tensor, second: Tensor) -> Tensor:
    """(n, r) and (n, r) -> (n, r²): products of all pairs of columns."""
    return (first[:, :, None] * second[:, None, :]).flatten(1)
