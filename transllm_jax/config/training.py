"""How the three training stages train."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from transllm_jax.choices import Recovery, Remat, Schedule
from transllm_jax.config.data import PairSource, Source, WholeSource
from transllm_jax.config.section import Positive, Section, Share


class Validation(Section):
    """Held-out text on which a stage's loss is measured during training, in bits per byte of the text that counts.

    The stage's result is then the checkpoint with the lowest loss.
    """

    source: WholeSource
    """The held-out text, pairs or conversations."""
    every: Positive
    """Steps between two validations. A checkpoint is written at each."""
    rows: Positive = 64
    """Measure on the first rows of the source, at most this many, packed as in training: `length` tokens each."""
    patience: Positive | None = None
    """Stop the stage after this many validations in a row that were no better than the best. By default it never stops
    early.
    """


class Training(Section):
    """How a stage trains."""

    newer: ClassVar[tuple[str, ...]] = ("recovery_weight",)

    steps: Annotated[int, Field(ge=0)] | None = None
    """Optimizer steps. Give `steps` or `epochs`. With 0 the stage is left out: its point is that before it."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """How often every source is read to its end at least. Give `steps` or `epochs`."""
    batch_size: Positive
    """Rows in a step, of `length` tokens each."""
    accumulate: Positive = 1
    """The number of micro-batches that a step's rows are computed in, one after another; it divides `batch_size`. More
    take less memory. The result is that of the whole batch (LoRA dropout is drawn for each micro-batch).
    """
    length: Annotated[int, Field(ge=16)]
    """Tokens in a row. Examples are packed whole. Of what is longer than a row, a document is split, a conversation is
    cut at a turn, and a translation is left out.
    """
    learning_rate: float = Field(gt=0)
    """The learning rate of the adapters at its peak, after warm-up (AdamW). With `lora: none`, that of the weights."""
    new_rows_multiplier: float = Field(default=1.0, gt=0)
    """The learning rate of vocabulary rows, as a multiple of `learning_rate`."""
    schedule: Schedule = "cosine"
    """After warm-up, the rate falls to `final_fraction` of the peak: as a cosine (`cosine`), linearly (`linear`), or
    linearly over the last `decay_ratio` of the steps (`wsd`). With `constant` it stays at the peak.
    """
    warmup_ratio: Share | None = None
    """Warm-up, in which the rate rises linearly, as a share of the steps: 0.01 if neither this nor `warmup_steps` is
    given.
    """
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Warm-up in steps, in place of `warmup_ratio`."""
    decay_ratio: Share = 0.1
    """For `schedule: wsd`: the share of the steps, at the end, in which the rate falls."""
    final_fraction: Share = 0.1
    """The rate at the last step, as a share of the peak; without effect for `schedule: constant`."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay of all trained arrays but norm scales and biases."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm if theirs is larger."""
    z_loss: float = Field(default=0.0, ge=0)
    """Factor of the squared log of the softmax's normaliser, which is added to the loss (PaLM, arXiv 2204.02311)."""
    recovery_weight: float = Field(default=1.0, gt=0)
    """How much the divergence of a token counts where the original model teaches (`recovery: token` or `both`), as a
    multiple of what a token of text counts.
    """
    checkpoint_every: Positive = 200
    """Steps between two checkpoints."""
    keep_checkpoints: Positive = 2
    """How many of the newest checkpoints are kept, besides the best."""
    log_every: Positive = 1
    """Steps between two log lines. Each line is of its own step alone."""
    remat: Remat = "none"
    """Rematerialisation: which values of a layer are kept for the backward pass; the others are computed again. Each
    takes less memory and more time than the one before.

    - `none`: all values.
    - `projections`: the outputs of linear layers and of attention.
    - `queries`: as `projections`, without q.
    - `feed_forward`: as `projections`, without q, k and v.
    - `attention`: as `projections`, without the feed-forward part (gate and up).
    - `full`: only the layer's input.
    """
    max_skipped: Positive = 5
    """Stop after this many updates in a row were skipped, because a loss or gradient was not finite."""
    validation: Validation | None = None
    """Measure held-out text during training, and keep the best checkpoint. By default nothing is measured, and the
    stage's result is its last step.
    """

    @model_validator(mode="after")
    def _agrees(self) -> Training:
        if (self.steps is None) == (self.epochs is None):
            both = "" if self.steps is None else "; on the command line, epochs=null takes epochs away"
            raise ValueError(f"give steps or epochs, one of the two{both}")
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
    """What the stage trains on: text, pairs or conversations, mixed by weight."""

    @model_validator(mode="after")
    def _has_all_weights_or_none(self) -> Pretraining:
        if len({source.weight is None for source in self.sources}) == 2:
            raise ValueError("some sources have a weight and others none; give it to all of them or to none")
        return self


class Transfer(Training):
    """Stage 4, second half: a mixture of chains, English answers, translation instructions and other sources."""

    newer: ClassVar[tuple[str, ...]] = (*Training.newer, "recovery", "answers")

    pairs: PairSource
    """The pairs from which translation instructions are made."""
    contamination: bool = True
    """Leave out pairs that contain at least half of any text of the evaluation sets."""
    chains: float = Field(default=0.5, ge=0)
    """Share of the rows that are translation chains, relative to the other parts of the mixture; 0 leaves them out."""
    english: float = Field(default=0.25, ge=0)
    """Share of the rows that are the original model's English answers, in the same way."""
    translations: float = Field(default=0.25, ge=0)
    """Share of the rows that are translation instructions, in the same way."""
    recovery: Recovery = "sequence"
    """How the English answers are learned: as text (`sequence`), by the original model's own distribution of each token
    (`token`: KL divergence over the base vocabulary, against the frozen weights without adapters in the same step), or
    both. `token` keeps English closer to the original for a little more time.
    """
    answers: Literal["chains", "direct"] = "chains"
    """What answers a question in the target language: a translation chain, or its last part alone (`direct`), to
    compare with. Of sources with `chains: true`, too, only the last part of a chain is then trained on.
    """
    sources: list[Source] = []
    """Other sources, such as conversations, each with a `weight` relative to the three shares above."""

    @model_validator(mode="after")
    def _has_weights(self) -> Transfer:
        if any(source.weight is None for source in self.sources):
            raise ValueError("each of the sources needs a weight, as chains, english and translations have")
        if self.recovery != "sequence" and not self.english:
            raise ValueError(f"recovery: {self.recovery} has no English answers to act on; raise english above 0")
        if not self.sources and self.chains + self.english + self.translations == 0:
            raise ValueError("nothing is left to train on: raise chains, english or translations above 0")
        return self
