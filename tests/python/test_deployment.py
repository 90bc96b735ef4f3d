"""A deployment as one file: started with `baton up --config`, and rendered to what the published schemas allow."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, START_TIMEOUT_S, STOP_TIMEOUT_S, baton

# What everything that can be rendered is in: GPUs, secrets, a NATS server elsewhere, several groups and API servers.
LARGE = """\
model: /models/llama
cluster: large_1
nats:
  request-plane-uri: nats://bus:4222
  request-plane-credentials: /etc/baton/creds
api-server: {count: 2, api-server-port: 9000, api-keys-file: /etc/baton/keys, cors-origin: ["https://a.example"]}
context:
  - {devices: cuda:0-3, count: 2, tp-size: 2, drain-s: 100, memory-mib: 4096, cpus: 8, ucx-tls: all}
decode:
  - {devices: [cuda:4, cuda:5], tp-size: 2, model: /models/llama-fp8}
  - {devices: cpu, count: 3, cpus: 4}
slurm: {nodes: 3}
"""
EXAMPLE = REPOSITORY / "examples/cluster.yaml"


# The packages with the schemas want it.
python_3_11 = pytest.mark.skipif(sys.version_info < (3, 11), reason="the schemas' packages want Python 3.11")


def run(*words, **options) -> subprocess.CompletedProcess:
    return subprocess.run([baton(), *words], capture_output=True, text=True, timeout=60, **options)


def render(target: str, config: Path) -> str:
    done = run("render", target, "--config", config)
    assert done.returncode == 0, done.stderr
    again = run("render", target, "--config", config)
    assert again.stdout == done.stdout
    return done.stdout


@pytest.fixture(params=["example", "large"])
def config(request, tmp_path) -> Path:
    if request.param == "example":
        return EXAMPLE
    path = tmp_path / "cluster.yaml"
    path.write_text(LARGE)
    return path




@python_3_11
def test_kubernetes_takes_every_object(config):
    import kubernetes_validate

    objects = list(yaml.safe_load_all(render("kubernetes", config)))
    assert len(objects) >= 5
    for value in objects:
        kubernetes_validate.validate(value, kubernetes_validate.latest_version(), strict=True)
    # The schema is one that can say no.
    objects[0]["spec"]["prots"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(objects[0], kubernetes_validate.latest_version(), strict=True)


def test_kubernetes_objects_belong_together(config):
    objects = list(yaml.safe_load_all(render("kubernetes", config)))
    names = [(value["kind"], value["metadata"]["name"]) for value in objects]
    assert len(set(names)) == len(names)
    pods = {}
    for value in objects:
        if value["kind"] == "Deployment":
            template = value["spec"]["template"]
            assert value["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]
            pods[template["metadata"]["labels"]["app"]] = template["spec"]
            volumes = {volume["name"] for volume in template["spec"].get("volumes", [])}
            for container in template["spec"]["containers"]:
                mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
                assert mounts == volumes
    for value in objects:
        if value["kind"] == "Service":
            ports = pods[value["spec"]["selector"]["app"]]["containers"][0]["ports"]
            wanted = [port["port"] for port in value["spec"]["ports"]]
            assert [port["containerPort"] for port in ports] == wanted


@python_3_11
def test_compose_takes_the_file(config):
    import importlib.util

    import jsonschema

    package = importlib.util.find_spec("check_jsonschema").submodule_search_locations[0]
    schema = json.loads((Path(package) / "builtin_schemas/vendor/compose-spec.json").read_text())
    value = yaml.safe_load(render("compose", config))
    jsonschema.validate(value, schema)
    used = {name for service in value["services"].values() for name in service.get("secrets", [])}
    assert used == set(value.get("secrets", {}))
    value["services"]["api-server"]["restrat"] = "no"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(value, schema)


def test_bash_takes_the_script(config, tmp_path):
    script = tmp_path / "slurm.sh"
    script.write_text(render("slurm", config))
    subprocess.run(["bash", "-n", script], check=True)
    subprocess.run(["shellcheck", script], check=True)


def test_a_mistake_is_one_sentence_with_its_place(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text("model: m\ncontext: [{}]\ndecode:\n- tp_size: 2\n")
    for words in (["up"], ["render", "slurm"]):
        done = run(*words, "--config", path)
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert f"{path}:4: " in line and "tp_size" in line and "tp-size" in line


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read()


def test_what_is_printed_is_started(model_dir, tmp_path):
    """Flags are printed, the file is changed to two API servers and another decode group, and all of it serves."""
    flags = ["--model", model_dir, "--device", "fake", "--kv-mib", "16", "--drain-s", "2", "--cluster", "from-a-file"]
    flags += ["--context-worker-count", "1", "--decode-worker-count", "1"]
    printed = run("up", *flags, "--print-config")
    assert printed.returncode == 0, printed.stderr
    value = yaml.safe_load(printed.stdout)
    assert (value["context"][0]["kv-mib"], value["api-server"]["drain-s"]) == (16, 2)
    value["api-server"] |= {"count": 2, "api-server-port": 0}
    value["decode"].append({**value["decode"][0], "count": 2})
    path, ready, log = (tmp_path / name for name in ("cluster.yaml", "ready.json", "up.log"))
    path.write_text(yaml.safe_dump(value))
    refused = run("up", "--config", path, "--model", model_dir)
    assert refused.returncode != 0 and "--model" in refused.stderr and "--config" in refused.stderr

    with open(log, "wb") as out:
        process = subprocess.Popen(
            [baton(), "up", "--config", path, "--ready-file", ready],
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "VIRTUAL_ENV": sys.prefix},
        )
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not ready.exists():
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            told = json.loads(ready.read_text())
            names = {"api-server-0", "api-server-1", "context-0", "decode-0", "decode-1", "decode-2", "nats-server", "up"}
            assert set(told["pids"]) == names
            cluster = json.loads(get(told["url"] + "/cluster"))
            assert cluster["healthy"], cluster
            assert {worker["worker"] for worker in cluster["workers"]} == {n for n in names if n[:4] in ("cont", "deco")}
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(STOP_TIMEOUT_S) == 0, log.read_text()
