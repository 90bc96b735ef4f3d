import { BOX_WIDTH, LABEL_ROOM, picture, PORT_HEIGHT, WIDTH, type Line } from "./layout";
import { perSecond, width, type Flow } from "./links";
import { stateOf, type Seen } from "./seen";
import type { Worker } from "./types";

/** More links than these are not listed, the busy ones first. */
const LISTED_MAX = 24;

/** Of the numbers' letters, about. */
const LETTER_WIDTH = 5.8;

const ROLES = { context: "runs prompts", decode: "generates", both: "does both" };

/**
 * The workers, and between them the ways that KV takes, from who has it to who reads it. On narrow screens, and for those who cannot see it,
 * the links are a list.
 */
export function FlowPicture({ workers, flows }: { workers: Seen[]; flows: Flow[] }) {
  const drawn = picture(workers, flows);
  if (!drawn) return null;
  const { height, boxes, lines, isNumbered } = drawn;
  return (
    <figure class="flow">
      <svg viewBox={`0 0 ${WIDTH} ${height}`} role="img" aria-labelledby="flow-title">
        <title id="flow-title">{`The ways of KV between ${boxes.length} workers: ${lines.length} link${lines.length === 1 ? "" : "s"}`}</title>
        {lines.map(({ flow, path, tip }) => {
          const line = { "stroke-width": flow.isBusy ? width(flow.rate ?? 0) : undefined };
          return (
            <g key={keyOf(flow)} class={classOf(flow)}>
              <path d={path} style={line}>
                <title>{said(flow)}</title>
              </path>
              <polygon points={arrow(tip)} />
            </g>
          );
        })}
        {isNumbered &&
          lines.map(({ flow, label }) => {
            const wide = Math.min(numbers(flow).length * LETTER_WIDTH + 10, LABEL_ROOM - 24);
            return (
              <g key={keyOf(flow)} class="rate">
                <rect x={label.x - wide / 2} y={label.y - PORT_HEIGHT / 2 + 1} width={wide} height={PORT_HEIGHT - 2} rx="4" />
                <text x={label.x} y={label.y + 4}>
                  {numbers(flow)}
                </text>
              </g>
            );
          })}
        {boxes.map(({ it, x, y, height }) => (
          <g key={it.worker.worker} class={`box is-${stateOf(it).name}`}>
            <rect x={x} y={y - height / 2} width={BOX_WIDTH} height={height} rx="7" />
            <text x={x + BOX_WIDTH / 2} y={y - 3}>
              {short(it.worker.worker)}
            </text>
            <text class="small" x={x + BOX_WIDTH / 2} y={y + 13}>
              {does(it.worker)}
            </text>
            <title>{`${it.worker.worker} ${ROLES[it.worker.role] ?? it.worker.role}`}</title>
          </g>
        ))}
      </svg>
      <LinkList flows={flows} />
    </figure>
  );
}

/** What it has to do with KV, and with requests. */
function does({ role, load }: Worker): string {
  const parts = [`${load.running} run`];
  if (role !== "decode") parts.push(`${load.leased} staged`);
  if (role !== "context") parts.push(`${load.pulling} pulled`);
  return parts.join(", ");
}

const keyOf = (flow: Flow) => `${flow.from.worker} ${flow.to.worker}`;

function arrow({ x, y, isRightwards }: Line["tip"]): string {
  const back = isRightwards ? x - 9 : x + 9;
  return `${x},${y} ${back},${y - 5} ${back},${y + 5}`;
}

function LinkList({ flows }: { flows: Flow[] }) {
  const byRate = [...flows].sort((a, b) => (b.rate ?? 0) - (a.rate ?? 0));
  // Where all have room, each stays in its place.
  const listed = flows.length <= LISTED_MAX ? flows : byRate.slice(0, LISTED_MAX);
  return (
    <ul class="links" aria-label="Links that KV takes">
      {listed.map((flow) => (
        <li key={keyOf(flow)} class={classOf(flow)}>
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
