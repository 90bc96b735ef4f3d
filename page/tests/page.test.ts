import assert from "node:assert/strict";
import { test } from "node:test";

import { EventReader } from "../src/api";
import { withEvent } from "../src/chat/answer";
import { html } from "../src/chat/markdown";
import { asCurl, asPython, faults, requestBody } from "../src/chat/request";
import { DEFAULTS, type Message } from "../src/chat/types";
import { seen } from "../src/cluster/seen";
import type { Worker } from "../src/cluster/types";
import { ceiling, written } from "../src/load/line_chart";
import { growth, parse, quantile, sum } from "../src/load/metrics";

test("events are cut wherever the bytes are", () => {
  const text = 'data: {"a":1}\r\n\r\n: nothing\n\ndata: {"b":\ndata: 2}\n\ndata: [DONE]\n\n';
  for (let piece = 1; piece < text.length; piece++) {
    const heard: string[] = [];
    const reader = new EventReader((data) => heard.push(data));
    for (let at = 0; at < text.length; at += piece) reader.take(text.slice(at, at + piece));
    assert.deepEqual(heard, ['{"a":1}', '{"b":\n2}', "[DONE]"]);
  }
});

test("an answer is put together from its chunks", () => {
  const chunks = [
    { choices: [{ delta: { reasoning_content: "hm" } }] },
    { choices: [{ delta: { content: "Par" } }] },
    { choices: [{ delta: { content: "is" } }] },
    { choices: [{ delta: { tool_calls: [{ index: 0, id: "c", function: { name: "f", arguments: '{"x"' } }] } }] },
    { choices: [{ delta: { tool_calls: [{ index: 0, function: { arguments: ":1}" } }] }, finish_reason: "tool_calls" }] },
    { choices: [], usage: { prompt_tokens: 9, completion_tokens: 4, prompt_tokens_details: { cached_tokens: 8 } } },
  ];
  let message: Message = { role: "assistant", content: "" };
  for (const chunk of chunks) message = withEvent(message, JSON.stringify(chunk));
  message = withEvent(message, "[DONE]");
  assert.equal(message.content, "Paris");
  assert.equal(message.reasoning, "hm");
  assert.deepEqual(message.toolCalls, [{ id: "c", name: "f", arguments: '{"x":1}' }]);
  assert.equal(message.end, "tool_calls");
  assert.deepEqual(message.usage, { prompt: 9, cached: 8, output: 4 });
  assert.equal(withEvent(message, '{"error":{"message":"no"}}').error, "no");
});

test("what a model writes stays text, and leads nowhere it should not", () => {
  const out = html("<img src=x onerror=alert(1)> [a](javascript:alert(1)) ![p](http://x/y.png) **b** <https://ok/>");
  assert.ok(!out.includes("<img"), out);
  assert.ok(!/href="javascript/i.test(out), out);
  assert.ok(out.includes("<strong>b</strong>"), out);
  assert.ok(out.includes('href="https://ok/"') && out.includes("noopener"), out);
});

test("settings become a body, and wrong ones are named", () => {
  const settings = { ...DEFAULTS, system: "s", temperature: "0", stop: "a\nb", schema: '{"type":"object"}', tools: "[]" };
  const messages: Message[] = [
    { role: "user", content: "hi" },
    { role: "assistant", content: "", error: "gone" },
    { role: "user", content: "it's" },
  ];
  const body = requestBody("m", { messages, settings });
  assert.deepEqual(
    (body.messages as { role: string }[]).map((it) => it.role),
    ["system", "user", "user"],
  );
  assert.equal(body.temperature, 0);
  assert.deepEqual(body.stop, ["a", "b"]);
  assert.ok(asCurl("http://h", body, true).includes("$BATON_API_KEY"));
  assert.ok(asCurl("http://h", body, false).includes("it'\\''s"));
  assert.ok(asPython("http://h", body, false).includes("stream=True"));
  assert.deepEqual(faults(DEFAULTS), {});
  const wrong = faults({ ...DEFAULTS, temperature: "hot", maxTokens: "1.5", schema: "{", tools: "{}" });
  assert.deepEqual(Object.keys(wrong).sort(), ["maxTokens", "schema", "temperature", "tools"]);
});

test("a worker that is gone is shown for a minute, one that drained is not", () => {
  const worker = (name: string, state = "serving") => ({ worker: name, incarnation: name, role: "decode", state }) as Worker;
  let shown = seen([], [worker("a"), worker("b"), worker("c", "draining")], 0);
  shown = seen(shown, [worker("a"), worker("b"), worker("c", "suspect")], 500);
  shown = seen(shown, [worker("a")], 1_000);
  assert.deepEqual(
    shown.map((it) => [it.worker.worker, it.isGone]),
    [
      ["a", false],
      ["b", true],
    ],
  );
  shown = seen(shown, [worker("a"), worker("b")], 2_000);
  assert.ok(shown.every((it) => !it.isGone));
  assert.equal(seen(seen(shown, [], 3_000), [], 70_000).length, 0);
});

test("metrics are read, counted and cut into quantiles", () => {
  const text = (n: number, low: number, high: number) =>
    `# HELP x y\nt_total{kind="a"} ${n}\nt_total{kind="b"} 5\nh_bucket{le="0.1"} ${low}\nh_bucket{le="1"} ${high}\nh_bucket{le="+Inf"} ${high}\n`;
  const [before, after] = [parse(text(10, 0, 0)), parse(text(30, 5, 10))];
  assert.equal(sum(after, "t_total"), 35);
  assert.equal(growth(before, after, "t_total", { kind: "a" }), 20);
  assert.equal(growth(after, before, "t_total", { kind: "a" }), 10, "a restart");
  assert.ok(Math.abs(quantile(before, after, "h", 0.5)! - 0.1) < 1e-9);
  assert.ok(Math.abs(quantile(before, after, "h", 0.75)! - 0.55) < 1e-9);
  assert.equal(quantile(after, after, "h", 0.5), null);
});

test("axes end at round numbers", () => {
  assert.deepEqual([0, 0.03, 7, 12, 501].map(ceiling), [1, 0.05, 10, 20, 1000]);
  assert.deepEqual([0.5, 12.34, 150, 1_500, 25_000].map(written), ["0.50", "12.3", "150", "1.5k", "25k"]);
});
