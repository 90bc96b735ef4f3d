"""What Prometheus and Grafana are told: by promtool, and by a real Prometheus over a real cluster."""

import json
import random
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest
import yaml
from clusters import REPOSITORY

DASHBOARD = REPOSITORY / "container/dashboard"
# Nothing is counted there while nothing goes wrong, nothing is promised, or no pool is short.
QUIET = {
    "Attainment of interactive requests", "Attainment by tier", "Outcomes", "Causes of misses", "Errors and retries", "Faults of the bus",
}


def program(name):
    found = shutil.which(name)
    if found is None:
        pytest.exit(f"{name} is missing: container/install-deps.sh dashboard", 1)
    return found


def panels():
    return [panel for panel in json.loads((DASHBOARD / "baton.json").read_text())["panels"] if panel["type"] != "row"]


@pytest.mark.parametrize("check", [("check", "config", "prometheus.yml"), ("check", "rules", "baton.rules.yml"), ("test", "rules", "baton.rules.test.yml")], ids=" ".join)
def test_promtool_finds_no_fault(check):
    ran = subprocess.run([program("promtool"), *check], cwd=DASHBOARD, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_dashboard_is_what_its_table_says():
    subprocess.run([sys.executable, DASHBOARD / "dashboard.py", "--check"], check=True, timeout=60)


def test_each_alert_says_what_to_do():
    groups = yaml.safe_load((DASHBOARD / "baton.rules.yml").read_text())["groups"]
    alerts = [rule for group in groups for rule in group["rules"] if "alert" in rule]
    tested = (DASHBOARD / "baton.rules.test.yml").read_text()
    for alert in alerts:
        assert alert["annotations"]["summary"] and alert["annotations"]["action"], alert
        assert f'alertname="{alert["alert"]}"' in tested, f"{alert['alert']} is never seen to fire"


def free_port() -> int:
    """One that nobody listens on, below those that Linux gives by chance: it is still free when Prometheus is told of it."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as asks:
            if asks.connect_ex(("127.0.0.1", port)) != 0:
                return port


@pytest.fixture(scope="module")
def prometheus(cluster, tmp_path_factory):
    """Where a Prometheus answers that asks the cluster, by the files as they are but for the address and the time between two looks."""
    directory = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((DASHBOARD / "prometheus.yml").read_text())
    job = config["scrape_configs"][0]
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": [urllib.parse.urlsplit(cluster["url"]).netloc]}]
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DASHBOARD / "baton.rules.yml")]
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = [program("prometheus"), f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data", f"--web.listen-address=127.0.0.1:{port}"]
    with open(directory / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"

        def query(expression):
            assert process.poll() is None, (directory / "log").read_text(errors="replace")[-4000:]
            asked = urllib.parse.urlencode({"query": expression})
            try:
                with urllib.request.urlopen(f"{url}/api/v1/query?{asked}", timeout=10) as answer:
                    return json.load(answer)["data"]["result"]
            except urllib.error.HTTPError as error:
                pytest.fail(f"{expression}: {error.read().decode()}")
            except urllib.error.URLError:
                # it does not listen yet
                return []

        yield query
    finally:
        process.terminate()
        process.wait(30)


def until(query, expression, meanwhile=lambda: time.sleep(0.2)):
    """The answer, once there is one."""
    deadline = time.monotonic() + 60
    while not (found := query(expression)):
        assert time.monotonic() < deadline, f"nothing came of {expression}"
        meanwhile()
    return found


def test_each_panel_has_numbers_of_a_real_cluster(prometheus, client, model):
    until(prometheus, 'up{job="baton"} == 1')

    def ask():
        # Longer than a block, so that the next one finds it cached.
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Count to twenty, in words. " * 10}], max_tokens=24)

    for panel in panels():
        for target in panel["targets"]:
            expression = target["expr"].replace("$instance", ".*").replace("$__rate_interval", "1m")
            assert "$" not in expression, expression
            found = prometheus(expression) if panel["title"] in QUIET else until(prometheus, expression, ask)
            # A legend's labels are there.
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                assert all(label in series["metric"] for series in found), (label, expression)
    firing = prometheus('ALERTS{alertstate="firing"}')
    assert firing == [], firing
