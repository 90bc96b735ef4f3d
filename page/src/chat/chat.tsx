import { useEffect, useRef, useState } from "preact/hooks";

import { apiKey, getJson, postStream } from "../api";
import { CodeDialog } from "./code_dialog";
import { MessageView } from "./message";
import { faults, requestBody } from "./request";
import { SettingsPanel } from "./settings";
import { fresh, load, save } from "./store";
import { withEvent } from "./answer";
import type { Conversation, Message, Settings } from "./types";

export function Chat() {
  const [conversations, setConversations] = useState<Conversation[]>(load);
  const [current, setCurrent] = useState<Conversation>(() => conversations[0] ?? fresh());
  const [model, setModel] = useState("");
  const [fault, setFault] = useState("");
  const [draft, setDraft] = useState("");
  const [running, setRunning] = useState<AbortController | null>(null);
  const [shows, setShows] = useState<"" | "settings" | "code">("");
  const log = useRef<HTMLDivElement>(null);
  const input = useRef<HTMLTextAreaElement>(null);
  const sticks = useRef(true);

  useEffect(() => {
    getJson<{ data: { id: string }[] }>("/v1/models").then(
      (models) => setModel(models.data[0]?.id ?? ""),
      (error: Error) => setFault(error.message),
    );
  }, []);
  useEffect(() => {
    const others = conversations.filter((it) => it.id !== current.id);
    const all = current.messages.length ? [current, ...others] : others;
    // While an answer streams it changes many times a second.
    if (!running) {
      setConversations(all);
      save(all);
    }
  }, [current, running]);
  useEffect(() => {
    if (sticks.current && log.current) log.current.scrollTop = log.current.scrollHeight;
  });

  const wrong = faults(current.settings);
  const isWrong = Object.keys(wrong).length > 0;

  /** Asks for the next message after `messages`. */
  async function ask(conversation: Conversation) {
    const abort = new AbortController();
    const begun = performance.now();
    let answer: Message = { role: "assistant", content: "" };
    let first = 0;
    const show = () => setCurrent({ ...conversation, messages: [...conversation.messages, answer] });
    setRunning(abort);
    setFault("");
    sticks.current = true;
    show();
    let frame = 0;
    try {
      await postStream(
        "/v1/chat/completions",
        requestBody(model, conversation),
        (data) => {
          answer = withEvent(answer, data);
          if (!first && (answer.content || answer.reasoning || answer.toolCalls)) first = performance.now() - begun;
          // A page is drawn once a frame, however fast tokens come.
          frame ||= requestAnimationFrame(() => {
            frame = 0;
            show();
          });
        },
        abort.signal,
      );
    } catch (error) {
      answer = abort.signal.aborted ? { ...answer, end: "stopped" } : { ...answer, error: (error as Error).message };
    }
    cancelAnimationFrame(frame);
    answer = { ...answer, times: { first, all: performance.now() - begun } };
    show();
    setRunning(null);
  }

  function send(event?: Event) {
    event?.preventDefault();
    const content = draft.trim();
    if (!content || running || isWrong || !model) return;
    setDraft("");
    const title = current.title || content.slice(0, 60);
    void ask({ ...current, title, messages: [...current.messages, { role: "user", content }] });
  }

  function again() {
    const last = current.messages.findLastIndex((it) => it.role !== "assistant");
    if (last >= 0 && !running) void ask({ ...current, messages: current.messages.slice(0, last + 1) });
  }

  function giveResult(id: string, content: string) {
    const messages: Message[] = [...current.messages, { role: "tool", toolCallId: id, content }];
    const calls = current.messages.findLast((it) => it.role === "assistant")?.toolCalls ?? [];
    const given = new Set(messages.map((it) => it.toolCallId));
    const next = { ...current, messages };
    // When all calls have a result, the model goes on.
    if (calls.every((call) => given.has(call.id))) void ask(next);
    else setCurrent(next);
  }

  function choose(conversation: Conversation) {
    running?.abort();
    setCurrent(conversation);
    setFault("");
    input.current?.focus();
  }

  function remove(id: string) {
    const others = conversations.filter((it) => it.id !== id);
    setConversations(others);
    save(others);
    if (id === current.id) choose(others[0] ?? fresh(current.settings));
  }

  const lastAnswer = current.messages.findLast((it) => it.role === "assistant");
  return (
    <div class="chat">
      <nav class="conversations" aria-label="Conversations">
        <button type="button" class="new" onClick={() => choose(fresh(current.settings))}>
          New conversation
        </button>
        <ul>
          {conversations.map((it) => (
            <li key={it.id} class={it.id === current.id ? "is-current" : ""}>
              <button type="button" aria-current={it.id === current.id ? "true" : undefined} onClick={() => choose(it)}>
                {it.title || "untitled"}
              </button>
              <button type="button" class="quiet" aria-label={`Delete ${it.title || "untitled"}`} onClick={() => remove(it.id)}>
                ×
              </button>
            </li>
          ))}
        </ul>
      </nav>
      <section class="talk" aria-label="Conversation">
        <div
          class="log"
          ref={log}
          role="log"
          aria-busy={running !== null}
          tabIndex={0}
          aria-label="Messages"
          onScroll={(event) => {
            const box = event.currentTarget;
            sticks.current = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
          }}
        >
          {!current.messages.length && (
            <p class="empty">
              {model ? (
                <>
                  Ask <strong>{model}</strong> something.
                </>
              ) : (
                "Looking for a model…"
              )}
            </p>
          )}
          {current.messages.map((message, index) => (
            <MessageView
              key={index}
              message={message}
              isRunning={running !== null && index === current.messages.length - 1}
              results={current.messages}
              onResult={giveResult}
            />
          ))}
        </div>
        {fault && (
          <p class="fault" role="alert">
            {fault}
          </p>
        )}
        <form class="ask" onSubmit={send}>
          <label class="hidden" for="draft">
            Message
          </label>
          <textarea
            id="draft"
            ref={input}
            rows={3}
            value={draft}
            placeholder="Message (Enter sends, Shift+Enter begins a line)"
            onInput={(event) => setDraft(event.currentTarget.value)}
            onKeyDown={(event) => {
              if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
            }}
          />
          <div class="buttons">
            {running ? (
              <button key="stop" type="button" class="primary" onClick={() => running.abort()}>
                Stop
              </button>
            ) : (
              <button key="send" type="submit" class="primary" disabled={!draft.trim() || isWrong || !model}>
                Send
              </button>
            )}
            <button type="button" onClick={again} disabled={running !== null || !lastAnswer}>
              Again
            </button>
            <button type="button" aria-expanded={shows === "settings"} onClick={() => setShows(shows === "settings" ? "" : "settings")}>
              Settings{isWrong ? " (!)" : ""}
            </button>
            <button type="button" onClick={() => setShows("code")} disabled={isWrong}>
              As code
            </button>
          </div>
        </form>
        {shows === "settings" && (
          <SettingsPanel
            settings={current.settings}
            wrong={wrong}
            onChange={(settings: Settings) => setCurrent({ ...current, settings })}
          />
        )}
        {shows === "code" && (
          <CodeDialog
            body={requestBody(model, withDraft(current, draft))}
            hasKey={apiKey() !== ""}
            onClose={() => setShows("")}
          />
        )}
      </section>
    </div>
  );
}

/** What would be sent now. */
function withDraft(conversation: Conversation, draft: string): Conversation {
  const content = draft.trim();
  if (content) return { ...conversation, messages: [...conversation.messages, { role: "user", content }] };
  const last = conversation.messages.findLastIndex((it) => it.role !== "assistant");
  return { ...conversation, messages: conversation.messages.slice(0, last + 1) };
}
