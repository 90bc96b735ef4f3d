// What the page asks of the server that it came from.

const KEY = "baton.api-key";

/** The API key of this browser tab; empty if there is none. It is sent in a header and stands in no address. */
export function apiKey(): string {
  return sessionStorage.getItem(KEY) ?? "";
}

export function setApiKey(key: string): void {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

/** An answer that is no success, with the server's own sentence. */
export class Refused extends Error {
  constructor(
    readonly status: number,
    message: string,
    /** Seconds after which to ask again, if the server says. */
    readonly retryAfter?: number,
  ) {
    super(message);
  }
}

async function ask(path: string, init: RequestInit = {}): Promise<Response> {
  const headers = new Headers(init.headers);
  const key = apiKey();
  if (key) headers.set("Authorization", `Bearer ${key}`);
  let response: Response;
  try {
    response = await fetch(path, { ...init, headers, cache: "no-store" });
  } catch (error) {
    if (init.signal?.aborted) throw error;
    throw new Refused(0, "the server did not answer");
  }
  if (!response.ok) {
    const text = await response.text();
    const after = Number(response.headers.get("retry-after"));
    throw new Refused(response.status, sentence(text) ?? `HTTP ${response.status}`, after || undefined);
  }
  return response;
}

function sentence(text: string): string | undefined {
  try {
    const body = JSON.parse(text);
    return body?.error?.message ?? body?.message;
  } catch {
    return text.slice(0, 300) || undefined;
  }
}

export async function getJson<T>(path: string, signal?: AbortSignal): Promise<T> {
  return (await ask(path, signal ? { signal } : {})).json() as Promise<T>;
}

export async function getText(path: string, signal?: AbortSignal): Promise<string> {
  return (await ask(path, signal ? { signal } : {})).text();
}

export async function post<T>(path: string, body: unknown): Promise<T> {
  const response = await ask(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
  return response.json() as Promise<T>;
}

/** Posts a body and hands on the data of each server-sent event, until the stream ends or `signal` ends it. */
export async function postStream(
  path: string,
  body: unknown,
  onData: (data: string) => void,
  signal: AbortSignal,
): Promise<void> {
  const response = await ask(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", Accept: "text/event-stream" },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.body) throw new Refused(response.status, "the answer has no body");
  const events = new EventReader(onData);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    events.take(value);
  }
}

/** Cuts a stream of server-sent events into the data of its events. */
export class EventReader {
  private rest = "";

  constructor(private readonly onData: (data: string) => void) {}

  take(text: string): void {
    const events = (this.rest + text).replaceAll("\r\n", "\n").split("\n\n");
    this.rest = events.pop() ?? "";
    for (const event of events) {
      const lines = event.split("\n").filter((line) => line.startsWith("data:"));
      if (lines.length) this.onData(lines.map((line) => line.slice(5).trimStart()).join("\n"));
    }
  }
}
