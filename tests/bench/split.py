"""Prefill and decode split over two GPUs, against two workers that do both on the same two.

Usage: split.py --baton BATON --model DIR [--rates 4 8 12 16 20 24] [--seconds 10] [--device cuda|cpu] [--out FILE] [--limit-s SECONDS]

Starts both deployments at once, each with an API server of its own (idle workers take memory and nothing else), and loads
them in turns: at each rate requests arrive at random times (Poisson, the same seed for both), 2,048 tokens in and 128 out.
Prints time to first token, time between tokens, goodput, and for the split deployment how long the hand-over took: from the
end of the prompt's last step to the moment when nothing but the decode worker's engine stands before the first step there.

Every worker sees its own GPU alone. `baton bench` makes the load; the hand-over's times are from the workers' logs, whose
clock is this host's.
"""

import argparse
import datetime
import json
import math
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from processes import Processes, free_port

parser = argparse.ArgumentParser()
parser.add_argument("--baton", type=Path, required=True)
parser.add_argument("--model", type=Path, required=True, help="a model directory, as model-prep or random_model.py makes it")
parser.add_argument("--nats-server", default=shutil.which("nats-server"))
parser.add_argument("--device", default="cuda", choices=["cuda", "cpu", "fake"])
parser.add_argument("--gpus", nargs=2, default=["0", "1"], help="the two GPUs, by CUDA_VISIBLE_DEVICES")
parser.add_argument("--only", choices=["split", "both"], help="one deployment alone")
parser.add_argument("--rates", type=float, nargs="*", default=[0, 4, 8, 12, 16, 20, 24], help="0: one short request at a time")
parser.add_argument("--seconds", type=float, default=10, help="how long requests arrive at each rate")
parser.add_argument("--prompt", type=int, default=2048)
parser.add_argument("--output", type=int, default=128)
parser.add_argument("--ttft-ms", type=float, default=200, help="goodput: first token within this")
parser.add_argument("--itl-ms", type=float, default=10, help="goodput: mean time between a request's tokens within this")
parser.add_argument("--pause-ms", type=float, default=50, help="goodput, stricter: no pause longer than this")
parser.add_argument("--rate-gbps", type=float, default=390, help="peer-copy rate, for the hand-over's floor")
parser.add_argument("--start-timeout", type=float, default=120)
parser.add_argument("--timeout-s", type=int, default=60, help="a request is given up, and has failed, after this")
parser.add_argument("--limit-s", type=float, default=math.inf, help="rates that would not be done by then are left out")
parser.add_argument("--worker-args", default="", help="for every worker, one string")
parser.add_argument("--out", type=Path, help="all figures as JSON, written after each rate")
parser.add_argument("--logs", type=Path, help="where logs go")
arguments = parser.parse_args()
started = time.monotonic()

logs = arguments.logs or Path(tempfile.mkdtemp(prefix="baton-split-"))
logs.mkdir(parents=True, exist_ok=True)
processes = Processes(logs)


def cluster(url):
    try:
        with urllib.request.urlopen(f"{url}/cluster", timeout=2) as answer:
            return json.load(answer)
    except OSError:
        return {}


def is_up(url, workers, peers):
    found = cluster(url)
    ready = [peer for worker in found.get("workers", []) for peer in worker["peers"] if peer["state"] == "ready"]
    serving = [worker for worker in found.get("workers", []) if worker["state"] == "serving"]
    return len(serving) == workers and len(ready) >= peers


def start_all():
    bus = f"nats://127.0.0.1:{free_port()}"
    processes.start("nats", [arguments.nats_server, "-a", "127.0.0.1", "-p", bus.rsplit(":", 1)[1]])
    deployments = {
        "split": [("context", "context", 0), ("decode", "decode", 1)],
        "both": [("both-0", "both", 0), ("both-1", "both", 1)],
    }
    urls = {}
    device = "cuda:0" if arguments.device == "cuda" else arguments.device
    for deployment, workers in deployments.items():
        if arguments.only not in (None, deployment):
            continue
        common = ["--log-format", "json", "--cluster", deployment, "--request-plane-uri", bus]
        for name, role, gpu in workers:
            processes.start(
                f"{deployment}-{name}",
                [arguments.baton, "worker", *common, "--role", role, "--worker-name", name, "--model", arguments.model,
                 "--device", device, *arguments.worker_args.split()],
                CUDA_VISIBLE_DEVICES=arguments.gpus[gpu], RUST_LOG="info,baton_worker=debug,baton_transfer=debug",
            )
        port = free_port()
        processes.start(
            f"{deployment}-api",
            [arguments.baton, "api-server", *common, "--api-server-port", port, "--tokenizer", arguments.model],
        )
        urls[deployment] = f"http://127.0.0.1:{port}"
    end = time.monotonic() + arguments.start_timeout
    for deployment, url in urls.items():
        peers = 1 if deployment == "split" else 0
        while not is_up(url, len(deployments[deployment]), peers):
            processes.check_alive()
            if time.monotonic() > end:
                sys.exit(f"{deployment} did not come up; its logs are in {logs}")
            time.sleep(0.1)
        status = subprocess.run([arguments.baton, "status", "--url", url], capture_output=True, text=True)
        print(status.stdout, flush=True)
    return urls


def bench(url, *options):
    done = subprocess.run(
        [str(part) for part in [
            arguments.baton, "bench", "--url", url, "--prompt-tokens", arguments.prompt,
            *([] if "--max-tokens" in options else ["--max-tokens", arguments.output]), "--ignore-eos", "--json", "--each",
            "--timeout-s", arguments.timeout_s,
            *options,
        ]],
        capture_output=True, text=True,
    )
    if not done.stdout:
        sys.exit(f"the load failed: {done.stderr}")
    return json.loads(done.stdout)


