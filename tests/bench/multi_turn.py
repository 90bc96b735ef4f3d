"""Conversations of several turns: how much of each prompt comes from the cache, and how long its first token takes.

Usage: multi_turn.py [--url http://127.0.0.1:8000] [--conversations 64] [--rate 4] [--turns 8] [--system-tokens 2000]
                     [--turn-tokens 400] [--answer-tokens 100] [--think-s 1] [--seed 1]

Any server with OpenAI's streamed chat completions will do. Conversations begin at random times (Poisson, --rate a second, the
same for the same --seed), all with one system prompt. A turn is a question and its answer, --turn-tokens together; the next
question comes --think-s after the answer. Words are drawn by the seed and counted in tokens by asking the server once, so
that prompts are within a few percent of what was asked for; what is reported is the server's own count.

Prints JSON: `cached_share` of all prompt tokens, beside `reachable_share`: what earlier turns and, after the first conversation,
the system prompt had already put somewhere. `by_turn` has the same for each turn, and the first token's time at p50 and p99.
"""

import argparse
import http.client
import json
import os
import random
import sys
import threading
import time
import urllib.parse

WORDS = (
    "the and of to in a is that for it was on are as with his they at be this from have or by one had not but what all were when we "
    "there can an your which their said if do will each about how up out them then she many some so these would other into has more "
    "her two like him see time could no make than first been its who now people my made over did down only way find use may water "
    "long little very after words called just where most know get through back much before go good new write our me man any day same"
).split()

parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
parser.add_argument("--url", default="http://127.0.0.1:8000")
parser.add_argument("--model", help="[default: the one that is served]")
parser.add_argument("--conversations", type=int, default=64)
parser.add_argument("--rate", type=float, default=4, help="conversations that begin in a second")
parser.add_argument("--turns", type=int, default=8)
parser.add_argument("--system-tokens", type=int, default=2000)
parser.add_argument("--turn-tokens", type=int, default=400, help="of a question and its answer")
parser.add_argument("--answer-tokens", type=int, default=100)
parser.add_argument("--think-s", type=float, default=1)
parser.add_argument("--timeout-s", type=float, default=600, help="a turn is given up after this, and its conversation ends")
parser.add_argument("--seed", type=int, default=1)
arguments = parser.parse_args()
if arguments.answer_tokens >= arguments.turn_tokens:
    parser.error("--answer-tokens must be less than --turn-tokens")
at = urllib.parse.urlsplit(arguments.url)
if at.scheme not in ("http", "https") or not at.hostname:
    parser.error("--url is not like http://HOST:PORT")


def request(method, path, body=None):
    """The open response; who calls closes its connection."""
    kind = http.client.HTTPSConnection if at.scheme == "https" else http.client.HTTPConnection
    connection = kind(at.hostname, at.port, timeout=arguments.timeout_s)
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    try:
        connection.request(method, at.path.rstrip("/") + path, json.dumps(body) if body else None, headers)
        response = connection.getresponse()
        if response.status != 200:
            raise OSError(f"{path}: HTTP {response.status}: {response.read(500).decode(errors='replace')}")
    except BaseException:
        connection.close()
        raise
    return connection, response


def words(draw, count):
    return " ".join(draw.choices(WORDS, k=count))


def turn(model, messages, answer_tokens):
    """One turn: its answer, usage, and the milliseconds to its first token."""
    body = {
        "model": model, "messages": messages, "max_tokens": answer_tokens, "ignore_eos": True, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True},
    }
    begun, first, text, usage = time.monotonic(), None, [], None
    connection, response = request("POST", "/v1/chat/completions", body)
    try:
        for line in response:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            event = json.loads(line[len(b"data: "):])
            if "error" in event:
                raise OSError(str(event["error"]))
            usage = event.get("usage") or usage
            for choice in event.get("choices", []):
                piece = choice["delta"].get("content") or ""
                if first is None and (piece or choice.get("finish_reason")):
                    first = time.monotonic() - begun
                text.append(piece)
    finally:
        connection.close()
    if usage is None or first is None:
        raise OSError("the stream ended without usage or without a token")
    return "".join(text), usage, 1e3 * first


def words_a_token(model):
    """By a prompt of many words beside one of a single word."""
    draw = random.Random(0)
    few, many = (turn(model, [{"role": "user", "content": words(draw, count)}], 1)[1]["prompt_tokens"] for count in (1, 201))
    return 200 / max(many - few, 1)


class Tally:
    def __init__(self):
        self.lock = threading.Lock()
        self.turns = [[] for _ in range(arguments.turns)]
        self.failures = []


