"""vLLM's CPU build, BF16, offline: one JSON line of tokens per second.

Usage: peer_vllm.py MODEL_DIR --threads 2 --context 512 --steps 32
The time of the prompt is taken out by generating one token and then `steps` more in a second run.
"""

import argparse
import json
import os
import random
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
arguments = parser.parse_args()

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{arguments.threads - 1}")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import vllm  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402


def main():
    with tempfile.TemporaryDirectory() as directory:
        links = Path(directory)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (links / name).symlink_to((arguments.model / name).resolve())
        (links / "model.safetensors").symlink_to((arguments.model / "rank0.safetensors").resolve())
        engine = LLM(
            model=str(links),
            dtype="bfloat16",
            max_model_len=arguments.context + arguments.steps + 64,
            max_num_seqs=max(arguments.batches),
            enable_prefix_caching=False,
        )

    vocabulary = json.loads((arguments.model / "config.json").read_text())["vocab_size"]
    prompts = lambda batch, length: [  # noqa: E731
        {"prompt_token_ids": [random.randrange(3, vocabulary) for _ in range(length)]} for _ in range(batch)
    ]

    def seconds(batch, length, tokens):
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        work = prompts(batch, length)
        start = time.perf_counter()
        engine.generate(work, sampling, use_tqdm=False)
        return time.perf_counter() - start

    figures = {}
    seconds(1, arguments.prefill, 1)
    figures[f"prefill_{arguments.prefill}"] = arguments.prefill / statistics.median(
        seconds(1, arguments.prefill, 1) for _ in range(4)
    )
    for batch in arguments.batches:
        first = statistics.median(seconds(batch, arguments.context, 1) for _ in range(3))
        whole = statistics.median(seconds(batch, arguments.context, 1 + arguments.steps) for _ in range(3))
        figures[f"decode_{batch}"] = batch * arguments.steps / (whole - first)
    print(json.dumps({"peer": f"vllm cpu {vllm.__version__}", **figures}))


if __name__ == "__main__":
    main()
