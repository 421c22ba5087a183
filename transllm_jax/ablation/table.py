"""The variants of a run: the ablations of TransLLM (arXiv 2405.13923), and other ways to the same end."""

from __future__ import annotations

from transllm_jax.ablation.overlay import Overlay, Sources, Start

_TAUGHT = ("token", "both")
_NO_STEPS = {"epochs": None, "steps": 0, "warmup_steps": None}


def _without(stage: str) -> dict[str, object]:
    return {f"{stage}.{key}": value for key, value in _NO_STEPS.items()}


# English is learned as text, and not from the original's distributions.
_AS_TEXT = Sources({"recovery": _TAUGHT}, {"recovery": "sequence"})
# Conversations that the original teaches are its own answers.
_NO_ANSWERS_OF_THE_ORIGINAL = Sources({"recovery": _TAUGHT, "format": ("conversations",)}, leave_out=True)
_ANOTHER_WRITER = {
    "transfer.recovery": "sequence",
    "recover.teacher": None,
    "recover.written": {"file": "{writer}", "missing": "drop"},
}
# Full fine-tuning diverges, or forgets all, at the learning rates of adapters.
_SLOWER = {f"{stage}.learning_rate": 0.1 for stage in ("pretrain", "translate", "transfer")}
# Only vocabulary.adapter says what the tokens and the first rows are.
_FROM_ADAPTER = {
    "vocabulary.size": None,
    "vocabulary.corpus": [],
    "vocabulary.tokenizer": None,
    "vocabulary.cuts": None,
    "vocabulary.within_words": False,
    "vocabulary.initial_rows": "mean",
    "vocabulary.english": None,
    "vocabulary.rows_from": None,
    "vocabulary.adapter": "{adapter}",
    **_without("pretrain"),
    **_without("translate"),
    **_without("transfer"),
}
_BASE_MODEL = {"model.source": "{base_model}", "model.sha256": None, "model.shape": None}


def _kd(kind: str, label: str, tests: str) -> Overlay:
    return Overlay(
        f"kd-{kind}",
        label,
        tests,
        set={"transfer.recovery": kind},
        sources=(Sources({"recovery": ("token", "both")}, {"recovery": kind}, stages=("transfer",)),),
    )


def _rows(way: str, label: str, *refused: str) -> Overlay:
    """A variant in which new rows start in another way. refused: keys of section `vocabulary` that this way refuses."""
    return Overlay(
        f"rows-{way}",
        label,
        "Does it matter what the rows of new tokens start from? All else is equal, training included.",
        set={"vocabulary.initial_rows": way, **{f"vocabulary.{key}": None for key in ("rows_from", *refused)}},
    )


FULL = Overlay("full", "the full method", "The config as it is.")

