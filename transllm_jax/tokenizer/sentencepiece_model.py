"""SentencePiece's own file, `tokenizer.model`: reads it, and writes that of an expanded tokenizer.

The written file gives the same ids as the tokenizer.json beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as schema

from transllm_jax.errors import UserError
from transllm_jax.tokenizer.formats import refuse_other_format
from transllm_jax.tokenizer.tokenizer import Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _UNUSED = 1, 2, 3, 5


def read_model(path: str | Path) -> tuple[Any, Any]:
    """SentencePiece's protobuf schema, and the parsed model of a `tokenizer.model` file.

    Raises UserError if the file is not a SentencePiece model.
    """
    refuse_other_format(Path(path))
    message: Any = schema  # its classes are created on import, which mypy does not see
    model = message.ModelProto()
    try:
        model.ParseFromString(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); correct the path") from None
    except (DecodeError, ValueError) as error:
        raise UserError(f"{path} is truncated or not a SentencePiece model ({error}); fetch it again") from None
    if not model.pieces:
        raise UserError(f"{path} is not a SentencePiece model, or has no pieces; fetch it again")
    return message, model


def write_model(base: Path, tokenizer: Tokenizer, path: Path) -> None:
    """Write `path`: the pieces of `base`, a tokenizer.model, followed by the other tokens of `tokenizer`.

    New pieces score below the base's, in the order of their ids. Added tokens, such as markers, are control pieces:
    SentencePiece never makes one from a text, even if the text spells it. Unused ids are unused pieces.

    Raises UserError if `base` is not a SentencePiece model, and if its pieces are not the first tokens of `tokenizer`.
    """
    message, model = read_model(base)
    kinds = message.TrainerSpec.ModelType
    if model.trainer_spec.model_type != kinds.Value("BPE"):
        raise UserError(
            f"{base} is a model of type {kinds.Name(model.trainer_spec.model_type)}, but the tokenizer.json beside it "
            "is BPE; take both from the same place, or remove tokenizer.model"
        )
    for number, piece in enumerate(model.pieces):
        if tokenizer.token(number) != piece.piece:
            raise UserError(
                f"{base} and the tokenizer.json beside it disagree: id {number} is {piece.piece!r} in the first and "
                f"{tokenizer.token(number)!r} in the second; take both from the same place, or remove tokenizer.model"
            )
    added = {token.content for token in tokenizer.backend.get_added_tokens_decoder().values()}
    score = np.float32(min((piece.score for piece in model.pieces), default=0.0))
    for number in range(len(model.pieces), tokenizer.vocab_size):
        token = tokenizer.token(number)
        assert token is not None, "the ids of an expanded tokenizer have no gaps"
        # The next lower float32 if subtracting 1 changes nothing (LLaMA-2 has scores of -1e9).
        score = min(score - np.float32(1), np.nextafter(score, np.float32(-np.inf)))
        kind = _CONTROL if token in added else _UNUSED if is_unused(token) else _NORMAL
        model.pieces.add(piece=token, score=float(score) if kind == _NORMAL else 0.0, type=kind)
    model.trainer_spec.vocab_size = len(model.pieces)
    path.write_bytes(model.SerializeToString())


def special_pieces(path: str | Path) -> dict[str, str]:
    """The special pieces of a `tokenizer.model` file, named as in tokenizer_config.json: those of bos, eos, unk and pad
    that the model has.

    Raises UserError if the file is not a SentencePiece model.
    """
    _, model = read_model(path)
    trainer = model.trainer_spec
    wanted = {
        "bos_token": (trainer.bos_id, _CONTROL),
        "eos_token": (trainer.eos_id, _CONTROL),
        "unk_token": (trainer.unk_id, _UNKNOWN),
        "pad_token": (trainer.pad_id, _CONTROL),
    }
    return {
        role: model.pieces[number].piece
        for role, (number, kind) in wanted.items()
        if 0 <= number < len(model.pieces) and model.pieces[number].type == kind
    }


def unused(number: int) -> str:
    """The token of an unused id. No text produces it, as tokenizers replace spaces by another character."""
    return f"<unused {number}>"


def is_unused(token: str) -> bool:
    """Whether this is the token of an unused id."""
    return token.startswith("<unused ") and token.endswith(">")
