//! Whether a chat template shows its model the tools of a request: it is rendered with one, and looked for.

use serde_json::{Value, json};

use super::ModelText;
use crate::text::template::{ChatTemplate, Prompt};
use crate::text::texts::Until;
use baton_chat_formats::Format;

/// The name of the tool that is looked for: no template holds it by itself.
const NAME: &str = "look_for_this_tool_7b1d";

/// Longest text of such a rendering.
const BYTES_MAX: usize = 1 << 20;

/// Which calls a model can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolsTaken {
    /// Those that it makes when it wants to: its template shows it the tools, and its format of calls is known.
    Auto,
    /// Only those that must come (`tool_choice`), which a grammar writes.
    Required,
}

impl ToolsTaken {
    /// As `GET /v1/models` has it.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Required => "required",
        }
    }
}

impl ModelText {
    /// Which calls this model can be asked for.
    pub fn tools_taken(&self) -> ToolsTaken {
        match self.shows_tools && self.formats.format != Format::None {
            true => ToolsTaken::Auto,
            false => ToolsTaken::Required,
        }
    }
}

/// Whether this template writes a tool that it is given, in one of the chats that templates take.
pub(super) fn shows_tools(template: &ChatTemplate) -> bool {
    let user = json!({"role": "user", "content": "Hi"});
    let system = json!({"role": "system", "content": "Be kind."});
    let parameters = json!({"type": "object", "properties": {}});
    let function = json!({"name": NAME, "description": "none", "parameters": parameters});
    let variables = json!({"tools": [{"type": "function", "function": function}]});
    [vec![user.clone()], vec![system, user]]
        .iter()
        .any(|messages| shows(template, messages, &variables))
}

fn shows(template: &ChatTemplate, messages: &[Value], variables: &Value) -> bool {
    let (counted, until) = (|bytes: &[u8]| bytes.len(), Until::forever());
    let mut prompt = Prompt::new(BYTES_MAX, &counted, &until);
    let rendered = template.render(&messages, true, variables, &mut prompt);
    let text = rendered.and_then(|()| prompt.into_text());
    text.is_ok_and(|text| text.contains(NAME))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown_by(template: &str) -> bool {
        shows_tools(&ChatTemplate::new(template, "<s>", "</s>").unwrap())
    }

    #[test]
    fn a_template_shows_tools_only_if_it_writes_them() {
        assert!(shown_by("{% if tools %}{{ tools | tojson }}{% endif %}"));
        assert!(shown_by(
            "{%- for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"
        ));
        // Beside a system message only.
        assert!(shown_by(
            "{% if messages[0].role == 'system' and tools %}{{ tools | tojson }}{% endif %}"
        ));
        // One that looks at them and writes none, one that knows of none, and one that objects to them.
        assert!(!shown_by("{% if tools %}I have tools.{% endif %}"));
        assert!(!shown_by(
            "{% for message in messages %}{{ message.content }}{% endfor %}"
        ));
        assert!(!shown_by(
            "{% if tools %}{{ raise_exception('no tools') }}{% endif %}"
        ));
    }
}
