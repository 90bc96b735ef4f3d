// Conversations, kept in this browser and nowhere else.

import { DEFAULTS, type Conversation } from "./types";

const KEY = "baton.conversations";

/** Oldest conversations go first when there are more, or when the browser has no room. */
const CONVERSATIONS_MAX = 100;

export function load(): Conversation[] {
  try {
    const kept: unknown = JSON.parse(localStorage.getItem(KEY) ?? "[]");
    if (!Array.isArray(kept)) return [];
    const isOne = (it: Partial<Conversation>) => typeof it?.id === "string" && Array.isArray(it.messages);
    return kept.filter(isOne).map((it) => ({ ...it, settings: { ...DEFAULTS, ...it.settings } }));
  } catch {
    return [];
  }
}

export function save(conversations: Conversation[]): void {
  let kept = conversations.filter((it) => it.messages.length > 0).slice(0, CONVERSATIONS_MAX);
  for (;;) {
    try {
      localStorage.setItem(KEY, JSON.stringify(kept));
      return;
    } catch {
      if (!kept.length) return;
      kept = kept.slice(0, Math.floor(kept.length / 2));
    }
  }
}

export function fresh(settings = DEFAULTS): Conversation {
  return { id: crypto.getRandomValues(new Uint32Array(4)).join("-"), title: "", messages: [], settings };
}
