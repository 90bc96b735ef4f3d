//! The rows of OpenAI's older doors and of `/tokenize`. A field that becomes supported changes its kind here, and `docs/api.md` with it.

use super::{Door, Doors, Field, accepted, done, refused};

const CHAT: Doors = Doors(Door::Chat as u8);
const TEXT: Doors = Doors(Door::Text as u8);
const BOTH: Doors = Doors(CHAT.0 | TEXT.0);
const TOKENIZE: Doors = Doors(Door::Tokenize as u8);
const DETOKENIZE: Doors = Doors(Door::Detokenize as u8);
const MESSAGES: Doors = Doors(CHAT.0 | TOKENIZE.0);
const PROMPTS: Doors = Doors(BOTH.0 | TOKENIZE.0);
const ALL: Doors = Doors(PROMPTS.0 | DETOKENIZE.0);

const NO_IMAGES: &str = "models here read only text";
const SCHEMAS: &str = "say it in structured_outputs, or in response_format";
const NO_BUDGET: &str =
    "use reasoning_effort, or a variable of the template in chat_template_kwargs";
const NO_SPLIT: &str = "Baton hands KV over by itself";

/// In the order of the page.
#[rustfmt::skip]
pub const FIELDS: &[Field] = &[
    // what is asked
    done("model", ALL, "one of the model's names, as `GET /v1/models` gives them; left out or empty, the model that there is"),
    done("messages", MESSAGES, "the chat, through the model's template"),
    done("prompt", Doors(TEXT.0 | TOKENIZE.0), "a text; for completions also token ids, or an array of either"),
    done("tokens", DETOKENIZE, "token ids"),
    done("stream", BOTH, "the answer as server-sent events"),
    done("stream_options", BOTH, "only with `stream`"),
    done("stream_options.include_usage", BOTH, "the last event has the usage of all choices"),
    done("stream_options.continuous_usage_stats", BOTH, "with `include_usage`: every event has the usage of its choice so far"),
    accepted("stream_options.include_obfuscation", BOTH, "events are never padded"),
    done("n", BOTH, "choices for each prompt"),
    done("echo", TEXT, "the text begins with the prompt; with `logprobs`, also those of the prompt"),
    // how long
    done("max_tokens", BOTH, "most output tokens; 16 for completions that name none, else `--default-max-tokens`, without which it is what the model has room for. 0 with `echo`: only the prompt"),
    done("max_completion_tokens", BOTH, "the same; wins over `max_tokens`"),
    done("min_tokens", BOTH, "no end before so many output tokens"),
    done("stop", BOTH, "texts that end the output, which ends before them"),
    done("stop_token_ids", BOTH, "token ids that end the output"),
    done("include_stop_str_in_output", BOTH, "the output ends after the stop text or token, not before it"),
    done("ignore_eos", BOTH, "goes on past the model's end-of-sequence tokens"),
    // which tokens
    done("temperature", BOTH, "from 0 (the most likely token) to 2; default: the model's `generation_config.json`, else 1"),
    done("top_p", BOTH, "over 0 to 1; default: the model's, else 1"),
    done("top_k", BOTH, "-1 and 0 keep all; default: the model's, else all"),
    done("min_p", BOTH, "from 0 to 1; default: the model's, else 0"),
    done("repetition_penalty", BOTH, "of prompt and output; default: the model's, else 1"),
    done("presence_penalty", BOTH, "of the output, from -2 to 2"),
    done("frequency_penalty", BOTH, "of the output, from -2 to 2"),
    done("logit_bias", BOTH, "token ids and what is added to their logits, from -100 to 100"),
    done("allowed_token_ids", BOTH, "only these ids are chosen; an end only if its id is one of them"),
    done("bad_words", BOTH, "texts that the output does not hold: of the tokens of each, with and without a space before it, the last does not follow the others"),
    done("seed", BOTH, "the same seed gives the same text, choice by choice"),
    // how the prompt is made
    done("cache_salt", BOTH, "prompts with different salts never share KV"),
    done("add_special_tokens", PROMPTS, "what the tokenizer adds at the ends of a text: default true for a text, false for a chat, whose template writes them"),
    done("truncate_prompt_tokens", BOTH, "keeps so many tokens of the prompt; -1: as many as leave room for `max_tokens`"),
    done("truncation_side", BOTH, "`left` (default) takes away the beginning of the prompt, `right` its end"),
    done("add_generation_prompt", MESSAGES, "the template opens the assistant's turn; default true, but with `continue_final_message`"),
    done("continue_final_message", MESSAGES, "the prompt ends with the last message's text, which the output goes on with"),
    done("chat_template_kwargs", MESSAGES, "variables for the template, such as `enable_thinking`"),
    // what the answer shows
    done("logprobs", BOTH, "chat: true or false; completions: how many alternatives, 0 to 20"),
    done("top_logprobs", CHAT, "alternatives, 0 to 20; needs `logprobs`"),
    done("prompt_logprobs", BOTH, "those of the prompt, with 0 to 20 alternatives: in the answer (chat) or in each choice (completions); not with `stream`. `rank` is the place among the alternatives, null for a token that is none of them"),
    done("return_tokens_as_token_ids", BOTH, "in log-probabilities, tokens are `token_id:N`"),
    done("return_token_ids", BOTH, "choices have `token_ids`; the answer (chat) or each choice (completions) `prompt_token_ids`, in streams the first event"),
    done("return_token_strs", TOKENIZE, "the tokens' names in the vocabulary too"),
    done("skip_special_tokens", BOTH, "false: the output's special tokens are in its text"),
    // what changes nothing
    accepted("user", BOTH, "for the client's own books"),
    accepted("metadata", BOTH, "for the client's own books"),
    accepted("store", CHAT, "chats are not kept, and none can be asked for again; `/v1/responses` keeps what it answered"),
    accepted("safety_identifier", BOTH, "for the client's own books"),
    accepted("request_id", BOTH, "the header `X-Request-Id` names a request"),
    accepted("rid", BOTH, "the header `X-Request-Id` names a request"),
    done("service_tier", BOTH, "`auto` (default): interactive, or batch where `--overload batch` says so and its time cannot be kept; `default`, `scale`: interactive; `priority`: before other interactive ones; `flex`: batch, which takes what interactive requests leave ([scheduling.md](scheduling.md))"),
    done("priority", BOTH, "an integer, 0 unless given: within a class the lower goes first"),
    accepted("prompt_cache_key", BOTH, "prefixes are found without"),
    accepted("prompt_cache_retention", BOTH, "prefixes are kept while there is room"),
    accepted("prompt_cache_options", BOTH, "prefixes are kept while there is room"),
    accepted("cache_prompt", BOTH, "prefixes are always cached"),
    accepted("id_slot", BOTH, "requests have no slots"),
    accepted("keep_alive", BOTH, "the model stays"),
    accepted("prediction", CHAT, "the text is the same without"),
    accepted("spaces_between_special_tokens", BOTH, "no spaces are added between tokens"),
    accepted("length_penalty", BOTH, "only beam search knows it"),
    accepted("early_stopping", BOTH, "only beam search knows it"),
    accepted("return_token_offsets", BOTH, "answers that generate have none"),
    accepted("return_assistant_tokens_mask", CHAT, "answers that generate have none"),
    // tools
    done("tools", MESSAGES, "functions that the model may call, those with `strict` only by their schema ([chat-formats.md](chat-formats.md)); a model whose format is not known takes none that it need not call"),
    done("tool_choice", CHAT, "`auto` (default with tools), `none`, with which the model is not shown the tools, or `required` or a function by name, with which it can write nothing but calls by their schema"),
    done("parallel_tool_calls", CHAT, "false: the answer ends with its first call; default true"),
    refused("functions", CHAT, &["[]"], "say it in tools"),
    refused("function_call", CHAT, &["\"none\""], "say it in tool_choice"),
    refused("web_search_options", CHAT, &[], "there is no web search"),
    // structured output
    done("response_format", BOTH, "`text`, `json_object`, or `json_schema` with a `schema`: the output is valid JSON by it, whatever `strict` says"),
    done("structured_outputs", BOTH, "one of `json` (a schema), `json_object`, `regex`, `choice`, `grammar` (Lark): the output follows it"),
    done("guided_json", BOTH, "as `structured_outputs.json`"),
    done("guided_regex", BOTH, "as `structured_outputs.regex`"),
    done("guided_choice", BOTH, "as `structured_outputs.choice`"),
    done("guided_grammar", BOTH, "as `structured_outputs.grammar`"),
    accepted("guided_decoding_backend", BOTH, "there is one"),
    refused("guided_whitespace_pattern", BOTH, &[], SCHEMAS),
    refused("structural_tag", BOTH, &[], SCHEMAS),
    refused("json_schema", BOTH, &[], SCHEMAS),
    refused("regex", BOTH, &[], SCHEMAS),
    refused("ebnf", BOTH, &[], SCHEMAS),
    refused("grammar", BOTH, &["\"\""], SCHEMAS),
    // reasoning
    done("reasoning_effort", CHAT, "`none`, `minimal`, `low`, `medium`, `high` or `xhigh`, for the template; `none` also says `enable_thinking: false` to it"),
    done("include_reasoning", CHAT, "false leaves the reasoning out of the answer; default true"),
    refused("separate_reasoning", CHAT, &["true"], "reasoning comes apart from the answer"),
    refused("thinking_token_budget", BOTH, &["-1"], NO_BUDGET),
    done("reasoning", CHAT, "an object, as OpenRouter's clients send it"),
    done("reasoning.effort", CHAT, "the same as `reasoning_effort`"),
    done("reasoning.enabled", CHAT, "false: as the effort `none`; true says `enable_thinking: true` to the template"),
    done("reasoning.exclude", CHAT, "true: as `include_reasoning: false`"),
    refused("reasoning.max_tokens", CHAT, &[], NO_BUDGET),
    accepted("reasoning.summary", CHAT, "all of the reasoning is in the answer"),
    done("verbosity", CHAT, "`low`, `medium` or `high`, for the template"),
    refused("thinking", CHAT, &[], "say so in chat_template_kwargs"),
    refused("enable_thinking", CHAT, &[], "say so in chat_template_kwargs"),
    // what workers would have to do
    refused("logprob_token_ids", BOTH, &["[]"], "use top_logprobs, or logprobs in completions"),
    refused("logits_processors", BOTH, &["[]"], "use logit_bias"),
    refused("best_of", BOTH, &["1"], "ask for n choices and take the best"),
    refused("use_beam_search", BOTH, &["false"], "tokens are drawn one by one"),
    refused("suffix", TEXT, &["\"\""], "a text is only continued at its end"),
    refused("prompt_embeds", TEXT, &[], "prompts are text or token ids"),
    refused("repetition_detection", BOTH, &[], "use repetition_penalty, or max_tokens"),
    refused("typical_p", BOTH, &["1"], "use top_p"),
    refused("tfs_z", BOTH, &["1"], "use top_p"),
    refused("top_a", BOTH, &["0"], "use min_p"),
    refused("mirostat", BOTH, &["0"], "use top_p"),
    // others' doors and others' work
    refused("echo", CHAT, &["false"], "use continue_final_message, and put the message before the answer"),
    refused("chat_template", MESSAGES, &[], "the model's own is used"),
    refused("documents", CHAT, &["[]"], "give them in chat_template_kwargs"),
    refused("modalities", CHAT, &["[\"text\"]"], "answers are text"),
    refused("audio", CHAT, &[], "answers are text"),
    refused("moderation", CHAT, &[], "nothing is moderated"),
    refused("safe_prompt", CHAT, &["false"], "write it into a message"),
    refused("media_io_kwargs", MESSAGES, &["{}"], NO_IMAGES),
    refused("mm_processor_kwargs", MESSAGES, &["{}"], NO_IMAGES),
    refused("return_prompt_text", CHAT, &["false"], "/tokenize shows the prompt's tokens"),
    refused("kv_transfer_params", BOTH, &[], NO_SPLIT),
    refused("ec_transfer_params", BOTH, &[], NO_SPLIT),
    refused("vllm_xargs", BOTH, &["{}"], "nothing here reads them"),
    refused("extra_body", BOTH, &["{}"], "its fields belong into the body itself"),
    // other names
    refused("max_new_tokens", BOTH, &[], "the field is max_tokens"),
    refused("max_length", BOTH, &[], "the field is max_tokens"),
    refused("n_predict", BOTH, &[], "the field is max_tokens"),
    refused("num_predict", BOTH, &[], "the field is max_tokens"),
    refused("repeat_penalty", BOTH, &["1"], "the field is repetition_penalty"),
    refused("stop_sequences", BOTH, &["[]"], "the field is stop"),
    refused("random_seed", BOTH, &[], "the field is seed"),
    refused("do_sample", BOTH, &["true"], "say temperature 0 for the most likely tokens"),
];
