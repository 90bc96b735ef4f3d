import type { Seen } from "./seen";

/** More than these are not drawn: the cards below show all. */
const DRAWN_MAX = 12;

const [WIDTH, ROW, BOX_WIDTH, BOX_HEIGHT] = [760, 54, 210, 38];

/** Context workers on the left, decode workers on the right, and between them the ways that KV takes. */
export function FlowPicture({ workers }: { workers: Seen[] }) {
  const drawn = workers.slice(0, 2 * DRAWN_MAX);
  const left = drawn.filter((it) => it.worker.role !== "decode").slice(0, DRAWN_MAX);
  const right = drawn.filter((it) => it.worker.role === "decode").slice(0, DRAWN_MAX);
  if (!left.length || !right.length) return null;
  const height = Math.max(left.length, right.length) * ROW + 8;
  const y = (index: number, count: number) => (height / count) * (index + 0.5);
  const place = new Map<string, { x: number; y: number }>();
  left.forEach((it, index) => place.set(it.worker.worker, { x: BOX_WIDTH + 4, y: y(index, left.length) }));
  const links = right.flatMap((it, index) =>
    it.worker.peers.flatMap((peer) => {
      const from = place.get(peer.worker);
      if (!from) return [];
      const isReady = peer.state === "ready" && !it.isGone;
      return [{ from, to: { x: WIDTH - BOX_WIDTH - 4, y: y(index, right.length) }, peer, isReady, isBusy: it.worker.load.pulling > 0 }];
    }),
  );
  return (
    <figure class="flow">
      <svg viewBox={`0 0 ${WIDTH} ${height}`} role="img" aria-labelledby="flow-title">
        <title id="flow-title">{`KV goes from ${left.length} context to ${right.length} decode workers over ${links.length} links`}</title>
        {links.map(({ from, to, peer, isReady, isBusy }) => {
          const middle = (from.x + to.x) / 2;
          const rate = peer.pulled_gigabytes_per_second;
          return (
            <g key={`${from.y}-${to.y}`} class={isReady ? (isBusy ? "link is-busy" : "link") : "link is-broken"}>
              <path d={`M${from.x} ${from.y} C${middle} ${from.y} ${middle} ${to.y} ${to.x} ${to.y}`}>
                <title>{`${peer.transport || peer.state}${rate ? `, ${rate.toFixed(2)} GB/s in pulls` : ""}${peer.error ? `: ${peer.error}` : ""}`}</title>
              </path>
              {links.length <= 8 && rate ? (
                <text x={middle} y={(from.y + to.y) / 2 - 5}>
                  {`${rate.toFixed(1)} GB/s`}
                </text>
              ) : null}
            </g>
          );
        })}
        {[...left.map((it, index) => ({ it, x: 4, y: y(index, left.length) })),
          ...right.map((it, index) => ({ it, x: WIDTH - BOX_WIDTH - 4, y: y(index, right.length) }))].map(({ it, x, y: centre }) => (
          <g key={it.worker.worker} class={`box is-${it.isGone ? "gone" : it.worker.state}`}>
            <rect x={x} y={centre - BOX_HEIGHT / 2} width={BOX_WIDTH} height={BOX_HEIGHT} rx="7" />
            <text x={x + BOX_WIDTH / 2} y={centre - 3}>
              {short(it.worker.worker)}
            </text>
            <text class="small" x={x + BOX_WIDTH / 2} y={centre + 12}>
              {`${it.worker.load.running} run, ${it.worker.role === "decode" ? `${it.worker.load.pulling} pulled` : `${it.worker.load.leased} staged`}`}
            </text>
          </g>
        ))}
      </svg>
    </figure>
  );
}

function short(name: string): string {
  return name.length > 26 ? `${name.slice(0, 12)}…${name.slice(-12)}` : name;
}
