//! The rows of `/v1/responses`.

use super::{Door, Doors, Field, accepted, done, refused};

const ASK: Doors = Doors(Door::Responses as u8);

/// In the order of the page.
#[rustfmt::skip]
pub const FIELDS: &[Field] = &[
    // what is asked
    done("model", ASK, "as in chats"),
    done("input", ASK, "a text, or items: messages, function calls, their outputs, reasoning ([Responses](#responses))"),
    done("instructions", ASK, "the system message; that of an earlier response is not carried over"),
    done("previous_response_id", ASK, "goes on from a response that this API server keeps; 404 if it does not"),
    done("store", ASK, "whether the response is kept; default true"),
    done("stream", ASK, "the answer as server-sent events"),
    done("stream_options", ASK, "only with `stream`"),
    accepted("stream_options.include_obfuscation", ASK, "events are never padded"),
    // how long
    done("max_output_tokens", ASK, "most output tokens, the reasoning's included; default: as `max_tokens` in chats"),
    done("truncation", ASK, "`auto` takes away the beginning of a prompt that is too long, token by token; default `disabled`, which refuses it"),
    done("min_tokens", ASK, "as in chats"),
    done("stop", ASK, "as in chats"),
    done("stop_token_ids", ASK, "as in chats"),
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
    done("seed", ASK, "as in chats"),
    // how the prompt is made
    done("cache_salt", ASK, "as in chats"),
    done("chat_template_kwargs", ASK, "as in chats"),
    // tools
    done("tools", ASK, "functions, which lie flat here (`type`, `name`, `description`, `parameters`, `strict`); strict is false where it is not said. Others are refused"),
    done("tool_choice", ASK, "`auto` (default with tools), `none`, `required`, a function by `name`, or `allowed_tools`, which leaves the others out"),
    done("parallel_tool_calls", ASK, "as in chats"),
    refused("max_tool_calls", ASK, &[], "tools are called by the client, which can count"),
    // structured output
    done("text", ASK, "an object"),
    done("text.format", ASK, "`text`, `json_object`, or `json_schema` with a `schema`: the text is valid JSON by it"),
    done("structured_outputs", ASK, "as in chats, in place of `text.format`"),
    done("text.verbosity", ASK, "as `verbosity` in chats"),
    // reasoning
    done("reasoning", ASK, "an object"),
    done("reasoning.effort", ASK, "as `reasoning_effort` in chats"),
    done("reasoning.summary", ASK, "`auto`, `concise` or `detailed`: the reasoning comes as a summary too, which is all of it"),
    done("reasoning.generate_summary", ASK, "the same"),
    // what the answer shows
    done("metadata", ASK, "up to 16 texts, which the answer repeats"),
    done("include", ASK, "an array; `message.output_text.logprobs` asks for log-probabilities of the text's tokens, `reasoning.encrypted_content` for reasoning that can be sent back ([Responses](#responses)), what answers have anyhow is accepted, what they do not have is refused"),
    done("top_logprobs", ASK, "alternatives, 0 to 20; needs `message.output_text.logprobs` in `include`"),
    // what changes nothing
    accepted("user", ASK, "for the client's own books"),
    accepted("safety_identifier", ASK, "for the client's own books"),
    done("service_tier", ASK, "as in chats"),
    done("priority", ASK, "as in chats"),
    accepted("prompt_cache_key", ASK, "prefixes are found without"),
    accepted("prompt_cache_retention", ASK, "prefixes are kept while there is room"),
    accepted("prompt_cache_options", ASK, "prefixes are kept while there is room"),
    accepted("client_metadata", ASK, "for the client's own books"),
    // what this server does not do
    refused("background", ASK, &["false"], "answers come while the client waits"),
    refused("conversation", ASK, &[], "use previous_response_id"),
    refused("prompt", ASK, &[], "send the text itself in input"),
    refused("context_management", ASK, &["[]"], "leave items out of input"),
    refused("moderation", ASK, &[], "nothing is moderated"),
];
