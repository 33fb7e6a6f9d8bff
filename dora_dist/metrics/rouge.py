"""ROUGE (Lin, 2004): words and word pairs that a summary shares with its reference, by Google's rouge-score."""

from collections.abc import Sequence

METRICS = ("rouge1", "rouge2", "rougeL")


def rouge_metrics(predicted: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """F1 of shared words, word pairs and the longest common sequence of words, stemmed; means over texts, 0 to 1."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(METRICS, use_stemmer=True)
    scores = [scorer.score(reference, text) for reference, text in zip(references, predicted, strict=True)]
    return {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in METRICS}
