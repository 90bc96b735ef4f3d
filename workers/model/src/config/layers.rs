//! Which layers see only so many tokens.

use serde_json::Value;

use super::fields::Fields;

/// How a family's class in Transformers reads `sliding_window`, where there are no `layer_types`.
#[derive(Clone, Copy)]
pub(super) enum Windows {
    /// Not at all.
    None,
    /// In every layer.
    Every,
    /// If `use_sliding_window`, in the layers from `max_window_layers` on.
    Upper,
}

/// The first layer with a window in Transformers' Qwen classes, where a configuration does not say.
const MAX_WINDOW_LAYERS: usize = 28;

/// The window of each of `count` layers, in tokens; `None` sees all. A window that holds the longest sequence of the
/// model is none.
pub(super) fn sliding_windows(
    config: &Fields,
    windows: Windows,
    count: usize,
    tokens_max: usize,
) -> Result<Vec<Option<usize>>, String> {
    let (window, first) = match windows {
        Windows::None => (None, count),
        Windows::Every => (config.count("sliding_window")?, 0),
        Windows::Upper if config.flag("use_sliding_window")? != Some(true) => (None, count),
        Windows::Upper => match config.count("sliding_window")? {
            None => {
                return Err("`use_sliding_window` is true without a `sliding_window`".to_owned());
            }
            window => (
                window,
                config
                    .count("max_window_layers")?
                    .unwrap_or(MAX_WINDOW_LAYERS),
            ),
        },
    };
    let slides = match layer_types(config, count)? {
        Some(slides) if window.is_none() && slides.contains(&true) => {
            return Err("`layer_types` asks for sliding attention without a window".to_owned());
        }
        Some(slides) => slides,
        None => (0..count).map(|layer| layer >= first).collect(),
    };
    let window = window.filter(|window| *window < tokens_max);
    let of_layer = |slides| if slides { window } else { None };
    Ok(slides.into_iter().map(of_layer).collect())
}

/// Whether each layer slides, if the configuration lists that.
fn layer_types(config: &Fields, count: usize) -> Result<Option<Vec<bool>>, String> {
    let types = match config.present("layer_types") {
        Some(Value::Array(types)) => types,
        Some(other) => return Err(format!("`layer_types` is no list: {other}")),
        None => return Ok(None),
    };
    if types.len() != count {
        return Err(format!(
            "`layer_types` lists {} layers, `num_hidden_layers` is {count}",
            types.len()
        ));
    }
    let slides = |kind: &Value| match kind.as_str() {
        Some("full_attention") => Ok(false),
        Some("sliding_attention") => Ok(true),
        _ => Err(format!("`layer_types` has {kind}, which is not supported")),
    };
    types.iter().map(slides).collect::<Result<_, _>>().map(Some)
}
