"""Compares the ids that llama.cpp gives to text with those of an expanded byte-level tokenizer's tokenizer.json.

    python bench/llama_cpp_cuts.py BASE --pre llama-bpe --addon llama-addon.node --corpus FILE ... --held-out FILE ...
                                   [--size 4000] [--language th] [--plain FILE ...] [--stand-in qwen35]

BASE: a directory with tokenizer.json. --pre: the pre-tokenizer that llama.cpp's converter names for the base
(llama-bpe, qwen2, smollm). --addon: llama.cpp as a file of the npm package @node-llama-cpp/linux-x64 (`npm install` it;
the file is in bins/), which node runs. FILE: UTF-8 text, documents separated by a blank line, may be .xz. --plain:
texts without the language, whose ids must not change. --stand-in: another pre-tokenizer of llama.cpp, to try on whole
runs. Prints, for the unchanged base and for each kind of `cuts`: tokens per character of the held-out documents by
tokenizer.json and by llama.cpp, in how many documents the ids differ, and whether the converter takes the tokenizer for
the base's.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import subprocess
import tempfile
from pathlib import Path

import gguf

from transllm_jax.tokenizer.chain import Markers
from transllm_jax.tokenizer.growing.expand import expand
from transllm_jax.tokenizer.llama_cpp import passes_for
from transllm_jax.tokenizer.tokenizer import Tokenizer

NODE = """
import {createRequire} from "module"; import {readFileSync, writeFileSync} from "fs";
const [addon, file, texts, ids] = process.argv.slice(-4), llama = createRequire("file:///")(addon);
const model = new llama.AddonModel(file, {vocabOnly: true, addonExports: llama});
if (!await model.init()) throw new Error("llama.cpp does not load the vocabulary");
const found = JSON.parse(readFileSync(texts, "utf8")).map(text => Array.from(model.tokenize(text, false)));
writeFileSync(ids, JSON.stringify(found));
process.exit(0);
"""
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def read(path: Path) -> list[str]:
    data = path.read_bytes()
    text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode()
    return [document for document in text.split("\n\n") if document.strip()]


def write_vocabulary(tokenizer: Tokenizer, pre: str, path: Path) -> None:
    """Write a GGUF file with only the tokenizer, like llama.cpp's converter."""
    state = json.loads(tokenizer.backend.to_str())
    added = {token["content"]: token for token in state["added_tokens"]}
    vocabulary = {**state["model"]["vocab"], **{token["content"]: token["id"] for token in added.values()}}
    tokens = [f"[PAD{i}]" for i in range(max(vocabulary.values()) + 1)]
    types = [UNUSED] * len(tokens)
    for token, number in vocabulary.items():
        tokens[number] = token
        types[number] = NORMAL if token not in added else CONTROL if added[token]["special"] else USER_DEFINED
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]])
    writer.add_add_bos_token(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def by_llama_cpp(tokenizer: Tokenizer, pre: str, addon: Path, texts: list[str]) -> list[list[int]]:
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "vocabulary.gguf"
        write_vocabulary(tokenizer, pre, file)
        script, given, ids = (Path(scratch) / name for name in ("encode.mjs", "texts.json", "ids.json"))
        script.write_text(NODE)
        given.write_text(json.dumps(texts))
        subprocess.run(
            ["node", str(script), str(addon.resolve()), str(file), str(given), str(ids)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "LD_LIBRARY_PATH": str(addon.resolve().parent)},
            check=True,
        )
        found: list[list[int]] = json.loads(ids.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--pre", required=True)
    parser.add_argument("--addon", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, nargs="+", required=True)
    parser.add_argument("--held-out", type=Path, nargs="+", required=True)
    parser.add_argument("--plain", type=Path, nargs="*", default=[])
    parser.add_argument("--stand-in")
    parser.add_argument("--size", type=int, default=4000)
    parser.add_argument("--language", default="th")
    given = parser.parse_args()

    corpus, held_out, plain = (
        [document for path in paths for document in read(path)] for paths in (given.corpus, given.held_out, given.plain)
    )
    characters = sum(map(len, held_out))
    base = Tokenizer.load(given.base)
    markers = list(Markers.for_language(given.language).in_order())
    print(f"{given.base}: {len(held_out):,} documents, {characters:,} characters held out; {len(plain):,} without")

    def measure(name: str, tokenizer: Tokenizer, pre: str) -> None:
        trained = tokenizer.encode_batch(held_out, specials=False)
        other = by_llama_cpp(tokenizer, pre, given.addon, held_out + plain)
        here, there = (sum(map(len, ids)) for ids in (trained, other[: len(held_out)]))
        differ = sum(a != b for a, b in zip(trained, other, strict=False))
        unlike = sum(
            a != b for a, b in zip(base.encode_batch(plain, specials=False), other[len(held_out) :], strict=True)
        )
        known = "takes it for the base" if passes_for(base, tokenizer) else "does not know it"
        print(
            f"{name:6} {here:9,} tokens {here / characters:.4f} a character; llama.cpp, {pre}: {there:9,} "
            f"{there / characters:.4f}, {differ:,} of {len(held_out):,} differ, without the language {unlike:,} of "
            f"{len(plain):,}; the converter {known}",
            flush=True,
        )

    measure("-", base, given.pre)
    for cuts in ("whole", "base"):
        expansion = expand(base, corpus, size=given.size, language=given.language, markers=markers, cuts=cuts)
        measure(cuts, expansion.tokenizer, given.pre)
        if cuts == "whole" and given.stand_in:
            measure(cuts, expansion.tokenizer, given.stand_in)


if __name__ == "__main__":
    main()
