"""Choices that have the same names in a config, on the command line and in the model."""

from __future__ import annotations

from typing import Literal

# What of a layer is computed again in the backward pass; `config/training.py` explains each. Less memory and more time,
# in this order.
Remat = Literal["none", "projections", "queries", "feed_forward", "attention", "full"]
# Which implementation computes attention.
Attention = Literal["auto", "plain", "splash"]
