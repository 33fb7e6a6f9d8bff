"""Single-rank components of gated layers: importance, budget, pruning, and the penalty of the
Dimensional Equilibrium Modulator (DEM).

Mao et al., "Enhancing Parameter-Efficient Fine-Tuning with Dynamic Rank Distribution", ACL 2024 (arXiv 2405.17357).
Component i of a layer is c_i·B_i·A_i. Training starts with more components than the budget allows, and sets the
gates of the least important ones, over all layers together, to 0.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dora_dist.adapters.layer import AdaptedLinear, before_any_forward
from dora_dist.runtime.stopwatch import Stopwatch

Schedule = Literal["dora", "adalora"]
EPSILON = 1e-8


@dataclass(frozen=True)
class Budget:
    """How many components are pruned when (Mao, section 3.2).

    Layers start with `start_r` components each and end with `r` on average. In steps: nothing is pruned before
    `first`; from there to `last`, every `every` steps and at `last`, ever more; then the mask is final. "dora": slow
    first, fast last; "adalora" (Zhang et al., 2023): fast first.
    """

    r: int
    start_r: int
    first: int
    last: int
    every: int
    schedule: Schedule = "dora"

    @classmethod
    def of_run(
        cls, r: int, start_r: int, steps: int, *, start: float = 0.15, stop: float = 0.5, every: int, schedule: Schedule
    ) -> "Budget":
        """The budget of a run of `steps` optimizer steps whose pruning window is [start, stop] as shares of them.

        Raises ValueError if the window is empty, or if only its last step is a multiple of `every`.
        """
        first, last = int(start * steps), int(stop * steps)
        if last <= first:
            raise ValueError(f"the pruning window, steps {first} to {last} of {steps}, is empty")
        if every > last - first:
            raise ValueError(f"the pruning window, steps {first} to {last} of {steps}, is shorter than {every} steps")
        return cls(r, start_r, first, last, every, schedule)

    def prunes_at(self, step: int) -> bool:
        """Whether components are pruned after optimizer step `step` (counted from 1)."""
        return self.first <= step <= self.last and (step % self.every == 0 or step == self.last)

    def pruned(self, step: int, components: int) -> int:
        """How many of all `components` have their gate set to 0 after a step that prunes: at least 1."""
        x = (step - self.first) / (self.last - self.first)
        progress = x**3 if self.schedule == "dora" else 1 - (1 - x) ** 3
        return max(int((self.start_r - self.r) * components * progress / self.start_r), 1)


@dataclass(frozen=True)
class FactorSums:
    """Sums over the rows of a factor X (rows, r), fp64 on the CPU: `gram` XᵀX (r, r) and `total` ΣX (r,)."""

    gram: Tensor
    total: Tensor
    rows: int

    @classmethod
    def of(cls, factor: Tensor) -> "FactorSums":
        """The sums of a whole factor."""
        x = factor.detach().double()
        return cls((x.t() @ x).cpu(), x.sum(0).cpu(), len(x))

    def variance(self) -> Tensor:
        """Unbiased variance of each component's entries, (r,); 0 of a single one."""
        return (self.gram.diagonal() - self.total.square() / self.rows) / max(self.rows - 1, 1)


@dataclass(frozen=True)
class LayerSums:
    """What importance and penalty of a layer follow from: its gates c (r,), fp64 on the CPU, and both factors' sums."""

    gates: Tensor
    A: FactorSums
    B: FactorSums

    def importance(self) -> Tensor:
        """Each component's share of the update, (r,) fp64: ‖c_i·B_i·A_i‖ / (‖Σ_j c_j·B_j·A_j‖ + 1e-8) (Mao, eq. 5).

        Exact without building any (out, in) matrix: ‖Σ‖² = Σ_kl c_k·c_l·(BᵀB)_kl·(AᵀA)_kl.
        """
        parts = self.gates.abs() * (self.A.gram.diagonal() * self.B.gram.diagonal()).sqrt()
        whole = self.gates @ (self.A.gram * self.B.gram) @ self.gates
        return parts / (whole.clamp(min=0).sqrt() + EPSILON)

    def spread(self) -> float:
        """Σ_i Var(A_i) + Var(B_i): what the DEM penalty averages over components (Mao, section 3.4)."""
        return float((self.A.variance() + self.B.variance()).sum())


@dataclass
class PruningEvent:
    """What one pruning did: of all components, `pruned` had their gates closed, and `kept` are open, by layer too."""

    step: int
    components: int
    pruned: int
    kept: int
    by_layer: dict[str, int] = field(default_factory=dict)
    final: bool = False


def component_parameters(layer: AdaptedLinear) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """A (in, r), B (out, r) and the gates (r,) of a layer that has components."""
    assert layer.method.components is not None
    own, names = layer.adapter_parameters(), layer.method.components
    return own[names.A], own[names.B], own[names.gates]


