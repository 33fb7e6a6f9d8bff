"""The log-probability of each candidate answer, the prompt's work done once per question."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dora_dist.data.formats import Rendered
from dora_dist.data.texts import encode
from dora_dist.models.families import family_of
from dora_dist.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Row:
    """A prompt and the candidates after it, in one sequence; each candidate sees the prompt and itself.

    prompt p0 p1 p2 | a0 a1 | b0 b1 b2        positions 0 1 2 | 3 4 | 3 4 5
    """

    question: int
    first: int  # which of the question's candidates the first branch is
    prefix: list[int]
    branches: list[list[int]]

    def __len__(self) -> int:
        return len(self.prefix) + sum(map(len, self.branches))


def candidate_log_probs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[Sequence[Rendered]],
    *,
    batch_size: int,
    mean: bool = False,
    widened: Callable[[list[int]], list[int]] = list,
    inputs_of: Callable[[Sequence[int]], Inputs] = lambda questions: {},
    advance: Callable[[int], object] = lambda rows: None,
) -> list[list[float]]:
    """For each question, the log-probability of every candidate after the prompt that they share.

    The sum over the candidate's tokens (or, with `mean`, their average) of log p(token | all before it). What
    comes after them is not scored: the end of sequence, or in a complete text all that follows its answer. A
    candidate's tokens are those that answer-only training puts its loss on; where candidates make the tokenizer
    split the end of the prompt differently, the tokens from there on, so that what is compared is always the
    probability of whole texts. Batches are of `batch_size` sequences of similar length. `advance` is called with the
    number of questions finished, as they are.

    For models that read more than text: `widened` is called on a prompt's tokens for those that the model is given,
    and `inputs_of` on a batch's questions, by number, for its further inputs.
    """
    rows = [_row(tokenizer, i, candidates, widened) for i, candidates in enumerate(questions)]
    scores = _log_probs(model, rows, tokenizer.pad_token_id, batch_size, inputs_of, advance)
    return [[total / count if mean else total for total, count in row] for row in scores]


def answer_log_probs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    answers: Sequence[Rendered],
    *,
    batch_size: int,
    advance: Callable[[int], object] = lambda rows: None,
) -> list[tuple[float, int]]:
    """The log-probability of each answer with its end, as training with loss_on "answer" has it, and how many tokens
    that are. `advance` as of `candidate_log_probs`."""
    rows = []
    for i, (tokens, answer) in enumerate(encode(tokenizer, answers) if answers else []):
        first = max(1, answer.index(True))  # nothing predicts a text's very first token
        end = _end(answer, complete=True)  # with the end of sequence, where `encode` has put one
        rows.append(Row(i, 0, tokens[:first], [tokens[first:end]]))
    scores = _log_probs(model, rows, tokenizer.pad_token_id, batch_size, lambda questions: {}, advance)
    return [score for [score] in scores]


def _log_probs(
    model: PreTrainedModel,
    rows: list[Row],
    pad_token_id: int,
    batch_size: int,
    inputs_of: Callable[[Sequence[int]], Inputs],
    advance: Callable[[int], object],
) -> list[list[tuple[float, int]]]:
    """For each question (row i is question i), the log-probability and the number of tokens of every branch."""
    shared = _shares_prompts(model, max(map(len, rows), default=0))
    scores = [[(0.0, 0)] * len(row.branches) for row in rows]
    left = [len(row.branches) for row in rows]
    if not shared:
        rows = [Row(r.question, i, r.prefix, [branch]) for r in rows for i, branch in enumerate(r.branches)]
    rows = sorted(rows, key=len, reverse=True)  # longest first: if memory is short, it shows at once
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        inputs = inputs_of([row.question for row in batch])
        for row, log_probs in zip(batch, _score(model, batch, shared, inputs, pad_token_id), strict=True):
            for i, (tokens, log_prob) in enumerate(zip(row.branches, log_probs, strict=True)):
                scores[row.question][row.first + i] = log_prob, len(tokens)
            left[row.question] -= len(row.branches)
            if left[row.question] == 0:
                advance(1)
    return scores


def _row(
    tokenizer: PreTrainedTokenizerFast,
    question: int,
    candidates: Sequence[Rendered],
    widened: Callable[[list[int]], list[int]],
) -> Row:
    encoded = encode(tokenizer, candidates)
    ids = [tokens[: _end(answer, one.complete)] for (tokens, answer), one in zip(encoded, candidates, strict=True)]
    first_answer = min(answer.index(True) for _, answer in encoded)
    common = 0
    while common < first_answer and len({tokens[common] for tokens in ids}) == 1:
        common += 1
    branches = [tokens[common:] for tokens in ids]
    if not all(branches):
        empty = candidates[branches.index([])]
        raise UserError(f"the tokenizer makes no token of candidate {empty.text[empty.answers[0][0] :]!r}")
    if not common:
        raise UserError(f"no prompt in front of the candidates of {candidates[0].text!r}: nothing predicts their start")
    return Row(question, 0, widened(ids[0][:common]), branches)


def _end(answer: list[bool], complete: bool) -> int:
    """Where an answer's tokens end, without the end of sequence that `encode` puts after a text not complete."""
    return len(answer) - answer[::-1].index(True) - (not complete)


