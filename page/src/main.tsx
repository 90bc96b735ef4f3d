import { render } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";

import { apiKey, setApiKey } from "./api";
import { Chat } from "./chat/chat";
import { Chats } from "./chat/chats";
import { Cluster } from "./cluster/cluster";
import { History } from "./load/history";
import { Load, useReadings } from "./load/load";
import { applyTheme, nextTheme, theme } from "./theme";
import "./style.css";

const VIEWS = { chat: "Chat", cluster: "Cluster", load: "Load" } as const;
type View = keyof typeof VIEWS;

function viewOfAddress(): View {
  const name = location.hash.slice(1);
  return name in VIEWS ? (name as View) : "chat";
}

/** They live as long as the page, whatever is shown. */
const chats = new Chats(localStorage);
const history = new History();
addEventListener("storage", (event) => chats.heard(event));
addEventListener("pagehide", () => chats.keepAll());

function Page() {
  const [view, setView] = useState<View>(viewOfAddress);
  const [asksKey, setAsksKey] = useState(false);
  // Counts keys: what asked without one asks anew with it.
  const [round, setRound] = useState(0);
  const [colours, setColours] = useState(theme);
  const fault = useReadings(history, view === "load");
  useEffect(() => {
    const moved = () => setView(viewOfAddress());
    addEventListener("hashchange", moved);
    return () => removeEventListener("hashchange", moved);
  }, []);
  useEffect(() => {
    document.title = `Baton: ${VIEWS[view]}`;
  }, [view]);
  return (
    <>
      <a class="skip" href="#main" onClick={(event) => (event.preventDefault(), document.getElementById("main")?.focus())}>
        To the content
      </a>
      <header>
        <h1>Baton</h1>
        <nav aria-label="Views">
          {Object.entries(VIEWS).map(([name, label]) => (
            <a key={name} href={`#${name}`} aria-current={view === name ? "page" : undefined}>
              {label}
            </a>
          ))}
        </nav>
        <div class="buttons">
          <button type="button" onClick={() => setAsksKey(true)}>
            API key{apiKey() ? " ✓" : ""}
          </button>
          <button
            type="button"
            aria-label={`Colours: ${colours}`}
            onClick={() => {
              applyTheme(nextTheme(colours));
              setColours(theme());
            }}
          >
            {{ system: "◐", light: "☀", dark: "☾" }[colours]}
          </button>
        </div>
      </header>
      <main id="main" tabIndex={view === "chat" ? -1 : 0} aria-label={VIEWS[view]}>
        {view === "chat" && <Chat chats={chats} round={round} />}
        {view === "cluster" && <Cluster />}
        {view === "load" && <Load history={history} fault={fault} round={round} />}
      </main>
      {asksKey && (
        <KeyDialog
          onClose={() => {
            setAsksKey(false);
            setRound(round + 1);
          }}
        />
      )}
    </>
  );
}

function KeyDialog({ onClose }: { onClose: () => void }) {
  const dialog = useRef<HTMLDialogElement>(null);
  const [key, setKey] = useState(apiKey);
  useEffect(() => dialog.current?.showModal(), []);
  return (
    <dialog ref={dialog} aria-labelledby="key-title" onClose={onClose}>
      <form
        method="dialog"
        onSubmit={() => {
          setApiKey(key.trim());
        }}
      >
        <h2 id="key-title">API key</h2>
        <label>
          Key
          <input type="password" autoComplete="off" value={key} onInput={(event) => setKey(event.currentTarget.value)} />
        </label>
        <p class="note">It stays in this tab, and goes to this server in a header.</p>
        <div class="buttons">
          <button type="submit" class="primary">
            Use it
          </button>
          <button type="button" onClick={() => dialog.current?.close()}>
            Cancel
          </button>
        </div>
      </form>
    </dialog>
  );
}

applyTheme(theme());
render(<Page />, document.getElementById("page")!);
