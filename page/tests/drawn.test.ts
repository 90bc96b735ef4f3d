// Where things are drawn: boxes and links of the cluster, axes of charts.

import assert from "node:assert/strict";
import { test } from "node:test";

import { limits } from "../src/chat/model";
import { picture, type Picture } from "../src/cluster/layout";
import { flows } from "../src/cluster/links";
import { seen } from "../src/cluster/seen";
import type { Worker } from "../src/cluster/types";
import { axis, written } from "../src/load/axis";

/** Workers by name and role, each reading from all others that run prompts. */
function cluster(...roles: Worker["role"][]): Picture | null {
  const load = { waiting: 0, running: 0, waiting_tokens: 0, leased: 0, pulling: 0, blocks_used: 0, blocks_cached: 0, blocks_quarantined: 0 };
  const names = roles.map((role, index) => `${role}-${index}`);
  const workers = roles.map((role, index): Worker => {
    const sources = names.filter((_, at) => at !== index && roles[at] !== "decode" && role !== "context");
    const peers = sources.map((worker) => ({ worker, state: "ready", transport: "tcp", gigabytes_per_second: 1 }));
    const capacity = { blocks: 1, batch: 1, queue: 1 };
    return { worker: names[index]!, incarnation: "1", role, state: "serving", silent_ms: 0, device: "cpu", weights: "bf16", transport: "", load, capacity, peers };
  });
  const shown = seen([], workers, 0);
  return picture(shown, flows(shown, new Map(), 0));
}

const MIXES: Worker["role"][][] = [
  ["both", "both"],
  ["both", "both", "both"],
  ["both", "both", "both", "both", "both"],
  ["context", "decode"],
  ["context", "context", "decode", "decode", "decode", "both", "both"],
  ["context", "both"],
  ["decode", "both"],
];

test("each worker is one box, and none is upon another", () => {
  for (const mix of MIXES) {
    const { boxes, height } = cluster(...mix)!;
    const names = boxes.map(({ it }) => it.worker.worker);
    assert.equal(new Set(names).size, mix.length, `${mix}: ${names}`);
    for (const isLeft of [true, false]) {
      const column = boxes.filter((it) => it.isLeft === isLeft).sort((a, b) => a.y - b.y);
      const edges = column.flatMap(({ y, height }) => [y - height / 2, y + height / 2]);
      assert.deepEqual(edges, [...edges].sort((a, b) => a - b), `${mix}: ${edges}`);
      assert.ok(edges.every((y) => y >= 0 && y <= height));
    }
  }
  assert.equal(cluster("both"), null, "one worker hands nothing over");
  assert.equal(cluster(), null);
});

test("each link is a line of its own, and the two between a pair do not cross", () => {
  for (const mix of MIXES) {
    const { lines } = cluster(...mix)!;
    const readers = mix.filter((role) => role !== "context").length;
    const sources = mix.filter((role) => role !== "decode").length;
    const selves = mix.filter((role) => role === "both").length;
    assert.equal(lines.length, readers * sources - selves, `${mix}`);
    assert.equal(new Set(lines.map((it) => it.path)).size, lines.length);
  }
  const [one, other] = cluster("both", "both")!.lines;
  // One goes right above, the other left below.
  const [right, left] = one!.tip.isRightwards ? [one!, other!] : [other!, one!];
  assert.ok(right.tip.y < left.tip.y && right.tip.x > left.tip.x);
});

test("numbers of links are at their readers, none upon another", () => {
  for (const mix of MIXES) {
    const { lines, isNumbered } = cluster(...mix)!;
    if (!isNumbered) continue;
    const places = lines.map(({ label }) => `${label.x} ${label.y}`);
    assert.equal(new Set(places).size, lines.length, `${mix}: ${places}`);
  }
});

test("axes have round numbers, and whole ones where things are counted", () => {
  assert.deepEqual(axis(0, true), [0, 1]);
  assert.deepEqual(axis(1, true), [0, 1]);
  assert.deepEqual(axis(3, true), [0, 1, 2, 3]);
  assert.deepEqual(axis(5, true), [0, 2, 4, 6]);
  assert.deepEqual(axis(100, false), [0, 50, 100]);
  assert.deepEqual(axis(0, false), [0, 1]);
  assert.deepEqual(axis(0.03, false), [0, 0.01, 0.02, 0.03]);
  for (let count = 0; count < 3_000; count++) {
    const ticks = axis(count, true);
    assert.ok(ticks.every(Number.isInteger) && ticks.length <= 5 && ticks.at(-1)! >= count, `${count}: ${ticks}`);
  }
  for (const value of [0.00012, 0.012, 0.07, 0.9, 1.1, 7, 12.5, 501, 98_765.4, 1_400_000]) {
    const ticks = axis(value, false);
    assert.ok(ticks.at(-1)! >= value && ticks.length >= 3 && ticks.length <= 5, `${value}: ${ticks}`);
    assert.equal(new Set(ticks.map(written)).size, ticks.length, `${value}: ${ticks.map(written)}`);
  }
  const numbers = [0, 0.012, 0.5, 2.5, 12.34, 150, 1_500, 2_000, 25_000, 1_000_000];
  assert.deepEqual(numbers.map(written), ["0", "0.012", "0.5", "2.5", "12.3", "150", "1.5k", "2k", "25k", "1M"]);
});

test("a model's limits are a line", () => {
  const model = { id: "m", max_model_len: 8192 };
  assert.equal(limits(model), "8,192 tokens for question and answer");
  assert.equal(limits({ ...model, default_max_tokens: null, tools: "auto" }), "8,192 tokens for question and answer · calls tools");
  assert.equal(
    limits({ ...model, default_max_tokens: 1024, tools: "required" }),
    "8,192 tokens for question and answer · answers of up to 1,024 unless a request says otherwise · calls tools only where tool_choice says so",
  );
});
