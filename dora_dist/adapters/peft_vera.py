"""PEFT folders of VeRA: two vectors a module, and the key of the matrices that all modules share.

PEFT writes the matrices into the folder, unless told not to; here they follow from the key, and those of a folder must
be the same. The folder says of no module how wide its input is, and the matrices are as wide as the widest: the base
says that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Self

import torch

from dora_dist.adapters.peft_folder import PeftFolder
from dora_dist.adapters.peft_layer import VeraLayer
from dora_dist.adapters.projection import Projection
from dora_dist.runtime.errors import UserError

PROJECTION_DIGEST = "dora_dist.projection"
"""Where a file of ours says, in its metadata, which matrices its vectors were trained with (`Projection.digest`)."""
_A, _B = "base_model.vera_A", "base_model.vera_B"


@dataclass
class VeraFolder(PeftFolder):
    """A PEFT folder of VeRA that was checked but not read; its layers can be merged once it is `of_base`."""

    parts: ClassVar[dict[str, str]] = {"vera_lambda_d": "lambda_d", "vera_lambda_b": "lambda_b"}
    shared = (_A, _B)
    projection: Projection | None = None

    @property
    def lora_alpha(self) -> float:
        return float(self.config["r"])

    @property
    def dropout(self) -> float:
        return float(self.config.get("vera_dropout") or 0.0)

    def shape(self, module: str) -> tuple[int, None]:
        return self.tensors.entries[self.modules[module]["lambda_b"]].shape[0], None

    def of_base(self, shapes: Mapping[str, tuple[int, int]]) -> Self:
        """Raises UserError where the shared matrices in the folder are not those of such modules."""
        if not shapes:
            return self
        known = self.checked().projection
        projection = Projection.over(shapes.values(), key=self.config["projection_prng_key"], r=self.config["r"])
        if known is not None and known.widest != projection.widest:
            raise UserError(
                f"{self.path}: its vera_A and vera_B are for layers of up to {known.widest}, and those that "
                f"it adapts in this base are up to {projection.widest}; give the base that it was trained on"
            )
        projection.check(self._projection_digest, str(self.path))
        return replace(self, projection=projection)

    def layer(self, module: str) -> VeraLayer:
        names = self.modules[module]
        return VeraLayer(
            lambda_d=self.read(names["lambda_d"]),
            lambda_b=self.read(names["lambda_b"]),
            prng_key=self.config["projection_prng_key"],
            projection_digest=self._projection_digest,
            projection=self.projection,
        )

    def checked(self) -> Self:
        """With the matrices' sizes, if the folder has them. Raises UserError where they are not what the key gives."""
        there = [name for name in self.shared if name in self.tensors.entries]
        if not there:
            return self
        if len(there) == 1:
            raise UserError(f"{self.path}: it has {there[0]!r} and not the other of the two; save the adapter again")
        A, B = (self.tensors.entries[name].shape for name in self.shared)
        r, key = self.config["r"], self.config["projection_prng_key"]
        if len(A) != 2 or len(B) != 2 or (A[0], B[1]) != (r, r):
            raise UserError(f"{self.path}: vera_A {A} and vera_B {B} must be (r, in) and (out, r) with r={r}")
        projection = Projection(key, r, (B[0], A[1]))
        for name, drawn in zip(self.shared, projection.drawn(), strict=True):
            stored = self.tensors.entries[name].dtype
            if not torch.equal(self.read(name), drawn.to(stored).float()):
                raise UserError(
                    f"{self.tensors.entries[name].path}: tensor {name!r} is not what PEFT draws for "
                    f"projection_prng_key={key}, which is all that can be read here; merge it with PEFT"
                )
        return replace(self, projection=projection)

    @cached_property
    def _projection_digest(self) -> str:
        return self._metadata(PROJECTION_DIGEST, "")

    def _check(self, module: str) -> None:
        shapes = {part: self.tensors.entries[name].shape for part, name in self.modules[module].items()}
        r = self.config["r"]
        if set(shapes) != set(self.parts.values()) or shapes["lambda_d"] != (r,) or len(shapes["lambda_b"]) != 1:
            found = ", ".join(f"{part} {shape}" for part, shape in shapes.items())
            expected = f"with r={r} it must have vera_lambda_d (r,) and vera_lambda_b (out,)"
            raise UserError(f"{self.path}: module {module!r} has {found}; {expected}")
