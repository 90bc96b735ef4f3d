//! What the output of a chat with tools must follow: one grammar for calls, and for the answer that may come instead.

use std::time::{Duration, Instant};

use baton_chat_formats::grammar::{self as formats, Request, ToolChoice, after_reasoning, grammar};
use baton_chat_formats::{Format, Reasoning, Tool};
use baton_protocol::Grammar;
use baton_protocol::limits::GRAMMAR_BYTES_MAX;
use serde_json::Value;

use super::tools::Offer;
use crate::error::ApiError;

/// How long the schema is looked for that is at fault. A grammar is found wrong in about as long.
const SEARCH: Duration = Duration::from_secs(1);

/// What a client's own fields say of the answer.
#[derive(Clone, Copy, Debug)]
pub struct Answer<'a> {
    /// The field's path.
    pub field: &'a str,
    /// What it asks for.
    pub grammar: &'a Grammar,
}

impl Offer {
    /// What the output must follow, if anything: nothing if the model may write what it likes and no tool is strict. `token` gives the id
    /// of the special token with a text. Compiling it, which is done here once to see whether it can be, takes up to about a second.
    ///
    /// # Errors
    /// 400 with the field at fault.
    pub fn grammar(
        &self,
        format: Format,
        reasoning: Reasoning,
        answer: Option<Answer<'_>>,
        token: &dyn Fn(&str) -> Option<u32>,
    ) -> Result<Option<Grammar>, ApiError> {
        let schema = match answer {
            Some(answer) if !self.may_be_called() => {
                return Ok(Some(reasoned(answer.grammar, reasoning, token)));
            }
            // There is no answer then: the schema holds of none.
            Some(Answer { grammar, .. })
                if self.is_forced() && matches!(grammar, Grammar::JsonSchema(_)) =>
            {
                None
            }
            Some(answer) => Some(self.schema(answer)?),
            None => None,
        };
        let made = grammar(&Request {
            format,
            reasoning,
            tools: &self.tools,
            choice: &self.choice,
            parallel: self.parallel,
            answer: schema.as_ref(),
            token,
        });
        let text = match (made, answer) {
            (Ok(Some(text)), _) => text,
            (Ok(None), _) => return Ok(None),
            (Err(why), Some(Answer { field, .. })) => {
                let message = format!(
                    "{field} and tools cannot both be held: {why}; send tool_choice \"none\", or leave {field} out"
                );
                return Err(ApiError::param(field, message));
            }
            (Err(why), None) => return Err(ApiError::param("tool_choice", why)),
        };
        let bytes = text.len();
        if bytes > GRAMMAR_BYTES_MAX {
            let message = format!(
                "the grammar of calls to these tools has {bytes} bytes, more than {GRAMMAR_BYTES_MAX}: send fewer or shorter schemas"
            );
            return Err(ApiError::param("tools", message));
        }
        let grammar = Grammar::Lark(text);
        match baton_grammar::check(&grammar) {
            Ok(()) => Ok(Some(grammar)),
            Err(error) => Err(self.at_fault().unwrap_or_else(|| {
                let message = format!("the calls to these tools: {error}");
                ApiError::param("tools", message)
            })),
        }
    }

    /// The schema that an answer must follow beside tools that may be called.
    fn schema(&self, answer: Answer<'_>) -> Result<Value, ApiError> {
        let Answer { field, grammar } = answer;
        if self.is_forced() {
            let message = format!(
                "{field} says what the answer must be, and tool_choice that there is none but calls: send one of them"
            );
            return Err(ApiError::param("tool_choice", message));
        }
        let schema = match grammar {
            Grammar::JsonSchema(text) => serde_json::from_str(text).ok(),
            Grammar::Regex(_) | Grammar::Lark(_) => None,
        };
        schema.ok_or_else(|| {
            let message = format!(
                "{field} cannot be followed where tools may be called too: send a JSON schema, or tool_choice \"none\""
            );
            ApiError::param(field, message)
        })
    }

    /// The first schema that cannot be compiled by itself.
    fn at_fault(&self) -> Option<ApiError> {
        let begun = Instant::now();
        let is_held = |tool: &Tool| match &self.choice {
            ToolChoice::Named(name) => *name == tool.name,
            ToolChoice::Auto => tool.strict,
            ToolChoice::Required | ToolChoice::None => true,
        };
        let tools = self.tools.as_slice().iter().enumerate();
        for (i, tool) in tools.filter(|(_, tool)| is_held(tool)) {
            if begun.elapsed() > SEARCH {
                break;
            }
            let schema = Grammar::JsonSchema(tool.schema().to_string());
            if let Err(error) = baton_grammar::check(&schema) {
                let param = format!("tools[{i}].{}", self.schema_field);
                let message = format!("{param}: {error}");
                return Some(ApiError::param(param, message));
            }
        }
        None
    }
}

