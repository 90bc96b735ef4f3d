"""Clusters whose workers have one GPU or two, on two GPUs: they must agree on what comes next.

Usage: gpu_ranks.py BATON NATS_SERVER   (`tests/gpu.sh` runs it; UCX with CUDA: BATON_UCX_LIB_DIR)

A model with random weights answers the same prompts in every cluster: workers that do both on one GPU, on two, and split ones
whose two sides have one and two GPUs, so that KV goes from each to each. Prompts are long enough for steps of many rows; then
rows are few. Log-probabilities of the likeliest tokens may differ by rounding. How much KV matters to this model is measured: two
prompts differ in their first half only, and what that changes must be far more than what is allowed.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

BATON, NATS = sys.argv[1:]
ROOT = Path(__file__).parent.parent
# BF16's rounding; other batch sizes take other paths. Measured: 0.0016.
DIFFERENCE_MAX = 0.003
EFFECT_MIN = 3 * DIFFERENCE_MAX # measured: 0.0142


def words(n, count):
    return " ".join(f"word {i * n % 97}" for i in range(count))


TAIL = words(13, 20)
PROMPTS = [words(3, 2), words(5, 40), words(7, 90), words(11, 300), words(17, 20) + TAIL, words(19, 20) + TAIL]

CLUSTERS = {
    "both on one GPU": "both:\n  - {count: 1, kv-mib: 2048, devices: cuda:0}\n",
    "both on two": "both:\n  - {count: 1, kv-mib: 2048, devices: cuda:0-1, tp-size: 2}\n",
    "context on one, decode on two": (
        "context:\n  - {count: 1, kv-mib: 2048, devices: cuda:0, share-devices: true}\n"
        "decode:\n  - {count: 1, kv-mib: 2048, devices: cuda:0-1, tp-size: 2, share-devices: true}\n"
    ),
    "context on two, decode on one": (
        "context:\n  - {count: 1, kv-mib: 2048, devices: cuda:0-1, tp-size: 2, share-devices: true}\n"
        "decode:\n  - {count: 1, kv-mib: 2048, devices: cuda:1, share-devices: true}\n"
    ),
    "context on two, decode on two": (
        "context:\n  - {count: 1, kv-mib: 2048, devices: cuda:0-1, tp-size: 2, share-devices: true}\n"
        "decode:\n  - {count: 1, kv-mib: 2048, devices: cuda:0-1, tp-size: 2, share-devices: true}\n"
    ),
}


def main():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        model = Path(directory) / "model"
        sizes = {"layers": 6, "hidden": 2048, "intermediate": 5632, "heads": 16, "kv-heads": 8, "vocab": 32000, "tokens-max": 8192}
        options = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
        subprocess.run([sys.executable, ROOT / "tests/bench/random_model.py", model, *options], check=True)
        answers, failed = {}, False
        for name, groups in CLUSTERS.items():
            try:
                answers[name] = ask(Path(directory), model, groups)
            except Exception as error:
                print(f"{name}: {error}")
                failed = True
                continue
            expected = answers.get("both on one GPU")
            effect = compare(answers[name][4:5], answers[name][5:6], least=1)[0]
            print(f"{name}: other first halves of a prompt change {effect:.4f}")
            failed |= not effect > EFFECT_MIN
            worst, text = compare(expected, answers[name]) if expected else (float("inf"), "nothing to compare with")
            print(f"{name}: worst difference {worst:.4f}; {text}", flush=True)
            failed |= not worst < DIFFERENCE_MAX
    sys.exit(failed)


def ask(directory, model, groups):
    """Each prompt's likeliest tokens, by position, in a cluster of these groups; all prompts at once, and then each alone."""
    (directory / "cluster.yaml").write_text(f"model: {model}\nnats: {{nats-server: {NATS}}}\n{groups}")
    ready, log = directory / "ready.json", directory / "up.log"
    ready.unlink(missing_ok=True)
    command = [BATON, "up", "--config", directory / "cluster.yaml", "--ready-file", ready, "--start-timeout-s", "100"]
    # One model at a time in memory: the arena takes what its share says of what is left.
    with log.open("w") as out:
        up = subprocess.Popen([str(word) for word in command], stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + 110
        while not ready.exists():
            if up.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"it did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.1)
        told = json.loads(ready.read_text())
        results = [None] * len(PROMPTS)

        def one(i):
            results[i] = tops(told, PROMPTS[i])

        threads = [threading.Thread(target=one, args=[i]) for i in range(len(PROMPTS))]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        if None in results:
            raise RuntimeError(f"a request failed:\n{log.read_text()[-3000:]}")
        return results + [tops(told, prompt) for prompt in PROMPTS]
    finally:
        up.send_signal(signal.SIGTERM)
        try:
            up.wait(30)
        except subprocess.TimeoutExpired:
            up.kill()


def tops(told, prompt):
    body = {"model": told["model"], "prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": 5}
    request = urllib.request.Request(
        told["url"] + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        logprobs = json.load(answer)["choices"][0]["logprobs"]
    return [sorted(top.values(), reverse=True) for top in logprobs["top_logprobs"]], logprobs["tokens"]


def compare(expected, found, least=2):
    """The worst difference of the likeliest tokens' log-probabilities, as long as the tokens before were the same."""
    worst, compared, same = 0.0, 0, 0
    for (a, a_tokens), (b, b_tokens) in zip(expected, found):
        for position, (x, y) in enumerate(zip(a, b)):
            if a_tokens[:position] != b_tokens[:position]:
                break
            # The best few, in order: tokens of the same text may hide each other among them.
            worst = max([worst] + [abs(p - q) for p, q in zip(x[:3], y[:3])])
            compared += 1
        same += a_tokens == b_tokens
    return (worst if compared >= len(expected) * least else float("inf")), f"{compared} positions, {same} of {len(expected)} texts the same"


main()
