"""What others make of an expanded tokenizer: llama.cpp, and transformers where it reads past tokenizer.json.

llama.cpp's converter does not bring a byte-level tokenizer's pre-tokenizer into a GGUF file. It encodes one text, knows
by the ids which of the pre-tokenizers of llama.cpp is meant, and writes that one's name. The text has Latin, Cyrillic,
Han and Khmer letters, emoji, digits and signs. So an expansion for another script passes for its base, and llama.cpp
cuts text as the base does. Source: convert_hf_to_gguf.py (get_vocab_base_pre), src/llama-vocab.cpp.

transformers 5 does not believe what tokenizer_config.json says beside a config.json of some kinds of model: it takes
the kind's own class, which puts the base's pre-tokenizer in the place of the file's. Source:
models/auto/tokenization_auto.py (MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS); a test holds the list against it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transllm_jax.tokenizer.scripts import JOINERS
from transllm_jax.tokenizer.tokenizer import Tokenizer, model_type_of

# Kinds of model (of those that we read) whose pre-tokenizer transformers 5 makes by itself.
REBUILT = frozenset({"qwen2"})
AS_TRAINED, OTHER_IDS = "as trained", "other ids"

# The text by which the converter knows a pre-tokenizer.
CHECK_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 "
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ "
    "------======= нещо на "
    "Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure I'll make "
    "it, 'D you like some tea? We'Ve a'lL"
)


# Qwen2's pattern (and Qwen2.5's and Qwen3's) has this. llama.cpp has Qwen3.5's, too, in which marks go with letters.
_QWEN2 = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+"


# A run of a script as `runs.keep_runs_whole` writes it: `Script.stretch`, with a space before.
_RUN = re.compile(rf" \?(\[[^^].*\])\+(?:\(\?:\[{JOINERS}\]\1\+\)\*)?")


def has_own_cuts(state: dict[str, Any]) -> bool:
    """Whether a parsed tokenizer.json has the pre-tokenizer of `runs.keep_runs_whole`, which no GGUF file can name."""
    return _own_patterns(state) is not None


def stand_in(state: dict[str, Any]) -> str | None:
    """The pre-tokenizer of llama.cpp that cuts most text as such a tokenizer.json does; None where there is none.

    Its runs hold letters and marks of any script, but neither digits nor signs.
    """
    return "qwen35" if any(_QWEN2 in pattern for pattern in _own_patterns(state) or []) else None


def override_message(name: str) -> str:
    """What there is to say of a `stand_in`."""
    return f"llama.cpp with --override-kv tokenizer.ggml.pre=str:{name} reads most texts as trained"


def _own_patterns(state: dict[str, Any]) -> list[str] | None:
    """The patterns that follow one of runs of a script, each with that as its first alternative; None without it."""
    steps = (state.get("pre_tokenizer") or {}).get("pretokenizers", [])
    run, *others = [step["pattern"].get("Regex", "") for step in steps if step["type"] == "Split"] or [""]
    return others if _RUN.fullmatch(run) and all(other.startswith(f"{run}|") for other in others) else None


def readers(state: dict[str, Any], model_type: str | None) -> dict[str, str]:
    """Who reads texts as the ids that a model is trained on. `state`: its parsed tokenizer.json.

    model_type: of the config.json beside it. llama.cpp reads the base's own text as it does the base's: without NFC,
    where the base has that. vLLM's tokenizer is transformers'.
    """
    own = has_own_cuts(state)
    transformers = OTHER_IDS if own and model_type in REBUILT else AS_TRAINED
    return {"transformers": transformers, "vllm": transformers, "llama.cpp": OTHER_IDS if own else AS_TRAINED}


def readers_of(directory: Path) -> dict[str, str]:
    """`readers` of a model's directory."""
    state = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    return readers(state, model_type_of(directory))


def rebuilt_message(model_type: str | None) -> str:
    """What there is to say of a tokenizer with cuts of its own, of a model whose pre-tokenizer transformers makes."""
    return (
        f"transformers 5 and vLLM read other ids than it is trained on: of a {model_type} model they take the base's "
        "pre-tokenizer, whatever tokenizer.json says; so does llama.cpp"
    )


def misread_message(directory: Path) -> str | None:
    """What there is to say where somebody gives a model directory's text other ids; None where nobody does."""
    if not (directory / "tokenizer.json").is_file():
        return None
    found = readers_of(directory)
    if found["transformers"] == OTHER_IDS:
        return f"{rebuilt_message(model_type_of(directory))} (vocabulary.cuts: base learns tokens that all read)"
    if found["llama.cpp"] == AS_TRAINED:
        return None
    instead = stand_in(json.loads((directory / "tokenizer.json").read_text(encoding="utf-8")))
    return (
        "transformers and vLLM read the ids it is trained on, llama.cpp others: a GGUF file has no place for its "
        "tokenizer's cuts (vocabulary.cuts: base learns tokens that llama.cpp reads, too"
        + ("" if instead is None else f"; {override_message(instead)}")
        + ")"
    )


def passes_for(base: Tokenizer, tokenizer: Tokenizer) -> bool:
    """Whether llama.cpp's converter takes an expanded tokenizer for its base. One that it does not know, it refuses."""
    return base.encode(CHECK_TEXT, specials=False) == tokenizer.encode(CHECK_TEXT, specials=False)
