// Against an API server of the cluster to which what the model writes is reasoning, which knows a format of calls, and which takes two
// requests at a time.

import assert from "node:assert/strict";

import { ai, check, each, modelName, once, quiet, read, optionsOf, used, warned, ways } from "./baton.js";
import { City, QUESTION } from "./shapes.js";

const { generateText, streamText, tool } = ai;

const ask = { prompt: QUESTION, ...once, maxOutputTokens: 8 };

// `forceReasoning`: models whose names say nothing are taken for ones that do not reason.
function options(way, more = {}) {
  return way.options === "openai" ? optionsOf(way, { forceReasoning: true, reasoningEffort: "high", ...more }) : {};
}

each(
  "reasoning comes apart from the answer",
  async (model, way) => {
    const answer = await generateText({ model, ...ask, ...options(way) });
    assert.ok(answer.reasoningText);
    assert.equal(answer.text, "");
    used(answer.usage, 8);
    assert.ok(answer.usage.outputTokenDetails.reasoningTokens > 0);
    warned(answer.warnings);

    const stream = streamText({ model, ...ask, ...options(way), ...quiet });
    const { reasoning, of, types } = await read(stream);
    assert.ok(reasoning);
    assert.ok(of("reasoning-delta").length > 1);
    assert.ok(!types.includes("text-delta"));
    assert.equal(await stream.reasoningText, reasoning);
    warned(await stream.warnings);
  },
  { only: ["compatible", "responses", "messages"], alone: true },
);

each(
  "an answer that was cut in its reasoning has no text",
  async (model, way) => {
    const { content } = await generateText({ model, ...ask, ...options(way) });
    assert.deepEqual(content.map((part) => part.type), ["reasoning"]);
  },
  { only: ["compatible", "responses", "messages"], alone: true },
);

each(
  "a chat with reasoning goes on",
  async (model, way) => {
    for (const store of way.name === "responses" ? [true, false] : [undefined]) {
      const more = options(way, { store });
      const first = await generateText({ model, ...ask, ...more });
      const { prompt, ...rest } = ask;
      const messages = [{ role: "user", content: QUESTION }, ...first.response.messages, { role: "user", content: "And in Rome?" }];
      const second = await generateText({ model, ...rest, messages, ...more });
      assert.ok(second.usage.inputTokens > first.usage.inputTokens);
      warned(second.warnings);
    }
  },
  { alone: true },
);

each(
  "the model may call a tool or not",
  async (model) => {
    const tools = { weather: tool({ description: "The weather of a city.", inputSchema: City }) };
    const answer = await generateText({ model, ...ask, tools, toolChoice: "auto" });
    assert.equal(answer.toolCalls.length, 0);
    assert.equal(answer.finishReason, "length");
    warned(answer.warnings);
    const stream = streamText({ model, ...ask, tools, ...quiet });
    await read(stream);
    assert.equal(await stream.finishReason, "length");
  },
  { alone: true },
);

for (const way of ways.filter(({ name }) => ["compatible", "messages"].includes(name))) {
  check(`a request that is refused for now is tried again: ${way.name}`, async () => {
    const statuses = [];
    const watch = async (...request) => {
      const response = await fetch(...request);
      statuses.push(response.status);
      if (response.status === 429) assert.equal(response.headers.get("retry-after"), "1");
      return response;
    };
    // One more than there is room for. The SDK waits for as long as the server says.
    const model = way.make(modelName, watch);
    const asked = [1, 2, 3].map(() => generateText({ model, prompt: QUESTION, maxOutputTokens: 60, maxRetries: 10 }));
    for (const answer of await Promise.all(asked)) assert.ok(answer.usage.outputTokens > 0);
    assert.equal(statuses.filter((status) => status === 200).length, 3);
    assert.ok(statuses.every((status) => status === 200 || status === 429), statuses.join(" "));
  });
}
