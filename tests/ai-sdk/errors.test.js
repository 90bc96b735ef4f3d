// What the server refuses: the SDK's own classes of errors, with the server's words.

import assert from "node:assert/strict";

import { ai, check, compatible, each, modelName, once, openai, providers, quiet, refusal, optionsOf, url, ways } from "./baton.js";
import { QUESTION } from "./shapes.js";

const { embed, experimental_transcribe, generateImage, generateText, streamText } = ai;
const generateSpeech = ai.generateSpeech ?? ai.experimental_generateSpeech;
const transcribe = ai.transcribe ?? experimental_transcribe;

const ask = { prompt: QUESTION, ...once, maxOutputTokens: 8 };

for (const way of ways) {
  check(`a model that is not there: ${way.name}`, async () => {
    const model = way.make("no-such-model");
    const error = await refusal(generateText({ model, ...ask }));
    assert.equal(error.statusCode, 404);
    assert.match(error.message, /the model "no-such-model" does not exist here/);
    assert.match(error.message, new RegExp(modelName));
    assert.equal(error.data.error.type, way.name === "messages" ? "not_found_error" : "invalid_request_error");
    if (way.name !== "messages") assert.equal(error.data.error.code, "model_not_found");

    const parts = [];
    for await (const part of streamText({ model, ...ask, ...quiet }).fullStream) parts.push(part);
    const { error: streamed } = parts.find((part) => part.type === "error");
    assert.ok(ai.APICallError.isInstance(streamed));
    assert.equal(streamed.statusCode, 404);
    assert.equal(streamed.message, error.message);
  });
}

each("a setting that is out of range", async (model) => {
  const error = await refusal(generateText({ model, ...ask, topP: 2 }));
  assert.equal(error.statusCode, 400);
  assert.match(error.message, /top_p/);
});

each("a prompt that is too long", async (model, way) => {
  const error = await refusal(generateText({ model, ...ask, prompt: "rain ".repeat(4000) }));
  assert.equal(error.statusCode, 400);
  // What Anthropic says, by which agents know to shorten their chat.
  if (way.name === "messages") assert.match(error.message, /^prompt is too long/);
  else assert.match(error.message, /2048/);
});

each("an image", async (model) => {
  const image = { type: "file", mediaType: "image/png", data: new Uint8Array([137, 80, 78, 71]) };
  const messages = [{ role: "user", content: [{ type: "text", text: QUESTION }, image] }];
  const error = await refusal(generateText({ model, ...once, maxOutputTokens: 8, messages }));
  assert.equal(error.statusCode, 400);
  assert.match(error.message, /reads only text/);
});

// Options of the SDK that would change the answer and that Baton has nothing for.
const REFUSED = {
  compatible: [[{ textVerbosity: "huge" }, /verbosity/], [{ noSuchField: 1 }, /noSuchField/]],
  chat: [[{ logitBias: { 99999999: 1 } }, /logit_bias names token 99999999/]],
  responses: [
    [{ conversation: "conv_1" }, /conversation/],
    [{ maxToolCalls: 1 }, /max_tool_calls/],
    [{ previousResponseId: "resp_none" }, /resp_none/, 404],
  ],
  messages: [[{ mcpServers: [{ type: "url", name: "a", url: "https://a.example" }] }, /mcp_servers/]],
};

each("options that cannot be met are refused by name", async (model, way) => {
  for (const [options, words, status] of REFUSED[way.name]) {
    const error = await refusal(generateText({ model, ...ask, ...optionsOf(way, options) }));
    assert.equal(error.statusCode, status ?? 400, error.message);
    assert.match(error.message, words);
  }
});

check("what there is no model for", async () => {
  const wav = new Uint8Array(Buffer.from("RIFF\0\0\0\0WAVE"));
  const asked = {
    "/v1/embeddings": [
      () => embed({ model: openai.embedding(modelName), value: "rain", ...once }),
      () => embed({ model: compatible.embeddingModel(modelName), value: "rain", ...once }),
    ],
    "/v1/audio/transcriptions": [() => transcribe({ model: openai.transcription("whisper-1"), audio: wav, ...once })],
    "/v1/audio/speech": [() => generateSpeech({ model: openai.speech("tts-1"), text: "Rain.", ...once })],
    "/v1/images/generations": [() => generateImage({ model: openai.image("dall-e-3"), prompt: "Rain.", ...once })],
  };
  for (const [path, calls] of Object.entries(asked)) {
    for (const call of calls) {
      const error = await refusal(call());
      assert.equal(error.statusCode, 404, path);
      // By the name of what is not offered, which may be the beginning of the path.
      const [, offered] = error.message.match(/^(\S+) is not offered: the models here/) ?? [];
      assert.ok(offered && path.startsWith(offered), error.message);
    }
  }
});

check("an address without /v1", async () => {
  const { compatible } = providers(undefined, url);
  const error = await refusal(generateText({ model: compatible(modelName), ...ask }));
  assert.equal(error.statusCode, 404);
  assert.match(error.message, /nothing at \/chat\/completions: do you mean \/v1\/chat\/completions\? The base URL .* ends with \/v1/);
});
