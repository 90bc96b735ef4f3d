//! A stream as chunks: what [`Shape`] writes, event by event.

use super::Shape;
use crate::error::ApiError;
use crate::output::{Finish, Part, Piece, StreamWriter, Usage};
use crate::text::tokenizer::ModelText;

impl StreamWriter for Shape {
    fn open(&mut self, index: usize, usage: Usage, out: &mut Vec<u8>) {
        self.role_chunk(index, usage, out);
    }

    fn text(
        &mut self,
        index: usize,
        piece: Piece<'_>,
        usage: Usage,
        model: &ModelText,
        out: &mut Vec<u8>,
    ) {
        self.text_chunk(index, piece, usage, model, out);
    }

    fn part(
        &mut self,
        index: usize,
        part: &Part,
        piece: Piece<'_>,
        usage: Usage,
        model: &ModelText,
        out: &mut Vec<u8>,
    ) {
        self.part_chunk(index, part, piece, usage, model, out);
    }

    fn finish(&mut self, index: usize, finish: &Finish, usage: Usage, out: &mut Vec<u8>) {
        self.finish_chunk(index, finish, usage, out);
    }

    fn done(&mut self, usage: Usage, out: &mut Vec<u8>) {
        self.end_chunks(usage, out);
    }

    fn fail(&mut self, error: &ApiError, out: &mut Vec<u8>) {
        error_event(error, out);
    }
}

/// An error in mid-stream.
fn error_event(error: &ApiError, out: &mut Vec<u8>) {
    out.extend_from_slice(b"event: error\ndata: ");
    out.extend_from_slice(error.body().as_bytes());
    out.extend_from_slice(b"\n\n");
}
