// Puts an assistant's message together from the chunks of its stream.

import type { Message } from "./types";

interface Chunk {
  choices?: {
    delta?: {
      content?: string | null;
      reasoning_content?: string | null;
      reasoning?: string | null;
      tool_calls?: { index: number; id?: string; function?: { name?: string; arguments?: string } }[];
    };
    finish_reason?: string | null;
  }[];
  usage?: {
    prompt_tokens: number;
    completion_tokens: number;
    prompt_tokens_details?: { cached_tokens?: number } | null;
  } | null;
  error?: { message?: string };
}

/** The message with what one event says added; the same one if it says nothing. `[DONE]` says nothing. */
export function withEvent(message: Message, data: string): Message {
  if (data === "[DONE]") return message;
  const chunk = JSON.parse(data) as Chunk;
  const next: Message = { ...message };
  if (chunk.error) next.error = chunk.error.message ?? "the stream ended with an error";
  if (chunk.usage)
    next.usage = {
      prompt: chunk.usage.prompt_tokens,
      cached: chunk.usage.prompt_tokens_details?.cached_tokens ?? 0,
      output: chunk.usage.completion_tokens,
    };
  const choice = chunk.choices?.[0];
  if (!choice) return next;
  const delta = choice.delta ?? {};
  if (delta.content) next.content += delta.content;
  const reasoning = delta.reasoning_content ?? delta.reasoning;
  if (reasoning) next.reasoning = (next.reasoning ?? "") + reasoning;
  for (const part of delta.tool_calls ?? []) {
    const calls = [...(next.toolCalls ?? [])];
    const call = calls[part.index] ?? { id: "", name: "", arguments: "" };
    calls[part.index] = {
      id: part.id ?? call.id,
      name: part.function?.name ?? call.name,
      arguments: call.arguments + (part.function?.arguments ?? ""),
    };
    next.toolCalls = calls;
  }
  if (choice.finish_reason) next.end = choice.finish_reason;
  return next;
}
