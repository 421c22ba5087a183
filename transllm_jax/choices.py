"""Choices that have the same names in a config, on the command line and in the model."""

from __future__ import annotations

from typing import Literal

# The three training stages, in order.
TRAININGS = ("pretrain", "translate", "transfer")
# The points of a run: the states of the model after which it is evaluated, in order.
POINTS = ("base", "vocabulary", *TRAININGS)

# Which values of a layer are computed again in the backward pass; `config/training.py` explains each. Each takes less
# memory and more time than the one before.
Remat = Literal["none", "projections", "queries", "feed_forward", "attention", "full"]
# Which implementation computes attention. plain: our own, on any device. splash: TPU only (transllm_jax.model.splash).
# auto: splash where possible.
Attention = Literal["auto", "plain", "splash"]

# What the items of a source are, and how they are stored.
Content = Literal["text", "pairs", "conversations"]
Container = Literal["lines", "jsonl", "parquet", "datasets", "tfds"]
# What separates two documents in a file of lines.
Separator = Literal["blank line", "line"]
# What to do with a control character, and with a bad row.
Controls = Literal["refuse", "remove"]
OnBadRows = Literal["refuse", "skip"]
# Where the text of a byte-level base is cut before merging; no new token crosses a cut. "whole": nowhere in a run of
# the target script; "base": where the base cuts.
Cuts = Literal["whole", "base"]
# How English answers of the original model are trained on: their text (sequence), the original's distribution of each
# token (token), or both.
Recovery = Literal["sequence", "token", "both"]
# How the learning rate falls after warm-up.
Schedule = Literal["cosine", "linear", "wsd", "constant"]
