"""A Baton cluster under Slurm, in the cluster of virtual nodes that `tests/slurm.sh` makes: what `baton render slurm` writes, as a
real job."""

import json
import os
import re
import subprocess
import threading
import urllib.request
from pathlib import Path

import openai
import pytest
from cluster_state import wait_until
from conftest import baton

URL = "http://node0:8000"
# A context and a decode worker on each of two nodes, the API server on the first.
DEPLOYMENT = """
model: {model}
api-server:
  api-server-host: 0.0.0.0
context:
  - {{count: 2, devices: cpu, kv-mib: 192}}
decode:
  - {{count: 2, devices: cpu, kv-mib: 192}}
slurm:
  nodes: 2
"""
STREAMS = 6
# Enough to be under way when a worker is asked to leave, and few enough to be done while it may drain.
TOKENS = 300
START_DEADLINE_S = 180
ANSWER_DEADLINE_S = 120
# A worker drains for up to 25 s, an API server for 10; Slurm's own steps end within seconds.
END_DEADLINE_S = 60


def slurm(*command: str) -> str:
    """What a command of Slurm's prints."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout.strip()


def workers() -> dict:
    """Workers by name, as /cluster shows them; none where nobody answers yet."""
    try:
        with urllib.request.urlopen(URL + "/cluster", timeout=10) as answer:
            return {worker["worker"]: worker for worker in json.load(answer)["workers"]}
    except OSError:
        return {}


def serving(count: int) -> bool:
    """Whether so many workers serve, and each decode worker can pull from each context worker."""
    known = {name: worker for name, worker in workers().items() if worker["state"] == "serving"}
    contexts = [name for name in known if name.startswith("context")]
    ready = [
        sum(peer["state"] == "ready" for peer in worker["peers"])
        for name, worker in known.items()
        if name.startswith("decode")
    ]
    return len(known) == count and len(contexts) > 0 and all(peers == len(contexts) for peers in ready)


class Job:
    """A batch job, and what is known of it."""

    def __init__(self, script: Path):
        self.log = script.with_suffix(".log")
        self.id = slurm("sbatch", "--parsable", f"--output={self.log}", str(script))

    def field(self, name: str) -> str:
        found = re.search(rf"\b{name}=(\S+)", slurm("scontrol", "show", "job", self.id))
        assert found, f"the job has no {name}"
        return found[1]

    def steps(self, node: str) -> dict[str, str]:
        """Ids of the steps on a node, by their names; the batch script itself is none of them."""
        listed = slurm("squeue", "--noheader", "--steps", f"--nodelist={node}", "--format=%i %j").splitlines()
        steps = (line.split() for line in listed)
        return {name: step for step, name in steps if re.fullmatch(rf"{self.id}\.\d+", step)}

    def check_running(self):
        assert self.field("JobState") == "RUNNING", self.log.read_text(errors="replace")[-8000:]


def node_state(node: str) -> str:
    return slurm("sinfo", "--noheader", f"--nodes={node}", "--format=%T")


class Stream(threading.Thread):
    """A completion that is streamed: its tokens so far, and how it ended."""

    def __init__(self, client: openai.OpenAI, model: str, prompt: str, tokens: int = TOKENS):
        super().__init__(daemon=True)
        self.client, self.model, self.prompt, self.tokens = client, model, prompt, tokens
        self.begun = threading.Event()
        self.usage, self.finish, self.error = None, None, None
        self.start()

    def run(self):
        try:
            chunks = self.client.completions.create(
                model=self.model,
                prompt=self.prompt,
                max_tokens=self.tokens,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            for chunk in chunks:
                for choice in chunk.choices:
                    self.begun.set()
                    self.finish = choice.finish_reason or self.finish
                self.usage = chunk.usage or self.usage
        except Exception as error:  # noqa: BLE001 - told by the test
            self.error = error
        finally:
            self.begun.set()

    def assert_whole(self):
        self.join(ANSWER_DEADLINE_S)
        assert not self.is_alive(), f"no end within {ANSWER_DEADLINE_S} s: {self.prompt}"
        assert self.error is None, f"{self.prompt}: {self.error}"
        assert self.finish == "length" and self.usage.completion_tokens == self.tokens, (self.finish, self.usage)


@pytest.fixture(scope="module")
def job(model_dir):
    """The cluster."""
    directory = Path(os.environ["SLURM_TEST_DIR"])
    binaries = directory / "bin"
    binaries.mkdir()
    (binaries / "baton").symlink_to(baton().resolve())
    os.environ["PATH"] = f"{binaries}:{os.environ['PATH']}"
    config, script = directory / "cluster.yaml", directory / "job.sh"
    config.write_text(DEPLOYMENT.format(model=json.dumps(str(model_dir))))
    with open(script, "w") as out:
        subprocess.run(["baton", "render", "slurm", "--config", config], stdout=out, check=True, timeout=30)
    job = Job(script)

    def is_up():
        if job.field("JobState") not in ("PENDING", "RUNNING"):
            pytest.exit(f"no cluster:\n{job.log.read_text(errors='replace')[-8000:]}", 1)
        return serving(4)

    wait_until("all workers to serve", is_up, START_DEADLINE_S)
    yield job


@pytest.fixture(scope="module")
def client(job):
    return openai.OpenAI(base_url=URL + "/v1", api_key="none", max_retries=0, timeout=ANSWER_DEADLINE_S)


@pytest.fixture(scope="module")
def model(client):
    return client.models.list().data[0].id


def test_a_cluster_under_srun_answers(job, client, model):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    answer = client.chat.completions.create(model=model, messages=messages, max_tokens=20, temperature=0)
    assert answer.choices[0].message.content.strip()
    assert answer.usage.completion_tokens > 0
    job.check_running()


def test_a_node_that_is_drained_loses_nothing(job, client, model):
    streams = [Stream(client, model, f"Story {number}: once upon a time") for number in range(STREAMS)]
    for stream in streams:
        assert stream.begun.wait(ANSWER_DEADLINE_S), "no first token"
    wait_until("decode-1 to generate", lambda: workers()["decode-1"]["load"]["running"] > 0)

    # Slurm gives the node nothing new, and touches nothing that runs there.
    slurm("scontrol", "update", "nodename=node1", "state=drain", "reason=test")
    assert node_state("node1") == "draining"
    job.check_running()
    # The workers there are asked to leave: they finish what they have.
    steps = job.steps("node1")
    assert sorted(steps) == ["context-1", "decode-1"]
    slurm("scancel", "--ctld", "--signal=TERM", *steps.values())
    late = [Stream(client, model, f"Late {number}: once upon a time") for number in range(STREAMS)]

    for stream in streams + late:
        stream.assert_whole()
    wait_until("its workers to leave", lambda: sorted(workers()) == ["context-0", "decode-0"], END_DEADLINE_S)
    wait_until("their steps to end", lambda: not job.steps("node1"), END_DEADLINE_S)
    assert serving(2)
    # A step that failed would have ended the job.
    job.check_running()
    log = job.log.read_text(errors="replace")
    held = re.findall(r"draining prefills=\d+ decodes=(\d+)", log)
    assert len(held) == 2 and sum(map(int, held)) > 0, f"they had nothing to finish: {held}"
    assert len(re.findall(r"INFO left\n", log)) == 2, "they did not end by themselves"


def test_a_job_that_is_asked_to_leave_finishes_what_it_has(job, client, model):
    # An API server gives streams 10 s.
    stream = Stream(client, model, "Last: once upon a time", tokens=60)
    assert stream.begun.wait(ANSWER_DEADLINE_S), "no first token"
    slurm("scancel", "--signal=TERM", job.id)
    stream.assert_whole()
    wait_until("the job to end", lambda: job.field("JobState") != "RUNNING", END_DEADLINE_S)
    assert (job.field("JobState"), job.field("ExitCode")) == ("COMPLETED", "0:0"), job.log.read_text(errors="replace")[-8000:]
    wait_until("node1 to be out of service", lambda: node_state("node1") == "drained", END_DEADLINE_S)
