// The SDK, its models of the cluster under test, and what the tests share.
//
// BATON_URL     the API server
// BATON_MODEL   its model
// AI_SDK        the SDK's major version: 7 (default) or 6, each with the providers made for it

import assert from "node:assert/strict";
import { describe, test } from "node:test";

export const url = process.env.BATON_URL;
export const modelName = process.env.BATON_MODEL;
export const newest = (process.env.AI_SDK ?? "7") === "7";

export const ai = await import(newest ? "ai" : "ai-6");
const { createAnthropic } = await import(newest ? "@ai-sdk/anthropic" : "anthropic-3");
const { createOpenAI } = await import(newest ? "@ai-sdk/openai" : "openai-3");
const { createOpenAICompatible } = await import(newest ? "@ai-sdk/openai-compatible" : "openai-compatible-2");

// Each test compares the warnings of its answers instead.
globalThis.AI_SDK_LOG_WARNINGS = false;

// `fetch` is for tests that watch what is sent.
export const providers = (fetch, address = `${url}/v1`) => ({
  compatible: createOpenAICompatible({ name: "baton", baseURL: address, includeUsage: true, supportsStructuredOutputs: true, fetch }),
  openai: createOpenAI({ baseURL: address, apiKey: "none", fetch }),
  anthropic: createAnthropic({ baseURL: address, apiKey: "none", fetch }),
});

export const { compatible, openai, anthropic } = providers();

// The ways to the model. `options` is the provider's key in providerOptions and providerMetadata; `unsupported` are the settings
// that the provider does not send, with a warning.
const WAYS = {
  compatible: {
    make: (name, fetch) => providers(fetch).compatible(name),
    options: "baton",
    unsupported: ["topK"],
  },
  chat: {
    make: (name, fetch) => providers(fetch).openai.chat(name),
    options: "openai",
    unsupported: ["topK"],
  },
  responses: {
    make: (name, fetch) => providers(fetch).openai.responses(name),
    options: "openai",
    unsupported: ["frequencyPenalty", "presencePenalty", "seed", "stopSequences", "topK"],
  },
  messages: {
    make: (name, fetch) => providers(fetch).anthropic(name),
    options: "anthropic",
    unsupported: ["frequencyPenalty", "presencePenalty", "seed"],
  },
};
export const ways = Object.entries(WAYS).map(([name, way]) => ({ name, ...way }));

// A hanging request ends here. Nothing is retried unless a test is about retries.
const LIMIT_MS = 90_000;
export const once = { maxRetries: 0 };

/** A test with a limit. */
export function check(name, body) {
  test(name, { timeout: LIMIT_MS }, body);
}

/** A test for each way to the model, or for those of `only`; side by side, unless `alone`. */
export function each(name, body, { only = Object.keys(WAYS), alone = false } = {}) {
  describe(name, { concurrency: !alone }, () => {
    for (const way of ways) {
      if (only.includes(way.name)) check(`${name}: ${way.name}`, () => body(way.make(modelName), way));
    }
  });
}

/** Provider options under the key of `way`. */
export function optionsOf(way, options) {
  return { providerOptions: { [way.options]: options } };
}

/** Asserts which settings were warned of: none unless they are named. */
export function warned(warnings, features = []) {
  const seen = (warnings ?? []).map((warning) => warning.feature ?? warning.setting ?? warning.message);
  assert.deepEqual(seen.sort(), [...features].sort(), JSON.stringify(warnings));
}

/** Asserts that usage is whole and adds up. */
export function used(usage, outputMax) {
  assert.ok(usage.inputTokens > 0, JSON.stringify(usage));
  assert.ok(usage.outputTokens > 0 && usage.outputTokens <= outputMax, JSON.stringify(usage));
  assert.equal(usage.totalTokens, usage.inputTokens + usage.outputTokens);
  const { cacheReadTokens, noCacheTokens } = usage.inputTokenDetails;
  if (cacheReadTokens !== undefined) assert.equal(cacheReadTokens + noCacheTokens, usage.inputTokens);
}

/** A stream, read to its end: its parts by type, in order, and what they hold. Errors of the stream are thrown. */
export async function read(stream) {
  const parts = [];
  for await (const part of stream.fullStream) {
    if (part.type === "error") throw part.error;
    parts.push(part);
  }
  const of = (type) => parts.filter((part) => part.type === type);
  return {
    parts,
    of,
    types: parts.map((part) => part.type),
    text: of("text-delta").map((part) => part.text).join(""),
    reasoning: of("reasoning-delta").map((part) => part.text).join(""),
  };
}

/** Errors of streams are parts of them: nothing need be printed. */
export const quiet = { onError() {} };

/** The error of a request that the server refused. */
export async function refusal(promise) {
  const error = await promise.then(
    () => assert.fail("it was not refused"),
    (error) => error,
  );
  assert.ok(ai.APICallError.isInstance(error), `${error.name}: ${error.message}`);
  assert.equal(error.isRetryable, false);
  assert.ok(error.responseHeaders["x-request-id"]);
  return error;
}

/** What the server says at `path`. */
export async function get(path) {
  const response = await fetch(url + path);
  assert.equal(response.status, 200);
  return response.json();
}

/** The one token that `text` is. */
export async function token(text) {
  const body = JSON.stringify({ prompt: text, add_special_tokens: false });
  const response = await fetch(`${url}/tokenize`, { method: "POST", body, headers: { "content-type": "application/json" } });
  const { tokens } = await response.json();
  assert.equal(tokens.length, 1);
  return tokens[0];
}