class ComponentPruner:
    """Scores and prunes the gated layers of a model whose parameters are whole; after every optimizer step, by itself.

    Attached to a model and to the torch optimizer that steps (an engine's inner one), it works before the first forward
    that follows a step, of the root or of an inner module, and before norms are refreshed. `settle()` does it at once:
    before saving, and where results are wanted at the step's end. Until `budget.last` scores are smoothed,
    S ← β·S + (1 − β)·s, from S = 0 at step 1 on; afterwards the pruned gates are held at 0 whatever the optimizer does.

    `dem` weighs the penalty R = (1/N)·Σ_i Var(A_i) + Var(B_i), whose gradient the layers add in backward: 1/`backwards`
    of it in each of a step's backward passes.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        budget: Budget,
        *,
        beta: float = 0.9,
        dem: float = 0.0,
        backwards: int = 1,
        clear_moments: bool = False,
    ) -> None:
        self.layers = {
            name: m for name, m in model.named_modules() if isinstance(m, AdaptedLinear) and m.method.components
        }
        self.budget, self.beta, self.clear_moments = budget, beta, clear_moments
        self.components = sum(layer.method.r for layer in self.layers.values())
        self.step = 0
        self.scores = {name: torch.zeros(layer.method.r, dtype=torch.float64) for name, layer in self.layers.items()}
        self.pruned = {name: torch.zeros(layer.method.r, dtype=torch.bool) for name, layer in self.layers.items()}
        self.penalty = math.nan
        self.device = next(model.parameters()).device
        self.stopwatch = Stopwatch()
        self.events: list[PruningEvent] = []
        self._optimizer, self._dem, self._backwards = optimizer, dem, backwards
        self._stepped = False
        self._set_dem()
        self._handles = [
            *before_any_forward(model, self.settle, prepend=True),
            optimizer.register_step_post_hook(self._on_step),
        ]

    @property
    def finished(self) -> bool:
        """Whether the mask is final."""
        return self.step >= self.budget.last

    def close(self) -> None:
        """Detach from the model and from optimizers; no layer adds a penalty any more."""
        for handle in self._handles:
            handle.remove()
        for layer in self.layers.values():
            layer.dem_weight = 0.0

    @torch.no_grad()
    def settle(self) -> None:
        """Do what follows from the last optimizer step, if that is still to do. On shards this is collective."""
        if not self._stepped:
            return
        self._stepped = False
        self.step += 1
        with self.stopwatch.on(self.device):
            self._settle()

    def _settle(self) -> None:
        if self.step <= self.budget.last:
            sums = self.layer_sums()
            self.penalty = sum(layer.spread() for layer in sums.values()) / self.components
            for name, layer in sums.items():
                self.scores[name].mul_(self.beta).add_(layer.importance(), alpha=1 - self.beta)
            if self.budget.prunes_at(self.step):
                self._prune({name: layer.gates for name, layer in sums.items()})
            self._set_dem()
        else:
            self._zero(self.pruned)

    def survivors(self) -> dict[str, Tensor]:
        """The components of each layer that the present mask leaves, as sorted indices."""
        return {name: (~pruned).nonzero()[:, 0] for name, pruned in self.pruned.items()}

    def load(self, step: int, scores: dict[str, Tensor], pruned: dict[str, Tensor]) -> None:
        """Go on from a saved state: `step` optimizer steps were taken and settled."""
        self.step, self._stepped = step, False
        for name in self.layers:
            self.scores[name].copy_(scores[name])
            self.pruned[name].copy_(pruned[name])
        self._set_dem()

    def layer_sums(self) -> dict[str, LayerSums]:
        """Every gated layer's sums, of its present parameters."""
        result = {}
        for name, layer in self.layers.items():
            A, B, gates = component_parameters(layer)
            result[name] = LayerSums(gates.detach().double().cpu(), FactorSums.of(A), FactorSums.of(B))
        return result

    def zero_gates(self, name: str, pruned: Tensor, clear_moments: bool) -> None:
        """Set a layer's gates to 0 where `pruned` (r,), in every copy; with `clear_moments` Adam's moments too."""
        _, _, gates = component_parameters(self.layers[name])
        where = pruned.to(gates.device)
        gates.masked_fill_(where, 0.0)
        if clear_moments:
            for key in ("exp_avg", "exp_avg_sq"):
                if key in self._optimizer.state.get(gates, {}):
                    self._optimizer.state[gates][key].masked_fill_(where, 0.0)

    def _on_step(self, *_: Any) -> None:
        self._stepped = True

    def _prune(self, gates: dict[str, Tensor]) -> None:
        scores = torch.cat(list(self.scores.values()))
        lowest = torch.sort(scores, stable=True).indices[: self.budget.pruned(self.step, self.components)]
        mask = torch.zeros_like(scores, dtype=torch.bool)
        mask[lowest] = True
        sizes = [len(score) for score in self.scores.values()]
        self.pruned = dict(zip(self.scores, mask.split(sizes), strict=True))
        self._zero(self.pruned)
        kept = {name: int(((gates[name] != 0) & ~self.pruned[name]).sum()) for name in self.layers}
        closed = int(mask.sum())
        self.events.append(PruningEvent(self.step, self.components, closed, sum(kept.values()), kept, self.finished))

    def _zero(self, pruned: dict[str, Tensor]) -> None:
        for name, where in pruned.items():
            if where.any():
                self.zero_gates(name, where, self.clear_moments)

    def _set_dem(self) -> None:
        weight = 0.0 if self.finished else self._dem / (self.components * self._backwards)
        for layer in self.layers.values():
            layer.dem_weight = weight
