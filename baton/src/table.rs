//! Tables in a terminal, of what JSON says.

use serde_json::Value;

/// Columns as wide as what is in them.
pub struct Table {
    rows: Vec<Vec<String>>,
    header: Vec<String>,
}

impl Table {
    /// An empty one with these columns.
    pub fn new(header: &[&str]) -> Self {
        Self {
            rows: Vec::new(),
            header: header.iter().map(|&name| name.to_owned()).collect(),
        }
    }

    /// One more row.
    pub fn row<const N: usize>(&mut self, row: [String; N]) {
        debug_assert_eq!(N, self.header.len());
        self.rows.push(row.into());
    }

    /// Whether it has no rows.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Its lines, the columns' names first.
    pub fn render(&self) -> String {
        let all = || std::iter::once(&self.header).chain(&self.rows);
        let width = |column: usize| {
            all()
                .map(|row| row[column].chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<_> = (0..self.header.len()).map(width).collect();
        let line = |row: &Vec<String>| {
            let cells: Vec<_> = row
                .iter()
                .zip(&widths)
                .map(|(cell, &width)| format!("{cell:<width$}"))
                .collect();
            format!("{}\n", cells.join("  ").trim_end())
        };
        all().map(line).collect()
    }
}

/// The elements of a JSON array; of anything else, none.
pub fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// A value for a person: strings as they are, nothing as a dash.
pub fn word(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) if text.is_empty() => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}
