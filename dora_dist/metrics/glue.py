"""The metrics of GLUE (Wang et al., arXiv 1804.07461), from predictions and labels."""

import math
import warnings

import numpy as np
from torch import Tensor


def classification_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy and Matthews' correlation of the likeliest labels, and F1 of label 1 where there are two.

    logits (n, num_labels) and labels (n,).
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    predicted, expected = logits.argmax(1).cpu().numpy(), labels.long().cpu().numpy()
    metrics = {
        "accuracy": float(accuracy_score(expected, predicted)),
        "matthews": float(matthews_corrcoef(expected, predicted)),
    }
    if logits.shape[1] == 2:
        metrics["f1"] = float(f1_score(expected, predicted, zero_division=0.0))
    return metrics


def rating_metrics(predicted: Tensor, labels: Tensor) -> dict[str, float]:
    """Pearson's and Spearman's correlation of (n,) ratings; 0 where either side is constant."""
    from scipy.stats import pearsonr, spearmanr

    found, expected = (np.asarray(values.double().cpu()) for values in (predicted, labels))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about constant input, for which both give NaN
        both = {"pearson": pearsonr, "spearman": spearmanr}
        values = {name: float(f(found, expected)[0]) if len(found) > 1 else 0.0 for name, f in both.items()}
    return {name: 0.0 if math.isnan(value) else value for name, value in values.items()}
