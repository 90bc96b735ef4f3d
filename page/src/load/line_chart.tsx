import { axis, written } from "./axis";

export interface Point {
  at: number;
  /** null: there was nothing to measure. */
  value: number | null;
}

interface Props {
  title: string;
  unit: string;
  from: number;
  to: number;
  /** Things are counted: the axis has whole numbers. */
  isCount?: boolean;
  /** Of a hundred: the axis ends there. */
  isShare: boolean;
  /** What is said in place of an axis where nothing was measured. */
  nothing: string;
  lines: { label: string; points: Point[] }[];
}

const [WIDTH, HEIGHT, LEFT, TOP, BOTTOM] = [420, 150, 48, 8, 18];

export function LineChart({ title, unit, from, to, isCount = false, isShare, nothing, lines }: Props) {
  const values = lines.flatMap((line) => line.points.flatMap((point) => point.value ?? []));
  const ticks = axis(isShare ? 100 : Math.max(0, ...values), isCount);
  const top = ticks.at(-1)!;
  const isEmpty = values.length === 0;
  const x = (at: number) => LEFT + ((at - from) / (to - from)) * (WIDTH - LEFT - 4);
  const y = (value: number) => TOP + (1 - value / top) * (HEIGHT - TOP - BOTTOM);
  const now = lines.map((line) => {
    const last = line.points.at(-1)?.value;
    return `${line.label} ${last === null || last === undefined ? "–" : written(last)}`;
  });
  return (
    <figure class="chart">
      <figcaption>
        <strong>{title}</strong> <span class="note">{unit}</span>
        <span class="legend">
          {(isEmpty ? [] : now).map((text, index) => (
            <span key={text.split(" ")[0]} class={`line-${index}`}>
              {text}
            </span>
          ))}
        </span>
      </figcaption>
      <svg viewBox={`0 0 ${WIDTH} ${HEIGHT}`} role="img" aria-label={`${title}, ${unit}: ${isEmpty ? nothing : now.join(", ")}`}>
        {isEmpty && (
          <text class="nothing" x={WIDTH / 2} y={HEIGHT / 2}>
            {nothing}
          </text>
        )}
        {(isEmpty ? [] : ticks).map((tick) => (
          <g key={tick} class="grid">
            <line x1={LEFT} x2={WIDTH - 4} y1={y(tick)} y2={y(tick)} />
            <text x={LEFT - 5} y={y(tick) + 4}>
              {written(tick)}
            </text>
          </g>
        ))}
        {[5, 4, 3, 2, 1, 0]
          .filter((minutes) => minutes * 60_000 <= to - from)
          .map((minutes) => (
            <text key={minutes} class={minutes ? "time" : "time is-now"} x={x(to - minutes * 60_000)} y={HEIGHT - 4}>
              {minutes ? `−${minutes} min` : "now"}
            </text>
          ))}
        {lines.map((line, index) => (
          <path key={line.label} class={`line line-${index}`} d={path(line.points.filter((it) => it.at >= from), x, y)} />
        ))}
      </svg>
    </figure>
  );
}

/** Where there is nothing, the line has a gap. */
function path(points: Point[], x: (at: number) => number, y: (value: number) => number): string {
  let isOn = false;
  return points
    .map(({ at, value }) => {
      const move = isOn ? "L" : "M";
      isOn = value !== null;
      return value === null ? "" : `${move}${x(at).toFixed(1)} ${y(value).toFixed(1)}`;
    })
    .join("");
}
