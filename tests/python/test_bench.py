"""The benchmarks that need neither a GPU nor other engines: each runs for a second or two, and what it writes has the shape that is read elsewhere."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from conftest import REPOSITORY, baton

BENCH = REPOSITORY / "tests/bench"
# What a step of the fake device takes: some milliseconds, more with more tokens.
COST = {"layers": [{"tokens": 1, "us": 2000}, {"tokens": 256, "us": 8000}], "row_us": 20, "kv_token_us": 0.1, "pair_us": 0.01}
MIXES = {"both": "both*2", "split": "context*1+decode*1"}
RATE, SECONDS = 8, 1

# The session's cluster has the turn: no other test's cluster runs meanwhile.
pytestmark = pytest.mark.usefixtures("cluster")


def run(script, *words):
    done = subprocess.run([sys.executable, BENCH / script, *map(str, words)], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def table(text):
    """Rows of a Markdown table, each by the names of its columns in order."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    head, rule, *rows = rows
    assert set(rule) == {"---"} and all(len(row) == len(head) for row in rows), text
    return head, rows


def on_the_fake_device(model_dir, tmp_path, *mixes):
    cost = tmp_path / "cost.json"
    cost.write_text(json.dumps(COST))
    mixes = [word for name in mixes for word in ("--mix", f"{name}={MIXES[name]}")]
    return ["--baton", baton(), "--model", model_dir, "--device", "fake", "--worker-args", f"--kv-mib 64 --fake-cost {cost}", *mixes,
            "--logs", tmp_path]


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    """A model directory of random weights, as small as it gets."""
    directory = tmp_path_factory.mktemp("random")
    sizes = {"hidden": 64, "intermediate": 128, "layers": 1, "heads": 1, "kv-heads": 1, "head-dim": 64, "vocab": 32768, "tokens-max": 2048, "threads": 1}
    printed = run("random_model.py", directory, "--name", "random", "--chat", *(word for size, value in sizes.items() for word in (f"--{size}", value)))
    assert "GB of weights" in printed
    return directory


def test_goodput(model_dir, tmp_path):
    out, plots = tmp_path / "goodput.json", tmp_path / "plots"
    load = ["--load", "S", "--rates", RATE, "--seconds", SECONDS]
    printed = run("goodput.py", *on_the_fake_device(model_dir, tmp_path, *MIXES), *load, "--out", out, "--plots", plots)
    rows = json.loads(out.read_text())
    assert [row["mix"] for row in rows] == list(MIXES)
    for row in rows:
        assert row["load"] == "S" and row["rate"] == RATE and row["seconds"] == SECONDS
        assert row["requests"] > 0 and row["failed"] == 0 and row["failures"] == {}
        assert 0 <= row["attainment"] <= 1
        assert row["goodput"] == pytest.approx(row["attainment"] * row["requests"] / SECONDS)
        # Of each request, its first token, its mean time between tokens and its longest pause: positive, and in this order.
        assert len(row["each"]) == row["requests"]
        assert all(len(each) == 3 and 0 < each[1] <= each[2] for each in row["each"])
        assert 0 < row["ttft"]["p50"] <= row["ttft"]["p99"]
        assert 0 < row["itl"]["p50"] <= row["itl"]["p90"] <= row["itl"]["p99"]
        assert row["pause"]["p99"] > 0
        # Measured: workers know what steps cost, and have run some.
        assert row["step_cost_error"] > 0
    head, lines = table(printed)
    assert [line[head.index("mix")] for line in lines] == list(MIXES)
    # Over the rate: a level and its lines in three panels. Distributions: two panels, in each a level and a line for each mix.
    for name, drawn in [("goodput-S.svg", 3 * 1 + len(MIXES) * (1 + 2 + 2)), ("goodput-S-distributions.svg", 2 * (1 + len(MIXES)))]:
        root = ElementTree.parse(plots / name).getroot()
        lines = [line for line in root.iter() if line.tag.endswith("polyline")]
        assert len(lines) == drawn, name
        assert all(line.get("points") for line in lines), name


def test_planned(model_dir, tmp_path):
    words = ["--load", "S", "--rates", RATE, "--seconds", SECONDS, "--api", "--ttft-ms 1000 --itl-ms 100"]
    head, lines = table(run("planned.py", *on_the_fake_device(model_dir, tmp_path, "both"), *words))
    assert [line[head.index("mix")] for line in lines] == ["both"]
    for line in lines:
        for column, cell in zip(head, line):
            assert column == "mix" or float(cell.removesuffix("%")) >= 0, (column, cell)


def test_mixes(tmp_path):
    out = tmp_path / "mixes.json"
    cost = BENCH / "costs/h200-llama-8b-bf16.json"
    plan = "--kv-bytes-per-token 131072 --kv-mib 81920 --link-gbps 1600"
    printed = run("mixes.py", "--baton", baton(), "--cost", cost, "--plan", plan, "--load", "A", "--load", "C", "--mix", "both*2",
                  "--mix", "context*1+decode*1", "--rates", 10, 200, "--seconds", 2, "--out", out)
    rows = json.loads(out.read_text())
    assert [(row["load"], row["mix"], row["rate"]) for row in rows] == [
        (load, mix, rate) for load in "AC" for mix in ("both*2", "context*1+decode*1") for rate in (10, 200)
    ]
    for row in rows:
        assert 0 <= row["attainment"] <= 1 and row["refused"] >= 0
        assert row["goodput"] == pytest.approx(row["attainment"] * row["requests"] / 2)
        assert row["ttft_ms"]["p50"] <= row["ttft_ms"]["p99"] and row["itl_ms"]["p50"] <= row["itl_ms"]["p99"]
    assert all(row["attainment"] >= 0.95 for row in rows if row["rate"] == 10)
    assert all(row["attainment"] < 0.9 for row in rows if row["rate"] == 200)
    said = [line for line in printed.splitlines() if "95% at" in line]
    assert len(said) == 4 and said[0].startswith("A, both*2: 95% at 10/s")


