"""Goodput: the share of requests that get the service level they were promised, by the rate at which they come.

Usage: goodput.py --baton BATON --model DIR --mix NAME=GROUPS [--mix …] --load NAME [--load …] [--rates …] [--seconds 10] [--out FILE] [--plots DIR]

A mix is a cluster: groups divided by `+`, each `ROLE*COUNT` with worker flags behind it: `both*4 --step-tokens 512 --itl-ms 0`, or
`context*3+decode*1`. Each worker has a GPU of its own, in order (`--gpus`); with `--share` all of them have the first. `--api "FLAGS"` is for every
API server: `--api "--ttft-ms 200 --itl-ms 10"`. Mixes run one after the other, loads and rates within.

Loads (a rate is in requests a second, for the whole cluster):

    A   2,048 tokens in, 128 out; first token within 200 ms, mean time between tokens within 10 ms
    B   8,192 in, 256 out; 1,000 ms, 10 ms
    C   512 in, 512 out; 150 ms, 8 ms
    D   bursts: lengths are log-normal (median 1,024 in, 128 out), arrivals come in bursts of two seconds at three times the rate; 500 ms, 10 ms
    S   64 in, 32 out; 1,000 ms, 100 ms: for SmolLM2 on a CPU

Arrivals and lengths are the same for every mix. What failed or was refused did not get its level. `baton bench --trace` makes the load.
JSON after each rate, with each request's times; with --plots (needs nothing but Python) two SVGs for each load: attainment over rate, and first token and time
between tokens, p50 and p99; and their whole distributions at each rate.
"""

import argparse
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
import zlib
from pathlib import Path

import goodput_plots
from processes import Processes, free_port

LOADS = {
    "A": dict(prompt=2048, output=128, ttft=200, itl=10, rates=[36, 40, 48, 51, 54, 57, 60]),
    "B": dict(prompt=8192, output=256, ttft=1000, itl=10, rates=[6, 8, 10, 11, 12]),
    "C": dict(prompt=512, output=512, ttft=150, itl=8, rates=[40, 60, 80, 100]),
    "D": dict(prompt=1024, output=128, ttft=500, itl=10, bursts=True, rates=[20, 30, 40, 50, 60]),
    "S": dict(prompt=64, output=32, ttft=1000, itl=100, rates=[1, 2, 4, 6, 8]),
}
BURST_SECONDS, BURST_PART, BURST_FACTOR = 2.0, 0.2, 3.0
LOG_SIGMA = 0.8


def arrivals(load, rate, seconds, seed):
    """A request a line, as `baton bench --trace` reads them."""
    dice = random.Random(seed)
    times, at = [], 0.0
    # In bursts a part of the time has a multiple of the rate, the rest what is left of it.
    calm = (1 - BURST_PART * BURST_FACTOR) / (1 - BURST_PART)
    while True:
        factor = 1.0
        if load.get("bursts"):
            period = BURST_SECONDS / BURST_PART
            factor = BURST_FACTOR if at % period < BURST_SECONDS else calm
        at += dice.expovariate(rate * factor)
        if at >= seconds:
            break
        times.append(at)
    for at in times or [0.0]:
        scale = math.exp(dice.gauss(0, LOG_SIGMA)) if load.get("bursts") else 1.0
        other = math.exp(dice.gauss(0, LOG_SIGMA)) if load.get("bursts") else 1.0
        prompt = max(16, min(8192, round(load["prompt"] * scale)))
        output = max(2, min(1024, round(load["output"] * other)))
        yield {"at": round(at, 6), "prompt_tokens": prompt, "max_tokens": output}


