// What GET /v1/models says of a model, as far as the page shows it.

export interface Model {
  id: string;
  max_model_len: number;
  /** Servers of before do not say the rest. */
  default_max_tokens?: number | null;
  /** "auto": it calls tools when it wants to; "required": only where a request says that it must. */
  tools?: string;
}

/** Its limits and whether it takes tools, in a line. */
export function limits({ max_model_len, default_max_tokens, tools }: Model): string {
  const parts = [`${max_model_len.toLocaleString("en")} tokens for question and answer`];
  if (default_max_tokens) parts.push(`answers of up to ${default_max_tokens.toLocaleString("en")} unless a request says otherwise`);
  if (tools === "auto") parts.push("calls tools");
  if (tools === "required") parts.push("calls tools only where tool_choice says so");
  return parts.join(" · ");
}
