//! The rows of `/v1/messages` and `/v1/messages/count_tokens`.

use super::{Door, Doors, Field, accepted, done, refused};

const ASK: Doors = Doors(Door::Messages as u8);
const BOTH: Doors = Doors(ASK.0 | Door::CountTokens as u8);

/// What Claude Code sends to have nothing cleared.
const KEEPS_ALL: &str = r#"{"edits":[{"type":"clear_thinking_20251015","keep":"all"}]}"#;

/// In the order of the page.
#[rustfmt::skip]
pub const FIELDS: &[Field] = &[
    // what is asked
    done("model", BOTH, "as in chats"),
    done("messages", BOTH, "the chat, through the model's template ([Messages](#messages)); with the assistant's message last, the output goes on with it"),
    done("system", BOTH, "the system prompt: a text or text blocks"),
    done("stream", ASK, "the answer as server-sent events"),
    // how long
    done("max_tokens", ASK, "most output tokens, the reasoning's included; required. More than there is room for means all the room, and the answer then ends with `model_context_window_exceeded`"),
    done("min_tokens", ASK, "as in chats"),
    done("stop_sequences", ASK, "texts that end the output, which ends before them"),
    done("stop_token_ids", ASK, "as in chats; the answer's `stop_reason` is `end_turn`"),
    done("ignore_eos", ASK, "as in chats"),
    // which tokens
    done("temperature", ASK, "from 0 to 2; default: the model's `generation_config.json`, else 1"),
    done("top_p", ASK, "as in chats"),
    done("top_k", ASK, "as in chats"),
    done("min_p", ASK, "as in chats"),
    done("repetition_penalty", ASK, "as in chats"),
    done("presence_penalty", ASK, "as in chats"),
    done("frequency_penalty", ASK, "as in chats"),
    done("logit_bias", ASK, "as in chats"),
    done("allowed_token_ids", ASK, "as in chats"),
    done("bad_words", ASK, "as in chats"),
    done("seed", ASK, "as in chats"),
    // how the prompt is made
    done("cache_salt", ASK, "as in chats"),
    done("chat_template_kwargs", BOTH, "as in chats; wins over `thinking` and `output_config.effort`"),
    accepted("cache_control", BOTH, "prefixes are found without"),
    // thinking
    done("thinking", BOTH, "whether the model is to think, which its template is told; left out, the template's own default"),
    done("thinking.type", BOTH, "`enabled` and `adaptive` tell the template `enable_thinking: true` (and `thinking: true`), `disabled` tells it false. With `output_config.format` a model that reasons does so before the answer"),
    done("thinking.budget_tokens", BOTH, "told to the template as `thinking_budget`, for models that are made for it. Nothing holds others to it: `max_tokens` bounds thinking and answer together"),
    done("thinking.display", BOTH, "`omitted` leaves the thinking blocks out; default `summarized`, which shows all of it"),
    // tools
    done("tools", BOTH, "`custom` tools with a `name`, `description`, `input_schema` and `strict`; tools that Anthropic's servers run are refused. `defer_loading`, `input_examples` and `allowed_callers` are refused where they ask for something"),
    done("tool_choice", BOTH, "an object"),
    done("tool_choice.type", BOTH, "`auto` (default with tools), `any`, `tool` (with a `name`), or `none`, with which the model is not shown the tools"),
    done("tool_choice.name", BOTH, "of the tool that must be called"),
    done("tool_choice.disable_parallel_tool_use", BOTH, "true: the answer ends with its first call"),
    refused("mcp_servers", BOTH, &["[]"], "connect to them from the client, and send their tools in tools"),
    refused("container", ASK, &[], "nothing is run here"),
    // structured output
    done("output_config", BOTH, "an object"),
    done("output_config.format", BOTH, "`json_schema` with a `schema`: the answer is valid JSON by it"),
    done("output_config.effort", BOTH, "`low`, `medium`, `high`, `xhigh` or `max`, told to the template as `reasoning_effort`"),
    refused("output_config.task_budget", BOTH, &[], "use max_tokens"),
    done("output_format", BOTH, "the same as `output_config.format`"),
    // what changes nothing
    accepted("metadata", ASK, "for the client's own books"),
    done("service_tier", ASK, "`auto` and `standard_only`: interactive"),
    accepted("speed", BOTH, "there is one"),
    accepted("billing_policy", ASK, "nothing is billed"),
    accepted("diagnostics", ASK, "there are none"),
    accepted("user_profile_id", BOTH, "for the client's own books"),
    accepted("workspace_id", BOTH, "for the client's own books"),
    // others' work
    refused("context_management", BOTH, &["{}", "{\"edits\":[]}", KEEPS_ALL], "the client keeps the chat short enough"),
    refused("compaction", BOTH, &[], "the client keeps the chat short enough"),
    refused("thread", BOTH, &[], "chats are not kept: send all messages"),
    refused("inference_geo", ASK, &["\"global\""], "the answer is made where this server's workers are"),
    refused("fallbacks", ASK, &["[]"], "there is one model"),
    // other names
    refused("stop", ASK, &["[]"], "the field is stop_sequences"),
    refused("n", ASK, &["1"], "an answer is one message"),
];
