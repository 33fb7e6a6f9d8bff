"""VL-BART: BART that reads visual features behind its text. `modeling` makes transformers know it when imported."""
