// Conversations, kept in this browser and nowhere else. Each has an entry of its own, so that several tabs write side by side.

import { DEFAULTS, type Conversation } from "./types";

const PREFIX = "baton.conversation.";

/** Where earlier versions of the page kept all of them as one list. */
const OLD_KEY = "baton.conversations";

/** Those asked longest ago go first when there are more, or when the browser has no room. */
const CONVERSATIONS_MAX = 100;

export type Kept = Pick<Storage, "getItem" | "setItem" | "removeItem" | "key" | "length">;

/** All of them, the one asked last first. */
export function load(kept: Kept): Conversation[] {
  takeOver(kept);
  const ids = Array.from({ length: kept.length }, (_, index) => kept.key(index)?.split(PREFIX)[1]);
  return ids.flatMap((id) => (id && read(kept, id)) || []).sort(byAsked);
}

export function read(kept: Kept, id: string): Conversation | null {
  return parsed(kept.getItem(PREFIX + id));
}

/** Whether the browser had room for it. Others may have to go. */
export function save(kept: Kept, conversation: Conversation): boolean {
  const others = load(kept).filter((it) => it.id !== conversation.id);
  for (const old of others.splice(CONVERSATIONS_MAX - 1)) remove(kept, old.id);
  for (;;) {
    try {
      kept.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
      return true;
    } catch {
      const oldest = others.pop();
      if (!oldest) return false;
      remove(kept, oldest.id);
    }
  }
}

export function remove(kept: Kept, id: string): void {
  kept.removeItem(PREFIX + id);
}

/** What another tab did, as the event `storage` tells it; null if it is about something else. */
export function changed(event: Pick<StorageEvent, "key" | "newValue">): { id: string; to: Conversation | null } | null {
  if (!event.key?.startsWith(PREFIX)) return null;
  return { id: event.key.slice(PREFIX.length), to: parsed(event.newValue) };
}

export function byAsked(a: Conversation, b: Conversation): number {
  return b.asked - a.asked;
}

function parsed(text: string | null): Conversation | null {
  try {
    return completed(JSON.parse(text ?? "null"), 0);
  } catch {
    return null;
  }
}

/** With what later versions added; null if it is none. */
function completed(it: Partial<Conversation> | null, asked: number): Conversation | null {
  if (typeof it?.id !== "string" || !Array.isArray(it.messages)) return null;
  const known = { title: "", asked, answering: 0, ...it } as Conversation;
  return { ...known, settings: { ...DEFAULTS, ...it.settings } };
}

function takeOver(kept: Kept): void {
  const text = kept.getItem(OLD_KEY);
  if (text === null) return;
  kept.removeItem(OLD_KEY);
  try {
    const all: unknown = JSON.parse(text);
    if (!Array.isArray(all)) return;
    // They stand in the order in which they were asked, the last first.
    all.forEach((it, index) => {
      const conversation = completed(it, all.length - index);
      if (conversation) kept.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
    });
  } catch {
    // Unreadable, or no room: what could be taken over was.
  }
}

export function fresh(settings = DEFAULTS): Conversation {
  const id = crypto.getRandomValues(new Uint32Array(4)).join("-");
  return { id, title: "", messages: [], settings, asked: 0, answering: 0 };
}
