"""Where the components of a dynamic-rank run survived: a table for the log, a picture for the run folder."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dora_dist.adapters.components import Budget, PruningEvent
from dora_dist.analysis.grid import grid
from dora_dist.runtime import extras
from dora_dist.runtime.console import warn


def rank_table(event: PruningEvent) -> str:
    """Adapter ranks after a pruning as text: a line per layer of the model, a column per kind of module."""
    layers, kinds, ranks = _grid(event)
    first, widths = max(map(len, ["layer", *layers])), [max(len(kind), 4) for kind in kinds]
    lines = [f"{'layer':>{first}}  " + "  ".join(f"{kind:>{width}}" for kind, width in zip(kinds, widths, strict=True))]
    for layer, row in zip(layers, ranks.tolist(), strict=True):
        cells = (f"{'' if r < 0 else r:>{width}}" for r, width in zip(row, widths, strict=True))
        lines.append(f"{layer:>{first}}  " + "  ".join(cells))
    return "\n".join(lines)


def write_rank_map(events: Sequence[PruningEvent], budget: Budget, path: Path) -> None:
    """A PNG: the last event's ranks as a heat map; the components left after each pruning, over the schedule's curve.

    Without matplotlib, a warning instead: a run does not end for a picture.
    """
    if (remedy := extras.missing("matplotlib")) is not None:
        warn(f"{path} is not drawn: it {remedy}")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers, kinds, ranks = _grid(events[-1])
    height = max(3.2, 0.22 * len(layers) + 1.4)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, height), layout="constrained")
    image = left.imshow(ranks.float().masked_fill(ranks < 0, float("nan")), aspect="auto", vmin=0, vmax=budget.start_r)
    left.set_xticks(range(len(kinds)), kinds, rotation=30, ha="right")
    left.set_yticks(range(len(layers)), layers)
    left.set_ylabel("layer")
    left.set_title(f"adapter rank after step {events[-1].step} (start {budget.start_r}, average {budget.r})")
    figure.colorbar(image, ax=left)
    if len(layers) <= 40:
        for row, values in enumerate(ranks.tolist()):
            for column, r in enumerate(values):
                if r >= 0:
                    colour = "white" if r < 0.6 * budget.start_r else "black"
                    left.text(column, row, r, ha="center", va="center", fontsize=7, color=colour)

    components = events[-1].components
    steps = range(budget.first, budget.last + 1)
    right.plot(steps, [components - budget.pruned(step, components) for step in steps], label="schedule", color="gray")
    right.plot([e.step for e in events], [e.kept for e in events], "o", label="open after pruning", markersize=4)
    right.set_xlabel("optimizer step")
    right.set_ylabel(f"components of {components:,}")
    right.set_ylim(0, 1.05 * components)
    right.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _grid(event: PruningEvent) -> tuple[list[str], list[str], Tensor]:
    """Layers, kinds of module, and ranks (layers, kinds), -1 where a layer lacks the module."""
    layers, kinds, places = grid(event.by_layer)
    ranks = torch.full((len(layers), len(kinds)), -1)
    for name, r in event.by_layer.items():
        ranks[places[name]] = r
    return layers, kinds, ranks
