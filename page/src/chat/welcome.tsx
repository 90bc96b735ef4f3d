import { limits, type Model } from "./model";

/** Something that every model can say something of. */
export const EXAMPLES = [
  "What is the capital of France?",
  "Explain in two sentences why the sky is blue.",
  "Write a short poem about the sea.",
  "Name three things to cook with eggs.",
];

interface Props {
  model: Model | null;
  /** Asks one of the examples; null while nothing can be asked. */
  onAsk: ((question: string) => void) | null;
}

/** What a conversation shows before its first question: the model, what it takes, and examples of what to ask. */
export function Welcome({ model, onAsk }: Props) {
  if (!model) return <p class="empty">Looking for a model…</p>;
  return (
    <div class="empty">
      <p>
        Ask <strong>{model.id}</strong> something.
      </p>
      <p class="note">{limits(model)}</p>
      <ul class="examples" aria-label="Example questions">
        {EXAMPLES.map((question) => (
          <li key={question}>
            <button type="button" disabled={!onAsk} onClick={() => onAsk?.(question)}>
              {question}
            </button>
          </li>
        ))}
      </ul>
    </div>
  );
}
