"""Clusters for the tests: `baton up` with one context and one decode worker, real weights."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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


@contextlib.contextmanager
def running_cluster(model_dir, directory, *more, restart=False):
    """A cluster of one context and one decode worker; brings the ready file, which says where it is. Unless what dies is started again
    it ends with what dies, and the tests with it."""
    ready, log = directory / "ready.json", directory / "up.log"
    models = REPOSITORY / "target/test-models"
    with open(models / "cluster.lock", "w") as turn, open(log, "wb") as out:
        # the Rust tests take the same turn: one cluster at a time
        fcntl.flock(turn, fcntl.LOCK_EX)
        process = subprocess.Popen(
            [baton(), "up", "--model", model_dir, "--threads", "2", "--kv-mib", "192"]
            + ["--context-worker-count", "1", "--decode-worker-count", "1", "--ready-file", ready, *([] if restart else ["--no-restart"]), *more],
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
            yield ready
            assert process.poll() is None, f"the cluster ended:\n{log.read_text(errors='replace')[-8000:]}"
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
