// Where workers and the links between them are drawn: one box a worker, in two columns. Context workers are on the left, decode workers on the
// right, and those that do both where there is more room.

import type { Flow } from "./links";
import type { Seen } from "./seen";

/** More than these are not drawn in a column: the cards below show all. */
const DRAWN_MAX = 12;

/** More links than these are drawn without their numbers. */
const NUMBERED_MAX = 8;

export const [WIDTH, BOX_WIDTH] = [820, 210];
const [MARGIN, GAP, BOX_HEIGHT] = [4, 22, 44];

/** A link's numbers are on its last part, which is straight: each link comes to its reader at a height of its own. */
export const [PORT_HEIGHT, LABEL_ROOM] = [20, 190];

export interface Box {
  it: Seen;
  isLeft: boolean;
  x: number;
  /** Of its middle. */
  y: number;
  height: number;
}

export interface Line {
  flow: Flow;
  /** What is drawn, from the edge of the one box to that of the other. */
  path: string;
  /** The tip of its arrow: where it comes to its reader, and whether from the left. */
  tip: { x: number; y: number; isRightwards: boolean };
  /** The middle of its numbers. */
  label: { x: number; y: number };
}

export interface Picture {
  height: number;
  boxes: Box[];
  lines: Line[];
  isNumbered: boolean;
}

/** Null where nothing can be handed over: one worker alone, or none that another reads from. */
export function picture(workers: Seen[], flows: Flow[]): Picture | null {
  const [left, right] = columns(workers);
  if (!left.length || !right.length) return null;
  const boxes = [...left.map((it) => box(it, true)), ...right.map((it) => box(it, false))];
  const named = new Map(boxes.map((it) => [it.it.worker.worker, it]));
  const drawn = flows.flatMap((flow) => {
    const [from, to] = [named.get(flow.from.worker), named.get(flow.to.worker)];
    return from && to && from !== to ? [{ flow, from, to }] : [];
  });
  const isNumbered = drawn.length <= NUMBERED_MAX;
  // From top to bottom: links that go right above those that go left, so that the two between a pair do not cross.
  const row = (it: Box) => boxes.filter((other) => other.isLeft === it.isLeft).indexOf(it);
  const ports = new Map(
    boxes.map((it) => {
      const incoming = drawn.filter(({ to }) => to === it).sort((a, b) => row(a.from) - row(b.from));
      const outgoing = drawn.filter(({ from }) => from === it);
      const out = outgoing.length ? [outgoing] : [];
      const each = isNumbered ? incoming.map((link) => [link]) : incoming.length ? [incoming] : [];
      return [it, it.isLeft ? [...out, ...each] : [...each, ...out]];
    }),
  );
  for (const it of boxes) it.height = Math.max(BOX_HEIGHT, ports.get(it)!.length * PORT_HEIGHT + 4);
  const height = Math.max(...[true, false].map((isLeft) => stacked(boxes.filter((it) => it.isLeft === isLeft))));
  for (const isLeft of [true, false]) centred(boxes.filter((it) => it.isLeft === isLeft), height);
  const portOf = (it: Box, link: (typeof drawn)[number]) => {
    const all = ports.get(it)!;
    const at = all.findIndex((port) => port.includes(link));
    return it.y + (at - (all.length - 1) / 2) * PORT_HEIGHT;
  };
  const lines = drawn.map((link) => line(link.flow, link.from, link.to, portOf(link.from, link), portOf(link.to, link), isNumbered));
  return { height, boxes, lines, isNumbered };
}

function columns(workers: Seen[]): [Seen[], Seen[]] {
  const left = workers.filter((it) => it.worker.role === "context");
  const right = workers.filter((it) => it.worker.role === "decode");
  for (const it of workers.filter((it) => it.worker.role === "both")) (left.length <= right.length ? left : right).push(it);
  return [left.slice(0, DRAWN_MAX), right.slice(0, DRAWN_MAX)];
}

function box(it: Seen, isLeft: boolean): Box {
  return { it, isLeft, x: isLeft ? MARGIN : WIDTH - BOX_WIDTH - MARGIN, y: 0, height: BOX_HEIGHT };
}

const stacked = (column: Box[]) => column.reduce((sum, it) => sum + it.height + GAP, GAP);

/** Spreads a column's boxes over this height. */
function centred(column: Box[], height: number): void {
  const gap = GAP + (height - stacked(column)) / (column.length + 1);
  let top = gap;
  for (const it of column) {
    it.y = top + it.height / 2;
    top += it.height + gap;
  }
}

function line(flow: Flow, from: Box, to: Box, fromY: number, toY: number, isNumbered: boolean): Line {
  // Links leave and come at the edge that looks to the middle.
  const edge = (it: Box) => (it.isLeft ? it.x + BOX_WIDTH : it.x);
  const inwards = to.isLeft ? 1 : -1;
  const [start, end] = [edge(from), edge(to)];
  const bent = isNumbered ? end + inwards * LABEL_ROOM : end;
  const isSameSide = from.isLeft === to.isLeft;
  // Between boxes of one column it goes out to the middle and comes back.
  const reach = isSameSide ? bent + inwards * (isNumbered ? 60 : 110) : (start + bent) / 2;
  const path = `M${start} ${fromY} C${reach} ${fromY} ${reach} ${toY} ${bent} ${toY} H${end}`;
  return {
    flow,
    path,
    tip: { x: end, y: toY, isRightwards: !to.isLeft },
    label: { x: end + (inwards * LABEL_ROOM) / 2, y: toY },
  };
}
