"""Choices that have the same names in a config, on the command line and in the model."""

from __future__ import annotations

from typing import Literal

# The three trainings, in their order.
TRAININGS = ("pretrain", "translate", "transfer")

# What of a layer is computed again in the backward pass; `config/training.py` explains each. Less memory and more time,
# in this order.
Remat = Literal["none", "projections", "queries", "feed_forward", "attention", "full"]
# Which implementation computes attention.
Attention = Literal["auto", "plain", "splash"]

# What a source of text gives, and how it is stored.
Content = Literal["text", "pairs", "conversations"]
Container = Literal["lines", "jsonl", "parquet", "datasets", "tfds"]
# What is between two documents of a file of lines.
Separator = Literal["blank line", "line"]
# What is done with a control character, and with a row that cannot be read.
Controls = Literal["refuse", "remove"]
OnBadRows = Literal["refuse", "skip"]
# Where a byte-level base's text is cut before it merges; no new token crosses a cut. "whole": nowhere in a run of the
# target script; "base": where the base cuts.
Cuts = Literal["whole", "base"]
# How the learning rate falls after the warm-up.
Schedule = Literal["cosine", "linear", "wsd", "constant"]
