// The conversations of this tab, and the answers that stream into them. It lives above the views: whatever is shown, an answer goes on,
// into the conversation that it belongs to and into no other.

import { postStream } from "../api";
import { withEvent } from "./answer";
import { requestBody } from "./request";
import { byAsked, changed, fresh, load, read, remove, save, type Kept } from "./store";
import type { Conversation, Message } from "./types";

/** Answers at the same time. A browser opens six connections to a server over HTTP/1.1, and the other views want some. */
const STREAMS_MAX = 3;

/** How often an answer is kept while it streams. */
const KEEP_INTERVAL_MS = 1_000;

/** A tab that kept an answer within this time still gets it. */
const ANSWERING_MS = 4 * KEEP_INTERVAL_MS;

export class Chats {
  /** The one asked last first. One that nothing was asked in yet is kept nowhere. */
  all: Conversation[];
  draft = "";
  /** What is to be said of the last thing that was done. */
  fault = "";
  private chosen: string;
  private readonly streams = new Map<string, AbortController>();
  private readonly watchers = new Set<() => void>();

  constructor(
    private readonly kept: Kept,
    private readonly stream: typeof postStream = postStream,
  ) {
    this.all = load(kept);
    this.chosen = this.all[0]?.id ?? this.begin();
  }

  get current(): Conversation {
    return this.all.find((it) => it.id === this.chosen) ?? this.all[0]!;
  }

  isRunning(id: string): boolean {
    return this.streams.has(id);
  }

  /** Calls after each change; returns how to end it. */
  watch(watcher: () => void): () => void {
    this.watchers.add(watcher);
    return () => this.watchers.delete(watcher);
  }

  /** Changes what the conversation is now, whatever it was when the change was thought of. One that is gone stays so. */
  update(id: string, change: (conversation: Conversation) => Conversation): void {
    this.all = this.all.map((it) => (it.id === id ? change(it) : it));
    this.tell();
  }

  /** As `update`, and kept in the browser. */
  change(id: string, change: (conversation: Conversation) => Conversation): void {
    this.update(id, change);
    this.keep(id);
  }

  setDraft(draft: string): void {
    this.draft = draft;
    this.tell();
  }

  choose(id: string): void {
    this.chosen = id;
    this.fault = "";
    this.all = this.all.filter((it) => it.asked > 0 || it.id === id);
    this.tell();
  }

  /** A new conversation with the settings of the present one. */
  new(): void {
    this.choose(this.begin(this.current.settings));
  }

  remove(id: string): void {
    remove(this.kept, id);
    this.drop(id);
  }

  stop(id: string): void {
    this.streams.get(id)?.abort();
  }

  /** Asks for the message that follows `messages`, which are the conversation's from now on. Says whether it does; if not, `fault` says why. */
  ask(id: string, messages: Message[], model: string): boolean {
    const conversation = this.all.find((it) => it.id === id);
    if (!conversation || this.streams.has(id)) return false;
    this.fault = "";
    if (this.streams.size >= STREAMS_MAX)
      this.fault = `${STREAMS_MAX} answers are being written: wait for one, or stop one`;
    else if (Date.now() - (read(this.kept, id)?.answering ?? 0) < ANSWERING_MS)
      this.fault = "another tab gets an answer in this conversation: wait for it, or begin a new one";
    this.tell();
    if (this.fault) return false;
    const abort = new AbortController();
    this.streams.set(id, abort);
    const body = requestBody(model, { messages, settings: conversation.settings });
    void this.answer(id, messages, body, abort.signal);
    return true;
  }

  private async answer(id: string, messages: Message[], body: object, signal: AbortSignal): Promise<void> {
    const begun = performance.now();
    let [first, frame] = [0, 0];
    let answer: Message = { role: "assistant", content: "", end: "unfinished" };
    const put = () => this.update(id, (it) => ({ ...it, messages: [...it.messages.slice(0, messages.length), answer] }));
    const question = messages.find((it) => it.role === "user")?.content ?? "";
    // The question is kept before it is asked.
    this.change(id, (it) => ({
      ...it,
      title: it.title || question.slice(0, 60),
      asked: Date.now(),
      messages: [...messages, answer],
    }));
    this.all = [...this.all].sort(byAsked);
    this.tell();
    const keeping = setInterval(() => (put(), this.keep(id)), KEEP_INTERVAL_MS);
    try {
      await this.stream(
        "/v1/chat/completions",
        body,
        (data) => {
          answer = withEvent(answer, data);
          if (!first && (answer.content || answer.reasoning || answer.toolCalls)) first = performance.now() - begun;
          // A page is drawn once a frame, however fast tokens come.
          frame ||= requestAnimationFrame(() => {
            frame = 0;
            put();
          });
        },
        signal,
      );
    } catch (error) {
      answer = signal.aborted ? { ...answer, end: "stopped" } : { ...answer, error: (error as Error).message };
    }
    clearInterval(keeping);
    cancelAnimationFrame(frame);
    answer = { ...answer, times: { first, all: performance.now() - begun } };
    if (answer.error && answer.end === "unfinished") delete answer.end;
    this.streams.delete(id);
    put();
    this.keep(id);
  }

  /** The tab is closed or loaded anew: what has come so far is there afterwards, and nobody waits for the rest. */
  keepAll(): void {
    for (const id of this.streams.keys()) this.keep(id, 0);
  }

  /** Another tab kept or deleted something. What streams here is this tab's to tell. */
  heard(event: Pick<StorageEvent, "key" | "newValue">): void {
    const news = changed(event);
    if (!news) return;
    const { id, to } = news;
    if (!to) return this.drop(id);
    if (this.streams.has(id)) return;
    this.all = [to, ...this.all.filter((it) => it.id !== id)].sort(byAsked);
    this.tell();
  }

  private begin(settings?: Conversation["settings"]): string {
    const conversation = fresh(settings);
    this.all = [conversation, ...this.all];
    return conversation.id;
  }

  private drop(id: string): void {
    this.streams.get(id)?.abort();
    const settings = this.current.settings;
    this.all = this.all.filter((it) => it.id !== id);
    if (id === this.chosen) this.choose(this.all[0]?.id ?? this.begin(settings));
    else this.tell();
  }

  private keep(id: string, answering = this.streams.has(id) ? Date.now() : 0): void {
    const conversation = this.all.find((it) => it.id === id);
    if (!conversation || conversation.asked === 0) return;
    if (!save(this.kept, { ...conversation, answering }))
      this.fault = "the browser has no room for this conversation: it is lost with this tab";
  }

  private tell(): void {
    for (const watcher of this.watchers) watcher();
  }
}
