import { TOOL_CHOICES, toolNames } from "./request";
import type { Settings } from "./types";

interface Props {
  settings: Settings;
  wrong: Partial<Record<keyof Settings, string>>;
  onChange: (settings: Settings) => void;
}

interface Field {
  name: keyof Settings;
  label: string;
  hint: string;
  rows?: number;
  /** What it may be beside empty; any text where there is none. */
  choices?: (settings: Settings) => string[];
}

const FIELDS: Field[] = [
  { name: "system", label: "System prompt", hint: "none", rows: 2 },
  { name: "temperature", label: "Temperature", hint: "the server's" },
  { name: "topP", label: "Top p", hint: "the server's" },
  { name: "topK", label: "Top k", hint: "the server's" },
  { name: "minP", label: "Min p", hint: "the server's" },
  { name: "presencePenalty", label: "Presence penalty", hint: "0" },
  { name: "frequencyPenalty", label: "Frequency penalty", hint: "0" },
  { name: "repetitionPenalty", label: "Repetition penalty", hint: "the server's" },
  { name: "maxTokens", label: "Most tokens", hint: "as many as fit" },
  { name: "seed", label: "Seed", hint: "random" },
  {
    name: "reasoningEffort",
    label: "Reasoning effort",
    hint: "the model's",
    choices: () => ["none", "minimal", "low", "medium", "high", "xhigh"],
  },
  { name: "stop", label: "Stop strings, one a line", hint: "none", rows: 2 },
  { name: "schema", label: "JSON schema of the answer", hint: '{"type": "object", …}', rows: 4 },
  { name: "tools", label: "Tools, as OpenAI's JSON list", hint: '[{"type": "function", "function": {…}}]', rows: 4 },
  { name: "toolChoice", label: "Tool choice", hint: "the server's", choices: (settings) => [...TOOL_CHOICES, ...toolNames(settings)] },
];

export function SettingsPanel({ settings, wrong, onChange }: Props) {
  return (
    <fieldset class="settings">
      <legend>Settings of this conversation</legend>
      {FIELDS.map(({ name, label, hint, rows, choices }) => {
        const field = {
          id: `set-${name}`,
          value: settings[name],
          "aria-invalid": wrong[name] ? true : undefined,
          "aria-describedby": wrong[name] ? `set-${name}-wrong` : undefined,
          onInput: (event: { currentTarget: { value: string } }) =>
            onChange({ ...settings, [name]: event.currentTarget.value }),
        };
        return (
          <div key={name} class={rows ? "wide" : ""}>
            <label for={field.id}>{label}</label>
            {choices ? (
              <select {...field}>
                <option value="">{hint}</option>
                {choices(settings).map((choice) => (
                  <option key={choice}>{choice}</option>
                ))}
              </select>
            ) : rows ? (
              <textarea rows={rows} placeholder={hint} {...field} />
            ) : (
              <input inputMode="decimal" placeholder={hint} {...field} />
            )}
            {wrong[name] && (
              <p class="fault" id={`set-${name}-wrong`}>
                {wrong[name]}
              </p>
            )}
          </div>
        );
      })}
    </fieldset>
  );
}
