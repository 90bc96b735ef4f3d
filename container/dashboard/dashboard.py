#!/usr/bin/env python3
"""Writes Grafana's dashboard, baton.json beside it, from the table below.

    python3 container/dashboard/dashboard.py            # writes it
    python3 container/dashboard/dashboard.py --check    # fails if it would write something else
"""

import json
import sys
from pathlib import Path

# The API servers that are chosen above, and the time over which Grafana can tell a rate.
OF = 'instance=~"$instance"'
RATE = "$__rate_interval"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
ATTAINED = "baton:service_level_attainment:ratio_rate10m"


def rate(metric, by="", labels=""):
    """How fast a counter grows, summed over the API servers; `by` a label."""
    by = f" by ({by})" if by else ""
    return f"sum{by} (rate({metric}{{{OF}{labels and ', ' + labels}}}[{RATE}]))"


def worker(metric, labels=""):
    """A worker's gauge: each API server tells of it, so what the highest one says."""
    return f"max by (worker, role) (baton_worker_{metric}{{{OF}{labels and ', ' + labels}}})"


def serving(role):
    return f"""count({worker("up", f'role=~"{role}|both"')} == 1) or vector(0)"""


def quantiles(metric):
    buckets = rate(f"{metric}_bucket", "le")
    return [(f"histogram_quantile({part}, {buckets})", name) for part, name in ((0.5, "median"), (0.9, "90 %"), (0.99, "99 %"))]


def parts(metric):
    """The mean of a histogram for each part."""
    sums, counts = (rate(f"{metric}_{of}", "part") for of in ("sum", "count"))
    return [(f"{sums} / ({counts} > 0)", "{{part}}")]


WHO = "{{worker}} ({{role}})"

