#!/usr/bin/env python3
"""What answers by schema cost, and whether they are valid.

    structured.py gaps --url URL [--streams 32] [--tokens 256] [--rounds 4]
    structured.py beside --url URL [--plain 8] [--bound 4] [--every-ms 50] [--seconds 120]
    structured.py answers --url URL --schemas DIRECTORY [--every 10] --out FILE
    structured.py check --schemas DIRECTORY FILE

`gaps`: the mean time between the tokens of streams that run at the same time, without and with a schema of each stream's own, in turn.
The first and last tokens of a stream are left out, for then not all are there.

`beside`: the same of plain streams alone, beside a few streams with a schema or without, in turn, while a prompt comes every few
milliseconds. It fails if a request does, if a worker refused a step, or if a generation was tried again.

`answers`: an answer at temperature 0 and one at 1 by each of JSON Schema Bench's schemas (`maskbench/data` of
github.com/guidance-ai/jsonschemabench), with no white space between its parts, so that small models come to an end.
`check` says which of those that ended by themselves are valid; it needs the package jsonschema.
"""

import argparse
import http.client
import json
import queue
import random
import statistics
import threading
import time
from collections import Counter
from pathlib import Path

COMPACT = {"x-guidance": {"whitespace_flexible": False}}
# Of a stream, tokens that are not counted.
BEFORE, AFTER = 20, 5


def post(url, path, body):
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=300)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    return connection.getresponse()


def get(url, path):
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    connection.request("GET", path)
    return connection.getresponse().read().decode()


def model_of(url):
    return json.loads(get(url, "/v1/models"))["data"][0]["id"]


def metric(url, name):
    """The sum over all labels."""
    lines = get(url, "/metrics").splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))


def people(stream):
    """A schema for an answer without end: one for each stream, so that none is made for another."""
    text = {"type": "string", "maxLength": 40}
    person = {
        "name": text,
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "email": {"type": "string", "pattern": "^[a-z]{3,8}@[a-z]{3,8}\\.com$"},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue", f"tag{stream}"]}, "minItems": 1, "maxItems": 3},
        "note": text,
    }
    item = {"type": "object", "properties": person, "required": list(person), "additionalProperties": False}
    return {"type": "array", "minItems": 400, "maxItems": 400, "items": item, **COMPACT}


def stream(a, model, number, with_schema, out, part=""):
    numbers = random.Random(f"{with_schema}{number}{part}")
    prompt = [numbers.randrange(1000, 30000) for _ in range(100)]
    body = {"model": model, "prompt": prompt, "max_tokens": a.tokens, "stream": True, "seed": number, "ignore_eos": True}
    if with_schema:
        body["structured_outputs"] = {"json": people(number)}
    answer = post(a.url, "/v1/completions", body)
    assert answer.status == 200, answer.read()
    times = []
    for line in answer:
        assert not line.startswith(b"event: error"), answer.readline()
        if line.startswith(b"data: {"):
            times.append(time.perf_counter())
    out.append(times)


def between_tokens(streams):
    """Milliseconds: the median of the streams' means, and all of them in order."""
    counted = [times[BEFORE:-AFTER] for times in streams]
    mean = statistics.median((times[-1] - times[0]) / (len(times) - 1) * 1e3 for times in counted)
    return mean, sorted((then - now) * 1e3 for times in counted for now, then in zip(times, times[1:]))


