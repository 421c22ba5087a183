"""Reads and writes PEFT's adapter_config.json for plain LoRA. Any other option is refused by name.

Every field is either read, or known not to change the computation, or refused unless it is empty. So an option of a
later PEFT is refused until it has been reviewed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transllm_jax.conversion.names import EMBEDDING, KERNELS, OUTPUT
from transllm_jax.disk import read_model_json
from transllm_jax.errors import UserError
from transllm_jax.model.lora import LoraConfig

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# PEFT writes this prefix before Hugging Face's own name of a tensor.
PREFIX = "base_model.model."

EMBED_MODULE = EMBEDDING.removesuffix(".weight")
HEAD_MODULE = OUTPUT.removesuffix(".weight")
# The names that an adapter uses for the two tables' modules; PEFT writes both names of the embedding.
_TABLES = {"embed_tokens": EMBED_MODULE, EMBED_MODULE: EMBED_MODULE, HEAD_MODULE: HEAD_MODULE}

# Fields that do not change what is computed. EVA uses data for the initial values of A only.
_IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
}
_READ = {
    "alpha_pattern",
    "bias",
    "ensure_weight_tying",
    "exclude_modules",
    "init_lora_weights",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "runtime_config",
    "target_modules",
    "task_type",
    "trainable_token_indices",
    "use_rslora",
}
# Fields that change the computation, the base, or further training, and why. All others are refused as unknown.
_REFUSED = {
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "corda_config": "CorDA changes the base's weights",
    "fan_in_fan_out": "transposed weights, of Conv1D layers",
    "kasa_config": "KaSA changes the base's weights",
    "layer_replication": "replicated layers",
    "layers_pattern": "adapters in some layers only",
    "layers_to_transform": "adapters in some layers only",
    "loftq_config": "LoftQ changes the base's weights",
    "lora_bias": "biases on LoRA's B",
    "lora_ga_config": "LoRA-GA changes the base's weights",
    "megatron_config": "Megatron's parallel layers",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "LoRA on bare parameters",
    "use_bdlora": "block-diagonal LoRA",
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "velora_config": "VeLoRA",
}
# Initialisations that leave the base unchanged and train both A and B.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_FIX = "merge the adapter with PEFT (merge_and_unload, save_pretrained) and take the merged model as the base"
_FIX_START = "save it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"


@dataclass(frozen=True)
class PeftConfig:
    """A checked adapter_config.json. Modules have Hugging Face's full names without `.weight`.

    `targets` is the list of `target_modules`, or None if it is a pattern; then the file's tensors decide. `saved` are
    the tables that were trained whole, and `tokens`, by table, the ids of rows that were trained alone. `tied`: the
    adapter keeps tied tables tied.
    """

    rank: int
    alpha: float
    dropout: float
    rslora: bool
    targets: tuple[str, ...] | None
    saved: frozenset[str]
    tokens: dict[str, list[int]]
    tied: bool

    def lora(self, targets: Sequence[str]) -> LoraConfig:
        """Our config, for adapters on these layers (q, k, v, o, gate, up, down)."""
        return LoraConfig(self.rank, self.alpha, self.dropout, self.rslora, tuple(targets))

    def targeted(self, module: str) -> bool:
        """Whether `target_modules` is a list with the module's whole name or the end of it."""
        return any(module == name or module.endswith(f".{name}") for name in self.targets or ())


def read_peft_config(directory: Path) -> PeftConfig:
    """Read and check adapter_config.json. Raises UserError, which lists every option that is not supported."""
    raw = read_model_json(directory / CONFIG)
    where = directory / CONFIG
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{where}: peft_type {kind!r} is not supported, only 'LORA' is; {_FIX}")
    faults = _unsupported(raw)
    rank: Any = raw.get("r")
    alpha: Any = raw.get("lora_alpha")
    dropout: Any = raw.get("lora_dropout", 0.0)
    if not _is_number(rank) or not isinstance(rank, int) or rank < 1:
        faults.append(f"r is {rank!r}, not a whole number above 0")
    if not _is_number(alpha) or not 0 < alpha < float("inf"):
        faults.append(f"lora_alpha is {alpha!r}, not a number above 0")
    if not _is_number(dropout) or not 0 <= dropout < 1:
        faults.append(f"lora_dropout is {dropout!r}, not a number from 0 to below 1")
    for name, all_of in (("rank_pattern", rank), ("alpha_pattern", alpha)):
        pattern = raw.get(name) or {}
        if not isinstance(pattern, dict) or any(value != all_of for value in pattern.values()):
            faults.append(f"{name} gives some layers another value; one for all is supported")
    flags = {name: raw.get(name) or False for name in ("use_rslora", "ensure_weight_tying")}
    faults += [
        f"{name} is {_short(value)}, not true or false" for name, value in flags.items() if value is not bool(value)
    ]
    targets = _targets(raw.get("target_modules"), faults)
    if not _is_empty(raw.get("exclude_modules")):
        targets = None
    saved = _saved(raw.get("modules_to_save"), faults)
    tokens = _tokens(raw.get("trainable_token_indices"), faults)
    faults += [
        f"both modules_to_save and trainable_token_indices name {name}" for name in sorted(saved & tokens.keys())
    ]
    if faults:
        raise UserError(f"{where}: {'; '.join(faults)}; {_FIX}")
    config = PeftConfig(
        rank, float(alpha), float(dropout), flags["use_rslora"], targets, saved, tokens, flags["ensure_weight_tying"]
    )
    on_tables = [module for module in (EMBED_MODULE, HEAD_MODULE) if config.targeted(module)]
    if on_tables:
        raise UserError(f"{where}: target_modules: LoRA on {' and '.join(on_tables)} is not supported; {_FIX}")
    return config


