//! One sequence's grammar, as the engine sees it.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use baton_engine::{Constraint, Mask, TokenMask};
use baton_grammar::Matcher;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use super::News;

/// A mask, or why there is none.
type Made = Result<Arc<TokenMask>, String>;

/// A mask to be made.
pub(super) struct MaskJob {
    matcher: Box<Matcher>,
    reply: Sender<(Box<Matcher>, Made)>,
    news: Sender<News>,
}

impl MaskJob {
    pub(super) fn run(mut self) {
        let made = mask_of(&mut self.matcher);
        // Nobody waits any more if the sequence was aborted.
        let _ = self.reply.send((self.matcher, made));
        // A full channel keeps the engine thread awake as well.
        let _ = self.news.try_send(News::Mask);
    }
}

pub(super) fn mask_of(matcher: &mut Matcher) -> Made {
    let words = matcher.mask().map_err(|error| error.to_string())?;
    Ok(Arc::new(TokenMask::new(words)))
}

/// A matcher that is either here or with the threads, which make its next mask.
pub(super) struct Following {
    place: Place,
    masks: Sender<MaskJob>,
    news: Sender<News>,
}

enum Place {
    Here(Box<Matcher>, Made),
    Away(Receiver<(Box<Matcher>, Made)>),
    /// It was dropped after an error.
    Nowhere,
}

impl Following {
    pub(super) fn new(
        matcher: Matcher,
        mask: Arc<TokenMask>,
        masks: Sender<MaskJob>,
        news: Sender<News>,
    ) -> Self {
        Self {
            place: Place::Here(Box::new(matcher), Ok(mask)),
            masks,
            news,
        }
    }
}

impl Constraint for Following {
    fn accept(&mut self, token: u32) -> Result<bool, String> {
        let place = std::mem::replace(&mut self.place, Place::Nowhere);
        let Place::Here(mut matcher, _) = place else {
            return Err("a token was chosen before its mask was made; this is a defect".to_owned());
        };
        matcher.accept(token).map_err(|error| error.to_string())?;
        if matcher.is_whole() {
            return Ok(true);
        }
        let (reply, made) = bounded(1);
        let job = MaskJob {
            matcher,
            reply,
            news: self.news.clone(),
        };
        let sent = self.masks.try_send(job);
        sent.map_err(|_| "the threads that make masks are gone or overrun".to_owned())?;
        self.place = Place::Away(made);
        Ok(false)
    }

    fn mask(&mut self, deadline: Instant) -> Mask {
        if let Place::Away(made) = &self.place {
            self.place = match made.recv_deadline(deadline) {
                Ok((matcher, made)) => Place::Here(matcher, made),
                Err(RecvTimeoutError::Timeout) => return Mask::Late,
                Err(RecvTimeoutError::Disconnected) => Place::Nowhere,
            };
        }
        match &self.place {
            Place::Here(_, Ok(mask)) => Mask::Ready(Arc::clone(mask)),
            Place::Here(_, Err(detail)) => Mask::Failed(detail.clone()),
            Place::Away(_) | Place::Nowhere => {
                Mask::Failed("the thread that made its next mask is gone".to_owned())
            }
        }
    }
}

impl fmt::Debug for Following {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = match &self.place {
            Place::Here(..) => "its mask is made",
            Place::Away(_) => "its mask is being made",
            Place::Nowhere => "it has failed",
        };
        write!(f, "Following({place})")
    }
}