def share(each, is_good, requests):
    return sum(map(is_good, each)) / requests


def measure(urls, rows):
    for url in urls.values():
        bench(url, "--requests", 16, "--concurrency", 4, "--seed", 99)
    for number, rate in enumerate(arguments.rates):
        # Half as long again, for answers under way and for queues at rates that are too high.
        if time.monotonic() - started + len(urls) * arguments.seconds * 1.5 > arguments.limit_s:
            print(f"no time for {rate:g} requests/s and what follows", flush=True)
            break
        for deployment, url in urls.items():
            requests = max(round(rate * arguments.seconds), 1)
            load = ["--request-rate", rate, "--concurrency", 1024]
            if rate == 0:
                requests, load = 12, ["--max-tokens", 16]
            began = time.time()
            report = bench(url, "--requests", requests, "--seed", 1000 + number, *load)
            each = report["each_ttft_mean_longest_ms"]
            row = {
                "rate": rate, "deployment": deployment, "began": began, "ended": time.time(), "requests": requests,
                "failed": report["failed"], "failures": report["failures"],
                "tokens_per_second": report["output_tokens_per_second"], "seconds": report["seconds"],
                "ttft": report["ttft_ms"], "itl": report["between_chunks_ms"], "pause": report["longest_pause_ms"],
                "goodput": share(each, lambda r: r[0] <= arguments.ttft_ms and r[1] <= arguments.itl_ms, requests),
                "strict": share(each, lambda r: r[0] <= arguments.ttft_ms and r[2] <= arguments.pause_ms, requests),
                "each": each,
            }
            rows.append(row)
            print_row(row)
            if row["failures"]:
                print("   ", row["failures"], flush=True)
            if arguments.out:
                arguments.out.write_text(json.dumps(rows))


HEAD = ["requests/s", "deployment", "TTFT p50", "p99", "between tokens p50", "p99", "longest pause p50", "tokens/s",
        "goodput", "without pauses"]


def print_row(row):
    cells = [
        f"{row['rate']:g}", row["deployment"], f"{row['ttft']['p50']:.0f}", f"{row['ttft']['p99']:.0f}",
        f"{row['itl']['p50']:.2f}", f"{row['itl']['p99']:.1f}", f"{row['pause']['p50']:.0f}",
        f"{row['tokens_per_second']:.0f}", f"{100 * row['goodput']:.0f}%", f"{100 * row['strict']:.0f}%",
    ]
    print("| " + " | ".join(cells) + " |", flush=True)


def log_lines(name):
    for line in open(logs / f"{name}.log"):
        if line.startswith("{"):
            entry = json.loads(line)
            at = datetime.datetime.fromisoformat(entry["timestamp"].replace("Z", "+00:00")).timestamp()
            yield at, entry["fields"]


def quantiles(values):
    values = sorted(values)
    return {name: values[min(int(len(values) * q), len(values) - 1)] for name, q in
            [("p50", 0.5), ("p90", 0.9), ("p99", 0.99)]}


def hand_overs(rows):
    """Per request: when its prompt was done, when the decode worker had read it, when its first step was next."""
    done, read, begun = {}, {}, {}
    for at, fields in log_lines("split-context"):
        if fields["message"] in ("prefilled", "prefilled, and was streamed"):
            done[fields["request"]] = at - int(fields["since_last_step_us"]) / 1e6
    for at, fields in log_lines("split-decode"):
        if fields["message"] == "read and released":
            read[fields["request"]] = fields
        if fields["message"] == "its next step is the first here":
            begun[fields["request"]] = at
    print("\nhand-over, ms: rate, requests, from the prompt's last step to the first decode step p50/p90/p99, of it reading, "
          "reading and release, GB/s while reading, share within bytes/rate + 2 ms")
    for row in [row for row in rows if row["deployment"] == "split"]:
        mine = [r for r in begun if r in done and r in read and row["began"] <= done[r] <= row["ended"]]
        if not mine:
            continue
        total = {r: (begun[r] - done[r]) * 1e3 for r in mine}
        floor = {r: read[r]["bytes"] / arguments.rate_gbps / 1e6 for r in mine}
        text = lambda q: "/".join(f"{q[p]:.2f}" for p in ("p50", "p90", "p99"))  # noqa: E731
        row["hand_over_ms"] = quantiles(total.values())
        row["read_ms"] = quantiles([read[r]["read_us"] / 1e3 for r in mine])
        row["release_ms"] = quantiles([read[r]["seconds"] * 1e3 for r in mine])
        # A few bytes can be read in less time than the clocks of two cores agree about.
        row["read_gbps"] = quantiles([read[r]["bytes"] / max(read[r]["read_us"], 1) / 1e3 for r in mine])
        row["in_time"] = sum(total[r] <= floor[r] + 2 for r in mine) / len(mine)
        ranges = quantiles([read[r]["ranges"] for r in mine])
        print(f"{row['rate']:g}: {len(mine)}, {text(row['hand_over_ms'])}, {text(row['read_ms'])}, {text(row['release_ms'])}, "
              f"{row['read_gbps']['p50']:.0f} GB/s, ranges {ranges['p50']}/{ranges['p99']}, {100 * row['in_time']:.0f}%")


def interrupted(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what follows stops the workers and prints what is known
    sys.exit("stopped")


signal.signal(signal.SIGTERM, interrupted)
rows = []
try:
    urls = start_all()
    print(f"up after {time.monotonic() - started:.0f} s")
    print("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD), flush=True)
    measure(urls, rows)
    processes.check_alive()
finally:
    processes.stop(5)
    if any(row["deployment"] == "split" for row in rows):
        hand_overs(rows)
    if arguments.out:
        arguments.out.write_text(json.dumps(rows))
