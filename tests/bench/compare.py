"""Baton's CPU executor beside its peers: interleaved runs on one machine, medians, ratios.

Usage: compare.py --model DIR --gguf BF16.gguf [--rounds 3] [--only NAME ...] [--prefill-only]

Every round runs each contestant once, in turn, so that a machine that drifts drifts under all of them. DIR is made by
`baton model-prep`, BF16.gguf by gguf_to_bf16.py; `tests/bench/README.md` says how to install the peers.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

parser = argparse.ArgumentParser()
parser.add_argument("--model", type=Path, required=True)
parser.add_argument("--gguf", type=Path, required=True)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--baton-bench", type=Path, help="the benchmark's executable, if it is already built")
parser.add_argument("--prefill-only", action="store_true", help="shorter rounds, for a machine that drifts within one")
parser.add_argument("--python", default=sys.executable, help="the Python that has the peers")
parser.add_argument("--vllm-python", help="the Python that has vLLM, if it is another")
parser.add_argument("--only", nargs="*", default=["baton", "transformers", "llama.cpp", "vllm"])
arguments = parser.parse_args()

BATCHES = [] if arguments.prefill_only else [1, 8, 32]
FIGURES = ["prefill_512", *(f"decode_{batch}" for batch in BATCHES)]


def run(command, **environment):
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=900, env={**os.environ, **environment}
    )
    if done.returncode != 0:
        sys.stderr.write(done.stderr[-2000:])
        raise SystemExit(f"{command[0]} failed")
    return done.stdout


def baton(**environment):
    command = [arguments.baton_bench, "--bench"] if arguments.baton_bench else [
        "cargo", "bench", "--quiet", "--manifest-path", ROOT / "Cargo.toml", "-p", "baton-cpu", "--bench", "cpu",
    ]
    prefill_only = {"BATON_BENCH_PREFILL_ONLY": "1"} if arguments.prefill_only else {}
    text = run(command, BATON_BENCH_MODEL=str(arguments.model), BATON_BENCH_THREADS=str(arguments.threads), **prefill_only, **environment)
    rate = lambda name: float(re.search(rf"^{name}\s.*?([\d.]+) tok/s", text, re.M)[1])  # noqa: E731
    bandwidth = re.search(r"^read bandwidth.*?([\d.]+) GB/s", text, re.M)[1]
    return {
        "peer": f"baton, {text.splitlines()[0]}",
        "prefill_512": rate("prefill 512"),
        **{f"decode_{batch}": rate(f"decode b={batch}") for batch in BATCHES},
        "bandwidth": float(bandwidth),
    }


def peer(script, model, python, *more):
    text = run([python, HERE / script, model, "--threads", arguments.threads, "--batches", *BATCHES, *more])
    return json.loads(text.splitlines()[-1])


CONTESTANTS = {
    "baton": baton,
    "baton-portable": lambda: baton(BATON_CPU_KERNEL="portable"),
    "transformers": lambda: peer("peer_transformers.py", arguments.model, arguments.python),
    "transformers-f32": lambda: peer("peer_transformers.py", arguments.model, arguments.python, "--dtype", "float32"),
    "llama.cpp": lambda: peer("peer_llama_cpp.py", arguments.gguf, arguments.python),
    "vllm": lambda: peer("peer_vllm.py", arguments.model, arguments.vllm_python or arguments.python),
}

results = {name: [] for name in arguments.only}
for round_number in range(arguments.rounds):
    for name in arguments.only:
        figures = CONTESTANTS[name]()
        results[name].append(figures)
        print(f"round {round_number + 1}: {json.dumps(figures)}", file=sys.stderr, flush=True)

median = lambda name, figure: statistics.median(run[figure] for run in results[name])  # noqa: E731
print("| tokens/s, median of", arguments.rounds, "rounds |", " | ".join(FIGURES), "|")
print("|---|" + "---|" * len(FIGURES))
for name, runs in results.items():
    cells = []
    for figure in FIGURES:
        values = sorted(run[figure] for run in runs)
        cells.append(f"{statistics.median(values):.0f} ({values[0]:.0f}–{values[-1]:.0f})")
    print(f"| {runs[0]['peer']} |", " | ".join(cells), "|")
others = [name for name in results if not name.startswith("baton")]
if "baton" in results and others:
    ratios = [f"{median('baton', f) / max(median(name, f) for name in others):.2f}" for f in FIGURES]
    print("| baton / best peer |", " | ".join(ratios), "|")
    if "llama.cpp" in results:
        ratios = [f"{median('baton', f) / median('llama.cpp', f):.2f}" for f in FIGURES]
        print("| baton / llama.cpp |", " | ".join(ratios), "|")