def make_peft_config(
    lora: LoraConfig,
    base_model: str,
    *,
    tables: Sequence[str] = (),
    tokens: Mapping[str, list[int]],
    tied: bool = False,
) -> dict[str, Any]:
    """The dictionary of an adapter_config.json that `PeftModel.from_pretrained` reads.

    Fields with PEFT's default are left out, because a version of PEFT that does not know a field fails on it. `tables`
    were trained whole; `tokens` are, by table, the ids of rows that were trained alone; `tied`: the tables are tied.
    """
    raw: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": [
            name.rpartition(".")[2] for path, name in KERNELS.items() if path.rpartition(".")[2] in lora.targets
        ],
        "modules_to_save": [name.rpartition(".")[2] for name in tables] or None,
    }
    if tokens:
        raw["trainable_token_indices"] = {name.rpartition(".")[2]: ids for name, ids in tokens.items()}
    if tied:
        raw["ensure_weight_tying"] = True
    return raw


def _unsupported(raw: Mapping[str, Any]) -> list[str]:
    faults = []
    for name, value in sorted(raw.items()):
        if name in _READ or name in _IGNORED or _is_empty(value):
            continue
        if name in _REFUSED:
            faults.append(f"{name}={_short(value)} is not supported ({_REFUSED[name]})")
        else:
            faults.append(f"{name}={_short(value)} is not known here")
    if raw.get("bias", "none") != "none":
        faults.append(f"bias={_short(raw['bias'])} is not supported (trained biases)")
    start = raw.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        faults.append(
            f"init_lora_weights={_short(start)} is not supported (it changes the base, or what trains); {_FIX_START}"
        )
    runtime = raw.get("runtime_config")
    if not _is_empty(runtime) and not (isinstance(runtime, dict) and runtime.keys() == {"ephemeral_gpu_offload"}):
        faults.append(f"runtime_config={_short(runtime)} is not known here")
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        faults.append(f"task_type={_short(raw['task_type'])} is not supported, only 'CAUSAL_LM' is")
    return faults


def _targets(value: Any, faults: list[str]) -> tuple[str, ...] | None:
    """The list of module names, or None. A pattern is never run, because one from a stranger could take forever."""
    if isinstance(value, list) and value and all(isinstance(name, str) and name for name in value):
        return tuple(value)
    if not isinstance(value, str) or not value:
        faults.append(f"target_modules is {_short(value)}, neither a list of names nor a pattern")
    return None


def _saved(value: Any, faults: list[str]) -> frozenset[str]:
    if value is None:
        return frozenset()
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        faults.append(f"modules_to_save is {_short(value)}, not a list of names")
        return frozenset()
    others = sorted(set(value) - _TABLES.keys())
    if others:
        faults.append(f"modules_to_save: {', '.join(others)} is not supported, only embed_tokens and lm_head are")
    return frozenset(_TABLES[name] for name in value if name in _TABLES)


def _tokens(value: Any, faults: list[str]) -> dict[str, list[int]]:
    if value is None:
        return {}
    tables = value if isinstance(value, dict) else {"embed_tokens": value}
    found: dict[str, list[int]] = {}
    for name, ids in tables.items():
        if name not in _TABLES or _TABLES[name] in found:
            faults.append(f"trainable_token_indices: {name} is not supported, only embed_tokens and lm_head are, once")
        elif not isinstance(ids, list) or not all(_is_id(i) for i in ids):
            faults.append(f"trainable_token_indices: {name} has {_short(ids)}, not a list of ids")
        elif len(set(ids)) < len(ids):
            faults.append(f"trainable_token_indices: {name} names {len(ids) - len(set(ids))} ids twice")
        elif ids:
            found[_TABLES[name]] = ids
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_empty(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, dict | list | str) and not value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
