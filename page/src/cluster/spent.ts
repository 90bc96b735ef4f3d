// Where a request's time went, as parts of a bar.

/** A request that ended, as GET /requests says. */
export interface Spent {
  number: number;
  ended_ms_ago: number;
  outcome: string;
  queue_ms: number;
  prefill_ms: number;
  handover_ms: number;
  decode_ms: number;
  prompt_tokens: number;
  cached_tokens: number;
  output_tokens: number;
  context_worker: string | null;
  decode_worker: string | null;
}

export const PARTS = ["queue", "prefill", "handover", "decode"] as const;

export const NAMES = { queue: "queue", prefill: "prefill", handover: "hand-over", decode: "decode" };

export function whole(spent: Spent): number {
  return PARTS.reduce((sum, part) => sum + spent[`${part}_ms`], 0);
}

/** Each part's width in percent of the row, of which the longest request takes all. */
export function widths(spent: Spent, longestMs: number): Record<(typeof PARTS)[number], number> {
  const of = (part: (typeof PARTS)[number]) => (100 * spent[`${part}_ms`]) / Math.max(longestMs, 1e-9);
  return { queue: of("queue"), prefill: of("prefill"), handover: of("handover"), decode: of("decode") };
}

/** A time as people read it. */
export function time(ms: number): string {
  if (ms >= 10_000) return `${(ms / 1e3).toFixed(1)} s`;
  if (ms >= 1_000) return `${(ms / 1e3).toFixed(2)} s`;
  return `${ms >= 100 ? ms.toFixed(0) : ms.toFixed(1)} ms`;
}
