import { useEffect, useRef, useState } from "preact/hooks";

import { asCurl, asPython, type Body } from "./request";

export function CodeDialog({ body, hasKey, onClose }: { body: Body; hasKey: boolean; onClose: () => void }) {
  const dialog = useRef<HTMLDialogElement>(null);
  const [language, setLanguage] = useState<"curl" | "python">("curl");
  const [said, setSaid] = useState("");
  useEffect(() => dialog.current?.showModal(), []);
  const write = language === "curl" ? asCurl : asPython;
  const code = write(location.origin, body, hasKey);
  async function copy() {
    try {
      await navigator.clipboard.writeText(code);
      setSaid("copied");
    } catch {
      setSaid("the browser did not allow it: select the text");
    }
  }
  return (
    <dialog ref={dialog} class="code" aria-labelledby="code-title" onClose={onClose}>
      <h2 id="code-title">This request as code</h2>
      <div class="buttons" role="group" aria-label="Language">
        {(["curl", "python"] as const).map((it) => (
          <button key={it} type="button" aria-pressed={language === it} onClick={() => setLanguage(it)}>
            {it === "curl" ? "curl" : "Python"}
          </button>
        ))}
      </div>
      <pre tabIndex={0}>{code}</pre>
      <div class="buttons">
        <button type="button" class="primary" onClick={copy}>
          Copy
        </button>
        <button type="button" onClick={() => dialog.current?.close()}>
          Close
        </button>
        <span role="status">{said}</span>
      </div>
    </dialog>
  );
}