def quantile(ordered, percent):
    return ordered[len(ordered) * percent // 100]


def together(a, model, with_schema):
    out = []
    threads = [threading.Thread(target=stream, args=(a, model, i, with_schema, out)) for i in range(a.streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(out) == a.streams, "a stream failed"
    mean, gaps = between_tokens(out)
    return mean, quantile(gaps, 50), quantile(gaps, 99)


def gaps(a):
    model = model_of(a.url)
    kinds = {"without": False, "with a schema": True}
    for with_schema in kinds.values():
        together(a, model, with_schema)
    rounds = {kind: [] for kind in kinds}
    for _ in range(a.rounds):
        for kind, with_schema in kinds.items():
            rounds[kind].append(together(a, model, with_schema))
    for kind, each in rounds.items():
        for name, column in zip(["mean", "p50", "p99"], zip(*each)):
            print(f"{kind:14} ms between tokens, {name:4}", *(f"{value:.3f}" for value in column))
    free, bound = (statistics.median(each[0] for each in rounds[kind]) for kind in kinds)
    print(f"ratio of the means {bound / free:.4f}")


def prompts(a, model, part, ends, took):
    """A prompt every few milliseconds, none like another, until the streams have ended. Into `took` go the seconds of each, `None` if it failed."""
    def one(number):
        numbers = random.Random(f"prompt {part} {number}")
        prompt = [numbers.randrange(1000, 30000) for _ in range(a.prompt_tokens)]
        began, seconds = time.perf_counter(), None
        try:
            answer = post(a.url, "/v1/completions", {"model": model, "prompt": prompt, "max_tokens": 1})
            assert answer.status == 200, answer.read()
            answer.read()
            seconds = time.perf_counter() - began
        finally:
            took.append(seconds)

    threads, due = [], time.perf_counter()
    while not ends.is_set():
        threads.append(threading.Thread(target=one, args=(len(threads),)))
        threads[-1].start()
        due += a.every_ms / 1e3
        time.sleep(max(0, due - time.perf_counter()))
    for thread in threads:
        thread.join()


def beside(a):
    model = model_of(a.url)
    kinds = {"without": False, "with a schema": True}
    means, gaps, prompted, part = {kind: [] for kind in kinds}, {kind: [] for kind in kinds}, [], 0
    began = time.perf_counter()
    # The first round of each wakes everything up.
    while part < 2 * len(kinds) or time.perf_counter() - began < a.seconds:
        for kind, with_schema in kinds.items():
            plain, bound, ends, took = [], [], threading.Event(), []
            prompter = threading.Thread(target=prompts, args=(a, model, part, ends, took))
            threads = [threading.Thread(target=stream, args=(a, model, i, False, plain, f" of {part}")) for i in range(a.plain)]
            threads += [threading.Thread(target=stream, args=(a, model, a.plain + i, with_schema, bound, f" of {part}")) for i in range(a.bound)]
            for thread in [prompter, *threads]:
                thread.start()
            for thread in threads:
                thread.join()
            ends.set()
            prompter.join()
            assert (len(plain), len(bound)) == (a.plain, a.bound), "a stream failed"
            assert None not in took, "a prompt failed"
            prompted += took
            part += 1
            if part > len(kinds):
                mean, each = between_tokens(plain)
                means[kind].append(mean)
                gaps[kind] += each
    for kind in kinds:
        each, all_gaps = sorted(means[kind]), sorted(gaps[kind])
        print(
            f"{kind:14} {len(each)} rounds, ms between tokens of plain streams: mean {statistics.median(each):.3f} ({each[0]:.3f} to {each[-1]:.3f}), "
            f"p50 {quantile(all_gaps, 50):.3f}, p99 {quantile(all_gaps, 99):.3f}"
        )
    free, bound = (statistics.median(means[kind]) for kind in kinds)
    print(f"ratio of the means {bound / free:.4f}; {len(prompted)} prompts, median {statistics.median(prompted) * 1e3:.1f} ms")
    refused, retried = metric(a.url, "baton_worker_plans_refused"), metric(a.url, "baton_retries_total")
    print(f"{refused:.0f} steps refused, {retried:.0f} generations tried again, in {time.perf_counter() - began:.0f} s")
    assert not refused and not retried


def schemas(a):
    files = sorted(a.schemas.glob("*.json"))[:: a.every]
    assert files, f"no schemas in {a.schemas}"
    return {file.name: json.loads(file.read_text())["schema"] for file in files}


def answers(a):
    model = model_of(a.url)
    jobs = queue.Queue()
    for job in schemas(a).items():
        jobs.put(job)
    results = []

    def work():
        while True:
            try:
                name, schema = jobs.get_nowait()
            except queue.Empty:
                return
            compact = {**schema, **COMPACT} if isinstance(schema, dict) else schema
            for temperature in (0, 1):
                body = {
                    "model": model,
                    "messages": [{"role": "user", "content": "Invent one. Answer in JSON, short."}],
                    "max_tokens": 1500,
                    "temperature": temperature,
                    "seed": 7,
                    "response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": compact}},
                }
                answer = post(a.url, "/v1/chat/completions", body)
                result = {"schema": name, "temperature": temperature, "status": answer.status}
                results.append({**result, "answer": json.load(answer)})

    threads = [threading.Thread(target=work) for _ in range(64)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    a.out.write_text("".join(json.dumps(result) + "\n" for result in results))
    tokens = sum(result["answer"]["usage"]["completion_tokens"] for result in results if result["status"] == 200)
    print(Counter(result["status"] for result in results), f"{tokens} tokens in {took:.0f} s")


def check(a):
    import jsonschema
    from jsonschema.validators import validator_for

    known, counts = schemas(a), Counter()
    for line in a.file.read_text().splitlines():
        result = json.loads(line)
        if result["status"] != 200:
            counts[f"status {result['status']}"] += 1
            continue
        choice = result["answer"]["choices"][0]
        if choice["finish_reason"] != "stop":
            counts["cut short"] += 1
            continue
        schema = known[result["schema"]]
        validator = validator_for(schema, default=jsonschema.Draft202012Validator)
        value = json.loads(choice["message"]["content"])
        error = next(validator(schema, format_checker=validator.FORMAT_CHECKER).iter_errors(value), None)
        counts["invalid" if error else "valid"] += 1
        if error:
            print(result["schema"], error.message[:200])
    print(dict(counts))


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
commands = parser.add_subparsers(required=True)
for command in (gaps, beside, answers, check):
    sub = commands.add_parser(command.__name__)
    sub.set_defaults(run=command)
    if command is not check:
        sub.add_argument("--url", default="http://127.0.0.1:8000")
    if command is gaps:
        sub.add_argument("--streams", type=int, default=32)
        sub.add_argument("--tokens", type=int, default=256)
        sub.add_argument("--rounds", type=int, default=4)
    elif command is beside:
        sub.add_argument("--plain", type=int, default=8)
        sub.add_argument("--bound", type=int, default=4)
        sub.add_argument("--every-ms", type=int, default=50)
        sub.add_argument("--prompt-tokens", type=int, default=512)
        sub.add_argument("--tokens", type=int, default=512)
        sub.add_argument("--seconds", type=int, default=120)
    else:
        sub.add_argument("--schemas", type=Path, required=True)
        sub.add_argument("--every", type=int, default=10)
    if command is answers:
        sub.add_argument("--out", type=Path, required=True)
    if command is check:
        sub.add_argument("file", type=Path)
arguments = parser.parse_args()
arguments.run(arguments)
