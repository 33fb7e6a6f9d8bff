"""A parameter's name in a model and in the folder that it is read from, where the two differ."""

from collections.abc import Iterable, Mapping


def stored_names(names: Iterable[str]) -> dict[str, str]:
    """Today's name of each tensor of a folder -> its name there."""
    return {modern(name): name for name in names}


def modern(name: str) -> str:
    """LayerNorms of old encoder checkpoints call their weight gamma and their bias beta."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def locate(name: str, stored: Mapping[str, str], prefix: str) -> str | None:
    """The tensor in a folder (`stored_names`) that parameter `name` is read from, None if it is not there.

    A plain encoder's folder lacks the `prefix` ("bert") under which a model with a head holds that encoder, and a
    folder of a model with a head has it where a plain encoder's parameters do not.
    """
    candidates = [name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"] if prefix else [name]
    return next((stored[candidate] for candidate in candidates if candidate in stored), None)


def prefix_between(names: Iterable[str], stored: Mapping[str, str]) -> str:
    """The prefix that model parameters `names` and a folder's tensors differ by; "" if they agree, or in more."""
    tops = {name.partition(".")[0] for name in stored}
    for name in names:
        if name in stored:
            return ""
        if name.partition(".")[2] in stored:
            return name.partition(".")[0]
        for top in sorted(tops):
            if f"{top}.{name}" in stored:
                return top
    return ""