class Cluster:
    """One mix, running."""

    def __init__(self, arguments, groups):
        self.arguments = arguments
        self.logs = Path(tempfile.mkdtemp(prefix="baton-goodput-", dir=arguments.logs))
        self.processes = Processes(self.logs)
        bus = f"nats://127.0.0.1:{free_port()}"
        self.processes.start("nats", [arguments.nats_server, "-a", "127.0.0.1", "-p", bus.rsplit(":", 1)[1]])
        common = ["--request-plane-uri", bus]
        self.workers, self.contexts, self.decoders = 0, 0, 0
        for group in groups.split("+"):
            what, *flags = group.split()
            role, _, count = what.partition("*")
            for _ in range(int(count or 1)):
                gpu = arguments.gpus[0 if arguments.share else self.workers % len(arguments.gpus)]
                self.processes.start(
                    f"{role}-{self.workers}",
                    [arguments.baton, "worker", *common, "--role", role, "--worker-name", f"{role}-{self.workers}", "--model",
                     arguments.model, "--device", arguments.device, *arguments.worker_args.split(), *flags],
                    **({"CUDA_VISIBLE_DEVICES": gpu} if arguments.device.startswith("cuda") else {}),
                )
                self.workers += 1
                self.contexts += role != "decode"
                self.decoders += role != "context"
        port = free_port()
        self.processes.start(
            "api",
            [arguments.baton, "api-server", *common, "--api-server-port", port, "--tokenizer", arguments.model, *arguments.api.split()],
        )
        self.url = f"http://127.0.0.1:{port}"
        try:
            self.wait_until_up(arguments)
        except BaseException:
            self.processes.stop()
            raise

    def wait_until_up(self, arguments):
        end = time.monotonic() + arguments.start_timeout
        while not self.is_up():
            self.processes.check_alive()
            if time.monotonic() > end:
                sys.exit(f"the cluster did not come up; its logs are in {self.logs}")
            time.sleep(0.1)

    def is_up(self):
        try:
            with urllib.request.urlopen(f"{self.url}/cluster", timeout=2) as answer:
                found = json.load(answer)["workers"]
        except OSError:
            return False
        serving = [worker for worker in found if worker["state"] == "serving"]
        # Every decoder reads from every context worker but itself.
        ready = sum(peer["state"] == "ready" for worker in found for peer in worker["peers"])
        both = self.contexts + self.decoders - self.workers
        return len(serving) == self.workers and ready >= self.contexts * self.decoders - both

    def metrics(self, prefix):
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line.startswith(prefix))}

    def bench(self, trace, seed=0):
        file = self.logs / "trace.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in trace))
        done = subprocess.run(
            [str(self.arguments.baton), "bench", "--url", self.url, "--trace", str(file), "--concurrency", "2048", "--ignore-eos", "--json", "--each",
             "--seed", str(seed), "--timeout-s", str(self.arguments.timeout_s)],
            capture_output=True, text=True,
        )
        if not done.stdout:
            sys.exit(f"the load failed: {done.stderr}")
        return json.loads(done.stdout)


def measure(cluster, mix, name, rate, arguments):
    load = LOADS[name]
    trace = list(arrivals(load, rate, arguments.seconds, f"{name} {rate} {arguments.seed}"))
    # Prompts of their own each time: none has its prefix cached.
    report = cluster.bench(trace, zlib.crc32(f"{name} {rate} {arguments.seed}".encode()))
    each = report["each_ttft_mean_longest_ms"]
    good = sum(ttft <= load["ttft"] and itl <= load["itl"] for ttft, itl, _ in each)
    return {
        "mix": mix, "load": name, "rate": rate, "requests": len(trace), "seconds": arguments.seconds, "failed": report["failed"],
        "failures": report["failures"], "attainment": good / len(trace), "goodput": good / arguments.seconds,
        "ttft": report["ttft_ms"], "itl": quantiles(itl for _, itl, _ in each), "pause": report["longest_pause_ms"],
        "step_cost_error": max(cluster.metrics("baton_worker_step_cost_error{").values(), default=None),
        "each": each,
    }


