"""Base models: folders, skeletons with adapters, tokenizers, LLaVA and its parts, GGUF."""
