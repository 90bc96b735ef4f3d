// The vertical axis of a chart: where its lines are, and what is written at them.

/** Lines of a chart above the one at 0. */
const LINES_MAX = 4;

/** From 0 up to the value at least, in steps of 1, 2 or 5 times a power of ten; of 1 at least where things are counted. */
export function axis(value: number, isCount: boolean): number[] {
  const top = value > 0 ? value : 1;
  let power = 10 ** (Math.floor(Math.log10(top)) - 1);
  if (isCount || !(value > 0)) power = Math.max(power, 1);
  const steps = [1, 2, 5, 10, 20, 50].map((it) => rounded(it * power));
  const step = steps.find((it) => top / it <= LINES_MAX) ?? steps.at(-1)!;
  return Array.from({ length: Math.ceil(rounded(top / step)) + 1 }, (_, at) => rounded(at * step));
}

/** Without what binary fractions add. */
function rounded(value: number): number {
  return Number(value.toPrecision(12));
}

/** A number as people read it, with as many digits as it needs. */
export function written(value: number): string {
  if (value >= 10_000) return `${(value / 1_000).toFixed(0)}k`;
  if (value >= 1_000) return `${trimmed(value / 1_000, 1)}k`;
  return trimmed(value, value >= 100 ? 0 : value >= 10 ? 1 : 2);
}

function trimmed(value: number, digits: number): string {
  return String(Number(value.toFixed(digits)));
}
