"""Transformers on torch, on the CPU: one JSON line of tokens per second.

Usage: peer_transformers.py MODEL_DIR --threads 2 --context 512 --steps 32 [--dtype float32]
MODEL_DIR is a directory made by `baton model-prep`: the very weights that Baton serves.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("model", type=Path)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--context", type=int, default=512)
parser.add_argument("--steps", type=int, default=32)
parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
parser.add_argument("--prefill", type=int, default=512)
parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="without instructions for BF16, f32 is quicker")
arguments = parser.parse_args()

import torch  # noqa: E402  (after the arguments, so that --help is quick)
from transformers import AutoModelForCausalLM  # noqa: E402

torch.set_num_threads(arguments.threads)


def load():
    """Transformers wants its own name for the weights; a directory of links gives it that."""
    with tempfile.TemporaryDirectory() as directory:
        links = Path(directory)
        (links / "config.json").symlink_to((arguments.model / "config.json").resolve())
        (links / "model.safetensors").symlink_to((arguments.model / "rank0.safetensors").resolve())
        return AutoModelForCausalLM.from_pretrained(links, dtype=getattr(torch, arguments.dtype)).eval()


model = load()
vocabulary = model.config.vocab_size
ids = lambda batch, length: torch.randint(3, vocabulary, (batch, length))  # noqa: E731
figures = {}

with torch.inference_mode():
    times = []
    for _ in range(5):
        prompt = ids(1, arguments.prefill)
        start = time.perf_counter()
        model(prompt, use_cache=True, logits_to_keep=1).logits.argmax(-1).tolist()
        times.append(time.perf_counter() - start)
    figures[f"prefill_{arguments.prefill}"] = arguments.prefill / statistics.median(times[1:])

    for batch in arguments.batches:
        cache = model(ids(batch, arguments.context), use_cache=True, logits_to_keep=1).past_key_values
        token = ids(batch, 1)
        times = []
        for _ in range(arguments.steps):
            start = time.perf_counter()
            out = model(token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            token.tolist()
            times.append(time.perf_counter() - start)
        figures[f"decode_{batch}"] = batch / statistics.median(times[2:])

print(json.dumps({"peer": f"transformers, torch {torch.__version__.split('+')[0]} {arguments.dtype}", **figures}))
