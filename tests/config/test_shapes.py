"""The shapes of configs/models are those of the published models."""

from pathlib import Path

import pytest

from transllm_jax.disk import read_json
from transllm_jax.model.config import LlamaConfig
from transllm_jax.model.layout import SINGLE
from transllm_jax.model.parameters import abstract, count_parameters

MODELS = Path(__file__).parents[2] / "configs" / "models"
# The number of parameters in the published safetensors files; theta and the factor of the rotary embedding and the
# trained context by the published config.json.
PUBLISHED = {
    "llama2_7b": (6_738_415_616, 1e4, None, 4096),
    "llama2_13b": (13_015_864_320, 1e4, None, 4096),
    "llama2_70b": (68_976_648_192, 1e4, None, 4096),
    "llama3_1_8b": (8_030_261_248, 5e5, 8.0, 131072),
    "llama3_2_1b": (1_235_814_400, 5e5, 32.0, 131072),
    "llama3_2_3b": (3_212_749_824, 5e5, 32.0, 131072),
    "qwen3_8b": (8_190_735_360, 1e6, None, 40960),
    "smollm2_135m": (134_515_008, 1e5, None, 8192),
}


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.json")), ids=lambda path: path.stem)
def test_a_shape_is_the_published_model(path: Path) -> None:
    parameters, theta, factor, context = PUBLISHED[path.stem]
    shape = LlamaConfig.from_hf(read_json(path))
    assert count_parameters(abstract(shape, None, 0, layout=SINGLE).frozen) == parameters
    assert (shape.rope_theta, shape.max_position_embeddings) == (theta, context)
    assert (shape.rope_scaling and (shape.rope_scaling.rope_type, shape.rope_scaling.factor)) == (
        factor and ("llama3", factor)
    )


def test_every_published_shape_is_there() -> None:
    assert {path.stem for path in MODELS.glob("*.json")} == set(PUBLISHED)