# In the order in which they run: those that share most with the full method, and those that tell most, come first.
OVERLAYS: tuple[Overlay, ...] = (
    FULL,
    Overlay(
        "no-tcot",
        "no chain: answers in the language alone",
        "Does the way over English bring knowledge that the model has in English? The same questions and answers are "
        "trained on, without the English between them.",
        set={"transfer.answers": "direct"},
    ),
    Overlay(
        "no-recovery-kd",
        "no Recovery KD: another writer's answers",
        "Is it the original's own answers that keep its English? Another writer's are trained on, in chains and in "
        "English; nothing is held to the original's distributions.",
        set=_ANOTHER_WRITER,
        sources=(_NO_ANSWERS_OF_THE_ORIGINAL, _AS_TEXT),
        needs=("writer",),
    ),
    Overlay(
        "no-translate",
        "no translation pre-training",
        "Do chains need stage 3, which teaches to translate?",
        set=_without("translate"),
        unless={
            f"recover.{key}.missing": ("model", "the model of stage translate makes the chains' translations")
            for key in ("translate_instructions", "translate_answers")
        },
    ),
    Overlay(
        "no-pretrain",
        "no pre-training in the language",
        "Does stage 2, on text in the language alone, help?",
        set=_without("pretrain"),
    ),
    _rows("mean", "new rows start from the mean of their pieces", "english"),
    _rows("calibrated", "new rows start from the mean, with frequency as a prior"),
    Overlay(
        "within-words",
        "new tokens stay within words",
        "Do tokens that run across words hide names, where a script has no spaces?",
        set={"vocabulary.within_words": True},
    ),
    _kd("sequence", "Recovery KD by text", "Is the text of the original's answers enough, in stage 4?"),
    _kd("token", "Recovery KD by token", "What does the original's distribution of each token add, in stage 4?"),
    _kd("both", "Recovery KD by text and token", "Are both better than either, in stage 4?"),
    Overlay(
        "chains-only",
        "chains without stages 2 and 3",
        "PLUG (arXiv 2311.08711): are chains alone enough, with the tokens of all stages?",
        tokens_into="transfer",
    ),
    Overlay(
        "direct",
        "fine-tuning on translated data",
        "What everyone tries first: translated questions and answers alone, with the tokens of all stages.",
        set={
            "transfer.answers": "direct",
            "transfer.english": 0.0,
            "transfer.translations": 0.0,
            "transfer.recovery": "sequence",
        },
        sources=(Sources({"format": ("text", "pairs")}, leave_out=True, stages=("transfer",)), _AS_TEXT),
        tokens_into="transfer",
    ),
    Overlay(
        "in-chat",
        "pre-training text inside the chat template",
        "Instruction continual pre-training (arXiv 2405.20175): does text keep chat better if it is written as an "
        "answer?",
        sources=(Sources({"format": ("text",), "recovery": (None,)}, {"in_chat": True}, stages=("pretrain",)),),
    ),
    Overlay(
        "embeddings-all",
        "all embedding rows train",
        "Is it right that the rows of the original's own tokens stay frozen?",
        set={"embeddings": "all"},
    ),
    Overlay(
        "full-ft",
        "full fine-tuning, Recovery KD by text",
        "Do frozen weights matter, if the original's answers are trained on? The learning rates are a tenth.",
        set={"lora": "none", "transfer.recovery": "sequence"},
        sources=(_AS_TEXT,),
        multiply=_SLOWER,
    ),
    Overlay(
        "full-ft-no-kd",
        "full fine-tuning, another writer's answers",
        "What is left of the original with neither frozen weights nor its own answers?",
        set={"lora": "none", **_ANOTHER_WRITER},
        sources=(_NO_ANSWERS_OF_THE_ORIGINAL, _AS_TEXT),
        multiply=_SLOWER,
        needs=("writer",),
    ),
    Overlay(
        "base-model",
        "a base model in place of the chat model",
        "Does the method move what the chat model can, or would any model do?",
        set=_BASE_MODEL,
        needs=("base_model",),
    ),
    Overlay(
        "elchat",
        "ElChat: pre-training alone, half of its adapter",
        "arXiv 2412.11704: text in the language with the tokens of all stages; the result is merged, half and half, "
        "with the original. Answers directly.",
        set=_FROM_ADAPTER,
        start=Start(
            Overlay("elchat-start", "", "The pre-training of ElChat.", tokens_into="pretrain"), "pretrain", scale=0.5
        ),
    ),
    Overlay(
        "chat-vector",
        "Chat Vector: an adapter of the base model",
        "arXiv 2310.04799: text in the language with the tokens of all stages, on the base model; what it learned is "
        "added to the chat model. Answers directly.",
        set=_FROM_ADAPTER,
        needs=("base_model",),
        start=Start(
            Overlay(
                "chat-vector-start",
                "",
                "The pre-training of Chat Vector.",
                set=_BASE_MODEL,
                tokens_into="pretrain",
                needs=("base_model",),
            ),
            "pretrain",
        ),
    ),
)
NAMES = tuple(overlay.name for overlay in OVERLAYS)
# Rows that need no training of their own: the original model, asked directly; asked in English, between two
# translations by the full method's model after stage translate; and asked in English within the full method's chains.
ORIGINAL, BRIDGE, INSIDE = "original", "bridge", "inside"
# Those that are asked through the full method's run, as systems of these kinds (`evaluation.systems.named`).
THROUGH = (BRIDGE, INSIDE)
