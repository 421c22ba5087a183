"""How llama.cpp and transformers read an expanded tokenizer, and in which cases their ids differ from ours.

llama.cpp's converter does not copy a byte-level tokenizer's pre-tokenizer into a GGUF file. It encodes one text,
recognises by the ids one of llama.cpp's own pre-tokenizers, and writes its name. The text has Latin, Cyrillic, Han and
Khmer letters, emoji, digits and signs. So an expansion for another script is mistaken for its base, and llama.cpp cuts
text as the base does. Source: convert_hf_to_gguf.py (get_vocab_base_pre), src/llama-vocab.cpp.

For some model types in config.json transformers 5 ignores the class in tokenizer_config.json: it uses the model type's
own class, which replaces the pre-tokenizer of tokenizer.json by the base's. Source: models/auto/tokenization_auto.py
(MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS); a test compares the list.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transllm_jax.tokenizer.scripts import JOINERS
from transllm_jax.tokenizer.tokenizer import Tokenizer, model_type_of

# Model types (of those that we read) whose pre-tokenizer transformers 5 replaces by its own.
REBUILT = frozenset({"qwen2"})
AS_TRAINED, OTHER_IDS = "as trained", "other ids"

# The text by which the converter recognises a pre-tokenizer.
CHECK_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 "
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ "
    "------======= нещо на "
    "Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure I'll make "
    "it, 'D you like some tea? We'Ve a'lL"
)


# A part of Qwen2's pattern (and of Qwen2.5's and Qwen3's). llama.cpp also has Qwen3.5's, where marks go with letters.
_QWEN2 = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+"


# The pattern of a run of a script as `runs.keep_runs_whole` writes it: an optional space and `Script.stretch`.
_RUN = re.compile(rf" \?(\[[^^].*\])\+(?:\(\?:\[{JOINERS}\]\1\+\)\*)?")


def has_own_cuts(state: dict[str, Any]) -> bool:
    """Whether a parsed tokenizer.json has the pre-tokenizer of `runs.keep_runs_whole`, which GGUF has no name for."""
    return _own_patterns(state) is not None


def stand_in(state: dict[str, Any]) -> str | None:
    """The pre-tokenizer of llama.cpp that cuts most text as a tokenizer.json with own cuts does; None if there is none.

    It keeps letters and marks of any script together, but neither digits nor signs.
    """
    return "qwen35" if any(_QWEN2 in pattern for pattern in _own_patterns(state) or []) else None


def override_message(name: str) -> str:
    """A message about how to use a `stand_in`."""
    return f"llama.cpp with --override-kv tokenizer.ggml.pre=str:{name} reads most texts as trained"


def base_cuts(state: dict[str, Any]) -> tuple[dict[str, Any] | None, str | None]:
    """A parsed tokenizer.json's pre-tokenizer without runs of a script, which is the base's, and the pattern of a run.

    The pattern is None, and the pre-tokenizer unchanged, if it keeps no runs whole.
    """
    if _own_patterns(state) is None:
        return state["pre_tokenizer"], None
    steps = list(state["pre_tokenizer"]["pretokenizers"])
    at = next(number for number, step in enumerate(steps) if step["type"] == "Split")
    run = steps.pop(at)["pattern"]["Regex"]
    for number, step in enumerate(steps):
        if step["type"] == "Split":
            steps[number] = {**step, "pattern": {"Regex": step["pattern"]["Regex"].removeprefix(f"{run}|")}}
    return {"type": "Sequence", "pretokenizers": steps}, run


def _own_patterns(state: dict[str, Any]) -> list[str] | None:
    """The patterns after a first one that matches runs of a script, if each has that one as its first alternative.

    None if the first pattern is not such a one.
    """
    steps = (state.get("pre_tokenizer") or {}).get("pretokenizers", [])
    run, *others = [step["pattern"].get("Regex", "") for step in steps if step["type"] == "Split"] or [""]
    return others if _RUN.fullmatch(run) and all(other.startswith(f"{run}|") for other in others) else None


def readers(state: dict[str, Any], model_type: str | None) -> dict[str, str]:
    """Program -> whether it reads text as the ids that the model is trained on: AS_TRAINED or OTHER_IDS.

    `state`: the model's parsed tokenizer.json. model_type: that of its config.json. llama.cpp applies no NFC, even if
    the base does. vLLM uses the tokenizer of transformers.
    """
    own_cuts = has_own_cuts(state)
    transformers = OTHER_IDS if own_cuts and model_type in REBUILT else AS_TRAINED
    return {"transformers": transformers, "vllm": transformers, "llama.cpp": OTHER_IDS if own_cuts else AS_TRAINED}


def readers_of(directory: Path) -> dict[str, str]:
    """`readers` for a model's directory."""
    state = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    return readers(state, model_type_of(directory))


def rebuilt_message(model_type: str | None) -> str:
    """A warning for a tokenizer with own cuts, of a model type in REBUILT."""
    return (
        f"transformers 5 and vLLM read other ids than it is trained on: of a {model_type} model they take the base's "
        "pre-tokenizer, whatever tokenizer.json says; so does llama.cpp"
    )


def misread_message(directory: Path) -> str | None:
    """A warning if some program reads text as other ids than the model in `directory` is trained on; else None."""
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
        "tokenizer's cuts (transllm convert to-gguf writes one that it reads most ids of; vocabulary.cuts: base learns "
        "tokens of which it reads all" + ("" if instead is None else f"; {override_message(instead)}") + ")"
    )


def passes_for(base: Tokenizer, tokenizer: Tokenizer) -> bool:
    """Whether llama.cpp's converter mistakes an expanded tokenizer for its base. It refuses an unknown tokenizer."""
    return base.encode(CHECK_TEXT, specials=False) == tokenizer.encode(CHECK_TEXT, specials=False)