# Rows of panels: title, unit, what it shows and what to watch for, and (expression, legend) each. One expression without a legend is a number.
ROWS = [
    ("At a glance", [
        ("Context workers", "none", "Workers that run prompts and serve, with those that do both. At 0 every request gets 503.", [(serving("context"), "")]),
        ("Decode workers", "none", "Workers that generate and serve, with those that do both. At 0 every request gets 503.", [(serving("decode"), "")]),
        ("In flight", "none", "Generations under way. An API server takes --in-flight-max of them.", [(f"sum(baton_requests_in_flight{{{OF}}})", "")]),
        ("Attainment of interactive requests", "percentunit", "Of those that were promised times, the part that got them in the last 10 minutes. Below 95 % for 10 minutes is an alert.", [(f'{ATTAINED}{{tier="interactive"}}', "")]),
    ]),
    ("What clients see", [
        ("Requests", "reqps", "Generations that ended, by outcome: stop, length, or an error's label.", [(rate("baton_requests_total", "outcome"), "{{outcome}}")]),
        ("Tokens", "none", "Tokens a second: of prompts (cached ones are part of them), and generated.", [(rate("baton_tokens_total", "kind"), "{{kind}}")]),
        ("Errors and retries", "none", "A second. Errors that clients were told: watch for any but 4xx. Retries are not seen by clients; a rate that stays is something that breaks and is gone round.", [(rate("baton_errors_total", "reason"), "{{reason}}"), (rate("baton_retries_total", "reason"), "retry: {{reason}}")]),
        ("First token (TTFT)", "s", "From a request's arrival to its first token.", quantiles("baton_ttft_seconds")),
        ("Between tokens (ITL)", "s", "Between tokens of one generation.", quantiles("baton_inter_token_seconds")),
        ("Wait of prompts", "s", "A prompt's wait on its context worker. Where it grows there are too few context workers.", quantiles("baton_queue_seconds")),
    ]),
    ("Service level", [
        ("Attainment by tier", "percentunit", "Of requests that were promised times, the part that got them, over 10 minutes. Refused, failed and those served as batch instead did not.", [(ATTAINED, "{{tier}}")]),
        ("Outcomes", "reqps", "Requests that were promised times, by tier and what became of them. Missed or refused ones that grow want more workers.", [(rate("baton_service_level_total", "tier, outcome"), "{{tier}}: {{outcome}}")]),
        ("Causes of misses", "reqps", "What took the time of those that missed: queue and compute want context workers, decode wants decode workers, transfer a look at the links.", [(rate("baton_service_level_missed_total", "tier, cause"), "{{tier}}: {{cause}}")]),
    ]),
    ("KV", [
        ("Hand-over", "s", "From a prompt's last step to the release of its KV. Where it grows decode workers are full, or the network is slow.", quantiles("baton_kv_handover_seconds")),
        ("Parts of hand-overs", "s", "Mean time of each part of a hand-over: room is the wait for a decode worker, turn for others' pulls, progress for the prompt, read and release what a pull does. Room that grows wants decode workers, turn and read a look at the network.", parts("baton_kv_handover_part_seconds")),
        ("Pulls", "s", "One pull, its release included.", quantiles("baton_kv_pull_seconds")),
        ("KV moved", "Bps", "Bytes a second that decode workers pull.", [(rate("baton_kv_pull_bytes_sum"), "pulled")]),
        ("Blocks in use", "percentunit", "Part of each worker's blocks that is held. Above 95 % for 10 minutes is an alert.", [(f"{worker('blocks_used')} / ({worker('blocks_capacity')} > 0)", WHO)]),
        ("Blocks kept for prefixes", "percentunit", "Part of each worker's blocks that is kept for prompts that begin the same, and free for others.", [(f"{worker('blocks_cached')} / ({worker('blocks_capacity')} > 0)", WHO)]),
        ("Prompt tokens found in caches", "percentunit", "Part of the prompts' tokens that was not computed again.", [
            (f"""{rate("baton_tokens_total", labels='kind="cached"')} / ({rate("baton_tokens_total", labels='kind="prompt"')} > 0)""", "cached"),
            (f"""{rate("baton_prefix_pull_tokens_total")} / ({rate("baton_tokens_total", labels='kind="prompt"')} > 0)""", "of these, pulled from another worker"),
        ]),
        ("Staged and pulled", "none", "Finished prompts' KV that waits to be pulled, and pulls under way. Where leases grow decode workers are full.", [(worker("leased"), f"leased: {WHO}"), (worker("pulling"), f"pulling: {WHO}")]),
        ("Quarantined blocks", "none", "Blocks that a broken transfer may still write to. Above 0 for long: look at the network.", [(worker("blocks_quarantined"), WHO)]),
        ("Waits for a decode worker", "none", "A second: waits for a place that ended with one. Where it grows: more decode workers, or --kv-mib.", [(rate("baton_decode_room_total"), "waits")]),
    ]),
    ("Workers", [
        ("Serving", "none", "1 if a worker serves; one that left has no line.", [(worker("up"), WHO)]),
        ("Waiting", "none", "Sequences that wait for their first step.", [(worker("waiting"), WHO)]),
        ("Waiting prompt tokens", "none", "Prompt tokens not begun: what a context worker has before it.", [(worker("waiting_tokens"), WHO)]),
        ("Running", "percentunit", "Part of the batch's places that is taken.", [(f"{worker('running')} / ({worker('batch_capacity')} > 0)", WHO)]),
        ("Generating", "none", "Generating sequences.", [(worker("decoding"), WHO)]),
        ("Step cost error", "percentunit", "Nine of ten steps took as long as predicted within this part. Above 10 % for long: the device is shared, or throttled.", [(worker("step_cost_error"), WHO)]),
        ("Refused steps", "none", "Steps that an executor has refused since it started: a defect of Baton, with a line in its log.", [(worker("plans_refused"), WHO)]),
        ("Context workers that can be read", "none", "How many context workers a worker can pull KV from. Less than there are: network, firewall, UCX.", [(worker("peers_ready"), WHO)]),
    ]),
    ("Bus and processes", [
        ("Faults of the bus", "none", "Messages dropped a second, by kind. Any: versions mixed, somebody on the bus who should not be, or too little CPU.", [(rate("baton_bus_faults_total", "kind"), "{{kind}}")]),
        ("Known prefixes", "none", "Blocks of the workers' prefix indexes that API servers know. 4,194,304 is the most.", [(f"baton_known_prefixes{{{OF}}}", "{{instance}}")]),
        ("Log lines dropped, malformed requests", "none", "A second. Dropped lines: a full disk, or a log collector that stands still; malformed: requests that were no HTTP.", [(rate("baton_log_lines_dropped_total", "reason"), "log: {{reason}}"), (rate("baton_http_malformed_total"), "malformed")]),
        ("Responses kept", "bytes", "What responses that are kept hold. At --response-store-mib older ones are let go.", [(f"baton_response_store_bytes{{{OF}}}", "{{instance}}")]),
    ]),
]

