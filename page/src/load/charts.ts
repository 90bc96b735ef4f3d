// What is drawn, and how it follows from readings. Series are written as Prometheus writes them: a test of the API server holds
// their names and labels to what it exposes.

import { growth, quantile, selector, sum, type Metrics, type Selector } from "./metrics";

export interface Reading {
  /** Milliseconds since the epoch. */
  at: number;
  metrics: Metrics;
}

export interface Line {
  label: string;
  /** `before` is some seconds older than `after`. null: there was nothing to measure. */
  value: (before: Reading, after: Reading) => number | null;
}

export interface ChartSpec {
  title: string;
  unit: string;
  /** Things are counted. */
  isCount?: boolean;
  /** They are shares of a hundred. */
  isShare?: boolean;
  /** It is of what the server promises, and empty where it promises nothing. */
  isOfPromises?: boolean;
  lines: Line[];
}

/** Names of all that is read. */
export const NAMES = new Set<string>();

const of = (text: string): Selector => {
  const wanted = selector(text);
  NAMES.add(wanted.name);
  return wanted;
};

const seconds = (before: Reading, after: Reading) => Math.max((after.at - before.at) / 1e3, 1e-3);

const rate = (text: string): Line["value"] => {
  const wanted = of(text);
  return (before, after) => growth(before.metrics, after.metrics, wanted) / seconds(before, after);
};

/** How many of a hundred. */
const percent = (part: string, whole: string): Line["value"] => {
  const [counted, all] = [of(part), of(whole)];
  return (before, after) => {
    const total = growth(before.metrics, after.metrics, all);
    return total ? (100 * growth(before.metrics, after.metrics, counted)) / total : null;
  };
};

const now = (text: string): Line["value"] => {
  const wanted = of(text);
  return (_, after) => sum(after.metrics, wanted);
};

/** Of a histogram of seconds, by its buckets, in milliseconds. */
const times = (text: string): Line[] => {
  const wanted = of(text);
  const ms = (q: number): Line["value"] => (before, after) => {
    const value = quantile(before.metrics, after.metrics, wanted, q);
    return value === null ? null : value * 1e3;
  };
  return [
    { label: "median", value: ms(0.5) },
    { label: "90%", value: ms(0.9) },
  ];
};

export const CHARTS: ChartSpec[] = [
  {
    title: "Tokens",
    unit: "per second",
    isCount: true,
    lines: [
      { label: "output", value: rate('baton_tokens_total{kind="output"}') },
      { label: "prompt", value: rate('baton_tokens_total{kind="prompt"}') },
    ],
  },
  { title: "Requests", unit: "in flight", isCount: true, lines: [{ label: "in flight", value: now("baton_requests_in_flight") }] },
  { title: "First token", unit: "ms", lines: times("baton_ttft_seconds_bucket") },
  { title: "Between tokens", unit: "ms", lines: times("baton_inter_token_seconds_bucket") },
  // The time that users wait for, from the prompt's last step to the release of its KV; and what of it the pull takes.
  { title: "Hand-over", unit: "ms, waits included", lines: times("baton_kv_handover_seconds_bucket") },
  { title: "Pull of KV", unit: "ms, of a hand-over", lines: times("baton_kv_pull_seconds_bucket") },
  {
    title: "Prompt tokens from cache",
    unit: "%",
    isShare: true,
    lines: [{ label: "cached", value: percent('baton_tokens_total{kind="cached"}', 'baton_tokens_total{kind="prompt"}') }],
  },
  {
    title: "Service level met",
    unit: "% of requests",
    isShare: true,
    isOfPromises: true,
    lines: [{ label: "met", value: percent('baton_service_level_total{outcome="met"}', "baton_service_level_total") }],
  },
  {
    title: "Errors and retries",
    unit: "per second",
    lines: [
      { label: "errors", value: rate("baton_errors_total") },
      { label: "retries", value: rate("baton_retries_total") },
    ],
  },
];
