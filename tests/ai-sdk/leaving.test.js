// A client that leaves: the generation ends, whole or streamed.

import assert from "node:assert/strict";
import { setTimeout as sleep } from "node:timers/promises";

import { ai, each, get, once, quiet } from "./baton.js";
import { QUESTION } from "./shapes.js";

const { generateText, streamText } = ai;

const ask = { prompt: QUESTION, ...once, temperature: 0, maxOutputTokens: 1500 };

// The request that ended last, once none is under way; the test's limit ends a wait without end.
async function last() {
  for (;;) {
    const { totals, requests } = await get("/requests");
    if (totals.running === 0 && totals.waiting === 0) return requests[0];
    await sleep(20);
  }
}

each("leaving a stream ends the generation", async (model) => {
  const leave = new AbortController();
  const stream = streamText({ model, ...ask, abortSignal: leave.signal, ...quiet });
  const types = [];
  for await (const part of stream.fullStream) {
    types.push(part.type);
    if (types.filter((type) => type === "text-delta").length === 2) leave.abort();
  }
  assert.equal(types.at(-1), "abort");
  assert.ok(!types.includes("finish"));
  assert.equal((await last()).outcome, "client_left");
}, { alone: true });

each("leaving before an answer is whole ends the generation", async (model) => {
  const before = await last();
  const abortSignal = AbortSignal.timeout(150);
  const asked = generateText({ model, ...ask, abortSignal });
  const error = await asked.then(() => null, (error) => error);
  // On a quick machine the answer may be whole by then; on a slow one nothing may have begun.
  if (error !== null) assert.ok(["AbortError", "TimeoutError"].includes(error.name), error);
  const ended = await last();
  if (error !== null && ended.number !== before?.number) assert.equal(ended.outcome, "client_left");
}, { alone: true });
