"""`transllm serve`: a model, and the original inside it, behind OpenAI's protocol."""

from __future__ import annotations

import ipaddress
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

from transllm_jax.commands.open_chat import ChatModel, English, check_english, open_chat_model
from transllm_jax.errors import UserError
from transllm_jax.generation.engine import ORIGINAL, WHOLE, Engine, Mode
from transllm_jax.generation.programs import STOPS
from transllm_jax.generation.translate import translation_ends
from transllm_jax.serving.app import Server, Settings
from transllm_jax.serving.engine_thread import EngineThread, Lane
from transllm_jax.serving.served import Served
from transllm_jax.tokenizer.chain import Markers
from transllm_jax.tokenizer.ends import end_ids
from transllm_jax.tokenizer.tokenizer import Tokenizer

# Connections that wait to be accepted.
_QUEUED = 2048


@dataclass(frozen=True)
class ServeOptions:
    """host, port: where; port 0 is any free one. name: of the model; None for that of its directory. slots: answers at
    a time, of each model. context: the most tokens of a prompt and its answer. grace: seconds that requests have to end
    when the server is told to stop. english: which model writes the English answers.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    slots: int = 8
    context: int = 2048
    grace: int = 120
    english: English = "model"
    settings: Settings = field(default_factory=Settings)


def serve(given: str, options: ServeOptions, say: Callable[[str], None]) -> None:
    """Serve a work directory's newest point and its original, or an exported model, until a signal ends it.

    The port opens when all programs are compiled. Raises UserError for a directory that is neither, and for an address
    that cannot be used.
    """
    # First, so that a port that is taken is found before a minute of compilation.
    listener = _bound(options.host, options.port)
    with listener:
        models = serve_models(given, options)
        thread = models[0].thread
        say(f"compiling for {options.slots} answers at a time, of up to {models[0].longest} tokens with their prompts")
        thread.start()
        # From now on clients wait in the kernel's queue, and are not refused.
        listener.listen(_QUEUED)
        host, port = listener.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        say(f"{address} serves {' and '.join(model.name for model in models)}; Ctrl-C ends it")
        local = ipaddress.ip_address(host).is_loopback
        if options.settings.key is None and not local:
            say("anybody who reaches this address may ask; --api-key sets a key")
        try:
            _listen(Server(models, replace(options.settings, local=local)), listener, options, say)
        finally:
            thread.close()


def serve_models(given: str, options: ServeOptions) -> list[Served]:
    """The models of a work directory or an exported model, with their engines; nothing is compiled yet."""
    opened = open_chat_model(given)
    check_english(opened, options.english)
    name = options.name or _name(given)
    longest = min(options.context, opened.config.context)
    chats: list[tuple[str, ChatModel, Mode, Markers | None]] = [(name, opened, WHOLE, _markers(opened))]
    if opened.original is not None and opened.split is not (original := opened.original()).split:
        mode = ORIGINAL if opened.holds_original else WHOLE
        chats.append((f"{name}-original", original, mode, None))
    engines: dict[int, Engine] = {}
    lanes: list[Lane] = []
    for _, chat, mode, markers in chats:
        split = opened.split if mode == ORIGINAL else chat.split
        if id(split) not in engines:
            engines[id(split)] = Engine(split, opened.config, batch_size=options.slots)
        # With the end tokens: the marker at which the original takes over, or all that end a translation.
        ends = end_ids(chat.tokenizer) if markers is None else translation_ends(chat.tokenizer, markers)
        stops = max(STOPS, 1 + len(ends))
        lanes.append(Lane(engines[id(split)], mode, longest, stops))
    thread = EngineThread(lanes)
    models = [
        Served(name, thread, lane, chat.tokenizer, markers)
        for lane, (name, chat, _, markers) in zip(lanes, chats, strict=True)
    ]
    if options.english == "original":
        models[0].english_by = models[1]
    return models


def _name(given: str) -> str:
    """The last part of a path, a URL or a hub's name."""
    path = given if "://" in given else str(Path(given).expanduser().resolve())
    return path.rstrip("/").rpartition("/")[2].rpartition("#")[2].removesuffix(".gguf") or "model"


def _markers(opened: ChatModel) -> Markers | None:
    """The markers of the chains that a model writes; None if it has no tokens for them."""
    tokenizer: Tokenizer = opened.tokenizer
    marks = opened.markers.in_order()
    return opened.markers if all(tokenizer.token_id(marker) is not None for marker in marks) else None


def _bound(host: str, port: int) -> socket.socket:
    """A socket at an address; it does not listen yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{host}:{port} cannot be used ({reason}); give others with --host and --port") from None
    return listener


def _listen(server: Server, listener: socket.socket, options: ServeOptions, say: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; then finish what runs. A second SIGINT ends at once."""
    import uvicorn

    class Finishing(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            first = not self.should_exit
            super().handle_exit(sig, frame)
            # Whoever read the lines may have gone: `transllm serve ... | tee log`, and Ctrl-C ends both.
            with suppress(OSError):
                if first:
                    say("finishing the answers that were asked for; Ctrl-C ends at once")

    config = uvicorn.Config(
        server.app(),
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=options.grace,
    )
    # uvicorn raises the signal again when all is done, which would end this process as if it had been killed.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with suppress(KeyboardInterrupt):
            Finishing(config).run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
