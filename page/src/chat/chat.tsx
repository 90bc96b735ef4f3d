import { useEffect, useRef, useState } from "preact/hooks";

import { apiKey, getJson } from "../api";
import type { Chats } from "./chats";
import { CodeDialog } from "./code_dialog";
import { MessageView } from "./message";
import type { Model } from "./model";
import { faults, requestBody } from "./request";
import { SettingsPanel } from "./settings";
import type { Conversation, Message, Settings } from "./types";
import { Welcome } from "./welcome";

interface Props {
  chats: Chats;
  /** Another one: ask for the models anew, there may be another key. */
  round: number;
}

export function Chat({ chats, round }: Props) {
  const [, redraw] = useState(0);
  const [served, setServed] = useState<Model | null>(null);
  const model = served?.id ?? "";
  const [fault, setFault] = useState("");
  const [shows, setShows] = useState<"" | "settings" | "code">("");
  const log = useRef<HTMLDivElement>(null);
  const input = useRef<HTMLTextAreaElement>(null);
  const sticks = useRef(true);

  useEffect(() => chats.watch(() => redraw((count) => count + 1)), [chats]);
  useEffect(() => {
    getJson<{ data: Model[] }>("/v1/models").then(
      (models) => (setServed(models.data[0] ?? null), setFault("")),
      (error: Error) => setFault(error.message),
    );
  }, [round]);
  useEffect(() => {
    if (sticks.current && log.current) log.current.scrollTop = log.current.scrollHeight;
  });

  const { current, draft } = chats;
  const isRunning = chats.isRunning(current.id);
  const wrong = faults(current.settings);
  const isWrong = Object.keys(wrong).length > 0;

  // Wherever the focus is; a dialog that is open is closed by Escape itself.
  useEffect(() => {
    if (!isRunning) return;
    const pressed = (event: KeyboardEvent) => {
      if (event.key === "Escape" && !event.isComposing && !document.querySelector("dialog[open]")) stop();
    };
    addEventListener("keydown", pressed);
    return () => removeEventListener("keydown", pressed);
  }, [isRunning, current.id]);

  function ask(messages: Message[]): boolean {
    sticks.current = true;
    return chats.ask(current.id, messages, model);
  }

  function send(event?: Event) {
    event?.preventDefault();
    const content = draft.trim();
    if (!content || isRunning || isWrong || !model) return;
    if (ask([...current.messages, { role: "user", content }])) chats.setDraft("");
    input.current?.focus();
  }

  function askExample(question: string) {
    ask([...current.messages, { role: "user", content: question }]);
    input.current?.focus();
  }

  function stop() {
    chats.stop(current.id);
    input.current?.focus();
  }

  function again() {
    const last = current.messages.findLastIndex((it) => it.role !== "assistant");
    if (last >= 0) ask(current.messages.slice(0, last + 1));
    input.current?.focus();
  }

  function giveResult(id: string, content: string) {
    const messages: Message[] = [...current.messages, { role: "tool", toolCallId: id, content }];
    const calls = current.messages.findLast((it) => it.role === "assistant")?.toolCalls ?? [];
    const given = new Set(messages.map((it) => it.toolCallId));
    // When all calls have a result, the model goes on.
    if (!calls.every((call) => given.has(call.id)) || !ask(messages))
      chats.change(current.id, (it) => ({ ...it, messages }));
  }

  function choose(id?: string) {
    if (id) chats.choose(id);
    else chats.new();
    sticks.current = true;
    input.current?.focus();
  }

  const lastAnswer = current.messages.findLast((it) => it.role === "assistant");
  const said = fault || chats.fault;
  return (
    <div class="chat">
      <nav class="conversations" aria-label="Conversations">
        <button type="button" class="new" onClick={() => choose()}>
          New conversation
        </button>
        <ul>
          {chats.all
            .filter((it) => it.asked > 0)
            .map((it) => (
              <li key={it.id} class={it.id === current.id ? "is-current" : ""}>
                <button type="button" aria-current={it.id === current.id ? "true" : undefined} onClick={() => choose(it.id)}>
                  {it.title || "untitled"}
                </button>
                <button type="button" class="quiet" aria-label={`Delete ${it.title || "untitled"}`} onClick={() => chats.remove(it.id)}>
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
          aria-busy={isRunning}
          tabIndex={0}
          aria-label="Messages"
          onScroll={(event) => {
            const box = event.currentTarget;
            sticks.current = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
          }}
        >
          {!current.messages.length && <Welcome model={served} onAsk={isWrong ? null : askExample} />}
          {current.messages.map((message, index) => (
            <MessageView
              key={`${current.id} ${index}`}
              message={message}
              isRunning={isRunning && index === current.messages.length - 1}
              results={current.messages}
              onResult={giveResult}
            />
          ))}
        </div>
        {said && (
          <p class="fault" role="alert">
            {said}
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
            placeholder="Message (Enter sends, Shift+Enter begins a line, Escape stops)"
            onInput={(event) => chats.setDraft(event.currentTarget.value)}
            onKeyDown={(event) => {
              if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
            }}
          />
          <div class="buttons">
            {isRunning ? (
              <button key="stop" type="button" class="primary" aria-keyshortcuts="Escape" onClick={stop}>
                Stop
              </button>
            ) : (
              <button key="send" type="submit" class="primary" disabled={!draft.trim() || isWrong || !model}>
                Send
              </button>
            )}
            <button type="button" onClick={again} disabled={isRunning || isWrong || !model || !lastAnswer}>
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
            onChange={(settings: Settings) => chats.change(current.id, (it) => ({ ...it, settings }))}
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
