"""TransLLM (arXiv 2405.13923) in JAX: move a chat LLM from English to another language, keeping what it knows."""

__version__ = "0.1.0"
