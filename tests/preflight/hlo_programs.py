"""Programs of known FLOPs and traffic, compiled by XLA for the CPU or for a TPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

# Sizes of the products, rounds of the loops; and of the step: layers, width, feed-forward, vocabulary, length.
M, K, N, ROUNDS, INNER = 256, 512, 1024, 6, 3
LAYERS, D, F, V, T = 8, 512, 1024, 2048, 256
ROWS = 2  # sequences per device
LINKS = 4  # devices along fsdp


def compile_programs(platform: str, out: Path) -> None:
    """Writes the text of every program, compiled for 8 CPU devices or for a slice. Runs in a process of its own."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from transllm_jax.preflight.program.chips import topology_devices

    devices = jax.devices() if platform == "cpu" else topology_devices(platform)
    count = len(devices)
    mesh = Mesh(np.array(devices).reshape(count // LINKS, LINKS), ("data", "fsdp"))
    alone = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), PartitionSpec())
    both = ("data", "fsdp")

    # XLA's CPU compiler widens bfloat16; its TPU compiler narrows float32 inputs of products.
    usual = jnp.float32 if platform == "cpu" else jnp.bfloat16

    def array(*shape: int, spec: PartitionSpec | None = None, dtype: object = usual) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=alone if spec is None else NamedSharding(mesh, spec))

    def save(name: str, function: Callable[..., object], *arguments: object) -> None:
        (out / name).write_text(jax.jit(function).lower(*arguments).compile().as_text(), encoding="utf-8")

    def scan(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda carry, w: (jnp.tanh(carry @ w), None), x, weights)[0]

    def nested(x: jax.Array, weights: jax.Array) -> jax.Array:
        def outer(carry: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return jax.lax.scan(lambda inner, _: (jnp.tanh(inner @ w), None), carry, None, length=INNER)[0], None

        return jax.lax.scan(outer, x, weights)[0]

    def checkpointed(x: jax.Array, weights: jax.Array) -> jax.Array:
        block = jax.checkpoint(lambda carry, w: (jnp.tanh(jnp.tanh(carry @ w) @ w.T), None))
        return jax.lax.scan(block, x, weights)[0].sum()

    def collectives(x: jax.Array, weights: jax.Array) -> jax.Array:
        def body(carry: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            full = jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)
            carry = jnp.tanh(carry @ full)
            total = jax.lax.psum(carry, "data")
            scattered = jax.lax.psum_scatter(total @ full.T, "fsdp", scatter_dimension=1, tiled=True)
            swapped = jax.lax.all_to_all(carry, "fsdp", split_axis=0, concat_axis=1, tiled=True)
            passed = jax.lax.ppermute(carry, "fsdp", [(place, (place + 1) % LINKS) for place in range(LINKS)])
            return carry + jnp.tanh(scattered).sum() + jnp.sin(swapped).sum() + passed, None

        return jax.lax.scan(body, x, weights)[0]

    spread = jax.shard_map(
        collectives,
        mesh=mesh,
        in_specs=(PartitionSpec(both), PartitionSpec(None, "fsdp")),
        out_specs=PartitionSpec(both),
        check_vma=False,
    )

    def step(weights: dict[str, jax.Array], tokens: jax.Array) -> dict[str, jax.Array]:
        def loss(weights: dict[str, jax.Array]) -> jax.Array:
            def block(x: jax.Array, w: dict[str, jax.Array]) -> tuple[jax.Array, None]:
                x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(both)))
                q, k, v = (jnp.sin(x @ w[name]).reshape(*x.shape[:2], 4, D // 4) for name in "qkv")
                scores = jax.nn.softmax(jnp.einsum("bqnh,bknh->bnqk", q, k))
                x = x + jnp.einsum("bnqk,bknh->bqnh", scores, v).reshape(x.shape) @ w["o"]
                return x + (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"], None

            x, _ = jax.lax.scan(jax.checkpoint(block), weights["rows"][tokens], weights["blocks"])
            logits = jax.nn.log_softmax((x @ weights["rows"].T).astype(jnp.float32))
            return -jnp.take_along_axis(logits, tokens[..., None], -1).mean()

        return jax.grad(loss)(weights)

    sizes = {name: (D, D) for name in "qkvo"} | {"gate": (D, F), "up": (D, F), "down": (F, D)}
    blocks = {name: array(LAYERS, *size, spec=PartitionSpec(None, both)) for name, size in sizes.items()}
    weights = {"rows": array(V, D, spec=PartitionSpec(both)), "blocks": blocks}
    square = array(ROUNDS, K, K)

    save("product", lambda a, b: a @ b, array(M, K), array(K, N))
    save("scan", scan, array(M, K), square)
    save("nested", nested, array(M, K), square)
    save("checkpointed", jax.grad(checkpointed, argnums=(0, 1)), array(M, K), square)
    save(
        "conditional",
        lambda which, a, b: jax.lax.cond(which > 0, lambda a, b: a @ b, lambda a, b: jnp.sin(a @ b) @ b, a, b),
        array(dtype=jnp.int32),
        array(M, M),
        array(M, M),
    )
    save("batched", lambda a, b: jnp.einsum("bnqh,bnkh->bnqk", a, b), array(2, 4, M, 128), array(2, 4, M, 128))
    save(
        "collectives",
        spread,
        array(128 * count, K, spec=PartitionSpec(both)),
        array(ROUNDS, K, K, spec=PartitionSpec(None, "fsdp")),
    )
    tokens = array(ROWS * count, T, spec=PartitionSpec(both), dtype=jnp.int32)
    save("step", step, weights, tokens)
    if platform != "cpu":
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            mask = masks.MultiHeadMask([masks.CausalMask((T, T))] * 4)
            return jax.vmap(kernel.make_splash_mha(mask, head_shards=1, q_seq_shards=1))(q, k, v)

        save("kernel", attend, *[array(2, 4, T, 128)] * 3)


if __name__ == "__main__":
    compile_programs(sys.argv[1], Path(sys.argv[2]))
