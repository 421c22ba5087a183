"""How the three training stages train."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from transllm_jax.choices import Remat, Schedule
from transllm_jax.config.data import PairSource, Source, WholeSource
from transllm_jax.config.section import Positive, Section, Share


class Validation(Section):
    """Held-out text on which a stage's loss is measured during training, in bits per byte of the text that counts.

    The stage's result is then the checkpoint with the lowest loss.
    """

    source: WholeSource
    # Steps between two validations; a checkpoint is written at each.
    every: Positive
    # At most this many packed rows of the source, of `length` tokens each.
    rows: Positive = 64
    # Stop after this many validations in a row that were no better than the best; null: never stop early.
    patience: Positive | None = None


class Training(Section):
    """How a stage trains."""

    # Give one of the two: optimizer steps, or how often every source is read to its end at least.
    steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    # Rows of `length` tokens in a step, and the number of micro-batches that they are computed in, one after another.
    # The result is that of the whole batch (LoRA dropout is drawn for each micro-batch).
    batch_size: Positive
    accumulate: Positive = 1
    length: Annotated[int, Field(ge=16)]
    learning_rate: float = Field(gt=0)
    # The learning rate of vocabulary rows, as a multiple of the adapters'.
    new_rows_multiplier: float = Field(default=1.0, gt=0)
    # After warm-up, the rate falls to final_fraction of the peak: as a cosine, linearly, or (wsd) linearly over the
    # last decay_ratio of the steps. constant: it stays at the peak.
    schedule: Schedule = "cosine"
    # Warm-up as a share of the steps (0.01 by default), or in steps.
    warmup_ratio: Share | None = None
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    decay_ratio: Share = 0.1
    final_fraction: Share = 0.1
    # AdamW's weight decay of all trained arrays but norm scales and biases.
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    # Factor of the squared log of the softmax's normaliser, which is added to the loss (PaLM, arXiv 2204.02311).
    z_loss: float = Field(default=0.0, ge=0)
    # Steps between two checkpoints.
    checkpoint_every: Positive = 200
    # How many of the newest checkpoints are kept, besides the best.
    keep_checkpoints: Positive = 2
    # Steps between two log lines; each line is of its own step alone.
    log_every: Positive = 1
    # Rematerialisation: which values of a layer are kept for the backward pass; the others are computed again. Each
    # takes less memory and more time than the one before.
    #   none: all values.
    #   projections: the outputs of linear layers and of attention.
    #   queries: as projections, without q.
    #   feed_forward: as projections, without q, k and v.
    #   attention: as projections, without the feed-forward part (gate and up).
    #   full: only the layer's input.
    remat: Remat = "none"
    # Stop after this many updates in a row were skipped, because a loss or gradient was not finite.
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
    """Stage 4, second half: a mixture of chains, English answers, translation instructions and other sources."""

    # The pairs from which translation instructions are made.
    pairs: PairSource
    # Leave out pairs that contain at least half of any text of the evaluation sets.
    contamination: bool = True
    # Weights of the three parts in the mixture, as shares of the rows; 0 leaves a part out.
    chains: float = Field(default=0.5, ge=0)
    english: float = Field(default=0.25, ge=0)
    translations: float = Field(default=0.25, ge=0)
    # Other sources, such as conversations, each with a weight relative to those above.
    sources: list[Source] = []

    @model_validator(mode="after")
    def _has_weights(self) -> Transfer:
        if any(source.weight is None for source in self.sources):
            raise ValueError("each of the sources needs a weight, as chains, english and translations have")
        if not self.sources and self.chains + self.english + self.translations == 0:
            raise ValueError("nothing is left to train on: raise chains, english or translations above 0")
        return self
