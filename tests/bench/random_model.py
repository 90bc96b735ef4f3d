"""A model directory of the Llama-3.1-8B shape with random weights, for measuring where no weights can be had.

Usage: random_model.py DIR [--dtype fp8] [--layers 32] [--hidden 4096] ...

Every matrix is a piece of the same noise: numbers of either sign between 2^-7 and 2^-3; with --dtype fp8 the projections
are e4m3 with a scale a channel. The tokenizer knows bytes and
nothing else by name, so answers are gibberish; with --tokens FILE (tiktoken's form: base64 and id, a line each; Llama 3's
tokenizer.model is one) tokens have the names that are there, as grammars need, but nothing is merged. Checksums in the manifest are left zero: nothing reads them but
`baton model-prep --verify`. With --chat there is a chat template, and what the model says is read again as the tokens that it was: conversations can be measured. Takes some seconds and 16 GB.
"""

import argparse
import base64
import json
import math
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("directory", type=Path)
parser.add_argument("--name", default="random-8b")
parser.add_argument("--dtype", choices=["bf16", "fp8"], default="bf16")
parser.add_argument("--tokens", type=Path)
parser.add_argument("--chat", action="store_true")
for option, default in {
    "hidden": 4096, "intermediate": 14336, "layers": 32, "heads": 32, "kv-heads": 8, "head-dim": 128, "vocab": 128256,
    "tokens-max": 131072, "threads": 16,
}.items():
    parser.add_argument(f"--{option}", type=int, default=default)
a = parser.parse_args()
a.directory.mkdir(parents=True, exist_ok=True)

q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
tensors = [("model.embed_tokens.weight", [a.vocab, a.hidden])]
for layer in range(a.layers):
    tensors += [(f"model.layers.{layer}.{name}.weight", shape) for name, shape in [
        ("input_layernorm", [a.hidden]), ("self_attn.q_proj", [q, a.hidden]), ("self_attn.k_proj", [kv, a.hidden]),
        ("self_attn.v_proj", [kv, a.hidden]), ("self_attn.o_proj", [a.hidden, q]), ("post_attention_layernorm", [a.hidden]),
        ("mlp.gate_proj", [a.intermediate, a.hidden]), ("mlp.up_proj", [a.intermediate, a.hidden]),
        ("mlp.down_proj", [a.hidden, a.intermediate]),
    ]]
tensors += [("model.norm.weight", [a.hidden]), ("lm_head.weight", [a.vocab, a.hidden])]

stored = []
for name, shape in tensors:
    if a.dtype == "fp8" and "_proj." in name:
        stored += [(name, "F8_E4M3", shape), (f"{name}_scale", "F32", shape[:1])]
    else:
        stored.append((name, "BF16", shape))
BYTES = {"BF16": 2, "F8_E4M3": 1, "F32": 4}
entries, end = {"__metadata__": {"format": "pt"}}, 0
for name, dtype, shape in stored:
    start, end = end, end + BYTES[dtype] * math.prod(shape)
    entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
header = json.dumps(entries).encode()
header += b" " * (-(8 + len(header)) % 64)
header = len(header).to_bytes(8, "little") + header

