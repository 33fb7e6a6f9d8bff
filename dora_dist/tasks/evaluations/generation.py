"""Let a language model continue prompts, without sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast


def beam_search(
    tokenizer: PreTrainedTokenizerFast,
    *,
    num_beams: int,
    max_new_tokens: int,
    stop: str | None = None,
    ends: Sequence[int] = (),
) -> GenerationConfig:
    """Beam search without sampling, up to the end of sequence, a token of `ends` or the text `stop`.

    Every setting that changes it is set, lest the model folder's generation_config.json fill it in.
    """
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        num_beams=num_beams,
        num_return_sequences=1,
        max_new_tokens=max_new_tokens,
        repetition_penalty=1.0,
        length_penalty=1.0,
        no_repeat_ngram_size=0,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=[tokenizer.eos_token_id, *ends],
        stop_strings=stop,
    )


def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    batch_size: int,
    num_beams: int,
    max_new_tokens: int,
    complete: bool = False,
    stop: str | None = None,
    ends: Sequence[int] = (),
    advance: Callable[[int], object] = lambda prompts: None,
) -> list[str]:
    """The model's continuation of each prompt, by `beam_search`, without special tokens.

    `complete`: the prompts already hold their special tokens. Prompts of similar length share a batch and are padded
    on the left. `advance` is called with the number of prompts finished, as they are.
    """
    search = beam_search(tokenizer, num_beams=num_beams, max_new_tokens=max_new_tokens, stop=stop, ends=ends)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    device = next(model.parameters()).device
    texts = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer(
            [prompts[i] for i in chosen],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=not complete,
        )
        generate: Any = model.generate  # typed as a submodule, since any attribute of a module could be one
        output = generate(
            input_ids=batch["input_ids"].to(device),
            attention_mask=batch["attention_mask"].to(device),
            generation_config=search,
            tokenizer=tokenizer if stop else None,
        )[:, batch["input_ids"].shape[1] :]
        for i, text in zip(chosen, tokenizer.batch_decode(output, skip_special_tokens=True), strict=True):
            texts[i] = text
        advance(len(chosen))
    return texts