COLUMNS = 24


def panel(number, at, size, title, unit, description, queries):
    is_number = len(queries) == 1 and not queries[0][1]
    # Parts of a whole are drawn from 0 to 1; nothing here is below 0.
    defaults = {"unit": unit, "min": 0, **({"max": 1} if unit == "percentunit" and not is_number else {})}
    if not is_number:
        defaults["custom"] = {"lineWidth": 1, "fillOpacity": 8, "showPoints": "never", "spanNulls": False}
    options = {
        True: {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}, "colorMode": "none", "graphMode": "area"},
        False: {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}},
    }
    return {
        "id": number,
        "type": "stat" if is_number else "timeseries",
        "title": title,
        "description": description,
        "datasource": SOURCE,
        "gridPos": {"x": at[0], "y": at[1], "w": size[0], "h": size[1]},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options[is_number],
        "targets": [
            {"refId": chr(ord("A") + n), "datasource": SOURCE, "editorMode": "code", "expr": expr, "legendFormat": legend or "__auto", "range": True}
            for n, (expr, legend) in enumerate(queries)
        ],
    }


def panels():
    """Rows, each with its panels below it: four across where they are numbers, else three."""
    made, y = [], 0
    for row, (title, members) in enumerate(ROWS):
        made.append({"id": len(made) + 1, "type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": 1}})
        y += 1
        across, height = (4, 4) if row == 0 else (3, 8)
        width = COLUMNS // across
        for place, member in enumerate(members):
            at = (place % across * width, y + place // across * height)
            made.append(panel(len(made) + 1, at, (width, height), *member))
        y += -(-len(members) // across) * height
    return made


def dashboard():
    instances = "label_values(baton_requests_in_flight, instance)"
    return {
        "uid": "baton",
        "title": "Baton",
        "description": "A cluster as its API servers see it: docs/operating.md says what each number means.",
        "tags": ["baton", "llm"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "links": [],
        "templating": {
            "list": [
                {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "current": {}},
                {"name": "instance", "label": "API server", "type": "query", "datasource": SOURCE, "query": {"query": instances, "refId": "instance"}, "definition": instances,
                 "multi": True, "includeAll": True, "allValue": ".*", "current": {"text": ["All"], "value": ["$__all"]}, "refresh": 2, "sort": 1},
            ]
        },
        "annotations": {
            "list": [
                {"name": "Alerts", "datasource": SOURCE, "enable": True, "iconColor": "red", "expr": 'ALERTS{alertname=~"Baton.*", alertstate="firing"}', "titleFormat": "{{alertname}}", "textFormat": "{{worker}} {{instance}}"},
            ]
        },
        "panels": panels(),
    }


def main():
    path = Path(__file__).with_name("baton.json")
    text = json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"
    if sys.argv[1:] == ["--check"]:
        sys.exit(None if path.read_text() == text else f"{path} is not what dashboard.py writes: run it")
    path.write_text(text)


if __name__ == "__main__":
    main()
