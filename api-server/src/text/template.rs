//! Chat templates: Jinja2 as Transformers runs it.

use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, Error, ErrorKind, syntax::SyntaxConfig};
use serde::Serialize;

use crate::text::texts::Until;

const NAME: &str = "chat";

/// Steps a template may take: a bound against endless loops, far over what real ones need.
const FUEL: u64 = 50_000_000;

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
}

impl ChatTemplate {
    /// Compiles a template.
    ///
    /// # Errors
    /// A sentence with the line at fault.
    pub fn new(source: &str, bos_token: &str, eos_token: &str) -> Result<Self, String> {
        let mut environment = Environment::new();
        // Transformers renders with trim_blocks and lstrip_blocks.
        environment.set_syntax(
            SyntaxConfig::builder()
                .trim_blocks(true)
                .lstrip_blocks(true)
                .build()
                .map_err(|error| format!("template syntax: {error}"))?,
        );
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_fuel(Some(FUEL));
        environment.add_function(
            "raise_exception",
            |message: String| -> Result<Value, Error> {
                Err(Error::new(
                    ErrorKind::InvalidOperation,
                    format!("{RAISED}{message}"),
                ))
            },
        );
        environment.add_function("strftime_now", |format: String| {
            strftime(&format, now_unix())
        });
        environment.add_filter("tojson", tojson);
        environment
            .add_template_owned(NAME, without_generation_tags(source))
            .map_err(|error| format!("the chat template does not compile: {error:#}"))?;
        Ok(Self {
            environment,
            bos_token: bos_token.to_owned(),
            eos_token: eos_token.to_owned(),
        })
    }

    /// Writes the prompt for these messages, with these variables besides, and with the opening of the assistant's turn at its end if
    /// it is wanted.
    ///
    /// # Errors
    /// What the template objects to, or what is wrong with it.
    pub fn render<M: Serialize>(
        &self,
        messages: &M,
        add_generation_prompt: bool,
        variables: &serde_json::Value,
        prompt: &mut Prompt,
    ) -> Result<(), String> {
        let template = self
            .environment
            .get_template(NAME)
            .map_err(|error| error.to_string())?;
        let context = minijinja::context! {
            messages => Value::from(Serde(messages)),
            add_generation_prompt,
            bos_token => self.bos_token.as_str(),
            eos_token => self.eos_token.as_str(),
            ..Value::from(Serde(variables))
        };
        let rendered = template.render_captured_to(context, prompt);
        rendered.map(drop).map_err(|error| {
            let text = error.detail().unwrap_or_default();
            match text.strip_prefix(RAISED) {
                Some(raised) => raised.to_owned(),
                None => format!("the chat template failed: {error}"),
            }
        })
    }
}

/// Longest text of any prompt.
const TEXT_BYTES_MAX: usize = 64 << 20;

/// A prompt in the making, up to its bound, for as long as somebody waits for it.
pub struct Prompt<'a> {
    text: Vec<u8>,
    bytes: usize,
    bytes_max: usize,
    counted: &'a dyn Fn(&[u8]) -> usize,
    is_over: bool,
    until: &'a Until,
}

impl<'a> Prompt<'a> {
    /// An empty one that may have this many bytes, of those that `counted` counts.
    pub fn new(bytes_max: usize, counted: &'a dyn Fn(&[u8]) -> usize, until: &'a Until) -> Self {
        Self {
            text: Vec::new(),
            bytes: 0,
            bytes_max,
            counted,
            is_over: false,
            until,
        }
    }

    /// Whether more was written than it may have.
    pub fn is_over(&self) -> bool {
        self.is_over
    }

    /// What was written.
    ///
    /// # Errors
    /// If it is no text.
    pub fn into_text(self) -> Result<String, String> {
        String::from_utf8(self.text).map_err(|error| error.to_string())
    }
}

impl std::io::Write for Prompt<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.until.check().map_err(std::io::Error::other)?;
        self.bytes += (self.counted)(bytes);
        if self.bytes > self.bytes_max || self.text.len() + bytes.len() > TEXT_BYTES_MAX {
            self.is_over = true;
            let message = format!("it makes a prompt of more than {} bytes", self.bytes_max);
            return Err(std::io::Error::other(message));
        }
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

const RAISED: &str = "raise_exception: ";

