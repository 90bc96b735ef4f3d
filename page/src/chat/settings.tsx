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
}

const FIELDS: Field[] = [
  { name: "system", label: "System prompt", hint: "none", rows: 2 },
  { name: "temperature", label: "Temperature", hint: "the server's" },
  { name: "topP", label: "Top p", hint: "the server's" },
  { name: "maxTokens", label: "Most tokens", hint: "as many as fit" },
  { name: "seed", label: "Seed", hint: "random" },
  { name: "stop", label: "Stop strings, one a line", hint: "none", rows: 2 },
  { name: "schema", label: "JSON schema of the answer", hint: '{"type": "object", …}', rows: 4 },
  { name: "tools", label: "Tools, as OpenAI's JSON list", hint: '[{"type": "function", "function": {…}}]', rows: 4 },
];

export function SettingsPanel({ settings, wrong, onChange }: Props) {
  return (
    <fieldset class="settings">
      <legend>Settings of this conversation</legend>
      {FIELDS.map(({ name, label, hint, rows }) => {
        const field = {
          id: `set-${name}`,
          value: settings[name],
          placeholder: hint,
          "aria-invalid": wrong[name] ? true : undefined,
          "aria-describedby": wrong[name] ? `set-${name}-wrong` : undefined,
          onInput: (event: { currentTarget: { value: string } }) =>
            onChange({ ...settings, [name]: event.currentTarget.value }),
        };
        return (
          <div key={name} class={rows ? "wide" : ""}>
            <label for={field.id}>{label}</label>
            {rows ? <textarea rows={rows} {...field} /> : <input inputMode="decimal" {...field} />}
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