def test_lone(random_model, tmp_path):
    """On the CPU, with real KV: the hand-over is there in the split mix alone."""
    out = tmp_path / "lone.json"
    words = ["--baton", baton(), "--model", random_model, "--device", "cpu", "--worker-args", "--kv-mib 16 --threads 1", "--logs", tmp_path]
    words += ["--mix", f"split={MIXES['split']}", "--tokens", 64, "--count", 2]
    head, (line,) = table(run("lone.py", *words, "--out", out))
    (row,) = json.loads(out.read_text())
    assert (row["mix"], row["tokens"], row["failed"], row["handovers"]) == ("split", 64, 0, 2)
    assert row["handover_mean_ms"] > 0 and row["handover_median_at_most_ms"] > 0
    assert 0 < row["ttft"]["p50"] <= row["ttft"]["p90"]
    assert line[head.index("mix")] == "split" and float(line[head.index("hand-over mean")]) > 0


def test_split(random_model, tmp_path):
    out = tmp_path / "split.json"
    words = ["--baton", baton(), "--model", random_model, "--device", "cpu", "--worker-args", "--kv-mib 16 --threads 1", "--logs", tmp_path]
    printed = run("split.py", *words, "--rates", 0, 8, "--seconds", 1, "--prompt", 64, "--output", 8, "--out", out)
    rows = json.loads(out.read_text())
    assert [(row["rate"], row["deployment"]) for row in rows] == [(rate, name) for rate in (0, 8) for name in ("split", "both")]
    for row in rows:
        assert row["failed"] == 0 and row["requests"] == len(row["each"]) == (12 if row["rate"] == 0 else 8)
        assert 0 <= row["goodput"] <= 1 and 0 <= row["strict"] <= 1
        # From the workers' logs: of every request that was handed over.
        assert ("hand_over_ms" in row) == (row["deployment"] == "split")
        if row["deployment"] == "split":
            assert row["hand_over_ms"]["p50"] > 0 and row["read_ms"]["p50"] > 0 and row["read_gbps"]["p50"] > 0
    assert "hand-over, ms" in printed


def test_page(model_dir, tmp_path):
    out = tmp_path / "page.json"
    head, lines = table(run("page.py", "--baton", baton(), "--model", model_dir, "--pages", 2, "--concurrency", 4, "--requests", 40, "--rounds", 2, "--out", out))
    rows = json.loads(out.read_text())
    # Each round begins with the next of them.
    assert [(row["round"], row["pages"]) for row in rows] == [(0, 0), (0, 2), (1, 2), (1, 0)]
    for row in rows:
        assert row["tokens_per_second"] > 0 and 0 < row["ttft_p50_ms"] <= row["ttft_p99_ms"]
        assert (row["answers"] > 0) == (row["bytes"] > 0) == (row["pages"] > 0)
    assert [line[head.index("pages")] for line in lines] == ["0", "2"]


def test_structured(cluster, tmp_path):
    printed = run("structured.py", "gaps", "--url", cluster["url"], "--streams", 2, "--tokens", 40, "--rounds", 1)
    said = [line.rsplit(maxsplit=1) for line in printed.splitlines()]
    assert [what for what, _ in said] == [*(f"{kind:14} ms between tokens, {name:4}".strip() for kind in ("without", "with a schema") for name in ("mean", "p50", "p99")),
                                          "ratio of the means"]
    assert all(float(value) > 0 for _, value in said)

    schemas, out = tmp_path / "schemas", tmp_path / "answers.jsonl"
    schemas.mkdir()
    for name, schema in [("color", {"enum": ["red", "green"]}), ("flag", {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"],
                                                                          "additionalProperties": False})]:
        (schemas / f"{name}.json").write_text(json.dumps({"schema": schema}))
    words = ["--schemas", schemas, "--every", 1]
    run("structured.py", "answers", "--url", cluster["url"], *words, "--out", out)
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted((answer["schema"], answer["temperature"], answer["status"]) for answer in answers) == [
        (f"{name}.json", temperature, 200) for name in ("color", "flag") for temperature in (0, 1)
    ]
    assert run("structured.py", "check", *words, out).strip() == "{'valid': 4}"


def test_multi_turn(cluster, model):
    sizes = ["--conversations", 2, "--rate", 4, "--turns", 3, "--system-tokens", 100, "--turn-tokens", 60, "--answer-tokens", 8, "--think-s", 0]
    report = json.loads(run("multi_turn.py", "--url", cluster["url"], *sizes))
    assert report["model"] == model and report["conversations"] == 2 and report["turns"] == 3
    assert report["requests"] == 6 and report["failed"] == 0
    assert [turn["turn"] for turn in report["by_turn"]] == [1, 2, 3]
    assert all(turn["requests"] == 2 for turn in report["by_turn"])
    # Blocks of 32 tokens: of later turns, most of what was there before.
    assert 0.3 < report["cached_share"] <= 1
    assert report["cached_tokens"] <= report["prompt_tokens"]
    assert report["by_turn"][0]["prompt_tokens_mean"] < report["by_turn"][2]["prompt_tokens_mean"]
    for row in [report, *report["by_turn"]]:
        assert 0 < row["first_token_ms_p50"] <= row["first_token_ms_p99"]
        assert 0 < row["reachable_share"] <= 1
