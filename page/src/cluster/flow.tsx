import { perSecond, width, type Flow } from "./links";
import { stateOf, type Seen } from "./seen";

/** More than these are not drawn on a side: the cards below show all. */
const DRAWN_MAX = 12;

/** More links than these are drawn without their numbers. */
const NUMBERED_MAX = 8;

/** More links than these are not listed, the busy ones first. */
const LISTED_MAX = 24;

const [WIDTH, ROW, BOX_WIDTH, BOX_HEIGHT] = [820, 64, 210, 40];

/** A link's numbers stand on its last part, which is straight: each link comes to its reader at a height of its own, and none crosses another there. */
const [LABEL_HEIGHT, LABEL_ROOM] = [18, 190];

/** Of the numbers' letters, about. */
const LETTER_WIDTH = 5.8;

interface Box {
  it: Seen;
  x: number;
  y: number;
  height: number;
  /** What it does on this side. */
  does: string;
}

/**
 * Who runs prompts on the left, who generates on the right, and between them the ways that KV takes. A worker that does both
 * stands on both sides. On narrow screens, and for whoever cannot see it, the links are a list.
 */
export function FlowPicture({ workers, flows }: { workers: Seen[]; flows: Flow[] }) {
  const left = workers.filter((it) => it.worker.role !== "decode").slice(0, DRAWN_MAX);
  const right = workers.filter((it) => it.worker.role !== "context").slice(0, DRAWN_MAX);
  // One worker alone hands nothing over.
  if (!left.some((a) => right.some((b) => a.worker.worker !== b.worker.worker))) return null;
  const height = Math.max(left.length, right.length) * ROW + 8;
  const column = (side: Seen[], x: number, does: (it: Seen) => string): Box[] =>
    side.map((it, index) => ({ it, x, y: (height / side.length) * (index + 0.5), height: BOX_HEIGHT, does: does(it) }));
  const sources = column(left, 4, (it) => `${it.worker.load.running} run, ${it.worker.load.leased} staged`);
  const readers = column(right, WIDTH - BOX_WIDTH - 4, (it) => `${it.worker.load.running} run, ${it.worker.load.pulling} pulled`);
  const boxOf = (side: Box[], name: string) => side.find((box) => box.it.worker.worker === name);
  const drawn = flows.flatMap((flow) => {
    const [from, to] = [boxOf(sources, flow.from.worker), boxOf(readers, flow.to.worker)];
    return from && to ? [{ flow, from: { x: from.x + BOX_WIDTH, y: from.y }, to, y: to.y }] : [];
  });
  const isNumbered = drawn.length <= NUMBERED_MAX;
  if (isNumbered) {
    for (const reader of readers) {
      const its = drawn.filter(({ to }) => to === reader).sort((a, b) => a.from.y - b.from.y);
      its.forEach((link, index) => (link.y += (index - (its.length - 1) / 2) * LABEL_HEIGHT));
      reader.height = Math.max(BOX_HEIGHT, its.length * LABEL_HEIGHT + 4);
    }
  }
  const count = (side: Seen[], one: string) => `${side.length} ${one}${side.length === 1 ? "" : "s"}`;
  return (
    <figure class="flow">
      <svg viewBox={`0 0 ${WIDTH} ${height}`} role="img" aria-labelledby="flow-title">
        <title id="flow-title">{`KV goes from ${count(left, "worker")} that ${left.length === 1 ? "runs" : "run"} prompts to ${count(right, "worker")} that ${right.length === 1 ? "generates" : "generate"}`}</title>
        {drawn.map(({ flow, from, to, y }) => {
          const bent = isNumbered ? to.x - LABEL_ROOM : to.x;
          const middle = (from.x + bent) / 2;
          const line = { "stroke-width": flow.isBusy ? width(flow.rate ?? 0) : undefined };
          return (
            <g key={`${flow.from.worker} ${flow.to.worker}`} class={classOf(flow)}>
              <path d={`M${from.x} ${from.y} C${middle} ${from.y} ${middle} ${y} ${bent} ${y} H${to.x}`} style={line}>
                <title>{said(flow)}</title>
              </path>
            </g>
          );
        })}
        {isNumbered &&
          drawn.map(({ flow, to, y }) => {
            const x = to.x - LABEL_ROOM / 2;
            const wide = Math.min(numbers(flow).length * LETTER_WIDTH + 10, LABEL_ROOM - 12);
            return (
              <g key={`${flow.from.worker} ${flow.to.worker}`} class="rate">
                <rect x={x - wide / 2} y={y - LABEL_HEIGHT / 2} width={wide} height={LABEL_HEIGHT} rx="4" />
                <text x={x} y={y + 4}>
                  {numbers(flow)}
                </text>
              </g>
            );
          })}
        {[...sources, ...readers].map(({ it, x, y, height, does }) => (
          <g key={`${it.worker.worker} ${x}`} class={`box is-${stateOf(it).name}`}>
            <rect x={x} y={y - height / 2} width={BOX_WIDTH} height={height} rx="7" />
            <text x={x + BOX_WIDTH / 2} y={y - 3}>
              {short(it.worker.worker)}
            </text>
            <text class="small" x={x + BOX_WIDTH / 2} y={y + 12}>
              {does}
            </text>
          </g>
        ))}
      </svg>
      <LinkList flows={flows} />
    </figure>
  );
}

function LinkList({ flows }: { flows: Flow[] }) {
  const byRate = [...flows].sort((a, b) => (b.rate ?? 0) - (a.rate ?? 0));
  // Where all have room, each stays in its place.
  const listed = flows.length <= LISTED_MAX ? flows : byRate.slice(0, LISTED_MAX);
  return (
    <ul class="links" aria-label="Links that KV takes">
      {listed.map((flow) => (
        <li key={`${flow.from.worker} ${flow.to.worker}`} class={classOf(flow)}>
          <strong>{`${flow.from.worker} → ${flow.to.worker}`}</strong> {said(flow)}
        </li>
      ))}
      {flows.length > listed.length && <li>{`and ${flows.length - listed.length} more`}</li>}
    </ul>
  );
}

function classOf({ isReady, isBusy }: Flow): string {
  return isReady ? (isBusy ? "link is-busy" : "link") : "link is-broken";
}

/** What goes over it now, and how fast it is. */
function numbers({ rate, isReady, peer }: Flow): string {
  if (!isReady) return peer.state === "ready" ? "gone" : peer.state;
  const now = rate === null ? "" : `${perSecond(rate)} now`;
  const fast = peer.pulled_gigabytes_per_second ?? peer.gigabytes_per_second;
  return [now, fast ? `link ${perSecond(fast * 1e9)}` : ""].filter(Boolean).join(" · ");
}

function said(flow: Flow): string {
  const { transport, error } = flow.peer;
  return `${numbers(flow)}${transport ? ` (${transport})` : ""}${error ? `: ${error}` : ""}`;
}

function short(name: string): string {
  return name.length > 26 ? `${name.slice(0, 12)}…${name.slice(-12)}` : name;
}
