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
  lines: { label: string; points: Point[] }[];
}

const [WIDTH, HEIGHT, LEFT, TOP, BOTTOM] = [420, 150, 48, 8, 18];

export function LineChart({ title, unit, from, to, lines }: Props) {
  const values = lines.flatMap((line) => line.points.flatMap((point) => point.value ?? []));
  const top = ceiling(Math.max(0, ...values));
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
          {now.map((text, index) => (
            <span key={text.split(" ")[0]} class={`line-${index}`}>
              {text}
            </span>
          ))}
        </span>
      </figcaption>
      <svg viewBox={`0 0 ${WIDTH} ${HEIGHT}`} role="img" aria-label={`${title}, ${unit}: ${now.join(", ")}`}>
        {[0, 0.5, 1].map((share) => (
          <g key={share} class="grid">
            <line x1={LEFT} x2={WIDTH - 4} y1={y(top * share)} y2={y(top * share)} />
            <text x={LEFT - 5} y={y(top * share) + 4}>
              {written(top * share)}
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

/** 1, 2 or 5 times a power of ten, not below the value. */
export function ceiling(value: number): number {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return (([1, 2, 5].find((it) => it * power >= value) ?? 10) as number) * power;
}

export function written(value: number): string {
  if (value >= 10_000) return `${(value / 1_000).toFixed(0)}k`;
  if (value >= 1_000) return `${(value / 1_000).toFixed(1)}k`;
  return value >= 100 || Number.isInteger(value) ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2);
}
