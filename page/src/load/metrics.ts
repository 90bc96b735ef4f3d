// Prometheus text, as far as the page needs it, and what follows from two readings.

/** By series as written: name and labels. */
export type Metrics = Map<string, number>;

/** Series of a name whose labels are these. */
export interface Selector {
  name: string;
  labels: [string, string][];
}

/** As Prometheus writes one: `name{label="value"}`. */
export function selector(text: string): Selector {
  const labels = [...text.matchAll(/(\w+)="([^"]*)"/g)].map((found): [string, string] => [found[1]!, found[2]!]);
  return { name: text.split("{")[0]!, labels };
}

/** Series of these names, or all. */
export function parse(text: string, names?: Set<string>): Metrics {
  const metrics: Metrics = new Map();
  for (const line of text.split("\n")) {
    if (!line || line.startsWith("#")) continue;
    const at = line.lastIndexOf(" ");
    const value = Number(line.slice(at + 1).replace("+Inf", "Infinity"));
    const series = line.slice(0, at);
    if (at > 0 && !Number.isNaN(value) && (names?.has(series.split("{")[0]!) ?? true)) metrics.set(series, value);
  }
  return metrics;
}

function label(series: string, name: string): string | undefined {
  const found = series.match(new RegExp(`[{,]${name}="([^"]*)"`));
  return found?.[1];
}

function selects({ name, labels }: Selector, series: string): boolean {
  const isIts = series === name || series.startsWith(`${name}{`);
  return isIts && labels.every(([key, wanted]) => label(series, key) === wanted);
}

/** Sum over the series. */
export function sum(metrics: Metrics, wanted: Selector): number {
  let total = 0;
  for (const [series, value] of metrics) if (selects(wanted, series)) total += value;
  return total;
}

/** How much counters grew. What fell began anew with its process. */
export function growth(before: Metrics, after: Metrics, wanted: Selector): number {
  const [from, to] = [sum(before, wanted), sum(after, wanted)];
  return to >= from ? to - from : to;
}

/** A quantile of what a histogram, chosen by its buckets, took in between two readings; null if that was nothing. Straight within a bucket. */
export function quantile(before: Metrics, after: Metrics, wanted: Selector, q: number): number | null {
  const buckets = new Map<number, number>();
  for (const [series, value] of after) {
    if (!selects(wanted, series)) continue;
    const bound = Number(label(series, "le")?.replace("+Inf", "Infinity"));
    const grown = Math.max(0, value - (before.get(series) ?? 0));
    buckets.set(bound, (buckets.get(bound) ?? 0) + grown);
  }
  const bounds = [...buckets.keys()].sort((a, b) => a - b);
  const last = bounds.at(-1);
  const all = last === undefined ? 0 : buckets.get(last)!;
  if (!all) return null;
  let [from, below] = [0, 0];
  for (const bound of bounds) {
    const upto = buckets.get(bound)!;
    if (upto >= q * all) {
      if (!Number.isFinite(bound)) return from;
      return from + ((bound - from) * (q * all - below)) / Math.max(upto - below, 1e-9);
    }
    [from, below] = [bound, upto];
  }
  return from;
}