def quantiles(values):
    values = sorted(values) or [0]
    return {name: values[min(int(len(values) * q), len(values) - 1)] for name, q in [("p50", 0.5), ("p90", 0.9), ("p99", 0.99)]}


HEAD = ["load", "requests/s", "mix", "attainment", "goodput/s", "TTFT p50", "p99", "between tokens p50", "p99", "failed", "cost error"]


def line(row):
    cells = [row["load"], f"{row['rate']:g}", row["mix"], f"{100 * row['attainment']:.0f}%", f"{row['goodput']:.1f}", f"{row['ttft']['p50']:.0f}",
             f"{row['ttft']['p99']:.0f}", f"{row['itl']['p50']:.2f}", f"{row['itl']['p99']:.2f}", str(row["failed"]),
             "" if row["step_cost_error"] is None else f"{100 * row['step_cost_error']:.0f}%"]
    return "| " + " | ".join(cells) + " |"


def arguments_of(line):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baton", type=Path)
    parser.add_argument("--model", type=Path, help="a model directory, as model-prep or random_model.py makes it")
    parser.add_argument("--nats-server", default=shutil.which("nats-server"))
    parser.add_argument("--device", default="cuda:0", help="of each worker: cuda:0 is the one GPU that it sees")
    parser.add_argument("--gpus", nargs="*", default=["0", "1", "2", "3"], help="by CUDA_VISIBLE_DEVICES")
    parser.add_argument("--share", action="store_true", help="all workers on the first GPU")
    parser.add_argument("--mix", action="append", default=[], help="NAME=GROUPS; may be given several times")
    parser.add_argument("--load", action="append", default=[], choices=LOADS)
    parser.add_argument("--rates", type=float, nargs="*", help="instead of each load's own")
    parser.add_argument("--seconds", type=float, default=10, help="how long requests come at each rate")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--worker-args", default="", help="for every worker, one string")
    parser.add_argument("--api", default="", help="for every API server, one string")
    parser.add_argument("--start-timeout", type=float, default=180)
    parser.add_argument("--timeout-s", type=int, default=60, help="a request is given up, and has failed, after this")
    parser.add_argument("--limit-s", type=float, default=math.inf, help="rates that would not be done by then are left out")
    parser.add_argument("--out", type=Path, help="all figures as JSON, written after each rate; with --mix left out, read")
    parser.add_argument("--plots", type=Path, help="folder for the SVGs")
    parser.add_argument("--logs", type=Path, help="where logs go")
    return parser.parse_args(line)


def main(arguments):
    started, rows = time.monotonic(), []
    if arguments.out and arguments.out.exists() and not arguments.mix:
        rows = json.loads(arguments.out.read_text())
    print("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD), flush=True)
    for mix in arguments.mix:
        name, _, groups = mix.partition("=")
        cluster = Cluster(arguments, groups)
        try:
            cluster.bench([{"at": i / 8, "prompt_tokens": 256, "max_tokens": 8} for i in range(16)])
            for load in arguments.load:
                for rate in arguments.rates or LOADS[load]["rates"]:
                    if time.monotonic() - started + 1.5 * arguments.seconds > arguments.limit_s:
                        print(f"no time for {name} at {rate:g}/s", flush=True)
                        continue
                    rows.append(measure(cluster, name, load, rate, arguments))
                    print(line(rows[-1]), flush=True)
                    if arguments.out:
                        arguments.out.write_text(json.dumps(rows))
        finally:
            cluster.processes.stop()
    for load in dict.fromkeys(row["load"] for row in rows):
        if arguments.plots:
            arguments.plots.mkdir(parents=True, exist_ok=True)
            of_it = [row for row in rows if row["load"] == load]
            goodput_plots.over_rate(of_it, LOADS[load], arguments.plots / f"goodput-{load}.svg")
            goodput_plots.distributions(of_it, LOADS[load], arguments.plots / f"goodput-{load}-distributions.svg")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    main(arguments_of(sys.argv[1:]))
