"""Converts a SentencePiece BPE tokenizer (LLaMA-2, Mistral) to one of the `tokenizers` library.

SentencePiece repeatedly merges the two neighbours that make the piece with the best score, and the leftmost of equal
scores. The `tokenizers` library merges the pair that comes first in a list of pairs. So the list is every split of
every piece into two known ones, the best score first. The rest is as in Hugging Face's LLaMA tokenizers: "▁" replaces a
space and is put before every text (also after a special token), and a character that is not a piece becomes its UTF-8
bytes.

A model whose merges no such list can express is refused: see `_merges`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from transllm_jax.errors import UserError
from transllm_jax.tokenizer.growing.pieces import split_priority
from transllm_jax.tokenizer.sentencepiece_model import read_model

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_SPACE = "▁"
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


def build_tokenizer(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    where: str | Path,
    *,
    bos: int | None,
    eos: int | None = None,
    add_space_prefix: bool = True,
) -> Tokenizer:
    """The tokenizer for SentencePiece's pieces; the id of a piece is its index.

    `types` are SentencePiece's: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte. `bos` and `eos` are
    the ids that the tokenizer puts before and after every text, or None. `where` is the file's path for messages.
    Control pieces and the unknown piece are special tokens, and are also found in a text that spells them out.

    Raises UserError for inconsistent lists, and for a model that cannot be converted exactly.
    """
    pieces = list(pieces)
    if not pieces or not len(pieces) == len(scores) == len(types):
        raise UserError(f"{where}: its pieces, scores and types are missing or of different lengths; use another file")
    if len(set(pieces)) != len(pieces) or "" in pieces:
        raise UserError(f"{where} has the same piece twice, or an empty one; use another file of the model")
    of_type = defaultdict(list)
    for piece, kind in zip(pieces, types, strict=True):
        of_type[kind].append(piece)
    if unknown_types := of_type.keys() - {*range(1, 7)}:
        raise UserError(
            f"{where}: pieces of type {', '.join(map(str, sorted(unknown_types)))} are not known; use another file"
        )
    if of_type[_BYTE] and set(of_type[_BYTE]) != _BYTES:
        raise UserError(f"{where}: its byte pieces are not <0x00> to <0xFF>; use another file of the model")
    if len(of_type[_UNKNOWN]) > 1 or not (of_type[_UNKNOWN] or of_type[_BYTE]):
        raise UserError(f"{where} has {len(of_type[_UNKNOWN])} unknown pieces; one is needed")
    for name, number in (("BOS", bos), ("EOS", eos)):
        if number is not None and not 0 <= number < len(pieces):
            raise UserError(f"{where}: the {name} id {number} is outside of the vocabulary of {len(pieces)} pieces")

    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces)},
            merges=_merges(pieces, scores, types, where),
            unk_token=next(iter(of_type[_UNKNOWN]), None),
            fuse_unk=True,
            byte_fallback=bool(of_type[_BYTE]),
        )
    )
    space = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), space] if add_space_prefix else [space],
    )
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if add_space_prefix else steps)
    special = [*of_type[_UNKNOWN], *of_type[_CONTROL]]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in of_type[_USER_DEFINED]])
    if bos is not None or eos is not None:
        before, after = ([] if number is None else [pieces[number]] for number in (bos, eos))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *(f"{piece}:1" for piece in before), "$B:1", *(f"{p}:1" for p in after)],
            special_tokens=[(pieces[number], number) for number in (bos, eos) if number is not None],
        )
    return tokenizer


def write_tokenizer_json(
    model_path: str | Path, directory: str | Path, *, add_bos: bool = True, add_eos: bool = False
) -> None:
    """Write `directory`/tokenizer.json from SentencePiece's `tokenizer.model`.

    `add_bos`, `add_eos`: whether the tokenizer puts the model's BOS piece before every text, and its EOS piece after
    it. Raises UserError for a file that is not a SentencePiece model, for a model that is not BPE, and for one whose
    text processing is not LLaMA's.
    """
    message, model = read_model(model_path)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    kinds = message.TrainerSpec.ModelType
    types = [piece.type for piece in model.pieces]
    if trainer.model_type != kinds.Value("BPE"):
        raise UserError(
            f"{model_path} has model type {kinds.Name(trainer.model_type)}, which is not supported; choose "
            "a model with a BPE tokenizer"
        )
    refused = {
        "a normaliser (precompiled_charsmap)": normalizer.precompiled_charsmap,
        "a denormaliser (precompiled_charsmap)": model.denormalizer_spec.precompiled_charsmap,
        "remove_extra_whitespaces": normalizer.remove_extra_whitespaces,
        "treat_whitespace_as_suffix": trainer.treat_whitespace_as_suffix,
        "escape_whitespaces=false": not normalizer.escape_whitespaces,
        # "▁" would be put after each of them, which SentencePiece does not do.
        "user-defined pieces with add_dummy_prefix": _USER_DEFINED in types and normalizer.add_dummy_prefix,
        # The piece would be searched for before spaces are replaced by "▁".
        f"user-defined pieces with {_SPACE}": any(
            _SPACE in piece.piece for piece in model.pieces if piece.type == _USER_DEFINED
        ),
    }
    if any(refused.values()):
        reasons = ", ".join(reason for reason, holds in refused.items() if holds)
        raise UserError(f"{model_path} has {reasons}, which is not supported; use a directory that has tokenizer.json")
    for name, number in (("BOS", add_bos and trainer.bos_id), ("EOS", add_eos and trainer.eos_id)):
        if number < 0:
            key = f"add_{name.lower()}_token"
            raise UserError(f"{model_path} has no {name} piece; set {key}: false in tokenizer_config.json")
    tokenizer = build_tokenizer(
        [piece.piece for piece in model.pieces],
        [piece.score for piece in model.pieces],
        types,
        model_path,
        bos=trainer.bos_id if add_bos else None,
        eos=trainer.eos_id if add_eos else None,
        add_space_prefix=normalizer.add_dummy_prefix,
    )
    tokenizer.save(str(Path(directory) / "tokenizer.json"))


def _merges(
    pieces: Sequence[str], scores: Sequence[float], types: Sequence[int], where: str | Path
) -> list[tuple[str, str]]:
    """Every split of a piece into two known pieces, in SentencePiece's order.

    Raises UserError for models of which no list of pairs gives the same merges:
    - different pieces with the same score, because the merge of two that overlap depends on their positions in the text
      (except runs of one character, where the longer left part comes first);
    - an unused piece that is made of others, because SentencePiece merges it and splits it again;
    - a piece with a character that is not a piece.
    """
    # The pieces that merges can start from or make: no special tokens and no bytes.
    known = {piece for piece, kind in zip(pieces, types, strict=True) if kind in (_NORMAL, _UNUSED)}
    frozen = {piece for piece, kind in zip(pieces, types, strict=True) if kind == _USER_DEFINED}
    merges: list[tuple[float, int, int, str, str]] = []
    made: dict[float, list[str]] = defaultdict(list)
    unused, uncovered = [], []
    for piece, score, kind in zip(pieces, scores, types, strict=True):
        if kind not in (_NORMAL, _UNUSED) or len(piece) == 1:
            continue
        if kind == _NORMAL and any(letter not in known and letter not in frozen for letter in piece):
            uncovered.append(piece)
        splits = [size for size in range(1, len(piece)) if piece[:size] in known and piece[size:] in known]
        if not splits:
            continue
        made[score].append(piece)
        if kind == _UNUSED:
            unused.append(piece)
        for size in splits:
            merges.append((-score, -split_priority(piece, size), -len(piece), piece[:size], piece[size:]))
    tied = [piece for group in made.values() if len(group) > 1 for piece in group if len(set(piece)) > 1]
    problems = [
        (tied, "have the score of another piece, so that the order of merges is not defined"),
        (unused, "are of type unused and made of other pieces"),
        (uncovered, "have a character that is not a piece"),
    ]
    if wrong := [f"{_some(names)} {reason}" for names, reason in problems if names]:
        raise UserError(f"{where}: pieces {'; '.join(wrong)}, which is not supported; use the Hugging Face directory")
    return [(left, right) for *_, left, right in sorted(merges)]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(repr, names[:5])) + more
