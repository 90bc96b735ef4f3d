//! Work on large texts: parsing, rendering, tokenising. It is kept off the HTTP threads, is done for a few requests at a time,
//! and ends when nobody waits for it any more.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use actix_web::web;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};

use crate::error::{ApiError, ErrorKind};

/// Bodies up to this size are worked on where they came, which costs no change of threads: a millisecond or two.
pub const INLINE_BYTES_MAX: usize = 8 << 10;

/// Threads for large texts, as many as there are HTTP threads on a large machine. Others wait in the order of their arrival; they
/// are as many as have a place among the requests in flight.
pub struct TextPool {
    threads: Arc<Semaphore>,
}

/// Until when work on a request's text goes on. To be asked again and again while it does.
#[derive(Clone, Debug)]
pub struct Until {
    deadline: Instant,
    left: Arc<AtomicBool>,
}

impl Until {
    /// Until the request's time is over, or its client has left, which sets `left`.
    pub fn new(deadline: Instant, left: Arc<AtomicBool>) -> Self {
        Self { deadline, left }
    }

    /// As long as it takes.
    pub fn forever() -> Self {
        let far = Duration::from_secs(100 * 365 * 24 * 3600);
        Self::new(Instant::now() + far, Arc::default())
    }

    /// Whether somebody still waits.
    ///
    /// # Errors
    /// That the time is over, or that the client left.
    pub fn check(&self) -> Result<(), ApiError> {
        if self.left.load(Ordering::Relaxed) {
            return Err(ApiError::new(ErrorKind::ClientLeft, "the client left"));
        }
        match self.deadline <= Instant::now() {
            true => Err(late()),
            false => Ok(()),
        }
    }
}

impl TextPool {
    /// A pool for so many texts at a time.
    pub fn new(threads: usize) -> Self {
        Self {
            threads: Arc::new(Semaphore::new(threads)),
        }
    }

    /// Runs the work for a request whose body has this many bytes: here if it is small, else on one of the threads, when its turn
    /// comes. What the work owns is dropped when it ends, also where nobody waits for that any more.
    ///
    /// # Errors
    /// What the work says; 504 if its turn or its end does not come in time.
    pub async fn run<T: Send + 'static>(
        &self,
        bytes: usize,
        until: Until,
        work: impl FnOnce(&Until) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        if bytes <= INLINE_BYTES_MAX {
            return work(&until);
        }
        let lost = || ApiError::new(ErrorKind::Internal, "a thread was lost");
        let deadline = until.deadline;
        let turn = Arc::clone(&self.threads).acquire_owned();
        let turn = timeout_at(deadline, turn).await.map_err(|_| late())?;
        let turn = turn.map_err(|_| lost())?;
        let work = move || {
            // Whoever waited for the turn may have been the last that did.
            let done = until.check().and_then(|()| work(&until));
            drop(turn);
            done
        };
        let outcome = timeout_at(deadline, web::block(work)).await;
        outcome.map_err(|_| late())?.unwrap_or_else(|_| Err(lost()))
    }
}

fn late() -> ApiError {
    let message = "the request's time ran out while its prompt was made into tokens";
    ApiError::new(ErrorKind::Deadline, message)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const LARGE: usize = INLINE_BYTES_MAX + 1;

    fn until(time: Duration) -> (Until, Arc<AtomicBool>) {
        let left = Arc::new(AtomicBool::new(false));
        (Until::new(Instant::now() + time, Arc::clone(&left)), left)
    }

    #[tokio::test]
    async fn what_work_owns_is_there_until_its_thread_is_done() {
        let pool = TextPool::new(1);
        let owned = Arc::new(());
        let (go_on, going) = mpsc::sync_channel::<()>(1);
        let held = Arc::clone(&owned);
        let (short, _) = until(Duration::ZERO);
        let work = pool.run(LARGE, short, |_| Ok(()));
        assert_eq!(work.await.unwrap_err().kind, ErrorKind::Deadline);
        let (short, _) = until(Duration::from_millis(200));
        let work = pool.run(LARGE, short, move |_| {
            let _held = held;
            // The sender is there until it has sent.
            let _ = going.recv();
            Ok(())
        });
        assert_eq!(work.await.unwrap_err().kind, ErrorKind::Deadline);
        if Arc::strong_count(&owned) == 2 {
            let (short, _) = until(Duration::from_millis(50));
            let other = pool.run(LARGE, short, |_| Ok(()));
            let error = other.await.unwrap_err();
            assert_eq!(error.kind, ErrorKind::Deadline, "the only thread is taken");
        }
        go_on.send(()).ok();
        let (long, _) = until(Duration::from_secs(20));
        pool.run(LARGE, long, |_| Ok(())).await.unwrap();
        assert_eq!(Arc::strong_count(&owned), 1, "both come back");
    }

    #[tokio::test]
    async fn work_hears_that_the_client_left() {
        let pool = TextPool::new(1);
        let (until, left) = until(Duration::from_secs(600));
        let (begun, has_begun) = mpsc::sync_channel(1);
        let leaves = std::thread::spawn(move || {
            has_begun.recv().unwrap();
            left.store(true, Ordering::Relaxed);
        });
        let work = pool.run(LARGE, until, move |until| {
            begun.send(()).ok();
            while until.check().is_ok() {
                std::thread::yield_now();
            }
            until.check()
        });
        let error = work.await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::ClientLeft);
        leaves.join().unwrap();
    }
}
