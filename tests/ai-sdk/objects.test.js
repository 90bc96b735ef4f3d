// Structured output: objects, lists, choices, any JSON; whole and streamed.

import assert from "node:assert/strict";
import { z } from "zod";

import { ai, each, once, quiet, token, optionsOf, used, warned } from "./baton.js";
import { COMPACT, QUESTION, Song, Weather } from "./shapes.js";

const { Output, generateObject, generateText, streamObject, streamText } = ai;

const ask = { prompt: QUESTION, ...once, temperature: 0, maxOutputTokens: 300 };

each("an object by a schema", async (model) => {
  const output = Output.object({ schema: Weather, name: "Weather", description: "The weather of a city." });
  const answer = await generateText({ model, ...ask, output });
  assert.deepEqual(Weather.parse(answer.output), answer.output);
  assert.equal(answer.finishReason, "stop");
  used(answer.usage, 300);
  warned(answer.warnings);
});

each("a streamed object by a schema", async (model) => {
  const stream = streamText({ model, ...ask, output: Output.object({ schema: Weather }), ...quiet });
  const partial = [];
  for await (const piece of stream.partialOutputStream) partial.push(piece);
  assert.ok(partial.length > 1);
  assert.deepEqual(Weather.parse(partial.at(-1)), await stream.output);
  warned(await stream.warnings);
});

// The SDK's own schema of a list has no bounds and allows white space: here a field has the list.
const Songs = z.object({ songs: z.array(Song).min(1).max(3) }).meta(COMPACT);

each("a list", async (model) => {
  const { output } = await generateText({ model, ...ask, output: Output.object({ schema: Songs }) });
  assert.deepEqual(Songs.parse(output), output);
});

each("a choice", async (model) => {
  const answer = await generateText({ model, ...ask, output: Output.choice({ options: ["clear", "cloudy"] }) });
  assert.ok(["clear", "cloudy"].includes(answer.output));
  warned(answer.warnings);
});

each("generateObject and streamObject", async (model) => {
  const { object, finishReason, usage, warnings } = await generateObject({ model, ...ask, schema: Weather, schemaName: "Weather" });
  assert.deepEqual(Weather.parse(object), object);
  assert.equal(finishReason, "stop");
  used(usage, 300);
  warned(warnings);
  const stream = streamObject({ model, ...ask, schema: Weather, ...quiet });
  let last;
  for await (const piece of stream.partialObjectStream) last = piece;
  assert.deepEqual(Weather.parse(last), await stream.object);
});

each("an object needs no bound of tokens", async (model, way) => {
  const { maxOutputTokens, ...open } = ask;
  const answer = await generateText({ model, ...open, output: Output.object({ schema: Weather }) });
  Weather.parse(answer.output);
  // The provider knows no bound of this model, and says which it takes.
  if (way.name === "messages") assert.match(JSON.stringify(answer.warnings), /max(imum)? output tokens/);
  else warned(answer.warnings);
});

each(
  "an object by a schema that is not strict",
  async (model, way) => {
    const options = optionsOf(way, { strictJsonSchema: false });
    const answer = await generateText({ model, ...ask, output: Output.object({ schema: Weather }), ...options });
    Weather.parse(answer.output);
    warned(answer.warnings);
  },
  { only: ["compatible", "chat", "responses"] },
);

for (const structuredOutputMode of ["outputFormat", "jsonTool"]) {
  each(
    `an object by ${structuredOutputMode}`,
    async (model, way) => {
      const options = optionsOf(way, { structuredOutputMode });
      // `outputFormat` leaves lengths and bounds out of schemas: here all that may come is listed.
      const schema = z.object({ city: z.enum(["Paris", "Rome"]), loud: z.boolean() });
      const output = Output.object({ schema });
      const answer = await generateText({ model, ...ask, output, ...options });
      schema.parse(answer.output);
      assert.equal(answer.finishReason, "stop");
      warned(answer.warnings);
      const stream = streamText({ model, ...ask, output, ...options, ...quiet });
      for await (const piece of stream.partialOutputStream) assert.equal(typeof piece, "object");
      assert.deepEqual(await stream.output, answer.output);
    },
    { only: ["messages"] },
  );
}

// `json_object`: a small model does not know what it is asked for, and need not end. With these tokens only, the object is `{}`.
each(
  "any JSON",
  async (model, way) => {
    const bias = { [await token("{")]: 100, [await token("}")]: 100 };
    const options = optionsOf(way, way.name === "chat" ? { logitBias: bias } : { logit_bias: bias });
    const answer = await generateText({ model, ...ask, maxOutputTokens: 8, output: Output.json(), ...options });
    assert.deepEqual(answer.output, {});
    warned(answer.warnings);
  },
  { only: ["compatible", "chat"] },
);

each("what is cut is no object", async (model) => {
  const cut = generateText({ model, ...ask, maxOutputTokens: 2, output: Output.object({ schema: Weather }) });
  await assert.rejects(
    cut.then((answer) => answer.output),
    (error) => ai.NoObjectGeneratedError.isInstance(error) || ai.NoOutputGeneratedError?.isInstance(error),
  );
});
