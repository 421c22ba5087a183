"""The sections that name another engine: a server with OpenAI's chat completions API, or batch files for one."""

from __future__ import annotations

import re
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, JsonValue, model_validator

from transllm_jax.config.section import Location, Positive, Section

# Keys of a request that the run itself sets.
_SET_BY_THE_RUN = ("messages", "model", "stream", "n", "max_tokens", "max_completion_tokens")
# Keys that mean nothing for batch files, which the user sends.
_FOR_A_SERVER = ("key", "concurrency", "timeout", "attempts")


class Endpoint(Section):
    """A model behind OpenAI's chat completions API. Give `endpoint` or `batch`, and `model`."""

    endpoint: str | None = None
    """The URL of a server, up to `/chat/completions`, such as `http://localhost:8000/v1`. It gets messages, never text
    in which a chat template was filled.
    """
    batch: Location | None = None
    """In place of `endpoint`: a directory for OpenAI's batch files. The run writes `requests.jsonl` there and stops; it
    goes on when the output of the batch is there as `responses.jsonl`.
    """
    model: str
    """The model's name, as the server knows it."""
    key: str | None = None
    """The name of an environment variable that holds the server's key. The key itself is never written anywhere."""
    concurrency: Positive = 16
    """Requests that are sent at once."""
    timeout: float = Field(default=600.0, gt=0)
    """Seconds that an answer may take."""
    attempts: Positive = 8
    """How often a request is sent at most. It is sent again after a time-out, a failed connection, and the status 408,
    429 or 5xx, with growing pauses (at least the server's `Retry-After`).
    """
    max_tokens_as: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """The key of a request that limits the tokens of an answer. Newer models of OpenAI take only the second."""
    body: dict[str, JsonValue] = {}
    """More keys of each request, such as `{chat_template_kwargs: {enable_thinking: false}}`. A key that is `null` is
    left out: `{temperature: null, seed: null}` for servers that refuse them (they are 0 and the run's seed).
    """
    refused: Literal["stop", "drop"] = "stop"
    """What to do if the server refuses a single request (status 400, 413 or 422, as a content filter does), or if a
    batch has no answer to it: stop the run (`stop`), or leave the text out, counted (`drop`).
    """

    @model_validator(mode="after")
    def _is_one_of_two(self) -> Endpoint:
        # These are checks of the whole section, because a message about one field shows its value, which may be a key.
        if (self.endpoint is None) == (self.batch is None):
            raise ValueError("give one of the two, endpoint (the URL of a server) or batch (a directory)")
        if not self.model.strip():
            raise ValueError("model is empty; give the name by which the server knows it")
        if self.endpoint is not None:
            _check_url(self.endpoint)
        if self.key is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.key):
            raise ValueError(
                "key is the name of an environment variable, such as OPENAI_API_KEY (capitals, digits and _), "
                "never the key itself; export the key under that name"
            )
        if self.batch is not None:
            for name in _FOR_A_SERVER:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} is for an endpoint; with batch, remove it")
        for name in _SET_BY_THE_RUN:
            if name in self.body:
                raise ValueError(f"body: {name!r} is set by the run; remove it")
        return self

    @property
    def place(self) -> str:
        """The server or the directory, for messages."""
        return str(self.endpoint if self.endpoint is not None else self.batch)


class TeacherEndpoint(Endpoint):
    """Another engine that serves the original chat model: its answers are the teacher's. See docs/endpoints.md."""

    check: bool = True
    """Before all others, answer 20 instructions with both engines, greedily. The run stops if the numbers of prompt
    tokens are not the same, or if fewer than 16 answers begin with the same 8 tokens. `false` for a teacher that is
    another model on purpose.
    """


class TranslatorEndpoint(Endpoint):
    """Another engine that translates. See docs/endpoints.md."""

    prompt: str = "Translate into {language}, and write only the translation: {text}"
    """What it is asked. `{text}` is replaced by the text, `{language}` by the target language's name."""
    max_tokens: Positive | None = None
    """Tokens of a translation at most, as the server counts them. By default `recover.max_new_tokens`."""

    @model_validator(mode="after")
    def _has_text(self) -> TranslatorEndpoint:
        if "{text}" not in self.prompt:
            raise ValueError("prompt lacks {text}, which the text replaces")
        return self


def _check_url(url: str) -> None:
    """Raises ValueError, which does not show the URL, because it may hold a password."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or parts.scheme not in ("http", "https") or any(letter.isspace() for letter in url):
        raise ValueError("endpoint is not the URL of a server, such as http://localhost:8000/v1; correct it")
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            "endpoint holds a user name or a password, which would be written to run.yaml; put the server's key into "
            "an environment variable, and name the variable in key"
        )
    if parts.query or parts.fragment:
        raise ValueError("endpoint goes on after ? or #, which the run would write to run.yaml; end it before that")
    if parts.path.rstrip("/").endswith("/completions"):
        raise ValueError("endpoint ends before /chat/completions, which the run adds; remove that")
