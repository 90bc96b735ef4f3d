#!/usr/bin/env python3
"""Runs tests; those of real processes that fail are run once more, one at a time.

    tests/once_more.py nextest [ARGS...]      cargo nextest run ARGS...
    tests/once_more.py pytest [ARGS...]       python -m pytest ARGS...
    tests/once_more.py script FILE [ARGS...]  tests/chaos.sh or tests/hostile.sh, which say how to see again what failed

The exit status is 0 if all passed, be it at the second try. A test that only passed then is flaky: it is printed as `flaky: NAME`, and
noted in the file that BATON_FLAKY names, where tests/run.sh counts them. A flaky test is a defect, of the test or of what it tests:
one is let pass, so that the others' work is not lost for it; two in a run are not.
"""

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent

# Programs whose tests start processes, or talk to a real nats-server. All other tests compute: what fails there once is wrong.
PROCESSES = {
    "baton-api-server::api",
    "baton-bus::access",
    "baton-bus::requests",
    "baton-tests::e2e",
    "baton-transfer::links",
    "baton-transfer::processes",
    "baton-worker::cluster",
}

# More failures than this are no chance.
AGAIN_MAX = 5


def failures(junit: Path) -> list[tuple[str, str, str]]:
    """Of each test that did not pass its suite, its name with its class, and its name."""
    failed = []
    for suite in ElementTree.parse(junit).getroot().iter("testsuite"):
        for case in suite.iter("testcase"):
            if case.find("failure") is not None or case.find("error") is not None:
                failed.append((suite.get("name", ""), f"{case.get('classname', '')}::{case.get('name', '')}", case.get("name", "")))
    return failed


def nextest(args: list[str]) -> int:
    # There whatever CARGO_TARGET_DIR is.
    junit = REPOSITORY / "target/nextest/default/junit.xml"
    run = ["cargo", "nextest", "run", *args]

    def once(more: list[str]) -> tuple[int, list[tuple[str, str]]]:
        junit.unlink(missing_ok=True)
        status = subprocess.run([*run, *more]).returncode
        found = failures(junit) if junit.exists() else []
        return status, [(suite, name) for suite, _, name in found]

    status, failed = once([])
    if status == 0 or not failed or len(failed) > AGAIN_MAX or any(suite not in PROCESSES for suite, _ in failed):
        return status
    again(failed)
    tests = " + ".join(f"(binary_id(={suite}) & test(={name}))" for suite, name in failed)
    status, still = once(["--test-threads", "1", "--filterset", tests])
    note([f"{suite} {name}" for suite, name in failed if (suite, name) not in still])
    return status


def pytest(args: list[str]) -> int:
    with tempfile.TemporaryDirectory() as directory:
        junit = Path(directory) / "junit.xml"
        run = [sys.executable, "-m", "pytest", "-o", f"cache_dir={directory}/cache", f"--junitxml={junit}", *args]

        def once(more: list[str]) -> tuple[int, list[str]]:
            junit.unlink(missing_ok=True)
            status = subprocess.run([*run, *more]).returncode
            return status, [name for _, name, _ in failures(junit)] if junit.exists() else []

        status, failed = once([])
        # 1: tests failed. All else is no test's failure.
        if status != 1 or not failed or len(failed) > AGAIN_MAX:
            return status
        again(failed)
        status, still = once(["--last-failed"])
        if status in (0, 1):
            note([name for name in failed if name not in still])
        return status


def script(args: list[str]) -> int:
    said = "to see it again: "
    lines = []
    with subprocess.Popen(args, stdout=subprocess.PIPE, text=True, errors="replace") as running:
        for line in running.stdout:
            print(line, end="", flush=True)
            lines.append(line.strip())
    seen = [line.removeprefix(said) for line in lines if line.startswith(said)]
    if running.returncode == 0 or len(seen) != 1:
        return running.returncode
    again(seen)
    status = subprocess.run(seen[0].split()).returncode
    if status == 0:
        command, failed = seen[0].rsplit(" ", 1)
        note([f"{command} {name}" for name in failed.split(",")])
    return status


def again(failed: list) -> None:
    names = ", ".join(" ".join(name) if isinstance(name, tuple) else name for name in failed)
    print(f"once more: {names}", flush=True)


def note(flaky: list[str]) -> None:
    for name in flaky:
        print(f"flaky: {name}", flush=True)
    if flaky and (file := os.environ.get("BATON_FLAKY")):
        with open(file, "a") as notes:
            notes.writelines(f"{name}\n" for name in flaky)


if __name__ == "__main__":
    runners = {"nextest": nextest, "pytest": pytest, "script": script}
    if len(sys.argv) < 2 or sys.argv[1] not in runners:
        sys.exit(__doc__)
    sys.exit(runners[sys.argv[1]](sys.argv[2:]))
