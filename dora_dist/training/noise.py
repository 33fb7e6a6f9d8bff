"""NEFTune: Jain et al., "NEFTune: Noisy Embeddings Improve Instruction Finetuning" (arXiv 2310.05914)."""

from typing import Any

from transformers.integrations.neftune import neftune_post_forward_hook


def add_noise(model: Any, alpha: float) -> None:
    """Let input embeddings (rows, length, width) gain uniform noise of up to alpha / sqrt(length·width) while training.

    transformers' own hook, at the module that looks texts up: an encoder's, where the model has one, whose table the
    model's `get_input_embeddings` may share without ever calling it. Off in eval(); torch's random numbers, which each
    step of a run seeds by itself, so a resumed run has the same noise.
    """
    reader = model.get_encoder() if model.config.is_encoder_decoder else model
    embeddings = reader.get_input_embeddings()
    embeddings.neftune_noise_alpha = alpha
    embeddings.register_forward_hook(neftune_post_forward_hook)
