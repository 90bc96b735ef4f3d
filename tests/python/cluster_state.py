"""What the cluster holds, as /cluster shows it."""

import json
import time
import urllib.request

HELD = ("running", "waiting", "leased", "pulling", "blocks_used", "blocks_quarantined")


def held(url: str) -> dict:
    """Everything some worker holds: `{"decode-0": {"running": 1}}`."""
    with urllib.request.urlopen(url + "/cluster", timeout=10) as answer:
        workers = json.load(answer)["workers"]
    assert workers, "no workers"
    loads = {worker["worker"]: {key: worker["load"][key] for key in HELD if worker["load"][key]} for worker in workers}
    return {name: load for name, load in loads.items() if load}


def wait_until(what: str, look, deadline_s: float = 30.0):
    """Looks until `look` gives something true."""
    deadline = time.monotonic() + deadline_s
    while not (seen := look()):
        assert time.monotonic() < deadline, f"waited {deadline_s} s for {what}"
        time.sleep(0.02)
    return seen


def wait_until_empty(url: str):
    wait_until("the cluster to hold nothing", lambda: not held(url))
