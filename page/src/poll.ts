import { useEffect, useState } from "preact/hooks";

/** Asks each second while the page is looked at, one question at a time; the last failure's sentence, empty if all is well. */
export function usePoll(ask: (signal: AbortSignal) => Promise<void>, periodMs = 1_000): string {
  const [fault, setFault] = useState("");
  useEffect(() => {
    const abort = new AbortController();
    let timer: ReturnType<typeof setTimeout> | undefined;
    async function round() {
      if (!document.hidden) {
        // An answer that does not come is given up.
        const signal = AbortSignal.any([abort.signal, AbortSignal.timeout(10_000)]);
        try {
          await ask(signal);
          setFault("");
        } catch (error) {
          if (abort.signal.aborted) return;
          setFault(signal.aborted ? "the server does not answer" : (error as Error).message);
        }
      }
      timer = setTimeout(round, periodMs);
    }
    void round();
    return () => {
      abort.abort();
      clearTimeout(timer);
    };
  }, []);
  return fault;
}
