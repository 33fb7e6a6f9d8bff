"""CIDEr, BLEU-4 and ROUGE-L of captions, by COCO's scorers (package pycocoevalcap)."""

import re
from collections.abc import Sequence

# What COCO's tokenizer leaves out, its names for brackets written as brackets.
_LEFT_OUT = {"''", "'", "``", "`", "(", ")", "{", "}", ".", "?", "!", ",", ":", "-", "--", "...", ";"}


def caption_metrics(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """CIDEr-D (Vedantam et al., arXiv 1411.5726; 0 to 10, papers print 100 times it), BLEU-4 and ROUGE-L (0 to 1).

    CIDEr weighs words by how rare they are among the pictures evaluated: of a single picture it is always 0. The
    scorers are COCO's own; words are split by nltk's Treebank rules, not by the Java program that COCO uses, which
    takes brackets and abbreviations differently: published numbers are not met to the last digit.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    found = {i: [tokenised(caption)] for i, caption in enumerate(captions)}
    wanted = {i: [tokenised(text) for text in texts] for i, texts in enumerate(references)}
    return {
        "cider": float(Cider().compute_score(wanted, found)[0]),
        "bleu4": float(Bleu(4).compute_score(wanted, found, verbose=0)[0][3]),
        "rougeL": float(Rouge().compute_score(wanted, found)[0]),
    }


def tokenised(caption: str) -> str:
    """The words of a caption in lower case with single blanks between them, without punctuation."""
    from nltk.tokenize import TreebankWordTokenizer

    # The Treebank rules part a period from a word at the very end only, for they expect one sentence.
    sentences = re.sub(r"\.(?=\s)", " .", caption.lower())
    return " ".join(word for word in TreebankWordTokenizer().tokenize(sentences) if word not in _LEFT_OUT)