# Pieces of an odd length of numbers, so that no two rows are the same.
PIECE = 2 * ((32 << 20) - 4099)
every = lambda number: int.from_bytes(number.to_bytes(2, "little") * (PIECE // 2), "little")  # noqa: E731
bits = random.Random(1).getrandbits(8 * PIECE)
noise = {
    "BF16": (bits & every(0x81FF) | every(0x3C00)).to_bytes(PIECE, "little"),
    "F8_E4M3": (bits & every(0x9F9F) | every(0x2020)).to_bytes(PIECE, "little"),
    "F32": bytes.fromhex("0000803d") * (PIECE // 4),  # 1/16
}
weights = os.open(a.directory / "rank0.safetensors", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
os.pwrite(weights, header, 0)


def fill(entry):
    at, end = (len(header) + offset for offset in entry["data_offsets"])
    while at < end:
        at += os.pwrite(weights, memoryview(noise[entry["dtype"]])[: end - at], at)


with ThreadPoolExecutor(a.threads) as pool:
    list(pool.map(fill, (entry for name, entry in entries.items() if name != "__metadata__")))
os.close(weights)

# The characters that byte-level tokenizers write bytes as, and names for the rest.
plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
letters = plain + [256 + i for i in range(256 - len(plain))]
if a.tokens:
    letter = {byte: chr(byte) for byte in plain} | {
        byte: chr(256 + i) for i, byte in enumerate(byte for byte in range(256) if byte not in plain)
    }
    lines = (line.split() for line in a.tokens.read_text().splitlines())
    vocabulary = {"".join(letter[byte] for byte in base64.b64decode(text)): int(i) for text, i in lines}
    vocabulary |= {f"word{i}": i for i in range(len(vocabulary), a.vocab - 2)}
else:
    vocabulary = {chr(letter): i for i, letter in enumerate(letters)} | {f"word{i}": i for i in range(256, a.vocab - 2)}
# Names that stand for themselves wherever they are in a text, however it is split.
named = [{"id": i, "content": f"<{i}>"} for i in range(256, a.vocab - 2)] if a.chat else []
if a.chat:
    vocabulary = {letter: i for letter, i in vocabulary.items() if i < 256}
template = "{% for message in messages %}<begin>{{ message.role }}: {{ message.content }}<end>{% endfor %}{% if add_generation_prompt %}<begin>assistant: {% endif %}"
specials = {"<begin>": a.vocab - 2, "<end>": a.vocab - 1}
byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
files = {
    "tokenizer.json": {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": byte_level,
        "added_tokens": [
            {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True} for text, i in specials.items()
        ] + [
            {**token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
            for token in named
        ],
        "post_processor": None, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": bool(a.tokens),
            "vocab": vocabulary | specials, "merges": [],
        },
    },
    "tokenizer_config.json": {"bos_token": "<begin>", "eos_token": "<end>", "add_bos_token": False} | ({"chat_template": template} if a.chat else {}),
    "config.json": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": a.hidden,
        "intermediate_size": a.intermediate, "num_hidden_layers": a.layers, "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads, "head_dim": a.head_dim, "vocab_size": a.vocab, "hidden_act": "silu",
        "max_position_embeddings": a.tokens_max, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    },
}
for name, content in files.items():
    (a.directory / name).write_text(json.dumps(content))
manifest = {
    "format": 1, "name": a.name, "fingerprint": "0" * 64, "dtype": {"bf16": "BF16", "fp8": "FP8_CHANNEL"}[a.dtype], "tp_size": 1, "tokens_max": a.tokens_max,
    "batch_max": None,
    "spec": {
        "family": "llama", "hidden": a.hidden, "intermediate": a.intermediate, "layers": a.layers, "heads": a.heads,
        "kv_heads": a.kv_heads, "head_dim": a.head_dim, "vocab": a.vocab, "tokens_max": a.tokens_max, "rms_eps": 1e-5,
        "rope": {"theta": 500000.0, "scaling": {"kind": "none"}}, "qkv_bias": False, "qk_norm": False,
        "tied_embeddings": False, "sliding_window": None,
    },
    "bos_token_id": a.vocab - 2, "eos_token_ids": [a.vocab - 1],
    "files": [
        {"name": path.name, "bytes": path.stat().st_size, "sha256": "0" * 64}
        for path in sorted(a.directory.iterdir()) if path.name != "manifest.json"
    ],
    "source": "random numbers", "source_stamp": "",
}
(a.directory / "manifest.json").write_text(json.dumps(manifest, indent=1))
print(f"{end / 1e9:.1f} GB of weights in {a.directory}")