def converse(number, begins, model, scale, system, tally):
    draw = random.Random(f"{arguments.seed} {number}")
    messages = [{"role": "system", "content": system}]
    question_words = round((arguments.turn_tokens - arguments.answer_tokens) * scale)
    time.sleep(max(begins - time.monotonic(), 0))
    before = 0
    for at_turn in range(arguments.turns):
        messages.append({"role": "user", "content": words(draw, question_words)})
        try:
            answer, usage, first_ms = turn(model, messages, arguments.answer_tokens)
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            with tally.lock:
                tally.failures.append(f"conversation {number}, turn {at_turn + 1}: {error}")
            return
        details = usage.get("prompt_tokens_details") or {}
        row = (usage["prompt_tokens"], details.get("cached_tokens") or 0, before, first_ms)
        with tally.lock:
            tally.turns[at_turn].append(row)
        before = usage["prompt_tokens"] + usage["completion_tokens"]
        messages.append({"role": "assistant", "content": answer})
        if at_turn + 1 < arguments.turns:
            time.sleep(arguments.think_s)


def quantile(values, share):
    values = sorted(values)
    return values[min(int(share * len(values)), len(values) - 1)] if values else None


def shares(rows, system_tokens, is_first):
    """Tokens of prompts, those that were cached, and those that could have been."""
    prompts = sum(prompt for prompt, *_ in rows)
    cached = sum(cached for _, cached, *_ in rows)
    reachable = sum(min(before or system_tokens, prompt) for prompt, _, before, _ in rows)
    # Somebody has to be the first to have the system prompt run.
    reachable -= min(system_tokens, prompts) if is_first and rows else 0
    return prompts, cached, reachable


def ratio(part, whole):
    return round(part / whole, 4) if whole else None


def main():
    model = arguments.model
    if model is None:
        connection, response = request("GET", "/v1/models")
        model = json.load(response)["data"][0]["id"]
        connection.close()
    scale = words_a_token(model)
    system = words(random.Random(f"{arguments.seed} system"), round(arguments.system_tokens * scale))
    alone = turn(model, [{"role": "user", "content": "x"}], 1)[1]["prompt_tokens"]
    arrivals, when = random.Random(f"{arguments.seed} arrivals"), time.monotonic()
    tally, threads = Tally(), []
    begun = time.monotonic()
    for number in range(arguments.conversations):
        thread = threading.Thread(target=converse, args=(number, when, model, scale, system, tally), daemon=True)
        thread.start()
        threads.append(thread)
        when += arrivals.expovariate(arguments.rate)
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - begun
    question = round(arguments.turn_tokens - arguments.answer_tokens)
    firsts = [prompt for prompt, *_ in tally.turns[0]]
    # What is left of a first prompt without its question and what the template writes round it.
    system_tokens = max(round(sum(firsts) / len(firsts)) - question - alone, 0) if firsts else 0
    by_turn, totals = [], (0, 0, 0)
    for number, rows in enumerate(tally.turns):
        prompts, cached, reachable = shares(rows, system_tokens, number == 0)
        totals = tuple(map(sum, zip(totals, (prompts, cached, reachable))))
        first_ms = [row[3] for row in rows]
        by_turn.append({
            "turn": number + 1,
            "requests": len(rows),
            "prompt_tokens_mean": round(prompts / len(rows)) if rows else None,
            "cached_share": ratio(cached, prompts),
            "reachable_share": ratio(reachable, prompts),
            "first_token_ms_p50": rows and round(quantile(first_ms, 0.5), 1) or None,
            "first_token_ms_p99": rows and round(quantile(first_ms, 0.99), 1) or None,
        })
    prompts, cached, reachable = totals
    everything = [row[3] for rows in tally.turns for row in rows]
    print(json.dumps({
        "model": model,
        "conversations": arguments.conversations,
        "rate": arguments.rate,
        "turns": arguments.turns,
        "seconds": round(seconds, 2),
        "requests": len(everything),
        "failed": len(tally.failures),
        "prompt_tokens": prompts,
        "cached_tokens": cached,
        "cached_share": ratio(cached, prompts),
        "reachable_share": ratio(reachable, prompts),
        "first_token_ms_p50": everything and round(quantile(everything, 0.5), 1) or None,
        "first_token_ms_p99": everything and round(quantile(everything, 0.99), 1) or None,
        "by_turn": by_turn,
    }, indent=2))
    for failure in tally.failures[:10]:
        print(failure, file=sys.stderr)
    sys.exit(1 if tally.failures else 0)


main()
