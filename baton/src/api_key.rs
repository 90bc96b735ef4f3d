//! The key that status, top, drain, chat and bench show to an API server.

use clap::Args;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};

use crate::Failure;

#[derive(Args, Clone, Debug, Default)]
pub struct ApiKeyArg {
    /// API key, if the server wants one
    #[arg(long, env = "BATON_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
}

impl ApiKeyArg {
    /// Headers that every request carries.
    ///
    /// # Errors
    /// If the key cannot stand in a header.
    pub fn headers(&self) -> Result<HeaderMap, Failure> {
        let mut headers = HeaderMap::new();
        if let Some(key) = &self.api_key {
            let mut value = HeaderValue::try_from(format!("Bearer {key}"))
                .map_err(|_| "the API key has characters that no HTTP header can carry")?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        Ok(headers)
    }
}
