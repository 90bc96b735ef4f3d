// Tools: calls that must come, their results sent back, agents of several steps.

import assert from "node:assert/strict";

import { ai, each, once, openai, quiet, read, refusal, optionsOf, used, warned, modelName } from "./baton.js";
import { City, QUESTION, Song } from "./shapes.js";

const { generateText, stepCountIs, streamText, tool, ToolLoopAgent } = ai;

const SUNNY = "Sunny, 21 degrees.";
const weather = { description: "The weather of a city.", inputSchema: City };
const shown = { weather: tool(weather), play: tool({ description: "Play a song.", inputSchema: Song }) };
const ask = { prompt: QUESTION, ...once, temperature: 0, maxOutputTokens: 200 };

// A small model that may call again goes on calling.
function oneCall(way) {
  const options = { compatible: { parallel_tool_calls: false }, messages: { disableParallelToolUse: true } };
  return optionsOf(way, options[way.name] ?? { parallelToolCalls: false });
}

const SHAPES = { weather: City, play: Song };

function checkCall(call) {
  assert.equal(call.type, "tool-call");
  assert.ok(call.toolCallId);
  assert.ok(!call.invalid && !call.dynamic, JSON.stringify(call));
  assert.deepEqual(SHAPES[call.toolName].parse(call.input), call.input);
}

for (const toolChoice of ["required", { type: "tool", toolName: "play" }]) {
  const which = toolChoice.toolName ? "by name" : "of any tool";
  each(`a call that must come, ${which}`, async (model, way) => {
    const must = { model, ...ask, tools: shown, toolChoice, ...oneCall(way) };
    const whole = await generateText(must);
    assert.equal(whole.finishReason, "tool-calls");
    assert.equal(whole.text, "");
    assert.equal(whole.toolCalls.length, 1);
    const [call] = whole.toolCalls;
    checkCall(call);
    if (toolChoice.toolName) assert.equal(call.toolName, toolChoice.toolName);
    used(whole.usage, 200);
    warned(whole.warnings);

    const stream = streamText({ ...must, ...quiet });
    const { of, types } = await read(stream);
    const [streamed, ...others] = of("tool-call");
    checkCall(streamed);
    assert.equal(others.length, 0);
    assert.equal(streamed.toolName, call.toolName);
    assert.deepEqual(streamed.input, call.input);
    // Arguments come in pieces.
    assert.deepEqual(of("tool-input-start").map((part) => part.id), [streamed.toolCallId]);
    assert.equal(of("tool-input-end").length, 1);
    assert.ok(of("tool-input-delta").length > 1);
    assert.deepEqual(JSON.parse(of("tool-input-delta").map((part) => part.delta).join("")), call.input);
    // There is no text, not even an empty one.
    assert.ok(!types.includes("text-start"), types.join(" "));
    assert.equal(await stream.finishReason, "tool-calls");
    warned(await stream.warnings);
  });
}

each(
  "calls may be more than one",
  async (model) => {
    const answer = await generateText({ model, ...ask, maxOutputTokens: 40, tools: shown, toolChoice: "required" });
    assert.ok(answer.toolCalls.length >= 1);
    // The last may be cut.
    for (const call of answer.toolCalls.slice(0, -1)) checkCall(call);
    assert.equal(new Set(answer.toolCalls.map((call) => call.toolCallId)).size, answer.toolCalls.length);
  },
  { only: ["chat", "messages"] },
);

each("strict tools", async (model, way) => {
  const tools = { weather: tool({ ...weather, strict: true }) };
  const answer = await generateText({ model, ...ask, tools, toolChoice: "required", ...oneCall(way) });
  assert.equal(answer.toolCalls.length, 1);
  checkCall(answer.toolCalls[0]);
  // That provider sends `strict` for models that it knows only.
  warned(answer.warnings, way.name === "messages" ? ["strict"] : []);
});

each(
  "inputs of tools that are not streamed eagerly",
  async (model, way) => {
    for (const toolStreaming of [true, false]) {
      const options = optionsOf(way, { toolStreaming, disableParallelToolUse: true });
      const stream = streamText({ model, ...ask, tools: shown, toolChoice: "required", ...options, ...quiet });
      for (const call of (await read(stream)).of("tool-call")) checkCall(call);
      warned(await stream.warnings);
    }
  },
  { only: ["messages"] },
);

