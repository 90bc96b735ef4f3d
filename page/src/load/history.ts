// The last minutes, as points of lines. Readings themselves are kept only as long as another point needs them.

import { CHARTS, type ChartSpec, type Reading } from "./charts";
import type { Point } from "./line_chart";

/** What is kept: the most that is shown. */
export const SHOWN_MS = 5 * 60_000;

/** Over how long each point is taken, about. */
export const WINDOW_MS = 5_000;

/** A reading a little early will do. */
const EARLY_MS = 500;

/** Two readings further apart than this say nothing of the time between them: nobody looked. */
const GAP_MS = 4 * WINDOW_MS;

/** A point of each line of each chart. */
interface Row {
  at: number;
  values: (number | null)[][];
}

export class History {
  private readings: Reading[] = [];
  private rows: Row[] = [];
  private readonly watchers = new Set<() => void>();

  constructor(private readonly charts: ChartSpec[] = CHARTS) {}

  /** When the first and the last point are of, or the time without one. */
  span(): { from: number; to: number } | null {
    const [first, last] = [this.rows[0], this.rows.at(-1)];
    return first && last ? { from: first.at, to: last.at } : null;
  }

  take(after: Reading): void {
    const { at } = after;
    const before = this.readings.findLast((it) => at - it.at >= WINDOW_MS - EARLY_MS);
    const isGap = before !== undefined && at - before.at > GAP_MS;
    if (before)
      this.rows.push({
        at,
        values: this.charts.map((chart) => chart.lines.map((line) => (isGap ? null : line.value(before, after)))),
      });
    // The newest of those that are old enough is the next one's, at least.
    this.readings = [...this.readings.filter((it) => at - it.at <= GAP_MS), after];
    this.rows = this.rows.filter((it) => at - it.at <= SHOWN_MS);
    for (const watcher of this.watchers) watcher();
  }

  points(chart: number, line: number): Point[] {
    return this.rows.map(({ at, values }) => ({ at, value: values[chart]?.[line] ?? null }));
  }

  /** Calls after each reading; returns how to end it. */
  watch(watcher: () => void): () => void {
    this.watchers.add(watcher);
    return () => this.watchers.delete(watcher);
  }
}
