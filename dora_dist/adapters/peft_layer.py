"""One adapted module in PEFT's form: what a method writes, what it starts from, and what is merged into a base.

PEFT keeps lora_A as (r, in), lora_B as (out, r) and the whole magnitude m, not an offset from the base's row norms.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from dora_dist.adapters.projection import Projection
from dora_dist.adapters.row_norms import give_norms

# A row whose weight and update are both zero has norm 0, and PEFT computes 0/0 there. Its magnitude is 0 as
# well, so its output is 0 whatever B is: a small B (exact in fp16 and bf16) keeps PEFT finite.
_ZERO_ROW_B = 2.0**-10


@dataclass
class AdapterLayer:
    """One adapted module; fp32 CPU tensors in PEFT's layout.

    lora_A (r, in) and lora_B (out, r), both None where only the magnitude is trained (then `in_features` must
    be given); magnitude (out,), None for plain LoRA; scaling = lora_alpha / r.
    """

    lora_A: Tensor | None
    lora_B: Tensor | None
    magnitude: Tensor | None
    scaling: float
    in_features: int | None = None
    peft_type: ClassVar[str] = "LORA"
    title: ClassVar[str] = "LoRA"
    method: ClassVar[str] = "lora"
    """What adapter.method calls it."""

    @property
    def r(self) -> int | None:
        """Components of the low-rank update; None where only the magnitude is trained."""
        return None if self.lora_A is None else self.lora_A.shape[0]

    @property
    def shape(self) -> tuple[int, int | None]:
        """(out, in) of the weight that the module was trained on; None for what the folder does not say."""
        rows = self.magnitude if self.lora_B is None else self.lora_B
        columns = self.in_features if self.lora_A is None else self.lora_A.shape[1]
        assert rows is not None and columns is not None
        return rows.shape[0], columns

    def with_magnitude(self, magnitude: Tensor) -> AdapterLayer:
        """This update under a magnitude (out,), in the form that PEFT has for it."""
        return replace(self, magnitude=magnitude)

    def odd_magnitudes(self) -> int:
        """How many magnitudes are below 0, which turns a row of the weight around, or 0, which silences one.

        0 is right where the base's row is 0, which shows in B (`stored_factors`); a layer is not all such rows.
        """
        if self.magnitude is None:
            return 0
        zeros = self.magnitude == 0
        if not bool(zeros.all()):
            B = torch.zeros(len(zeros), 1) if self.lora_B is None else self.lora_B
            zeros &= ((B != 0) & (B != _ZERO_ROW_B)).any(dim=1)
        return int(((self.magnitude < 0) | zeros).sum())

    def merge_rows(self, weight: Tensor, start: int) -> None:
        """Merge it into rows [start, start + len(weight)) of the base weight, fp32 (rows, in), in place.

        W = (m / n)[:, None]·(W0 + s·B·A), n = row norms of the bracket (Liu et al., section 4.1): a row needs only its
        own base row.
        """
        rows = slice(start, start + len(weight))
        if self.lora_A is not None and self.lora_B is not None:
            weight.addmm_(self.lora_B[rows] * self.scaling, self.lora_A)
        if self.magnitude is not None:
            give_norms(weight, self.magnitude[rows])

    def stored_factors(self, module: str) -> tuple[Tensor, Tensor]:
        """lora_A and lora_B for PEFT, which knows neither magnitude-only modules nor rows of norm zero.

        A magnitude-only module becomes a rank-one LoRA whose B is zero. Raises ValueError, naming `module`, where
        there is nothing to make factors of.
        """
        lora_A, lora_B, magnitude = self.lora_A, self.lora_B, self.magnitude
        if lora_A is None or lora_B is None:
            if magnitude is None or self.in_features is None:
                raise ValueError(f"{module}: a layer without lora_A and lora_B needs magnitude and in_features")
            lora_A, lora_B = magnitude.new_ones(1, self.in_features), magnitude.new_zeros(len(magnitude), 1)
        if magnitude is not None:
            zero_rows = (magnitude == 0) & (lora_B == 0).all(dim=1)
            lora_B = lora_B.masked_fill(zero_rows[:, None], _ZERO_ROW_B)
        return lora_A, lora_B

    def outline(self) -> AdapterLayer:
        """The same without numbers, on the meta device: what a file's layout needs to know."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        empty: dict[str, Any] = {name: value.to("meta") for name, value in own.items() if isinstance(value, Tensor)}
        return replace(self, **empty)

    @classmethod
    def of_stored(cls, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor | None, scaling: float) -> AdapterLayer:
        """A module from tensors that were read; placeholder factors (`stored_factors`) become None."""
        if magnitude is not None and _are_placeholders(lora_A, lora_B, magnitude):
            return cls(None, None, magnitude, scaling, lora_A.shape[1])
        return cls(lora_A, lora_B, magnitude, scaling, lora_A.shape[1])


@dataclass(kw_only=True)
class VeraLayer(AdapterLayer):
    """One module of a VeRA adapter: `lambda_d` (r,) and `lambda_b` (out,), fp32; ΔW = diag(b)·B·diag(d)·A.

    `prng_key` is what A and B were drawn from, `projection_digest` of what came of it, "" where that is not known.
    `projection` has them, where the sizes of all modules are known.
    """

    lora_A: None = None
    lora_B: None = None
    magnitude: None = None
    scaling: float = 1.0
    lambda_d: Tensor
    lambda_b: Tensor
    prng_key: int = 0
    projection_digest: str = ""
    projection: Projection | None = None
    peft_type = "VERA"
    title = "VeRA"
    method = "vera"

    @property
    def r(self) -> int:
        return len(self.lambda_d)

    @property
    def shape(self) -> tuple[int, int | None]:
        return len(self.lambda_b), self.in_features

    def merge_rows(self, weight: Tensor, start: int) -> None:
        A, B = self._views(weight.shape[1])
        rows = slice(start, start + len(weight))
        weight.addmm_(B[rows] * self.lambda_b[rows, None] * self.lambda_d, A)

    def low_rank(self, in_features: int) -> AdapterLayer:
        """As LoRA has it: A scaled by d, B by b."""
        A, B = self._views(in_features)
        return AdapterLayer(A * self.lambda_d[:, None], B * self.lambda_b[:, None], None, self.scaling, in_features)

    def with_magnitude(self, magnitude: Tensor) -> AdapterLayer:
        """As DoRA's: PEFT has no magnitude over VeRA."""
        assert self.in_features is not None
        return self.low_rank(self.in_features).with_magnitude(magnitude)

    def _views(self, in_features: int) -> tuple[Tensor, Tensor]:
        assert self.projection is not None
        return self.projection.views((len(self.lambda_b), in_features), self.lambda_d)


def _are_placeholders(lora_A: Tensor, lora_B: Tensor, magnitude: Tensor) -> bool:
    """Whether these factors are what `AdapterLayer.stored_factors` makes of a magnitude-only module."""
    ones_or_zeros = lora_A.shape[0] == 1 and bool((lora_A == lora_A[0, 0]).all()) and lora_A[0, 0] in (0, 1)
    empty = (lora_B[:, 0] == 0) | ((magnitude == 0) & (lora_B[:, 0] == _ZERO_ROW_B))
    return ones_or_zeros and bool(empty.all())