/// The same behind reasoning, of models that reason. What a client wrote in Lark has the whole output: its rules are its own.
fn reasoned(
    grammar: &Grammar,
    reasoning: Reasoning,
    token: &dyn Fn(&str) -> Option<u32>,
) -> Grammar {
    let schema: Value;
    let answer = match grammar {
        Grammar::JsonSchema(text) => {
            schema = serde_json::from_str(text).unwrap_or_default();
            Some(formats::Answer::Json(&schema))
        }
        Grammar::Regex(pattern) => Some(formats::Answer::Regex(pattern)),
        Grammar::Lark(text) => {
            let body = text.strip_prefix("start: ");
            let body = body.filter(|body| !body.contains('\n'));
            body.map(formats::Answer::Rule)
        }
    };
    let made = answer.and_then(|answer| after_reasoning(reasoning, answer, token));
    let fits = |text: &String| {
        text.len() <= GRAMMAR_BYTES_MAX
            && baton_grammar::check(&Grammar::Lark(text.clone())).is_ok()
    };
    made.filter(fits)
        .map_or_else(|| grammar.clone(), Grammar::Lark)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::openai::fields::Fields;
    use crate::openai::table::Door;

    const FORCED: &str = "required";

    fn offer(body: Value) -> Offer {
        let fields = &mut Fields::parse(Door::Chat, body.to_string().as_bytes()).unwrap();
        Offer::read(fields).unwrap()
    }

    fn tool(name: &str, parameters: Value, strict: bool) -> Value {
        json!({"type": "function", "function": {"name": name, "parameters": parameters, "strict": strict}})
    }

    fn place() -> Value {
        json!({"type": "object", "properties": {"city": {"enum": ["Paris"]}}, "required": ["city"], "additionalProperties": false})
    }

    /// The grammar's text.
    fn made(body: Value, answer: Option<&Grammar>) -> Result<Option<Grammar>, ApiError> {
        let offer = offer(body);
        let format = offer.format(Format::Hermes, true)?;
        let field = "response_format";
        let answer = answer.map(|grammar| Answer { field, grammar });
        offer.grammar(format, Reasoning::Think, answer, &|text| {
            (text == "<tool_call>").then_some(300)
        })
    }

    fn lark(made: Result<Option<Grammar>, ApiError>) -> String {
        match made {
            Ok(Some(Grammar::Lark(text))) => text,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn calls_that_must_come_or_be_right_are_held_to_a_grammar() {
        let tools = [tool("look", place(), false), tool("go", place(), false)];
        let text = lark(made(json!({"tools": tools, "tool_choice": FORCED}), None));
        assert!(text.contains(r#"{\"name\": \"look\""#) && text.contains(r#"{\"name\": \"go\""#));
        assert!(
            text.contains("<[300]>") && text.contains("<think>"),
            "{text}"
        );
        let named = json!({"type": "function", "function": {"name": "go"}});
        let text = lark(made(json!({"tools": tools, "tool_choice": named}), None));
        assert!(!text.contains("look") && text.contains(r#"{\"name\": \"go\""#));
        let free = |choice| json!({"tools": tools, "tool_choice": choice});
        for choice in ["auto", "none"] {
            assert_eq!(made(free(choice), None).unwrap(), None);
        }
        let strict = json!({"tools": [tool("look", place(), true)]});
        let text = lark(made(strict, None));
        assert!(text.contains("Paris") && text.contains("TEXT"), "{text}");
        // Of tools that are not strict only the form is held where the model need not call.
        let both = json!({"tools": [tool("look", place(), false), tool("go", json!({"type": "object"}), true)]});
        assert!(!lark(made(both, None)).contains("Paris"));
    }

    #[test]
    fn an_answer_by_schema_and_tools_go_together_where_both_can_be_held() {
        let schema = Grammar::JsonSchema(json!({"enum": ["yes"]}).to_string());
        let tools = [tool("look", place(), false)];
        let body = |choice: &str| json!({"tools": tools, "tool_choice": choice});
        let text = lark(made(body("auto"), Some(&schema)));
        assert!(text.contains("\"yes\"") && text.contains("look"), "{text}");
        // No calls, but a model that reasons does so first.
        let only = lark(made(body("none"), Some(&schema)));
        assert!(
            only.contains("<think>") && only.contains("\"yes\""),
            "{only}"
        );
        let of_clients = Grammar::Lark("start: word\nword: \"a\"".to_owned());
        let kept = made(body("none"), Some(&of_clients)).unwrap();
        assert_eq!(kept, Some(of_clients));
        let choice = Grammar::Lark("start: \"a\" | \"b\"".to_owned());
        let text = lark(made(body("none"), Some(&choice)));
        assert!(text.contains("answer: \"a\" | \"b\""), "{text}");
        // Nothing but calls: no answer that the schema could hold of.
        assert_eq!(
            lark(made(body(FORCED), Some(&schema))),
            lark(made(body(FORCED), None))
        );
        let regex = Grammar::Regex("a+".to_owned());
        let error = made(body(FORCED), Some(&regex)).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("tool_choice"));
        assert!(error.message.contains("response_format"), "{error}");
        let error = made(body("auto"), Some(&regex)).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("response_format"));
        let answer = Answer {
            field: "response_format",
            grammar: &schema,
        };
        let unmarked =
            offer(body("auto")).grammar(Format::Json, Reasoning::None, Some(answer), &|_| None);
        let error = unmarked.unwrap_err();
        assert_eq!(error.param.as_deref(), Some("response_format"));
        assert!(error.message.contains("tools"), "{error}");
    }

    #[test]
    fn a_schema_that_cannot_be_compiled_is_named() {
        let good = tool("look", place(), true);
        let bad = tool(
            "go",
            json!({"type": "object", "properties": {"x": {"type": "strnig"}}}),
            true,
        );
        let tools = [good.clone(), bad];
        for body in [
            json!({"tools": tools, "tool_choice": FORCED}),
            json!({"tools": tools}),
        ] {
            let error = made(body, None).unwrap_err();
            assert_eq!(error.param.as_deref(), Some("tools[1].function.parameters"));
            assert!(error.message.contains("strnig"), "{error}");
        }
        let good_only = json!({"type": "function", "function": {"name": "look"}});
        let named = made(json!({"tools": tools, "tool_choice": good_only}), None);
        assert!(matches!(named, Ok(Some(_))), "{named:?}");
        let long = tool(
            "look",
            json!({"enum": ["x".repeat(GRAMMAR_BYTES_MAX)]}),
            true,
        );
        let error = made(json!({"tools": [long]}), None).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("tools"));
    }
}
