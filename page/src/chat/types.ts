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
  /** How it ended: "stop", "length", "tool_calls", "stopped" by the reader, or an error's sentence. */
  end?: string;
  error?: string;
  usage?: { prompt: number; cached: number; output: number };
  /** Milliseconds to the first token, and in all. */
  times?: { first: number; all: number };
}

export interface Settings {
  system: string;
  temperature: string;
  topP: string;
  maxTokens: string;
  seed: string;
  stop: string;
  /** JSON schema that the answer must follow; empty: none. */
  schema: string;
  /** JSON list of OpenAI's tools; empty: none. */
  tools: string;
}

export interface Conversation {
  id: string;
  title: string;
  messages: Message[];
  settings: Settings;
}

export const DEFAULTS: Settings = {
  system: "",
  temperature: "",
  topP: "",
  maxTokens: "1024",
  seed: "",
  stop: "",
  schema: "",
  tools: "",
};
