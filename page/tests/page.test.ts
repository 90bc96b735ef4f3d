import assert from "node:assert/strict";
import { test } from "node:test";

import { EventReader } from "../src/api";
import { withEvent } from "../src/chat/answer";
import { Chats } from "../src/chat/chats";
import { html } from "../src/chat/markdown";
import { asCurl, asPython, faults, requestBody } from "../src/chat/request";
import { load, save } from "../src/chat/store";
import { DEFAULTS, type Message } from "../src/chat/types";
import { flows, perSecond, type Readings, taken, width } from "../src/cluster/links";
import { seen, stateOf } from "../src/cluster/seen";
import { time, whole, widths, type Spent } from "../src/cluster/spent";
import type { Worker } from "../src/cluster/types";
import type { Reading } from "../src/load/charts";
import { History } from "../src/load/history";
import { growth, parse, quantile, selector, sum } from "../src/load/metrics";

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
  const more = { ...DEFAULTS, topK: "40", minP: "0.1", presencePenalty: "1", frequencyPenalty: "-1", repetitionPenalty: "1.1", reasoningEffort: "low" };
  const tools = '[{"type":"function","function":{"name":"f"}}]';
  const asked = requestBody("m", { messages, settings: { ...more, tools, toolChoice: "f" } });
  assert.deepEqual(
    [asked.top_k, asked.min_p, asked.presence_penalty, asked.frequency_penalty, asked.repetition_penalty, asked.reasoning_effort],
    [40, 0.1, 1, -1, 1.1, "low"],
  );
  assert.deepEqual(asked.tool_choice, { type: "function", function: { name: "f" } });
  // The client of OpenAI has no arguments of these names.
  assert.match(asPython("http://h", asked, false), /extra_body=\{\n +"top_k": 40,\n +"min_p": 0.1,\n +"repetition_penalty": 1.1,/);
  const choice = (toolChoice: string, of: string) => requestBody("m", { messages, settings: { ...more, tools: of, toolChoice } }).tool_choice;
  assert.deepEqual([choice("required", tools), choice("gone", tools), choice("required", "")], ["required", undefined, undefined]);
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

test("a worker that was started again before anybody missed it is seen to have died", () => {
  const worker = (incarnation: string, state = "serving") => ({ worker: "a", incarnation, role: "decode", state }) as Worker;
  const said = (list: ReturnType<typeof seen>) => list.map((it) => stateOf(it).said);
  let shown = seen([], [worker("1")], 0);
  shown = seen(shown, [worker("2")], 1_000);
  assert.deepEqual(said(shown), ["died, started again"]);
  shown = seen(shown, [worker("2")], 9_000);
  assert.deepEqual(said(shown), ["died, started again"]);
  shown = seen(shown, [worker("2", "draining")], 12_000);
  assert.deepEqual(said(shown), ["draining"]);
  // One that drained was to leave, and one that was shown as gone is back.
  assert.deepEqual(said(seen(shown, [worker("3")], 13_000)), ["serving"]);
  shown = seen(seen([], [worker("1")], 0), [], 500);
  assert.deepEqual(said(shown), ["gone"]);
  assert.deepEqual(said(seen(shown, [worker("2")], 1_000)), ["serving"]);
});

test("a link's rate is what its reader's counter grew by, beat by beat", () => {
  const reader = (bytes: number | null, silent_ms: number, pulled: number | null = 1) =>
    ({
      worker: "d",
      incarnation: "1",
      role: "decode",
      silent_ms,
      load: { pulling: 1 },
      peers: [{ worker: "c", state: "ready", pulled_bytes: bytes, pulled_gigabytes_per_second: pulled }],
    }) as unknown as Worker;
  const source = { worker: "c", incarnation: "1", role: "context", silent_ms: 0, peers: [] } as unknown as Worker;
  const at = (worker: Worker, before: Readings, now: number) => {
    const readings = taken(before, [worker], now);
    const flow = flows(seen([], [source, worker], now), readings, now)[0]!;
    return { readings, rate: flow.rate, isBusy: flow.isBusy };
  };
  // Before its first pull a worker says nothing.
  let it = at(reader(null, 100, null), new Map(), 1_000);
  assert.deepEqual([it.rate, it.isBusy], [null, false]);
  it = at(reader(4_000_000, 100), it.readings, 2_000);
  assert.deepEqual([it.rate, it.isBusy], [4_000_000, true]);
  // The same beat once more, seen later.
  it = at(reader(4_000_000, 350), it.readings, 2_250);
  assert.equal(it.rate, 4_000_000);
  it = at(reader(4_000_000, 0), it.readings, 2_900);
  assert.equal(it.rate, 2_000_000);
  // Another connection counts from nothing.
  it = at(reader(2_000_000, 0), it.readings, 3_900);
  assert.equal(it.rate, 2_000_000);
  for (const now of [4_900, 5_900, 6_900, 7_900]) it = at(reader(2_000_000, 0), it.readings, now);
  assert.deepEqual([it.rate, it.isBusy], [0, false]);
  // One that fell silent tells nothing.
  assert.equal(at(reader(9_000_000, 5_100), it.readings, 13_000).rate, null);
  // A worker of old does not count: it is busy if it says that it pulls.
  it = at(reader(null, 0), new Map(), 1_000);
  assert.deepEqual([it.rate, it.isBusy], [null, true]);
  assert.deepEqual([0, 1_500, 2_340_000, 150e6, 4.5e9].map(perSecond), ["0 kB/s", "1.5 kB/s", "2.3 MB/s", "150 MB/s", "4.5 GB/s"]);
  assert.ok(width(1e4) < width(1e7) && width(1e7) < width(1e9) && width(1e12) <= 10);
});

test("lines go back five minutes, and have a gap where nobody looked", () => {
  const metrics = (count: number) => parse(`t ${count}\n`);
  const line = { label: "l", value: (before: Reading, after: Reading) => growth(before.metrics, after.metrics, selector("t")) };
  const history = new History([{ title: "t", unit: "", lines: [line] }]);
  const drawn = () => history.points(0, 0);
  for (let second = 0; second < 20; second += 5) history.take({ at: second * 1e3, metrics: metrics(second) });
  assert.deepEqual(drawn(), [5, 10, 15].map((second) => ({ at: second * 1e3, value: 5 })));
  // Looked at every second, each point is still of five.
  for (let second = 16; second <= 20; second++) history.take({ at: second * 1e3, metrics: metrics(second) });
  assert.deepEqual(drawn().at(-1), { at: 20_000, value: 5 });
  history.take({ at: 60_000, metrics: metrics(60) });
  assert.deepEqual(drawn().at(-1), { at: 60_000, value: null });
  history.take({ at: 65_000, metrics: metrics(65) });
  assert.deepEqual(drawn().at(-1), { at: 65_000, value: 5 });
  for (let second = 70; second <= 1_000; second += 5) history.take({ at: second * 1e3, metrics: metrics(second) });
  assert.equal(history.span()!.to - history.span()!.from, 300_000);
  assert.equal(drawn().length, 61);
});

/** As a browser's, with what it tells other tabs. */
class Cupboard {
  readonly entries = new Map<string, string>();
  readonly tabs: Chats[] = [];
  room = Infinity;
  get length() {
    return this.entries.size;
  }
  key(index: number) {
    return [...this.entries.keys()][index] ?? null;
  }
  getItem(key: string) {
    return this.entries.get(key) ?? null;
  }
  setItem(key: string, value: string) {
    const others = [...this.entries].filter(([it]) => it !== key).reduce((sum, [, it]) => sum + it.length, 0);
    if (others + value.length > this.room) throw new Error("no room");
    this.entries.set(key, value);
  }
  removeItem(key: string) {
    this.entries.delete(key);
  }
  /** What the tab that writes is for the others. */
  of(tab: () => Chats) {
    const tell = (key: string, newValue: string | null) => {
      for (const other of this.tabs) if (other !== tab()) other.heard({ key, newValue });
    };
    const cupboard = this;
    return {
      get length() {
        return cupboard.length;
      },
      key: (index: number) => cupboard.key(index),
      getItem: (key: string) => cupboard.getItem(key),
      setItem: (key: string, value: string) => (cupboard.setItem(key, value), tell(key, value)),
      removeItem: (key: string) => (cupboard.removeItem(key), tell(key, null)),
    };
  }
}

/** A tab, and its streams: what they say, and how they end. */
function tab(cupboard: Cupboard) {
  const streams: { say: (data: string) => void; end: () => void; signal: AbortSignal }[] = [];
  const chats: Chats = new Chats(
    cupboard.of(() => chats),
    (_path, _body, say, signal) =>
      new Promise((end, fail) => {
        streams.push({ say, end: () => end(), signal });
        signal.addEventListener("abort", () => fail(new Error("aborted")));
      }),
  );
  cupboard.tabs.push(chats);
  return { chats, streams };
}

const says = (content: string) => JSON.stringify({ choices: [{ delta: { content } }] });
const question = (content: string): Message[] => [{ role: "user", content }];
const contents = (chats: Chats) => chats.all.filter((it) => it.asked).map((it) => it.messages.map((message) => message.content));
const settled = () => new Promise((after) => setTimeout(after));
globalThis.requestAnimationFrame = (draw) => Number(setTimeout(draw, 0));
globalThis.cancelAnimationFrame = (id) => clearTimeout(id);

test("an answer goes into its own conversation, whatever is done meanwhile", async () => {
  const cupboard = new Cupboard();
  const { chats, streams } = tab(cupboard);
  const first = chats.current.id;
  assert.ok(chats.ask(first, question("one"), "m"));
  // The question is kept before there is an answer.
  assert.deepEqual(load(cupboard)[0]!.messages.map((it) => it.content), ["one", ""]);
  streams[0]!.say(says("a"));
  chats.new();
  const second = chats.current.id;
  assert.notEqual(second, first);
  chats.change(first, (it) => ({ ...it, settings: { ...it.settings, seed: "7" } }));
  assert.ok(chats.ask(second, question("two"), "m"));
  streams[0]!.say(says("b"));
  streams[0]!.end();
  await settled();
  assert.equal(chats.current.id, second);
  const kept = load(cupboard).find((it) => it.id === first)!;
  assert.deepEqual([kept.messages.at(-1)!.content, kept.settings.seed, kept.answering], ["ab", "7", 0]);
  // One that is deleted is stopped, and does not come back.
  streams[1]!.say(says("c"));
  chats.remove(second);
  assert.ok(streams[1]!.signal.aborted);
  await settled();
  assert.deepEqual(contents(chats), [["one", "ab"]]);
  assert.deepEqual(load(cupboard).map((it) => it.id), [first]);
  // No more at once than a browser has connections for.
  for (let count = 0; count < 3; count++) {
    chats.new();
    assert.ok(chats.ask(chats.current.id, question("more"), "m"));
  }
  assert.equal(chats.ask(first, question("too many"), "m"), false);
  assert.match(chats.fault, /3 answers/);
  for (const stream of streams) stream.end();
  await settled();
});

test("two tabs keep each other's conversations", async () => {
  const cupboard = new Cupboard();
  const [one, two] = [tab(cupboard), tab(cupboard)];
  one.chats.ask(one.chats.current.id, question("of one"), "m");
  two.chats.ask(two.chats.current.id, question("of two"), "m");
  one.streams[0]!.say(says("1"));
  two.streams[0]!.say(says("2"));
  // While one tab gets an answer, the other one asks nothing there.
  const id = one.chats.current.id;
  assert.equal(two.chats.ask(id, question("at once"), "m"), false);
  assert.match(two.chats.fault, /another tab/);
  one.streams[0]!.end();
  two.streams[0]!.end();
  await settled();
  for (const chats of [one.chats, two.chats, tab(cupboard).chats])
    assert.deepEqual(contents(chats).sort(), [
      ["of one", "1"],
      ["of two", "2"],
    ]);
  assert.equal(two.chats.current.messages[0]!.content, "of two", "what is shown stays");
  two.chats.remove(id);
  assert.deepEqual(contents(one.chats), [["of two", "2"]]);
  assert.equal(load(cupboard).length, 1);
});

test("conversations of earlier versions are taken over, and the oldest go when there is no room", () => {
  const cupboard = new Cupboard();
  const old = (id: string) => ({ id, title: id, messages: question(id), settings: { seed: "3" } });
  cupboard.setItem("baton.conversations", JSON.stringify([old("new"), old("old"), { no: "conversation" }]));
  const all = load(cupboard);
  assert.deepEqual(all.map((it) => it.id), ["new", "old"]);
  assert.deepEqual([all[0]!.settings.seed, all[0]!.settings.maxTokens, all[0]!.answering], ["3", "1024", 0]);
  assert.equal(cupboard.getItem("baton.conversations"), null);
  cupboard.setItem("baton.conversation.broken", "{");
  assert.equal(load(cupboard).length, 2);
  cupboard.removeItem("baton.conversation.broken");
  cupboard.room = [...cupboard.entries.values()].reduce((sum, it) => sum + it.length, 0) + 20;
  const third = { ...all[0]!, id: "third", asked: Date.now() };
  assert.ok(save(cupboard, third));
  assert.deepEqual(load(cupboard).map((it) => it.id), ["third", "new"]);
  cupboard.room = 10;
  assert.equal(save(cupboard, third), false);
});

test("metrics are read, counted and cut into quantiles", () => {
  const text = (n: number, low: number, high: number) =>
    `# HELP x y\nt_total{kind="a"} ${n}\nt_total{kind="b"} 5\nh_bucket{le="0.1"} ${low}\nh_bucket{le="1"} ${high}\nh_bucket{le="+Inf"} ${high}\n`;
  const [before, after] = [parse(text(10, 0, 0)), parse(text(30, 5, 10))];
  assert.equal(sum(after, selector("t_total")), 35);
  assert.equal(growth(before, after, selector('t_total{kind="a"}')), 20);
  assert.equal(growth(after, before, selector('t_total{kind="a"}')), 10, "a restart");
  assert.ok(Math.abs(quantile(before, after, selector("h_bucket"), 0.5)! - 0.1) < 1e-9);
  assert.ok(Math.abs(quantile(before, after, selector("h_bucket"), 0.75)! - 0.55) < 1e-9);
  assert.equal(quantile(after, after, selector("h_bucket"), 0.5), null);
});

test("a bar's parts are of the longest request's width", () => {
  const spent = { queue_ms: 10, prefill_ms: 30, handover_ms: 5, decode_ms: 55 } as Spent;
  assert.equal(whole(spent), 100);
  assert.deepEqual(widths(spent, 200), { queue: 5, prefill: 15, handover: 2.5, decode: 27.5 });
  const none = { queue_ms: 0, prefill_ms: 0, handover_ms: 0, decode_ms: 0 } as Spent;
  assert.deepEqual(widths(none, 0), { queue: 0, prefill: 0, handover: 0, decode: 0 });
  assert.deepEqual([0.05, 99.94, 250.4, 1_234, 61_000].map(time), ["0.1 ms", "99.9 ms", "250 ms", "1.23 s", "61.0 s"]);
});