// First a tool must be called, then none may be: this model does what it must.
function twoSteps(execute) {
  return {
    ...ask,
    maxOutputTokens: 32,
    tools: { weather: tool({ ...weather, execute }) },
    prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? { type: "tool", toolName: "weather" } : "none" }),
    stopWhen: stepCountIs(2),
  };
}

function checkSteps(steps) {
  assert.equal(steps.length, 2);
  assert.equal(steps[0].finishReason, "tool-calls");
  const [first, second] = steps.map((step) => step.content.map((part) => part.type));
  assert.ok(first.includes("tool-call") && !first.includes("text"), first.join(" "));
  assert.ok(!second.includes("tool-call"), second.join(" "));
  assert.ok(["stop", "length"].includes(steps[1].finishReason));
  // The call and its result are in the second prompt.
  assert.ok(steps[1].usage.inputTokens > steps[0].usage.inputTokens);
  for (const step of steps) warned(step.warnings);
}

each("a tool's result is sent back", async (model) => {
  const cities = [];
  const answer = await generateText({ model, ...twoSteps(({ city }) => (cities.push(city), SUNNY)) });
  checkSteps(answer.steps);
  assert.ok(cities.length >= 1 && cities.every((city) => ["Paris", "Rome"].includes(city)));
  assert.ok(answer.steps[0].toolResults.every((result) => result.output === SUNNY));

  // And the chat goes on with all that there was.
  const messages = [{ role: "user", content: QUESTION }, ...answer.response.messages, { role: "user", content: "And tomorrow?" }];
  const then = await generateText({ model, messages, ...once, temperature: 0, maxOutputTokens: 8, tools: shown, toolChoice: "none" });
  assert.ok(then.usage.inputTokens > answer.steps[1].usage.inputTokens);
  warned(then.warnings);
});

each("a tool's result is sent back, streamed", async (model) => {
  const stream = streamText({ model, ...twoSteps(() => ({ sky: "clear", degrees: 21 })), ...quiet });
  const { of } = await read(stream);
  assert.equal(of("start-step").length, 2);
  assert.ok(of("tool-result").length >= 1);
  assert.deepEqual(of("tool-result")[0].output, { sky: "clear", degrees: 21 });
  checkSteps(await stream.steps);
});

each("a tool's error is sent back", async (model) => {
  const answer = await generateText({
    model,
    ...twoSteps(() => {
      throw new Error("no such city");
    }),
  });
  assert.ok(answer.steps[0].content.some((part) => part.type === "tool-error"));
  checkSteps(answer.steps);
});

each("an agent", async (model) => {
  const { prompt, ...settings } = twoSteps(() => SUNNY);
  const agent = new ToolLoopAgent({ model, instructions: "You know the weather.", ...settings });
  checkSteps((await agent.generate({ prompt })).steps);
});

each(
  "an agent by the ids of its responses",
  async (model, way) => {
    const toolChoice = { type: "tool", toolName: "weather" };
    const first = await generateText({ model, ...ask, tools: shown, toolChoice, ...oneCall(way) });
    const [call] = first.toolCalls;
    const result = { type: "tool-result", toolCallId: call.toolCallId, toolName: "weather", output: { type: "text", value: SUNNY } };
    const { prompt, ...rest } = ask;
    const then = { ...rest, maxOutputTokens: 8, tools: shown, toolChoice: "none", messages: [{ role: "tool", content: [result] }] };
    const options = optionsOf(way, { previousResponseId: first.providerMetadata.openai.responseId });
    const second = await generateText({ model, ...then, ...options });
    assert.ok(second.usage.inputTokens > first.usage.inputTokens);
    warned(second.warnings);
  },
  { only: ["responses"] },
);

// It calls nothing of its own accord, and its template shows it no tools.
each("what the model must decide is refused", async (model) => {
  for (const toolChoice of [undefined, "auto"]) {
    const error = await refusal(generateText({ model, ...ask, tools: shown, toolChoice }));
    assert.equal(error.statusCode, 400);
    assert.match(error.message, /calls no tools in a way that this server knows: say which must be called in tool_choice/);
  }
});

each(
  "tools that OpenAI's servers run are refused by name",
  async () => {
    const tools = { web_search: openai.tools.webSearch({}) };
    const error = await refusal(generateText({ model: openai.responses(modelName), ...ask, tools }));
    assert.equal(error.statusCode, 400);
    assert.match(error.message, /web_search/);
  },
  { only: ["responses"] },
);