/// `{% generation %}` marks what the assistant wrote, for training. Here it does nothing.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let (before, tag) = rest.split_at(open);
        let Some((tag, after)) = tag[2..].split_once("%}") else {
            break;
        };
        let word = tag.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        out.push_str(before);
        match word {
            "generation" => out.push_str(&format!("{{%{}%}}", tag.replace(word, "if true"))),
            "endgeneration" => out.push_str(&format!("{{%{}%}}", tag.replace(word, "endif"))),
            _ => out.push_str(&format!("{{%{tag}%}}")),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// `json.dumps(value, ensure_ascii=False)`, with `indent` if asked for: no escaping for HTML.
fn tojson(value: &Value, arguments: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = arguments.get("indent")?;
    let _: Option<bool> = arguments.get("ensure_ascii")?;
    let _: Option<bool> = arguments.get("sort_keys")?;
    arguments.assert_all_used()?;
    let bad = |error: &dyn std::fmt::Display| {
        Error::new(ErrorKind::BadSerialization, format!("tojson: {error}"))
    };
    let mut out = Vec::new();
    let written = match indent {
        None => {
            let mut writer = serde_json::Serializer::with_formatter(&mut out, PythonFormat);
            value.serialize(&mut writer)
        }
        Some(width) => {
            let spaces = vec![b' '; width];
            let format = serde_json::ser::PrettyFormatter::with_indent(&spaces);
            let mut writer = serde_json::Serializer::with_formatter(&mut out, format);
            value.serialize(&mut writer)
        }
    };
    written.map_err(|error| bad(&error))?;
    String::from_utf8(out)
        .map(Value::from)
        .map_err(|error| bad(&error))
}

/// Python's separators: `", "` and `": "`.
struct PythonFormat;

impl serde_json::ser::Formatter for PythonFormat {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first {
            Ok(())
        } else {
            writer.write_all(b", ")
        }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first {
            Ok(())
        } else {
            writer.write_all(b", ")
        }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

fn now_unix() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |since| since.as_secs() as i64)
}

/// The directives of `strftime` that templates use, in UTC.
pub fn strftime(format: &str, unix: i64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = [
        "Thursday",
        "Friday",
        "Saturday",
        "Sunday",
        "Monday",
        "Tuesday",
        "Wednesday",
    ];
    let (days, seconds) = (unix.div_euclid(86_400), unix.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    let month_name = MONTHS[month as usize - 1];
    let day_name = DAYS[days.rem_euclid(7) as usize];
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out.push_str(&year.to_string()),
            Some('m') => out.push_str(&format!("{month:02}")),
            Some('d') => out.push_str(&format!("{day:02}")),
            Some('B') => out.push_str(month_name),
            Some('b') => out.push_str(&month_name[..3]),
            Some('A') => out.push_str(day_name),
            Some('a') => out.push_str(&day_name[..3]),
            Some('H') => out.push_str(&format!("{:02}", seconds / 3600)),
            Some('M') => out.push_str(&format!("{:02}", seconds / 60 % 60)),
            Some('S') => out.push_str(&format!("{:02}", seconds % 60)),
            Some('%') => out.push('%'),
            Some(other) => out.extend(['%', other]),
            None => out.push('%'),
        }
    }
    out
}

/// Year, month and day of a number of days since 1970-01-01: H. Hinnant's `civil_from_days`.
fn civil(days: i64) -> (i64, i64, i64) {
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let doe = z.rem_euclid(146_097);
    let yoe = (doe - doe / 1_460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    let year = yoe + era * 400 + i64::from(month <= 2);
    (year, month, doy - (153 * mp + 2) / 5 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(source: &str, messages: serde_json::Value) -> Result<String, String> {
        let until = Until::forever();
        let mut prompt = Prompt::new(1 << 20, &<[u8]>::len, &until);
        let template = ChatTemplate::new(source, "<s>", "</s>").unwrap();
        template.render(&messages, true, &json!({}), &mut prompt)?;
        prompt.into_text()
    }

    #[test]
    fn pythonisms_work() {
        let source = "{% for m in messages[::-1] %}{{ m['content'].strip().upper() }}|{% endfor %}";
        let messages = json!([{"content": " a "}, {"content": "b"}]);
        assert_eq!(render(source, messages).unwrap(), "B|A|");
        let source = "{{ bos_token + messages[0].get('role', 'none') }}";
        assert_eq!(render(source, json!([{}])).unwrap(), "<s>none");
    }

    #[test]
    fn generation_tags_do_nothing() {
        let source = "a{% generation %}b{%- endgeneration -%} c";
        assert_eq!(render(source, json!([])).unwrap(), "abc");
    }

    /// Found by fuzzing: the sign that opens a tag and the one that closes it may share one character.
    #[test]
    fn tags_that_close_before_they_open_are_an_error() {
        for source in ["{%}", "{% generation {%}", "a{%}b%}", "{%"] {
            assert!(ChatTemplate::new(source, "", "").is_err(), "{source}");
        }
    }

    #[test]
    fn raised_exceptions_reach_the_client() {
        let error = render("{{ raise_exception('roles must alternate') }}", json!([]));
        assert_eq!(error.unwrap_err(), "roles must alternate");
    }

    #[test]
    fn json_is_pythons() {
        let source = "{{ messages[0] | tojson }}";
        let text = render(source, json!([{"a": ["<é>", 1, null, true]}])).unwrap();
        assert_eq!(text, "{\"a\": [\"<é>\", 1, null, true]}");
    }

    #[test]
    fn dates() {
        assert_eq!(
            strftime("%d %b %Y %H:%M", 1_709_210_096),
            "29 Feb 2024 12:34"
        );
        assert_eq!(strftime("%A %B", 0), "Thursday January");
    }

    #[test]
    fn a_prompt_has_a_bound() {
        let source = "{% for a in range(100000) %}{{ messages[0] }}{% endfor %}";
        let error = render(source, json!(["x".repeat(1 << 20)])).unwrap_err();
        assert!(error.contains("write"), "{error}");
    }

    #[test]
    fn endless_templates_end() {
        let source = "{% for a in range(100000) %}{% for b in range(100000) %}{{ b }}{% endfor %}{% endfor %}";
        assert!(render(source, json!([])).is_err());
    }
}
