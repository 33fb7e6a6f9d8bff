"""The vision tower inside an ONNX file, as the Hugging Face folder of the model that it was exported from."""

from pathlib import Path
from typing import Any

from dora_dist.runtime.errors import UserError
from dora_dist.runtime.folders import new_folder

PREFIX = "backbone."
HEAD_SIZE = 64  # of an attention head, in every DINOv2; the file does not say


def import_dinov2(file: Path, output: Path) -> None:
    """Write the DINOv2 backbone of `file` to the folder `output`: config.json and safetensors, fp32.

    The export keeps the names of all parameters but two kinds: matrices that multiply (transposed), which are found
    by the bias that is added to their product, and the position table, of which the class token's row and the others'
    are constants apart. Raises UserError if that gives no whole model.
    """
    import onnx
    from transformers import Dinov2Config, Dinov2Model

    state = backbone_state(onnx.load(file))
    patch = state["embeddings.patch_embeddings.projection.weight"]
    layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.layer."))
    config = Dinov2Config(
        hidden_size=patch.shape[0],
        num_attention_heads=patch.shape[0] // HEAD_SIZE,
        num_hidden_layers=layers,
        patch_size=patch.shape[-1],
        image_size=patch.shape[-1] * round((state["embeddings.position_embeddings"].shape[1] - 1) ** 0.5),
    )
    loader: Any = Dinov2Model
    model, found = loader.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    if wrong := [*found["unexpected_keys"], *found["mismatched_keys"], *found["missing_keys"]]:
        raise UserError(f"{file}: is no whole DINOv2: {wrong[0]!r} is missing, unknown or of another shape")
    with new_folder(output) as folder:
        model.save_pretrained(folder)


def backbone_state(model: Any) -> dict[str, Any]:
    """Tensors of an ONNX model's backbone by their Hugging Face names."""
    import torch
    from onnx.numpy_helper import to_array

    graph = model.graph
    tensors = {tensor.name: torch.from_numpy(to_array(tensor).copy()) for tensor in graph.initializer}
    state = {name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)}
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        if node.op_type == "Add":
            bias = next((name for name in node.input if name.startswith(PREFIX) and name.endswith(".bias")), None)
            matrix = next((products[name] for name in node.input if name in products), None)
            if bias is not None and matrix in tensors:
                state[f"{bias.removeprefix(PREFIX).removesuffix('bias')}weight"] = tensors[matrix].T.contiguous()
    width = state["embeddings.cls_token"].shape[-1]
    tables = [
        t for name, t in tensors.items() if not name.startswith(PREFIX) and t.shape[:1] + t.shape[2:] == (1, width)
    ]
    state["embeddings.position_embeddings"] = torch.cat(sorted(tables, key=lambda table: table.shape[1]), dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, width)  # hides patches in the tower's own training; not exported
    return state
