//! Events in the making.

use crate::event::{End, Event};

/// White space that may turn out to stand beside a marker is held back, up to so many bytes.
const SPACE_BYTES_MAX: usize = 256;

/// Collects events, joins what belongs together, and leaves out white space beside markers.
#[derive(Debug, Default)]
pub(crate) struct Out {
    events: Vec<Event>,
    flow: Flow,
    /// White space of `flow`, which has a place only if text follows.
    space: String,
    /// A marker was the last thing: white space is left out until text comes.
    after_mark: bool,
    /// White space at the end of content may be beside a marker that comes.
    marks_may_follow: bool,
    calls: usize,
    is_call_open: bool,
    has_text: [bool; 2],
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Flow {
    #[default]
    Content,
    Reasoning,
}

impl Out {
    /// Nothing yet.
    pub fn new() -> Self {
        Self {
            marks_may_follow: true,
            ..Self::default()
        }
    }

    /// No marker comes any more: nothing needs to be held back.
    pub fn no_marks_follow(&mut self) {
        self.marks_may_follow = false;
    }

    /// A marker came, and white space on both its sides is part of it.
    pub fn mark(&mut self) {
        self.space.clear();
        self.after_mark = true;
    }

    /// Another message of the same kind may follow one that had text: a line ends between the two.
    pub fn new_message(&mut self, reasoning: bool) {
        self.mark();
        let flow = match reasoning {
            true => Flow::Reasoning,
            false => Flow::Content,
        };
        if self.has_text[flow as usize] {
            self.flow = flow;
            self.space.push('\n');
        }
    }

    /// A character of the answer.
    pub fn content(&mut self, c: char) {
        self.add(Flow::Content, c);
    }

    /// Characters of the answer.
    pub fn contents(&mut self, text: &str) {
        for c in text.chars() {
            self.content(c);
        }
    }

    /// A character of the reasoning.
    pub fn reasoning(&mut self, c: char) {
        self.add(Flow::Reasoning, c);
    }

    /// A call begins.
    pub fn begin(&mut self, id: Option<String>, name: String) {
        self.break_off();
        self.mark();
        let index = self.calls;
        self.calls += 1;
        self.is_call_open = true;
        self.events.push(Event::CallBegins { index, id, name });
    }

    /// A character of its arguments.
    pub fn argument(&mut self, c: char) {
        self.arguments(c.encode_utf8(&mut [0; 4]));
    }

    /// A part of its arguments.
    pub fn arguments(&mut self, text: &str) {
        if text.is_empty() || !self.is_call_open {
            return;
        }
        match self.events.last_mut() {
            Some(Event::CallArguments { delta, .. }) => delta.push_str(text),
            _ => self.events.push(Event::CallArguments {
                index: self.calls - 1,
                delta: text.to_owned(),
            }),
        }
    }

    /// The call ends with its arguments whole, if one is open.
    pub fn end(&mut self) {
        self.end_call(true);
    }

    /// The call ends before its arguments do, if one is open.
    pub fn break_off(&mut self) {
        self.end_call(false);
    }

    fn end_call(&mut self, is_whole: bool) {
        if std::mem::take(&mut self.is_call_open) {
            let index = self.calls - 1;
            self.events.push(Event::CallEnds { index, is_whole });
            self.mark();
        }
    }

    /// The output is over.
    pub fn finish(&mut self) -> End {
        if self.after_mark {
            self.space.clear();
        }
        self.flush_space();
        self.break_off();
        End { calls: self.calls }
    }

    /// What there is so far, taken out.
    pub fn take(&mut self, events: &mut Vec<Event>) {
        events.append(&mut self.events);
    }

    fn add(&mut self, flow: Flow, c: char) {
        if flow != self.flow {
            self.flush_space();
            self.flow = flow;
        }
        if c.is_whitespace() {
            let is_held = flow == Flow::Reasoning || self.marks_may_follow || self.after_mark;
            if is_held && self.space.len() + c.len_utf8() <= SPACE_BYTES_MAX {
                if !self.after_mark {
                    self.space.push(c);
                }
                return;
            }
        }
        self.flush_space();
        self.after_mark = false;
        self.append(flow, c.encode_utf8(&mut [0; 4]));
    }

    fn flush_space(&mut self) {
        let space = std::mem::take(&mut self.space);
        if !space.is_empty() {
            self.append(self.flow, &space);
        }
    }

    fn append(&mut self, flow: Flow, text: &str) {
        self.has_text[flow as usize] = true;
        match (flow, self.events.last_mut()) {
            (Flow::Content, Some(Event::Content(all)))
            | (Flow::Reasoning, Some(Event::Reasoning(all))) => all.push_str(text),
            (Flow::Content, _) => self.events.push(Event::Content(text.to_owned())),
            (Flow::Reasoning, _) => self.events.push(Event::Reasoning(text.to_owned())),
        }
    }
}
