import { useMemo, useState } from "preact/hooks";

import { html } from "./markdown";
import type { Message, ToolCall } from "./types";

interface Props {
  message: Message;
  isRunning: boolean;
  /** All messages: which calls have results. */
  results: Message[];
  onResult: (id: string, content: string) => void;
}

const NAMES = { user: "You", assistant: "Model", tool: "Result" };

export function MessageView({ message, isRunning, results, onResult }: Props) {
  const isText = message.role === "assistant";
  const rendered = useMemo(() => (isText ? html(message.content) : ""), [message.content, isText]);
  return (
    <article class={`message of-${message.role}`} aria-label={NAMES[message.role]}>
      <h2>{NAMES[message.role]}</h2>
      {message.reasoning && (
        <details class="reasoning" open={isRunning && !message.content}>
          <summary>Reasoning</summary>
          <div class="plain">{message.reasoning}</div>
        </details>
      )}
      {isText ? (
        <div class="markdown" dangerouslySetInnerHTML={{ __html: rendered }} />
      ) : (
        <div class="plain">{message.content}</div>
      )}
      {isRunning && !message.content && !message.reasoning && <p class="waits">…</p>}
      {message.toolCalls?.map((call) => (
        <CallView
          key={call.id}
          call={call}
          isOpen={!isRunning && !results.some((it) => it.toolCallId === call.id)}
          onResult={(content) => onResult(call.id, content)}
        />
      ))}
      {message.error && (
        <p class="fault" role="alert">
          {message.error}
        </p>
      )}
      {!isRunning && isText && <Footer message={message} />}
    </article>
  );
}

function CallView({ call, isOpen, onResult }: { call: ToolCall; isOpen: boolean; onResult: (content: string) => void }) {
  const [result, setResult] = useState("");
  return (
    <div class="call">
      <p>
        calls <code>{call.name}</code>
      </p>
      <pre>{pretty(call.arguments)}</pre>
      {isOpen && (
        <form
          onSubmit={(event) => {
            event.preventDefault();
            onResult(result);
          }}
        >
          <label>
            Its result
            <textarea rows={2} value={result} onInput={(event) => setResult(event.currentTarget.value)} />
          </label>
          <button type="submit">Give result</button>
        </form>
      )}
    </div>
  );
}

function pretty(json: string): string {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json;
  }
}

function Footer({ message }: { message: Message }) {
  const { usage, times, end } = message;
  const parts: string[] = [];
  if (usage) {
    const cached = usage.cached ? ` (${usage.cached} cached)` : "";
    parts.push(`${usage.prompt} prompt tokens${cached}, ${usage.output} output tokens`);
  }
  if (times?.first) parts.push(`first token ${(times.first / 1e3).toFixed(2)} s`);
  if (usage && times && times.all > times.first && usage.output > 1)
    parts.push(`${(((usage.output - 1) * 1e3) / (times.all - times.first)).toFixed(1)} tokens/s`);
  if (end === "length") parts.push("cut at the most tokens");
  if (end === "stopped" || end === "unfinished") parts.push(end);
  return parts.length ? <footer>{parts.join(" · ")}</footer> : null;
}
