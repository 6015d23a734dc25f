"""One device's compute: the model, capture at sites, SAEs, encoders and per-feature summaries.

Knows nothing of files of an index, of Ray or of DuckDB; the rooms above hand it tokens and take
Arrow-ready arrays back.
"""
