"""Synthetic SAEs in the exact file shape of each published format, and what their formulas give."""
