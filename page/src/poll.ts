import { useEffect, useRef, useState } from "preact/hooks";

interface Options {
  periodMs: number;
  /** For how long it goes on while the tab is hidden. */
  hiddenMs: number;
}

/**
 * Asks now and each period, one question at a time; the last failure's sentence, empty if all is well. Where nobody looks it
 * ends, and whoever looks again is answered at once.
 */
export function usePoll(ask: (signal: AbortSignal) => Promise<void>, { periodMs, hiddenMs }: Options): string {
  const [fault, setFault] = useState("");
  const question = useRef(ask);
  question.current = ask;
  useEffect(() => {
    const abort = new AbortController();
    let timer: ReturnType<typeof setTimeout> | undefined;
    let isAsking = false;
    let hiddenAt = document.hidden ? Date.now() : null;
    async function round() {
      timer = undefined;
      if (hiddenAt !== null && Date.now() - hiddenAt >= hiddenMs) return;
      // An answer that does not come is given up.
      const signal = AbortSignal.any([abort.signal, AbortSignal.timeout(10_000)]);
      isAsking = true;
      try {
        await question.current(signal);
        setFault("");
      } catch (error) {
        if (abort.signal.aborted) return;
        setFault(signal.aborted ? "the server does not answer" : (error as Error).message);
      }
      isAsking = false;
      if (!abort.signal.aborted) timer = setTimeout(round, periodMs);
    }
    function turned() {
      hiddenAt = document.hidden ? Date.now() : null;
      if (hiddenAt !== null || isAsking) return;
      clearTimeout(timer);
      void round();
    }
    document.addEventListener("visibilitychange", turned);
    void round();
    return () => {
      abort.abort();
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", turned);
    };
  }, [periodMs, hiddenMs]);
  return fault;
}
