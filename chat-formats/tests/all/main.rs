//! Tests of the parsers from outside: recorded cases, messages written as the families write them, and arbitrary text.

mod grammars;
mod properties;
mod recorded;
mod support;
mod walks;
mod written;
