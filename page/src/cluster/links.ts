// What goes over the links that KV takes: workers count the bytes that they pulled from each other, and the page takes the difference.

import type { Seen } from "./seen";
import type { Peer, Worker } from "./types";

/** Over how long a rate is taken: a pull takes milliseconds, and people look for longer. */
const WINDOW_MS = 3_000;

/** Beats come once a second. Two answers of the server less than this apart in beats show the same one. */
const BEAT_MIN_MS = 400;

interface Reading {
  /** When the beat came that said so. */
  at: number;
  bytes: number;
}

/** By link. */
export type Readings = Map<string, Reading[]>;

export interface Flow {
  /** Who has the KV, and who reads it. */
  from: Worker;
  to: Worker;
  peer: Peer;
  isReady: boolean;
  /** Bytes a second, over the last few; null if the reader does not count them, or has not said so twice. */
  rate: number | null;
  isBusy: boolean;
}

const key = (reader: Worker, peer: Peer) => `${peer.worker} ${reader.worker} ${reader.incarnation}`;

/** What of a link's counter can be known: nothing was pulled where there is neither a counter nor a rate. */
function counted(peer: Peer): number | null {
  return peer.pulled_bytes ?? (peer.pulled_gigabytes_per_second == null ? 0 : null);
}

/** The readings after an answer that came at `now`. */
export function taken(before: Readings, workers: Worker[], now: number): Readings {
  const after: Readings = new Map();
  for (const worker of workers)
    for (const peer of worker.peers) {
      const bytes = counted(peer);
      if (bytes === null) continue;
      const at = now - worker.silent_ms;
      const known = before.get(key(worker, peer)) ?? [];
      const last = known.at(-1);
      if (last && at - last.at < BEAT_MIN_MS) {
        after.set(key(worker, peer), known);
        continue;
      }
      // One that is older than the window is what the window begins with.
      const first = known.findLastIndex((it) => at - it.at >= WINDOW_MS);
      after.set(key(worker, peer), [...known.slice(Math.max(first, 0)), { at, bytes }]);
    }
  return after;
}

/** Bytes a second; null where too little is known, or nothing was heard for long. */
export function rate(readings: Reading[] | undefined, now: number): number | null {
  const [first, last] = [readings?.[0], readings?.at(-1)];
  if (!readings || !first || !last || first === last || now - last.at > WINDOW_MS) return null;
  let grown = 0;
  // What fell began anew with another connection.
  for (let index = 1; index < readings.length; index++) {
    const [before, after] = [readings[index - 1]!.bytes, readings[index]!.bytes];
    grown += after >= before ? after - before : after;
  }
  return (grown * 1e3) / (last.at - first.at);
}

/** All links between workers that are shown. */
export function flows(workers: Seen[], readings: Readings, now: number): Flow[] {
  const byName = new Map(workers.map((it) => [it.worker.worker, it]));
  return workers.flatMap((reader) =>
    reader.worker.peers.flatMap((peer) => {
      const source = byName.get(peer.worker);
      if (!source) return [];
      const isReady = peer.state === "ready" && !reader.isGone && !source.isGone;
      const bytes = isReady ? rate(readings.get(key(reader.worker, peer)), now) : null;
      // A worker of old only says that it pulls something from somebody.
      const isBusy = counted(peer) === null ? isReady && reader.worker.load.pulling > 0 : (bytes ?? 0) > 0;
      return [{ from: source.worker, to: reader.worker, peer, isReady, rate: bytes, isBusy }];
    }),
  );
}

/** Bytes a second as people read them. */
export function perSecond(bytes: number): string {
  const [unit, name] = bytes >= 1e9 ? [1e9, "GB"] : bytes >= 1e6 ? [1e6, "MB"] : [1e3, "kB"];
  const value = bytes / (unit as number);
  return `${value >= 100 || value === 0 ? value.toFixed(0) : value.toFixed(1)} ${name}/s`;
}

/** A line's width: a step wider for each power of ten, from 100 kB/s to 10 GB/s. */
export function width(bytes: number): number {
  return 3 + Math.min(5, Math.max(0, Math.log10(Math.max(bytes, 1)) - 5)) * 1.4;
}
