// Workers as the page has seen them: one that is gone stays for a while, so that people see that it is.

import type { Worker } from "./types";

const GONE_SHOWN_MS = 60_000;

/** A supervisor may have started it again before anybody saw that it was gone. */
const DIED_SHOWN_MS = 10_000;

export interface Seen {
  worker: Worker;
  /** When it was last in an answer. */
  at: number;
  isGone: boolean;
  /** It said that it drains: then it is to leave, and nobody misses it. */
  drains: boolean;
  /** When another life of it was first seen that followed without a farewell; null if none did, or long ago. */
  diedAt: number | null;
}

/** What it is called, and what its colour says. */
export function stateOf({ worker, isGone, diedAt }: Seen): { name: string; said: string } {
  if (isGone) return { name: "gone", said: "gone" };
  if (diedAt !== null) return { name: "restarted", said: "died, started again" };
  return { name: worker.state, said: worker.state };
}

/** What is to be shown after an answer that came at `now`. */
export function seen(before: Seen[], workers: Worker[], now: number): Seen[] {
  const drained = new Set(before.filter((it) => it.drains).map((it) => it.worker.incarnation));
  const there = workers.map((worker) => {
    const drains = worker.state === "draining" || drained.has(worker.incarnation);
    const former = before.find((it) => it.worker.worker === worker.worker);
    const died = former && !former.isGone && !former.drains && former.worker.incarnation !== worker.incarnation;
    const diedAt = died ? now : (former?.diedAt ?? null);
    const isShown = diedAt !== null && now - diedAt < DIED_SHOWN_MS;
    return { worker, at: now, isGone: false, drains, diedAt: isShown ? diedAt : null };
  });
  const names = new Set(workers.map((it) => it.worker));
  const gone = before
    .filter((it) => !names.has(it.worker.worker) && now - it.at < GONE_SHOWN_MS)
    .filter((it) => !it.drains)
    .map((it) => ({ ...it, isGone: true }));
  return [...there, ...gone].sort((a, b) => order(a.worker) - order(b.worker) || a.worker.worker.localeCompare(b.worker.worker));
}

function order(worker: Worker): number {
  return { context: 0, both: 1, decode: 2 }[worker.role] ?? 3;
}
