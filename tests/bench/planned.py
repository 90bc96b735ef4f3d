"""What `baton plan` predicts beside what processes do: the same arrivals, mix by mix and rate by rate.

Usage: planned.py --baton BATON --model DIR --device fake --worker-args "--fake-cost FILE" --mix NAME=GROUPS [--mix …] --load NAME [--rates …] [--seconds 10]

Takes the arguments of goodput.py. Each mix is started and measured as there; what its workers tell of themselves meanwhile, as `baton status --json`
prints it, is what the plan is of. Where goodput.py's `--api` promises something, so does the plan. At the end, the highest rate with 95% of each.
"""

import json
import subprocess
import sys
import urllib.request

import goodput

KEPT = 0.95
HEAD = ["mix", "requests/s", "attainment measured", "planned", "TTFT p50 measured", "planned", "p99 measured", "planned",
        "between tokens p50 measured", "planned", "p99 measured", "planned", "refused measured", "planned"]


def mix_of(groups):
    """As `baton plan` writes it: roles without flags."""
    return "+".join(group.split()[0] for group in groups.split("+"))


def planned(cluster, groups, name, rate, arguments):
    load = goodput.LOADS[name]
    trace = cluster.logs / "planned.jsonl"
    lines = goodput.arrivals(load, rate, arguments.seconds, f"{name} {rate} {arguments.seed}")
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = cluster.logs / "told.json"
    with urllib.request.urlopen(f"{cluster.url}/cluster", timeout=5) as answer:
        told.write_bytes(answer.read())
    promised = [] if "-ms" in arguments.api else ["--unpromised"]
    line = [arguments.baton, "plan", "--cost", told, "--mix", mix_of(groups), "--trace", trace, "--ttft-ms", str(load["ttft"]),
            "--itl-ms", str(load["itl"]), "--json", *promised]
    done = subprocess.run([str(word) for word in line], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the plan failed: {done.stderr}")
    return json.loads(done.stdout)["rows"][0]


def main(arguments):
    print("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD), flush=True)
    kept = {}
    for mix in arguments.mix:
        name, _, groups = mix.partition("=")
        cluster = goodput.Cluster(arguments, groups)
        try:
            cluster.bench([{"at": i / 8, "prompt_tokens": 64, "max_tokens": 8} for i in range(16)])
            for load in arguments.load:
                for rate in arguments.rates or goodput.LOADS[load]["rates"]:
                    own = goodput.measure(cluster, name, load, rate, arguments)
                    plan = planned(cluster, groups, load, rate, arguments)
                    for which, attainment in [("measured", own["attainment"]), ("planned", plan["attainment"])]:
                        rates = kept.setdefault((name, load, which), [])
                        if attainment >= KEPT:
                            rates.append(rate)
                    cells = [name, f"{rate:g}", f"{100 * own['attainment']:.1f}%", f"{100 * plan['attainment']:.1f}%"]
                    for times, digits in [("ttft", 0), ("itl", 1)]:
                        for at in ["p50", "p99"]:
                            cells += [f"{own[times][at]:.{digits}f}", f"{plan[times + '_ms'][at]:.{digits}f}"]
                    cells += [str(own["failed"]), str(plan["refused"] + plan["failed"])]
                    print("| " + " | ".join(cells) + " |", flush=True)
        finally:
            cluster.processes.stop()
    for (name, load, which), rates in kept.items():
        print(f"{name}, load {load}, {which}: 95% at {max(rates, default=0):g}/s")


if __name__ == "__main__":
    main(goodput.arguments_of(sys.argv[1:]))
