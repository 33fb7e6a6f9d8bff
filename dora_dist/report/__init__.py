"""The page of a run, RUN_DIR/report.html, and of several compared: one file that needs no network."""
