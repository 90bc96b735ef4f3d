import { useRef, useState } from "preact/hooks";

import { apiKey, getJson, post } from "../api";
import { usePoll } from "../poll";
import { FlowPicture } from "./flow";
import { LastRequests } from "./last_requests";
import { flows, type Readings, taken } from "./links";
import { seen, stateOf, type Seen } from "./seen";
import type { Spent } from "./spent";
import type { ClusterAnswer } from "./types";

export function Cluster() {
  const [answer, setAnswer] = useState<ClusterAnswer | null>(null);
  const [requests, setRequests] = useState<Spent[]>([]);
  const workers = useRef<Seen[]>([]);
  const pulled = useRef<Readings>(new Map());
  const fault = usePoll(
    async (signal) => {
      const [next, spent] = await Promise.all([
        getJson<ClusterAnswer>("/cluster", signal),
        getJson<{ requests: Spent[] }>("/requests", signal),
      ]);
      workers.current = seen(workers.current, next.workers, Date.now());
      pulled.current = taken(pulled.current, next.workers, Date.now());
      setAnswer(next);
      setRequests(spent.requests);
    },
    { periodMs: 1_000, hiddenMs: 0 },
  );
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
          <FlowPicture workers={workers.current} flows={flows(workers.current, pulled.current, Date.now())} />
          <div class="workers">
            {workers.current.map((it) => (
              <WorkerCard key={it.worker.worker} seen={it} />
            ))}
          </div>
          <LastRequests requests={requests} />
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

/** One function, so that it is called once and not after each answer of the server. */
function focused(button: HTMLButtonElement | null): void {
  button?.focus();
}

/** Asks twice, because what it has is handed back at the end of its time. Only with a key, which the server wants for it. */
function Drain({ worker }: { worker: string }) {
  const [stage, setStage] = useState<"idle" | "asks" | "sent">("idle");
  const [fault, setFault] = useState("");
  async function drain() {
    setStage("sent");
    try {
      await post(`/workers/${encodeURIComponent(worker)}/drain`, {});
      setFault("");
    } catch (error) {
      setFault((error as Error).message);
      setStage("idle");
    }
  }
  if (!apiKey()) return null;
  return (
    <div class="buttons">
      {stage === "asks" ? (
        <>
          <button type="button" onClick={drain} aria-label={`Yes, drain it: ${worker}`} ref={focused}>
            Yes, drain it
          </button>
          <button type="button" onClick={() => setStage("idle")}>
            No
          </button>
        </>
      ) : (
        <button type="button" disabled={stage === "sent"} onClick={() => setStage("asks")} aria-label={`Drain ${worker}`}>
          Drain
        </button>
      )}
      {fault && (
        <p class="fault" role="alert">
          {fault}
        </p>
      )}
    </div>
  );
}

function WorkerCard({ seen: shown }: { seen: Seen }) {
  const { worker, isGone } = shown;
  const { load, capacity } = worker;
  const { name, said } = stateOf(shown);
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
    <article class={`worker is-${name}`} aria-label={`${worker.worker}: ${said}`}>
      <h3>
        <span class={`lamp is-${name}`} aria-hidden="true" />
        {worker.worker}
      </h3>
      <p class="what">
        {worker.role} · {said}
        {worker.reason && `: ${worker.reason}`}
        {!isGone && worker.state === "suspect" && ` (silent for ${(worker.silent_ms / 1e3).toFixed(0)} s)`}
      </p>
      <p class="note">
        {worker.device}
        {(worker.ranks ?? 1) > 1 && !worker.device.includes(" ranks") && `, ${worker.ranks} ranks`}
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
      {!isGone && worker.state !== "draining" && <Drain key={worker.incarnation} worker={worker.worker} />}
    </article>
  );
}
