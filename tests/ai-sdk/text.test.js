// Text: whole and streamed, chats of several turns, settings, stop sequences.

import assert from "node:assert/strict";

import { ai, compatible, each, modelName, newest, once, openai, quiet, read, optionsOf, used, warned } from "./baton.js";
import { QUESTION } from "./shapes.js";

const { generateText, streamText } = ai;

const small = { ...once, temperature: 0, maxOutputTokens: 12 };

each("an answer", async (model, way) => {
  const answer = await generateText({ model, prompt: QUESTION, ...small });
  assert.ok(answer.text);
  assert.ok(["stop", "length"].includes(answer.finishReason));
  assert.ok(answer.rawFinishReason);
  used(answer.usage, 12);
  warned(answer.warnings);
  assert.equal(answer.response.modelId, modelName);
  assert.ok(answer.response.id);
  assert.ok(answer.response.headers["x-request-id"]);
  // Anthropic's have no date: the SDK takes its own clock's
  assert.ok(Math.abs(answer.response.timestamp - Date.now()) < 600_000);
  assert.ok(answer.content.every((part) => part.type === "text"));
  if (way.name === "messages") assert.ok(answer.response.headers["request-id"]);
});

each("a stream is the same answer", async (model) => {
  const whole = await generateText({ model, prompt: QUESTION, ...small });
  const stream = streamText({ model, prompt: QUESTION, ...small, ...quiet });
  const { text, types, of } = await read(stream);
  assert.equal(text, whole.text);
  assert.ok(of("text-delta").length > 2);
  for (const type of ["start", "start-step", "text-start", "text-end", "finish-step", "finish"]) assert.equal(of(type).length, 1, type);
  assert.ok(types.indexOf("text-start") < types.indexOf("text-delta") && types.lastIndexOf("text-delta") < types.indexOf("text-end"));
  assert.equal(await stream.finishReason, whole.finishReason);
  const usage = await stream.usage;
  used(usage, 12);
  assert.equal(usage.inputTokens, whole.usage.inputTokens);
  assert.equal(usage.outputTokens, whole.usage.outputTokens);
  warned(await stream.warnings);
  assert.equal((await stream.response).modelId, modelName);
});

// The SDK's own record of the first answer is sent back: OpenAI's responses as references to what the server keeps.
each("a chat goes on", async (model) => {
  const system = "Be brief.";
  const first = await generateText({ model, system, prompt: QUESTION, ...small });
  const question = { role: "user", content: "And in Rome?" };
  const messages = [{ role: "user", content: QUESTION }, ...first.response.messages, question];
  const second = await generateText({ model, system, messages, ...small });
  warned(second.warnings);
  assert.ok(second.usage.inputTokens > first.usage.inputTokens);
  const streamed = await read(streamText({ model, system, messages, ...small, ...quiet }));
  assert.equal(streamed.text, second.text);
});

each(
  "a chat goes on that is not kept",
  async (model, way) => {
    const options = optionsOf(way, { store: false });
    const first = await generateText({ model, prompt: QUESTION, ...small, ...options });
    const messages = [{ role: "user", content: QUESTION }, ...first.response.messages, { role: "user", content: "And in Rome?" }];
    const second = await generateText({ model, messages, ...small, ...options });
    warned(second.warnings);
    assert.ok(second.usage.inputTokens > first.usage.inputTokens);
  },
  { only: ["chat", "responses"] },
);

each(
  "a chat goes on by the id of its last response",
  async (model, way) => {
    const first = await generateText({ model, prompt: QUESTION, ...small });
    const previousResponseId = first.providerMetadata.openai.responseId;
    const second = await generateText({ model, prompt: "And in Rome?", ...small, ...optionsOf(way, { previousResponseId }) });
    warned(second.warnings);
    assert.ok(second.usage.inputTokens > first.usage.inputTokens);
  },
  { only: ["responses"] },
);

