// What GET /cluster says, as far as the page shows it.

export interface Peer {
  worker: string;
  state: string;
  transport: string;
  gigabytes_per_second: number;
  pulled_gigabytes_per_second?: number | null;
  /** What pulls brought over the present connection; workers of old do not say. */
  pulled_bytes?: number | null;
  error?: string | null;
}

export interface Worker {
  worker: string;
  incarnation: string;
  role: "context" | "decode" | "both";
  state: string;
  reason?: string | null;
  silent_ms: number;
  device: string;
  ranks?: number | null;
  weights: string;
  transport: string;
  load: {
    waiting: number;
    running: number;
    waiting_tokens: number;
    leased: number;
    pulling: number;
    blocks_used: number;
    blocks_cached: number;
    blocks_quarantined: number;
  };
  capacity: { blocks: number; batch: number; queue: number };
  peers: Peer[];
}

export interface ClusterAnswer {
  cluster: string;
  api_server: string;
  model: { name: string; tokens_max: number };
  /** The service level, null where nothing is promised; servers of before do not say. */
  promised?: { ttft_ms: number | null; itl_ms: number | null };
  healthy: boolean;
  reasons: string[];
  degraded: string[];
  workers: Worker[];
  api_servers: { api_server: string; in_flight: number }[];
}
