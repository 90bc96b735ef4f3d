// From a conversation to the body of POST /v1/chat/completions, and to code that sends it.

import type { Conversation, Message, Settings } from "./types";

export type Body = Record<string, unknown>;

/** What `tool_choice` may be beside the name of a tool. */
export const TOOL_CHOICES = ["auto", "none", "required"];

/** Names of the functions in the settings' tools, as far as they can be read. */
export function toolNames(settings: Settings): string[] {
  try {
    const tools = JSON.parse(settings.tools || "[]") as { function?: { name?: unknown } }[];
    return tools.flatMap((tool) => (typeof tool?.function?.name === "string" ? [tool.function.name] : []));
  } catch {
    return [];
  }
}

/** What is wrong with the settings, by field. */
export function faults(settings: Settings): Partial<Record<keyof Settings, string>> {
  const found: Partial<Record<keyof Settings, string>> = {};
  const number = (field: keyof Settings, low: number, high: number, whole = false) => {
    const text = settings[field].trim();
    if (!text) return;
    const value = Number(text);
    if (!Number.isFinite(value) || value < low || value > high || (whole && !Number.isInteger(value)))
      found[field] = `${whole ? "a whole number" : "a number"} from ${low} to ${high}`;
  };
  number("temperature", 0, 2);
  number("topP", 0, 1);
  number("topK", -1, 1_000_000, true);
  number("minP", 0, 1);
  number("presencePenalty", -2, 2);
  number("frequencyPenalty", -2, 2);
  number("repetitionPenalty", 0.01, 100);
  number("maxTokens", 1, 1_000_000, true);
  number("seed", 0, Number.MAX_SAFE_INTEGER, true);
  for (const field of ["schema", "tools"] as const) {
    const text = settings[field].trim();
    if (!text) continue;
    try {
      const value: unknown = JSON.parse(text);
      if (field === "tools" && !Array.isArray(value)) found.tools = "a JSON list of tools";
      if (field === "schema" && (typeof value !== "object" || value === null)) found.schema = "a JSON schema, an object";
    } catch (error) {
      found[field] = `no JSON: ${(error as Error).message}`;
    }
  }
  return found;
}

function wire(message: Message): Body {
  if (message.role === "tool") return { role: "tool", tool_call_id: message.toolCallId, content: message.content };
  const body: Body = { role: message.role, content: message.content };
  if (message.toolCalls?.length)
    body.tool_calls = message.toolCalls.map((call) => ({
      id: call.id,
      type: "function",
      function: { name: call.name, arguments: call.arguments },
    }));
  return body;
}

/** The body that asks for the next message. Messages that ended with an error and brought nothing are left out. */
export function requestBody(model: string, { messages, settings }: Pick<Conversation, "messages" | "settings">): Body {
  const all: Body[] = [];
  if (settings.system.trim()) all.push({ role: "system", content: settings.system });
  const isEmpty = (message: Message) => message.role === "assistant" && !message.content && !message.toolCalls?.length;
  for (const message of messages) if (!isEmpty(message)) all.push(wire(message));
  const body: Body = { model, messages: all };
  const number = (name: string, text: string) => {
    if (text.trim()) body[name] = Number(text);
  };
  number("temperature", settings.temperature);
  number("top_p", settings.topP);
  number("top_k", settings.topK);
  number("min_p", settings.minP);
  number("presence_penalty", settings.presencePenalty);
  number("frequency_penalty", settings.frequencyPenalty);
  number("repetition_penalty", settings.repetitionPenalty);
  number("max_tokens", settings.maxTokens);
  number("seed", settings.seed);
  if (settings.reasoningEffort) body.reasoning_effort = settings.reasoningEffort;
  const stop = settings.stop.split("\n").filter(Boolean);
  if (stop.length) body.stop = stop;
  if (settings.tools.trim()) {
    body.tools = JSON.parse(settings.tools);
    const choice = settings.toolChoice;
    // Only of tools that there are: what was chosen may have been taken out of the list since.
    if (TOOL_CHOICES.includes(choice)) body.tool_choice = choice;
    else if (toolNames(settings).includes(choice)) body.tool_choice = { type: "function", function: { name: choice } };
  }
  if (settings.schema.trim())
    body.response_format = {
      type: "json_schema",
      json_schema: { name: "answer", schema: JSON.parse(settings.schema), strict: true },
    };
  return { ...body, stream: true, stream_options: { include_usage: true } };
}

/** For a shell. The key stands in a variable, never in the text. */
export function asCurl(origin: string, body: Body, hasKey: boolean): string {
  const json = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  const key = hasKey ? ` \\\n  -H "Authorization: Bearer $BATON_API_KEY"` : "";
  return `curl -N ${origin}/v1/chat/completions \\\n  -H 'Content-Type: application/json'${key} \\\n  -d '${json}'\n`;
}

/** Fields that the client `openai` has no argument for. */
const EXTRA = ["top_k", "min_p", "repetition_penalty"];

/** For the client `openai`. */
export function asPython(origin: string, body: Body, hasKey: boolean): string {
  const key = hasKey ? `os.environ["BATON_API_KEY"]` : `"none"`;
  const { stream, stream_options, ...rest } = body;
  const extra = Object.entries(rest).filter(([name]) => EXTRA.includes(name));
  for (const [name] of extra) delete rest[name];
  const more = extra.length ? { extra_body: Object.fromEntries(extra) } : {};
  const args = Object.entries({ ...rest, stream, stream_options, ...more })
    .map(([name, value]) => `    ${name}=${python(value, 4)},`)
    .join("\n");
  return `${hasKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url="${origin}/v1", api_key=${key})
stream = client.chat.completions.create(
${args}
)
for chunk in stream:
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)
`;
}

function python(value: unknown, indent: number): string {
  if (value === null || value === undefined) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  const [pad, end] = [" ".repeat(indent + 4), " ".repeat(indent)];
  if (Array.isArray(value))
    return value.length ? `[\n${value.map((item) => `${pad}${python(item, indent + 4)},\n`).join("")}${end}]` : "[]";
  if (typeof value === "object") {
    const items = Object.entries(value).map(([key, item]) => `${pad}${JSON.stringify(key)}: ${python(item, indent + 4)},\n`);
    return items.length ? `{\n${items.join("")}${end}}` : "{}";
  }
  return JSON.stringify(value);
}
