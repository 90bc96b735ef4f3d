// Options of the providers that Baton takes: no error, and no warning but the SDK's own.

import assert from "node:assert/strict";

import { ai, each, newest, once, quiet, read, optionsOf, used, warned } from "./baton.js";
import { QUESTION } from "./shapes.js";

const { generateText, streamText } = ai;

const ask = { prompt: QUESTION, ...once, temperature: 0, maxOutputTokens: 4 };

const OPENAI = {
  metadata: { task: "weather" },
  parallelToolCalls: false,
  promptCacheKey: "weather",
  safetyIdentifier: "someone",
  serviceTier: "auto",
  strictJsonSchema: true,
  user: "someone",
};

// All at once: each is a field of its own.
const TAKEN = {
  compatible: {
    ...{ user: "someone", reasoningEffort: "low", strictJsonSchema: true },
    // Fields that the provider does not know are sent as they are.
    ...{ top_k: 5, min_p: 0.1, chat_template_kwargs: { enable_thinking: false }, service_tier: "default" },
  },
  chat: {
    ...OPENAI,
    ...{ logitBias: { 5: 1 }, maxCompletionTokens: 4, reasoningEffort: "low", store: true, textVerbosity: "low" },
    prediction: { type: "content", content: "Sunny." },
  },
  responses: { ...OPENAI, include: ["reasoning.encrypted_content"], instructions: "Be brief.", store: true, truncation: "auto", textVerbosity: "high" },
  messages: {
    ...{ cacheControl: { type: "ephemeral", ttl: "1h" }, effort: "low", metadata: { userId: "someone" }, sendReasoning: false },
    ...{ disableParallelToolUse: true, thinking: { type: "adaptive" }, toolStreaming: true, speed: "fast" },
    contextManagement: { edits: [{ type: "clear_thinking_20251015", keep: "all" }] },
  },
};

each("options that are taken", async (model, way) => {
  const options = optionsOf(way, TAKEN[way.name]);
  // The SDK leaves sampling out where a model of Anthropic's thinks.
  const { temperature, ...rest } = ask;
  const answer = await generateText({ model, ...rest, ...options });
  warned(answer.warnings);
  used(answer.usage, 4);
  const stream = streamText({ model, ...rest, ...options, ...quiet });
  await read(stream);
  warned(await stream.warnings);
});

each(
  "log-probabilities",
  async (model, way) => {
    for (const logprobs of [true, 2]) {
      const options = optionsOf(way, { logprobs });
      const whole = await generateText({ model, ...ask, ...options });
      const stream = streamText({ model, ...ask, ...options, ...quiet });
      const { text } = await read(stream);
      for (const [about, said] of [[whole.providerMetadata, whole.text], [await stream.providerMetadata, text]]) {
        const tokens = about.openai.logprobs.flat();
        assert.equal(tokens.map((entry) => entry.token).join(""), said);
        for (const entry of tokens) {
          assert.ok(entry.logprob <= 0);
          if (logprobs === 2) assert.ok(entry.top_logprobs.length >= 2);
        }
      }
      warned(whole.warnings);
    }
  },
  { only: ["chat", "responses"] },
);

// `forceReasoning` takes a model whose name says nothing for one that reasons: the role `developer`, max_completion_tokens, no sampling.
each(
  "a model that is said to reason",
  async (model, way) => {
    const options = optionsOf(way, { forceReasoning: true, reasoningEffort: "high" });
    const answer = await generateText({ model, system: "Be brief.", ...ask, ...options });
    warned(answer.warnings, ["temperature"]);
    used(answer.usage, 4);
  },
  { only: ["chat", "responses"] },
);

// The SDK's own setting, of version 7.
if (newest) {
  for (const reasoning of ["none", "minimal", "low", "high"]) {
    each(`reasoning: ${reasoning}`, async (model, way) => {
      // With Anthropic's provider the budget of thinking comes on top of the bound.
      if (way.name === "messages" && reasoning !== "none") return;
      const answer = await generateText({ model, ...ask, reasoning });
      used(answer.usage, 4);
      warned(answer.warnings);
    });
  }
}

each(
  "thinking, with a budget or off",
  async (model, way) => {
    for (const thinking of [{ type: "enabled", budgetTokens: 1024 }, { type: "disabled" }]) {
      // With a budget the provider adds it to the bound: the stop sequence ends the answer.
      const { temperature, ...rest } = ask;
      const answer = await generateText({ model, ...rest, stopSequences: ["a", "e", "i", "o"], ...optionsOf(way, { thinking }) });
      warned(answer.warnings);
    }
  },
  { only: ["messages"] },
);

each("earlier reasoning is taken", async (model, way) => {
  const reasoning = { type: "reasoning", text: "Hm.", providerOptions: { anthropic: { signature: "baton" } } };
  const messages = [
    { role: "user", content: QUESTION },
    { role: "assistant", content: [reasoning, { type: "text", text: "Sunny." }] },
    { role: "user", content: "And in Rome?" },
  ];
  const { prompt, ...rest } = ask;
  const answer = await generateText({ model, ...rest, messages });
  if (way.name !== "responses") warned(answer.warnings);
  if (way.name === "messages") {
    const without = await generateText({ model, ...rest, messages, ...optionsOf(way, { sendReasoning: false }) });
    assert.match(JSON.stringify(without.warnings), /sending reasoning content is disabled/);
  }
});

each(
  "an answer that is begun goes on",
  async (model) => {
    const { prompt, ...rest } = ask;
    const messages = [
      { role: "user", content: QUESTION },
      { role: "assistant", content: "The weather in" },
    ];
    used((await generateText({ model, ...rest, messages })).usage, 4);
  },
  { only: ["messages"] },
);
