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

/** A number as people read it, with three digits at most. */
export function written(value: number): string {
  const [unit, name] = value >= 1e6 ? [1e6, "M"] : value >= 1e3 ? [1e3, "k"] : [1, ""];
  const scaled = value / (unit as number);
  return `${Number(scaled.toPrecision(scaled >= 100 ? Math.ceil(Math.log10(scaled + 1)) : 3))}${name}`;
}
