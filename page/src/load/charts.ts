// What is drawn, and how it follows from readings.

import { growth, quantile, sum, type Metrics } from "./metrics";

export interface Reading {
  /** Milliseconds since the epoch. */
  at: number;
  metrics: Metrics;
}

export interface Line {
  label: string;
  /** `before` is some seconds older than `after`. */
  value: (before: Reading, after: Reading) => number | null;
}

export interface ChartSpec {
  title: string;
  unit: string;
  lines: Line[];
}

const seconds = (before: Reading, after: Reading) => Math.max((after.at - before.at) / 1e3, 1e-3);

const rate = (name: string, labels?: Record<string, string>): Line["value"] => (before, after) =>
  growth(before.metrics, after.metrics, name, labels) / seconds(before, after);

const ms = (name: string, q: number): Line["value"] => (before, after) => {
  const value = quantile(before.metrics, after.metrics, name, q);
  return value === null ? null : value * 1e3;
};

const times = (name: string): Line[] => [
  { label: "median", value: ms(name, 0.5) },
  { label: "90%", value: ms(name, 0.9) },
];

export const CHARTS: ChartSpec[] = [
  {
    title: "Tokens",
    unit: "per second",
    lines: [
      { label: "output", value: rate("baton_tokens_total", { kind: "output" }) },
      { label: "prompt", value: rate("baton_tokens_total", { kind: "prompt" }) },
    ],
  },
  {
    title: "Requests",
    unit: "in flight",
    lines: [{ label: "in flight", value: (_, after) => sum(after.metrics, "baton_requests_in_flight") }],
  },
  { title: "First token", unit: "ms", lines: times("baton_ttft_seconds") },
  { title: "Between tokens", unit: "ms", lines: times("baton_inter_token_seconds") },
  { title: "Hand-over of KV", unit: "ms", lines: times("baton_kv_pull_seconds") },
  {
    title: "Prompt tokens from cache",
    unit: "%",
    lines: [
      {
        label: "cached",
        value: (before, after) => {
          const of = (kind: string) => growth(before.metrics, after.metrics, "baton_tokens_total", { kind });
          const prompt = of("prompt");
          return prompt ? (100 * of("cached")) / prompt : null;
        },
      },
    ],
  },
  {
    title: "Service level met",
    unit: "% of requests",
    lines: [
      {
        label: "met",
        value: (before, after) => {
          const of = (labels?: Record<string, string>) =>
            growth(before.metrics, after.metrics, "baton_service_level_total", labels);
          const all = of();
          return all ? (100 * of({ outcome: "met" })) / all : null;
        },
      },
    ],
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
