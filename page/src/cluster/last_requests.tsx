import { NAMES, PARTS, time, whole, widths, type Spent } from "./spent";

/** Where the last requests' time went: a bar each, with its numbers when it is opened. */
export function LastRequests({ requests }: { requests: Spent[] }) {
  const longest = Math.max(...requests.map(whole));
  return (
    <section class="spent" aria-labelledby="spent-title">
      <h2 id="spent-title">Where the last requests' time went</h2>
      <p class="legend note">
        {PARTS.map((part) => (
          <span key={part}>
            <span class={`swatch is-${part}`} aria-hidden="true" />
            {NAMES[part]}
          </span>
        ))}
      </p>
      {requests.length === 0 && <p class="note">None has ended since this API server was started.</p>}
      <ol>
        {requests.map((it) => (
          <li key={it.number}>
            <Bar spent={it} longest={longest} />
          </li>
        ))}
      </ol>
    </section>
  );
}

function Bar({ spent, longest }: { spent: Spent; longest: number }) {
  const wide = widths(spent, longest);
  const rows = [
    ...PARTS.map((part) => [NAMES[part], time(spent[`${part}_ms`])]),
    ["ended", `${time(spent.ended_ms_ago)} ago: ${spent.outcome}`],
    ["prompt", `${spent.prompt_tokens} tokens, ${spent.cached_tokens} of them cached`],
    ["output", `${spent.output_tokens} tokens`],
    ["workers", [spent.context_worker, spent.decode_worker].filter(Boolean).join(", then ") || "none"],
  ];
  return (
    <details>
      <summary aria-label={`Request ${spent.number}: ${time(whole(spent))}, ${PARTS.map((part) => `${NAMES[part]} ${time(spent[`${part}_ms`])}`).join(", ")}`}>
        <span class="bar" aria-hidden="true">
          {PARTS.map((part) => (
            <span key={part} class={`is-${part}`} style={{ width: `${wide[part]}%` }} />
          ))}
        </span>
        <span class="time" aria-hidden="true">
          {time(whole(spent))}
        </span>
      </summary>
      <dl>
        {rows.map(([label, value]) => (
          <div key={label}>
            <dt>{label}</dt>
            <dd>{value}</dd>
          </div>
        ))}
      </dl>
    </details>
  );
}
