"""What the page costs requests: the same load with nobody looking, and with open pages asking what they show.

Usage: page.py --baton BATON --model DIR [--pages 1 8] [--concurrency 32] [--requests 3000] [--rounds 5] [--out FILE]

Starts `baton up` with fake executors, one context and one decode worker, and has each round run the load with no page and with each number of them,
the order turned by one from round to round. An open page is what the page's own code asks for once a second: /cluster and /requests of the Cluster view,
/metrics of the Load view, both as if looked at. Two views a page is more than a browser asks for, which shows one. Whoever asks runs on the same cores,
and is part of what is measured. The ratio of a round is against the run without pages in the same round.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from statistics import median

from processes import Processes

PATHS = ("/cluster", "/requests", "/metrics")
START_TIMEOUT_S = 60


class Pages:
    """So many open pages, while it is entered; how often they were answered, and with how many bytes. One that is not ends the benchmark."""

    def __init__(self, url, number):
        self.url, self.closed, self.answers, self.bytes, self.fault = url, threading.Event(), 0, 0, None
        self.threads = [threading.Thread(target=self.look, args=(index / max(number, 1),)) for index in range(number)]
        self.lock = threading.Lock()

    def look(self, offset):
        self.closed.wait(offset)
        while not self.closed.is_set():
            for path in PATHS:
                try:
                    with urllib.request.urlopen(self.url + path, timeout=10) as answer:
                        read = len(answer.read())
                except OSError as error:
                    self.fault = f"{path} was not answered: {error}"
                    return
                with self.lock:
                    self.answers, self.bytes = self.answers + 1, self.bytes + read
            self.closed.wait(1)

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.closed.set()
        for thread in self.threads:
            thread.join()
        if self.fault:
            sys.exit(self.fault)


def run(arguments, ready, url, pages):
    command = [arguments.baton, "bench", "--ready-file", ready, "--ignore-eos", "--concurrency", arguments.concurrency, "--requests", arguments.requests,
               "--warmup", arguments.concurrency, "--json"]
    with Pages(url, pages) as opened:
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"baton bench failed: {done.stderr}")
    report = json.loads(done.stdout)
    if report["failed"]:
        sys.exit(f"{report['failed']} requests failed")
    return {"pages": pages, "tokens_per_second": report["output_tokens_per_second"], "ttft_p50_ms": report["ttft_ms"]["p50"],
            "ttft_p99_ms": report["ttft_ms"]["p99"], "answers": opened.answers, "bytes": opened.bytes}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baton", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pages", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        processes = Processes(Path(directory))
        ready = Path(directory) / "ready.json"
        try:
            processes.start("up", [arguments.baton, "up", "--model", arguments.model, "--device", "fake", "--context-worker-count", 1, "--decode-worker-count", 1,
                                   "--api-server-port", 0, "--no-restart", "--start-timeout-s", START_TIMEOUT_S, "--ready-file", ready])
            while not ready.exists():
                processes.check_alive()
                time.sleep(0.05)
            url = json.loads(ready.read_text())["url"]
            numbers = [0, *arguments.pages]
            run(arguments, ready, url, 0)
            rows = []
            for round_ in range(arguments.rounds):
                turned = numbers[round_ % len(numbers):] + numbers[:round_ % len(numbers)]
                rows += [{"round": round_, **run(arguments, ready, url, pages)} for pages in turned]
        finally:
            processes.stop(60)
    print("| pages | tokens/s | of none, median (lowest–highest) | TTFT p50, ms | p99 | KB a page's second |\n|---|---|---|---|---|---|")
    alone = {row["round"]: row for row in rows if row["pages"] == 0}
    for pages in numbers:
        those = [row for row in rows if row["pages"] == pages]
        ratios = sorted(row["tokens_per_second"] / alone[row["round"]]["tokens_per_second"] for row in those)
        asked = sum(row["answers"] for row in those)
        size = sum(row["bytes"] for row in those) / asked * len(PATHS) / 1e3 if asked else 0
        print(f"| {pages} | {median(row['tokens_per_second'] for row in those):.0f} | {median(ratios):.3f} ({ratios[0]:.3f}–{ratios[-1]:.3f}) | "
              f"{median(row['ttft_p50_ms'] for row in those):.2f} | {median(row['ttft_p99_ms'] for row in those):.1f} | {size:.0f} |")
    if arguments.out:
        arguments.out.write_text(json.dumps(rows))


main()
