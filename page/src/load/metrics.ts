// Prometheus text, as far as the page needs it, and what follows from two readings.

/** By series as written: name and labels. */
export type Metrics = Map<string, number>;

export function parse(text: string): Metrics {
  const metrics: Metrics = new Map();
  for (const line of text.split("\n")) {
    if (!line || line.startsWith("#")) continue;
    const at = line.lastIndexOf(" ");
    const value = Number(line.slice(at + 1).replace("+Inf", "Infinity"));
    if (at > 0 && !Number.isNaN(value)) metrics.set(line.slice(0, at), value);
  }
  return metrics;
}

function label(series: string, name: string): string | undefined {
  const found = series.match(new RegExp(`[{,]${name}="([^"]*)"`));
  return found?.[1];
}

/** Sum over the series of a name whose labels are these. */
export function sum(metrics: Metrics, name: string, labels: Record<string, string> = {}): number {
  let total = 0;
  for (const [series, value] of metrics) {
    const isIts = series === name || series.startsWith(`${name}{`);
    if (isIts && Object.entries(labels).every(([key, wanted]) => label(series, key) === wanted)) total += value;
  }
  return total;
}

/** How much a counter grew. One that fell began anew with its process. */
export function growth(before: Metrics, after: Metrics, name: string, labels?: Record<string, string>): number {
  const [from, to] = [sum(before, name, labels), sum(after, name, labels)];
  return to >= from ? to - from : to;
}

/** A quantile of what a histogram took in between two readings; null if that was nothing. Straight within a bucket. */
export function quantile(before: Metrics, after: Metrics, name: string, q: number): number | null {
  const buckets = new Map<number, number>();
  for (const [series, value] of after) {
    if (!series.startsWith(`${name}_bucket{`)) continue;
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
