// What the chat keeps.

export interface ToolCall {
  id: string;
  name: string;
  arguments: string;
}

export interface Message {
  role: "user" | "assistant" | "tool";
  content: string;
  reasoning?: string;
  toolCalls?: ToolCall[];
  /** Of a tool's result: whose. */
  toolCallId?: string;
  /** How it ended: "stop", "length", "tool_calls", "stopped" by the reader; "unfinished" until then, and for good if its tab was closed. */
  end?: string;
  /** The sentence of what went wrong. */
  error?: string;
  usage?: { prompt: number; cached: number; output: number };
  /** Milliseconds to the first token, and in all. */
  times?: { first: number; all: number };
}

/** As written into the fields; empty: what the server does by itself. */
export interface Settings {
  system: string;
  temperature: string;
  topP: string;
  topK: string;
  minP: string;
  presencePenalty: string;
  frequencyPenalty: string;
  repetitionPenalty: string;
  maxTokens: string;
  seed: string;
  reasoningEffort: string;
  stop: string;
  /** JSON schema that the answer must follow; empty: none. */
  schema: string;
  /** JSON list of OpenAI's tools; empty: none. */
  tools: string;
  /** "auto", "none", "required", or the name of one of the tools. */
  toolChoice: string;
}

export interface Conversation {
  id: string;
  title: string;
  messages: Message[];
  settings: Settings;
  /** When its last question was asked, in milliseconds since the epoch; 0: nothing was asked yet. */
  asked: number;
  /** When the tab that gets its answer kept it last; 0: none gets one. */
  answering: number;
}

export const DEFAULTS: Settings = {
  system: "",
  temperature: "",
  topP: "",
  topK: "",
  minP: "",
  presencePenalty: "",
  frequencyPenalty: "",
  repetitionPenalty: "",
  maxTokens: "1024",
  seed: "",
  reasoningEffort: "",
  stop: "",
  schema: "",
  tools: "",
  toolChoice: "",
};
