"""The typed description of a run: YAML with dotted overrides. An unknown key is an error that names it."""

from transllm_jax.config.data import Cleaning, PairSource, Source, WholeSource
from transllm_jax.config.endpoint import Endpoint, TeacherEndpoint, TranslatorEndpoint
from transllm_jax.config.load import load_config, load_section
from transllm_jax.config.recovery import Checks, Filters, Seq2seq, Written
from transllm_jax.config.run import Config
from transllm_jax.config.section import Positive, Section, Share, meanings
from transllm_jax.config.sections import (
    ChatModel,
    Evaluation,
    Export,
    Language,
    Lora,
    MarkerNames,
    Prompts,
    Recover,
    Translation,
    Vocabulary,
)
from transllm_jax.config.training import Pretraining, Training, Transfer, Validation

__all__ = [
    "ChatModel",
    "Checks",
    "Cleaning",
    "Config",
    "Endpoint",
    "Evaluation",
    "Export",
    "Filters",
    "Language",
    "Lora",
    "MarkerNames",
    "PairSource",
    "Positive",
    "Pretraining",
    "Prompts",
    "Recover",
    "Section",
    "Seq2seq",
    "Share",
    "Source",
    "TeacherEndpoint",
    "Training",
    "Transfer",
    "Translation",
    "TranslatorEndpoint",
    "Validation",
    "Vocabulary",
    "WholeSource",
    "Written",
    "load_config",
    "load_section",
    "meanings",
]