each("the system prompt is seen", async (model) => {
  const long = "You answer questions about the weather in cities. ".repeat(4);
  const brief = await generateText({ model, system: "Be brief.", prompt: QUESTION, ...small });
  const answer = await generateText({ model, system: long, prompt: QUESTION, ...small });
  assert.ok(answer.usage.inputTokens > brief.usage.inputTokens + 20);
});

each("settings that a provider cannot send are warned of, all others taken", async (model, way) => {
  const settings = { temperature: 0.8, topP: 0.9, topK: 20, seed: 3, presencePenalty: 0.1, frequencyPenalty: 0.1, stopSequences: ["\n\n"] };
  const ask = { model, prompt: QUESTION, ...once, ...settings, maxOutputTokens: 8 };
  const answer = await generateText(ask);
  used(answer.usage, 8);
  warned(answer.warnings, way.unsupported);
  if (!way.unsupported.includes("seed")) assert.equal((await generateText(ask)).text, answer.text);
});

each(
  "a stop sequence ends an answer",
  async (model, way) => {
    const whole = await generateText({ model, prompt: QUESTION, ...small });
    const stop = whole.text.slice(3, 5);
    const answer = await generateText({ model, prompt: QUESTION, ...small, stopSequences: [stop] });
    assert.equal(answer.text, whole.text.slice(0, whole.text.indexOf(stop)));
    assert.equal(answer.finishReason, "stop");
    const stream = streamText({ model, prompt: QUESTION, ...small, stopSequences: [stop], ...quiet });
    assert.equal((await read(stream)).text, answer.text);
    assert.equal(await stream.finishReason, "stop");
    if (way.name === "messages") {
      assert.equal(answer.providerMetadata.anthropic.stopSequence, stop);
      assert.equal((await stream.providerMetadata).anthropic.stopSequence, stop);
    }
  },
  { only: ["compatible", "chat", "messages"] },
);

each("what a provider tells besides", async (model, way) => {
  const answer = await generateText({ model, prompt: QUESTION, ...small });
  const about = answer.providerMetadata[way.options];
  if (way.name === "responses") {
    assert.match(about.responseId, /^resp_/);
    assert.equal(about.serviceTier, "default");
    const part = answer.content.find((part) => part.type === "text");
    assert.match(part.providerMetadata.openai.itemId, /^msg_/);
  }
  if (way.name === "messages") {
    for (const field of ["input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"]) {
      assert.equal(typeof about.usage[field], "number", field);
    }
    assert.equal(answer.usage.inputTokenDetails.cacheWriteTokens, 0);
    assert.equal(about.usage.input_tokens + about.usage.cache_read_input_tokens, answer.usage.inputTokens);
  }
});

each(
  "completions",
  async (_, way) => {
    const model = way.name === "compatible" ? compatible.completionModel(modelName) : openai.completion(modelName);
    const ask = { model, prompt: QUESTION, ...small };
    const answer = await generateText(ask);
    assert.ok(answer.text);
    used(answer.usage, 12);
    // The SDK says `auto` by itself, and that this cannot be sent.
    warned(answer.warnings, newest ? ["toolChoice"] : answer.warnings.map((warning) => warning.feature));
    const stream = streamText({ ...ask, ...quiet });
    const { text, of } = await read(stream);
    assert.equal(text, answer.text);
    assert.ok(of("text-delta").length > 2);
    assert.equal(await stream.finishReason, answer.finishReason);
  },
  { only: ["compatible", "chat"] },
);

each("marks for caches are taken", async (model) => {
  const providerOptions = { anthropic: { cacheControl: { type: "ephemeral" } } };
  const messages = [
    { role: "system", content: "Be brief.", optionsOf },
    { role: "user", content: [{ type: "text", text: QUESTION, optionsOf }] },
  ];
  const ask = { model, messages, ...small, allowSystemInMessages: true };
  const answer = await generateText(ask);
  warned(answer.warnings);
  assert.ok(answer.text);
});