def _shares_prompts(model: PreTrainedModel, longest: int) -> bool:
    """Whether several candidates may follow one prompt in one sequence, kept apart by a 4-D mask.

    Other models get one row per candidate: the same numbers, more work.
    """
    config = model.config.get_text_config()
    window = config.sliding_window if hasattr(config, "sliding_window") else None
    return (
        family_of(config.model_type).masks_are_free
        and config._attn_implementation in ("sdpa", "eager")
        and (window is None or longest <= window)
    )


@torch.no_grad()
def _score(
    model: PreTrainedModel, rows: Sequence[Row], shared: bool, inputs: Inputs, pad_token_id: int
) -> list[list[float]]:
    """Sum of log-probabilities of every branch of every row."""
    length = max(map(len, rows))
    # Rows end together: the positions to predict from are the last ones, and only they get logits.
    keep = 1 + max(len(row) - len(row.prefix) for row in rows)
    ids = torch.full((len(rows), length), pad_token_id)
    positions = torch.zeros_like(ids)
    # Padding sees itself, since a softmax over nothing is NaN.
    visible = torch.eye(length, dtype=torch.bool).repeat(len(rows), 1, 1)
    for i, row in enumerate(rows):
        _lay_out(row, ids[i], positions[i], visible[i])
    device = next(model.parameters()).device
    if shared:
        blocked = torch.finfo(model.dtype).min
        mask = torch.zeros(visible.shape, dtype=model.dtype).masked_fill(~visible, blocked)[:, None]
    else:
        mask = visible[:, -1].long()  # the last token sees its whole row and nothing else
    logits = model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        position_ids=positions.to(device),
        logits_to_keep=keep,
        use_cache=False,
        **inputs,
    ).logits[:, -keep:]
    return [_branch_log_probs(row, logits[i]) for i, row in enumerate(rows)]


def _lay_out(row: Row, ids: Tensor, positions: Tensor, visible: Tensor) -> None:
    """Write a row, ending at the right, into ids (L,), positions (L,) and visible (L, L)."""
    start, length = ids.numel() - len(row), len(row.prefix)
    prefix = slice(start, start + length)
    at = start
    for tokens, offset in [(row.prefix, 0), *((branch, length) for branch in row.branches)]:
        here = slice(at, at + len(tokens))
        ids[here] = torch.tensor(tokens)
        positions[here] = torch.arange(offset, offset + len(tokens))
        visible[here, prefix] = True
        visible[here, here] = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
        at = here.stop


def _branch_log_probs(row: Row, logits: Tensor) -> list[float]:
    """Each branch's sum of log-probabilities; logits: (keep, vocabulary), of the last positions."""
    branch_tokens = len(row) - len(row.prefix)
    logits = logits[-branch_tokens - 1 :].float()  # [0] is the prefix's last token, [1 + i] is branch token i
    sources: list[int] = []  # which position predicts each branch token
    for branch in row.branches:
        at = len(sources)
        sources += [0, *range(at + 1, at + len(branch))]
    targets = torch.tensor([token for branch in row.branches for token in branch], device=logits.device)
    log_probs = -cross_entropy(logits[sources], targets, reduction="none").double().cpu()
    return [float(part.sum()) for part in log_probs.split([len(branch) for branch in row.branches])]
