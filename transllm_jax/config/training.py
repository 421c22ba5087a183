"""How the three training stages train."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from transllm_jax.choices import Remat, Schedule
from transllm_jax.config.data import PairSource, Source, WholeSource
from transllm_jax.config.section import Positive, Section, Share


class Validation(Section):
    """Held-out text that the stage's loss is measured on while it trains, in bits a byte of the text that is trained.

    The stage's result is then the checkpoint with the lowest.
    """

    source: WholeSource
    # In steps; a checkpoint is written with each.
    every: Positive
    # At most so many packed rows of the source, of `length` tokens each.
    rows: Positive = 64
    # Stop when so many validations in a row were no better than the best; null to go on to the end.
    patience: Positive | None = None


class Training(Section):
    """How a stage trains."""

    # One of the two: optimizer steps, or how often every source is read to its end at least.
    steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    # Rows of `length` tokens in a step, and the number of micro-batches that they are computed in, one after another:
    # the result is that of the whole batch (LoRA dropout draws for each).
    batch_size: Positive
    accumulate: Positive = 1
    length: Annotated[int, Field(ge=16)]
    learning_rate: float = Field(gt=0)
    # The vocabulary rows' learning rate over the adapters'.
    new_rows_multiplier: float = Field(default=1.0, gt=0)
    # Warm-up, then down to final_fraction of the peak: as a cosine, in a line, or (wsd) in a line over the last
    # decay_ratio of the steps; constant stays at the peak.
    schedule: Schedule = "cosine"
    # Warm-up as a share of the steps (0.01 by default), or in steps.
    warmup_ratio: Share | None = None
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    decay_ratio: Share = 0.1
    final_fraction: Share = 0.1
    # AdamW's, of all that trains but the scales of norms and biases.
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    # Times the square of the log of the softmax's sum, added to the loss (PaLM, arXiv 2204.02311).
    z_loss: float = Field(default=0.0, ge=0)
    # In steps.
    checkpoint_every: Positive = 200
    # The newest so many checkpoints are kept, and the best.
    keep_checkpoints: Positive = 2
    # In steps; each line is of its step alone.
    log_every: Positive = 1
    # What of a layer is computed again in the backward pass: nothing; all but the outputs of its linear layers and of
    # attention; these but q (queries); these but q, k and v (feed_forward is kept); these but the feed-forward part
    # (attention is kept); or the whole layer. Less memory, more time, in this order.
    remat: Remat = "none"
    # Stop when so many updates in a row had to be skipped, because a loss or gradient was not finite.
    max_skipped: Positive = 5
    validation: Validation | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Training:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give steps or epochs, one of the two")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is no multiple of accumulate {self.accumulate}; choose one")
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError("give warmup_ratio or warmup_steps, not both")
        if self.steps is not None and (self.warmup_steps or 0) > self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} is more than steps {self.steps}; lower it")
        if self.schedule != "wsd" and self.decay_ratio != 0.1:
            raise ValueError("decay_ratio is for schedule: wsd; remove it")
        return self


class Pretraining(Training):
    """Stages 2 and 3: causal LM on text and on pairs."""

    sources: list[Source] = Field(min_length=1)

    @model_validator(mode="after")
    def _has_all_weights_or_none(self) -> Pretraining:
        if len({source.weight is None for source in self.sources}) == 2:
            raise ValueError("some sources have a weight and others none; give it to all of them or to none")
        return self


class Transfer(Training):
    """Stage 4, second half: the mixture of chains, English answers, translation instructions and other sources."""

    # Pairs that the translation instructions are made of.
    pairs: PairSource
    # Leave out those that hold at least half of some text of the evaluation sets.
    contamination: bool = True
    # Shares of the rows; 0 leaves a part out.
    chains: float = Field(default=0.5, ge=0)
    english: float = Field(default=0.25, ge=0)
    translations: float = Field(default=0.25, ge=0)
    # What else is trained on, conversations for instance, each with its weight beside those above.
    sources: list[Source] = []

    @model_validator(mode="after")
    def _has_weights(self) -> Transfer:
        if any(source.weight is None for source in self.sources):
            raise ValueError("each of the sources needs a weight, beside chains, english and translations")
        if not self.sources and self.chains + self.english + self.translations == 0:
            raise ValueError("nothing is left to train on: raise chains, english or translations above 0")
        return self
