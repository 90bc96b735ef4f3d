"""vLLM's CPU build, BF16, offline: one JSON line of tokens per second.

Usage: peer_vllm.py MODEL_DIR --threads 2 --context 512 --steps 32
Decode counts the steps between the last request's first token and the first request's end.
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
batch_max = max(arguments.batches, default=1)

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
            max_model_len=arguments.context + arguments.steps + batch_max + 64,
            max_num_seqs=batch_max,
            enable_prefix_caching=False,
        )

    vocabulary = json.loads((arguments.model / "config.json").read_text())["vocab_size"]
    prompts = lambda batch, length: [  # noqa: E731
        {"prompt_token_ids": [random.randrange(3, vocabulary) for _ in range(length)]} for _ in range(batch)
    ]

    def seconds(batch, length, tokens):
        """Of a prompt's step, or of the steps between the last first token and the first end, and their tokens."""
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        core, counts, produced, began = engine.llm_engine, {}, 0, None
        start = time.perf_counter()
        for index, prompt in enumerate(prompts(batch, length)):
            core.add_request(f"{start}-{index}", prompt, sampling)
        while core.has_unfinished_requests():
            for output in core.step():
                new = len(output.outputs[0].token_ids) - counts.get(output.request_id, 0)
                counts[output.request_id] = counts.get(output.request_id, 0) + new
                if began and max(counts.values()) <= tokens - 1:
                    produced += new
                    ended = time.perf_counter()
            if began is None and len(counts) == batch:
                began = time.perf_counter()
        return (ended - began, produced) if produced else (time.perf_counter() - start, tokens)

    figures = {}
    seconds(1, arguments.prefill, 1)
    figures[f"prefill_{arguments.prefill}"] = arguments.prefill / statistics.median(
        seconds(1, arguments.prefill, 1)[0] for _ in range(4)
    )
    for batch in arguments.batches:
        # Requests that were admitted first are some steps ahead when the last one starts.
        tokens = arguments.steps + batch
        seconds(batch, arguments.context, tokens)
        took, produced = seconds(batch, arguments.context, tokens)
        figures[f"decode_{batch}"] = produced / took
    print(json.dumps({"peer": f"vllm cpu {vllm.__version__}", **figures}))


if __name__ == "__main__":
    main()
