"""A request alone: its first token and its hand-over, split and not, by the prompt's length.

Usage: lone.py --baton BATON --model DIR --mix both=both --mix split=context*1+decode*1 [--share] [--tokens 512 2048 8192 32768] [--count 12] [--out FILE]

Clusters are those of goodput.py, and so are all arguments but loads and rates. Each mix gets --count requests of each length, one after the
other. Hand-over is the time from the last step of the prompt to the release of its KV, on the context worker's clock: its mean, and the
upper end of the histogram's bucket that holds the median.
"""

import argparse
import json
import signal
import sys
import urllib.request
from pathlib import Path

import goodput

HEAD = ["tokens", "mix", "TTFT p50", "p90", "between tokens p50", "hand-over mean", "median at most"]
SECONDS_A_TOKEN = 60e-6


def handover(cluster):
    """Seconds, number, and the number up to each bound."""
    found = cluster.metrics("baton_kv_handover_seconds")
    total = {"_sum": 0.0, "_count": 0.0}
    buckets = {}
    for name, value in found.items():
        for part in total:
            if name.split("{")[0].endswith(part):
                total[part] += value
        if 'le="' in name:
            bound = float(name.split('le="')[1].split('"')[0].replace("+Inf", "inf"))
            buckets[bound] = buckets.get(bound, 0.0) + value
    return total["_sum"], total["_count"], buckets


def transports(cluster):
    """Over what, and how fast, by what the decode workers say of their peers."""
    with urllib.request.urlopen(f"{cluster.url}/cluster", timeout=5) as answer:
        peers = [peer for worker in json.load(answer)["workers"] for peer in worker["peers"]]
    return ", ".join(sorted({f"{peer.get('transport')} ({peer.get('gigabytes_per_second') or 0:.0f} GB/s)" for peer in peers}))


def measure(cluster, mix, tokens, count):
    pause = 0.3 + SECONDS_A_TOKEN * tokens
    before = handover(cluster)
    report = cluster.bench([{"at": i * pause, "prompt_tokens": tokens, "max_tokens": 16} for i in range(count)], seed=tokens)
    after = handover(cluster)
    seconds, number = after[0] - before[0], after[1] - before[1]
    median = next((bound for bound, upto in sorted(after[2].items()) if upto - before[2].get(bound, 0.0) >= number / 2), None)
    each = report["each_ttft_mean_longest_ms"]
    return {
        "mix": mix, "tokens": tokens, "failed": report["failed"], "ttft": goodput.quantiles(ttft for ttft, _, _ in each),
        "itl": goodput.quantiles(itl for _, itl, _ in each), "handovers": number,
        "handover_mean_ms": 1e3 * seconds / number if number else None, "handover_median_at_most_ms": 1e3 * median if number and median else None,
    }


def line(row):
    def told(value):
        return "–" if value is None else f"{value:.2f}"
    cells = [str(row["tokens"]), row["mix"], f"{row['ttft']['p50']:.1f}", f"{row['ttft']['p90']:.1f}", f"{row['itl']['p50']:.2f}",
             told(row["handover_mean_ms"]), told(row["handover_median_at_most_ms"])]
    return "| " + " | ".join(cells) + " |"


def main():
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False)
    own.add_argument("--tokens", type=int, nargs="*", default=[512, 2048, 8192, 32768])
    own.add_argument("--count", type=int, default=12)
    mine, rest = own.parse_known_args()
    arguments = goodput.arguments_of(rest)
    print("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD), flush=True)
    rows = []
    for mix in arguments.mix:
        name, _, groups = mix.partition("=")
        cluster = goodput.Cluster(arguments, groups)
        try:
            cluster.bench([{"at": i / 4, "prompt_tokens": 256, "max_tokens": 8} for i in range(8)])
            if moves := transports(cluster):
                print(f"{name}: KV over {moves}", flush=True)
            for tokens in mine.tokens:
                rows.append(measure(cluster, name, tokens, mine.count))
                print(line(rows[-1]), flush=True)
                if arguments.out:
                    Path(arguments.out).write_text(json.dumps(rows))
        finally:
            cluster.processes.stop()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    main()
