"""What `baton plan` predicts of mixes of workers under goodput.py's loads: a table, and for each mix and load the highest rate with 95%.

Usage: mixes.py --baton BATON --cost FILE --plan "--kv-bytes-per-token 131072 --kv-mib 81920 --link-gbps 1600" --load A [--load …] --mix both*4 [--mix …] [--seconds 30]

No worker is started. Arrivals and lengths are those of goodput.py with the same load, rate, seconds and seed; both times are promised. With `--below`, all mixes once
more at parts of the highest rate that any of them keeps, and whether the first of them is anywhere more than two points below the best.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import goodput

KEPT = 0.95

# With --below: parts of the highest rate that any mix keeps, and by how much the first mix may be below the best there.
PARTS = [0.25, 0.5, 0.75, 0.9]
BELOW_MOST = 0.02

HEAD = ["load", "requests/s", "mix", "attainment", "goodput/s", "TTFT p50", "p99", "between tokens p50", "p99", "refused"]

# Up to about twice of what the best mix keeps.
RATES = {
    "A": [36, 48, 54, 57, 60, 66, 80, 110],
    "B": [6, 8, 10, 11, 12, 13, 16, 24],
    "C": [30, 40, 60, 80, 85, 100, 120, 160],
    "D": [20, 30, 40, 50, 60, 70, 90, 120],
}


def plan(arguments, name, rate, mix):
    load = goodput.LOADS[name]
    lines = goodput.arrivals(load, rate, arguments.seconds, f"{name} {rate} {arguments.seed}")
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as trace:
        trace.write("".join(json.dumps(line) + "\n" for line in lines))
        trace.flush()
        done = subprocess.run(
            [arguments.baton, "plan", "--cost", arguments.cost, *arguments.plan.split(), "--trace", trace.name, "--mix", mix,
             "--ttft-ms", str(load["ttft"]), "--itl-ms", str(load["itl"]), "--json"],
            capture_output=True, text=True,
        )
    if done.returncode:
        sys.exit(f"the plan failed: {done.stderr}")
    row = json.loads(done.stdout)["rows"][0]
    return {**row, "load": name, "rate": rate, "goodput": row["attainment"] * row["requests"] / arguments.seconds}


def line(row):
    cells = [row["load"], f"{row['rate']:g}", row["mix"], f"{100 * row['attainment']:.0f}%", f"{row['goodput']:.1f}",
             f"{row['ttft_ms']['p50']:.0f}", f"{row['ttft_ms']['p99']:.0f}", f"{row['itl_ms']['p50']:.2f}", f"{row['itl_ms']['p99']:.2f}", str(row["refused"])]
    return "| " + " | ".join(cells) + " |"


def kept(rows):
    """The highest rate with 95% there and at all lower ones."""
    best = 0
    for row in sorted(rows, key=lambda row: row["rate"]):
        if row["attainment"] < KEPT:
            break
        best = row["rate"]
    return best


def below(arguments, name, rows):
    """The load once more at parts of the highest rate that a mix keeps, with a verdict on the first mix."""
    best = max(kept([row for row in rows if row["mix"] == mix]) for mix in arguments.mix)
    worst, more = 0, []
    for part in PARTS:
        at = [plan(arguments, name, part * best, mix) for mix in arguments.mix]
        for row in at:
            print(line(row), flush=True)
        first, others = at[0], max(row["attainment"] for row in at)
        worst = max(worst, others - first["attainment"])
        more += at
    verdict = "never" if worst <= BELOW_MOST else "SOMEWHERE"
    print(f"{name}, {arguments.mix[0]}: {verdict} below the best mix by more than {100 * BELOW_MOST:g} points at {', '.join(f'{100 * part:g}%' for part in PARTS)} of {best:g}/s (at most {100 * worst:.1f})")
    return more


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baton", type=Path, required=True)
    parser.add_argument("--cost", type=Path, required=True, help="what steps cost, as `baton plan --cost` takes it")
    parser.add_argument("--plan", default="", help="more for `baton plan`, one string")
    parser.add_argument("--load", action="append", default=[], choices=sorted(RATES))
    parser.add_argument("--mix", action="append", default=[])
    parser.add_argument("--rates", type=float, nargs="*", help="instead of each load's own")
    parser.add_argument("--below", action="store_true", help="the first mix beside the others at parts of the best rate")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="all figures as JSON")
    arguments = parser.parse_args()
    print("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD), flush=True)
    rows = []
    for name in arguments.load:
        for mix in arguments.mix:
            for rate in arguments.rates or RATES[name]:
                rows.append(plan(arguments, name, rate, mix))
                print(line(rows[-1]), flush=True)
    of_load = {name: [row for row in rows if row["load"] == name] for name in arguments.load}
    if arguments.below:
        for name in arguments.load:
            rows += below(arguments, name, of_load[name])
    if arguments.out:
        arguments.out.write_text(json.dumps(rows))
    for name in arguments.load:
        for mix in arguments.mix:
            of_it = [row for row in of_load[name] if row["mix"] == mix]
            print(f"{name}, {mix}: 95% at {kept(of_it):g}/s, at most {max(row['goodput'] for row in of_it):.1f}/s in time, {of_it[-1]['goodput']:.1f}/s at {of_it[-1]['rate']:g}/s")


if __name__ == "__main__":
    main()
