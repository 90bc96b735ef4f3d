import { useRef, useState } from "preact/hooks";

import { getJson } from "../api";
import { usePoll } from "../poll";
import { FlowPicture } from "./flow";
import { seen, type Seen } from "./seen";
import type { ClusterAnswer } from "./types";

export function Cluster() {
  const [answer, setAnswer] = useState<ClusterAnswer | null>(null);
  const workers = useRef<Seen[]>([]);
  const fault = usePoll(async (signal) => {
    const next = await getJson<ClusterAnswer>("/cluster", signal);
    workers.current = seen(workers.current, next.workers, Date.now());
    setAnswer(next);
  });
  return (
    <div class="cluster">
      {fault && (
        <p class="fault" role="alert">
          {fault}
        </p>
      )}
      {answer && (
        <>
          <p class="summary" role="status">
            <span class={`lamp ${answer.healthy ? "is-serving" : "is-gone"}`} aria-hidden="true" />
            <strong>{answer.model.name}</strong> in cluster <strong>{answer.cluster}</strong>:{" "}
            {answer.healthy ? "serving" : answer.reasons.join("; ")}
            {answer.degraded.length > 0 && `. Degraded: ${answer.degraded.join("; ")}`}
          </p>
          <FlowPicture workers={workers.current} />
          <div class="workers">
            {workers.current.map((it) => (
              <WorkerCard key={it.worker.worker} seen={it} />
            ))}
          </div>
          <h2>API servers</h2>
          <ul class="plain-list">
            {answer.api_servers.map((it) => (
              <li key={it.api_server}>
                {it.api_server}: {it.in_flight} in flight
              </li>
            ))}
          </ul>
        </>
      )}
    </div>
  );
}

function WorkerCard({ seen: { worker, isGone } }: { seen: Seen }) {
  const { load, capacity } = worker;
  const state = isGone ? "gone" : worker.state;
  const held = [
    { label: "used", blocks: load.blocks_used },
    { label: "cached", blocks: load.blocks_cached },
    { label: "quarantined", blocks: load.blocks_quarantined },
  ];
  const counts = [
    ["waiting", load.waiting],
    ["running", load.running],
    ["staged", load.leased],
    ["pulled", load.pulling],
  ] as const;
  const percent = (blocks: number) => (100 * blocks) / Math.max(capacity.blocks, 1);
  return (
    <article class={`worker is-${state}`} aria-label={`${worker.worker}: ${state}`}>
      <h3>
        <span class={`lamp is-${state}`} aria-hidden="true" />
        {worker.worker}
      </h3>
      <p class="what">
        {worker.role} · {state}
        {worker.reason && `: ${worker.reason}`}
        {!isGone && worker.state === "suspect" && ` (silent for ${(worker.silent_ms / 1e3).toFixed(0)} s)`}
      </p>
      <p class="note">
        {worker.device}
        {(worker.ranks ?? 1) > 1 && `, ${worker.ranks} ranks`}
        {worker.weights && `, ${worker.weights}`}
      </p>
      <dl>
        {counts.map(([label, count]) => (
          <div key={label}>
            <dt>{label}</dt>
            <dd>{count}</dd>
          </div>
        ))}
      </dl>
      <div
        class="pool"
        role="img"
        aria-label={`KV blocks: ${held.map((it) => `${it.blocks} ${it.label}`).join(", ")} of ${capacity.blocks}`}
      >
        {held.map((it) => (
          <span key={it.label} class={`is-${it.label}`} style={{ width: `${percent(it.blocks)}%` }} />
        ))}
      </div>
      <p class="note">
        KV: {load.blocks_used} used, {load.blocks_cached} cached of {capacity.blocks} blocks
      </p>
    </article>
  );
}
