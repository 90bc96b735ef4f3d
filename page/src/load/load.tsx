import { useRef, useState } from "preact/hooks";

import { getText } from "../api";
import { usePoll } from "../poll";
import { CHARTS, type Reading } from "./charts";
import { LineChart, type Point } from "./line_chart";
import { parse } from "./metrics";

/** The most that is shown, the least, and over how long each point is taken. */
const SHOWN_MS = 5 * 60_000;
const SHOWN_MIN_MS = 60_000;
const WINDOW_MS = 5_000;

/** Readings outlive the view: whoever comes back finds the last minutes. */
let readings: Reading[] = [];

export function Load() {
  const [, setRound] = useState(0);
  const points = useRef<Map<string, Point[]>>(new Map());
  const fault = usePoll(async (signal) => {
    const metrics = parse(await getText("/metrics", signal));
    const at = Date.now();
    readings = [...readings.filter((it) => at - it.at < SHOWN_MS + 2 * WINDOW_MS), { at, metrics }];
    points.current = draw();
    setRound((round) => round + 1);
  });
  const now = readings.at(-1)?.at ?? Date.now();
  const shown = Math.min(SHOWN_MS, Math.max(SHOWN_MIN_MS, now - (readings[0]?.at ?? now)));
  return (
    <div class="load">
      {fault && (
        <p class="fault" role="alert">
          {fault}
        </p>
      )}
      <p class="note">Of this API server, over five minutes at most; each point is of the {WINDOW_MS / 1e3} s before it.</p>
      <div class="charts">
        {CHARTS.map((chart) => (
          <LineChart
            key={chart.title}
            title={chart.title}
            unit={chart.unit}
            from={now - shown}
            to={now}
            lines={chart.lines.map((line) => ({
              label: line.label,
              points: points.current.get(`${chart.title}/${line.label}`) ?? [],
            }))}
          />
        ))}
      </div>
    </div>
  );
}

function draw(): Map<string, Point[]> {
  const all = new Map<string, Point[]>();
  for (const chart of CHARTS)
    for (const line of chart.lines) {
      const drawn: Point[] = [];
      let first = 0;
      readings.forEach((after, index) => {
        while (first + 1 < index && after.at - readings[first + 1]!.at >= WINDOW_MS) first += 1;
        const before = readings[first]!;
        if (index > 0 && after.at - before.at >= WINDOW_MS) drawn.push({ at: after.at, value: line.value(before, after) });
      });
      all.set(`${chart.title}/${line.label}`, drawn);
    }
  return all;
}
