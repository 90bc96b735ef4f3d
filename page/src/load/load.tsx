import { useEffect, useState } from "preact/hooks";

import { getJson, getText } from "../api";
import type { ClusterAnswer } from "../cluster/types";
import { usePoll } from "../poll";
import { CHARTS, NAMES } from "./charts";
import { SHOWN_MS, WINDOW_MS, type History } from "./history";
import { LineChart } from "./line_chart";
import { parse } from "./metrics";

const NO_LEVEL = "no level promised (the API server's --ttft-ms, --itl-ms)";
const NOTHING_YET = "nothing measured yet";

/** The least that is shown. */
const SHOWN_MIN_MS = 60_000;

/** Reads the server's metrics for as long as the page is open, so that the last minutes are there for whoever comes to look. */
export function useReadings(history: History, isLookedAt: boolean): string {
  const periodMs = isLookedAt ? 1_000 : WINDOW_MS;
  return usePoll(
    async (signal) => {
      const metrics = parse(await getText("/metrics", signal), NAMES);
      history.take({ at: Date.now(), metrics });
    },
    { periodMs, hiddenMs: SHOWN_MS },
  );
}

interface Props {
  history: History;
  fault: string;
  /** Another one: ask anew, there may be another key. */
  round: number;
}

export function Load({ history, fault, round }: Props) {
  const [, redraw] = useState(0);
  useEffect(() => history.watch(() => redraw((count) => count + 1)), [history]);
  const [isPromised, setIsPromised] = useState(true);
  useEffect(() => {
    const leaves = new AbortController();
    // A server of before says nothing of it: then the chart is drawn.
    getJson<ClusterAnswer>("/cluster", leaves.signal).then(
      ({ promised }) => setIsPromised(!promised || promised.ttft_ms !== null || promised.itl_ms !== null),
      () => {},
    );
    return () => leaves.abort();
  }, [round]);
  const { from, to } = history.span() ?? { from: Date.now(), to: Date.now() };
  const shown = Math.min(SHOWN_MS, Math.max(SHOWN_MIN_MS, to - from));
  return (
    <div class="load">
      {fault && (
        <p class="fault" role="alert">
          {fault}
        </p>
      )}
      <p class="note">
        Of this API server, since this page was opened and over five minutes at most; each point is of the {WINDOW_MS / 1e3} s before it.
      </p>
      <div class="charts">
        {CHARTS.map((chart, index) => (
          <LineChart
            key={chart.title}
            title={chart.title}
            unit={chart.unit}
            isCount={chart.isCount ?? false}
            isShare={chart.isShare ?? false}
            nothing={chart.isOfPromises && !isPromised ? NO_LEVEL : NOTHING_YET}
            from={to - shown}
            to={to}
            lines={chart.lines.map((line, number) => ({ label: line.label, points: history.points(index, number) }))}
          />
        ))}
      </div>
    </div>
  );
}
