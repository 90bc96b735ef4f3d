//! Which errors the faults of a run account for. An error that none does is a defect, however cleanly it is told.

use std::time::Duration;

use baton_protocol::Role;

use super::schedule::Target;
use super::verdict::Failure;

/// A time in which a fault lay on something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// On what.
    pub target: Target,
    /// Since when.
    pub from: Duration,
    /// Until it was well again: a worker that was started has beaten, an API server has answered.
    pub until: Duration,
}

/// How long a fault that is over may still be felt: a peer is probed again, beats are awaited, a client of the bus
/// pauses before it connects once more.
const AFTERMATH: Duration = Duration::from_secs(6);

/// A request that gets nowhere for this long without a fault is stuck: whatever was lost of it should have been missed
/// by then. Far more than the whole of any request here takes.
const STUCK_AFTER: Duration = Duration::from_secs(25);

/// The time of one request and where it was asked.
#[derive(Clone, Copy, Debug)]
pub struct Life {
    /// When it was asked.
    pub from: Duration,
    /// When it ended.
    pub until: Duration,
    /// Which API server.
    pub server: usize,
    /// What it may take there.
    pub budget: Duration,
}

/// Whether these faults may lead to this error; else why not.
///
/// # Errors
/// The sentence for the report.
pub fn excused(
    failure: Failure,
    life: Life,
    faults: &[Window],
    roles: &[Role],
) -> Result<(), String> {
    let felt = |target: Target| {
        faults.iter().any(|fault| {
            fault.target == target
                && fault.from <= life.until
                && life.from <= fault.until + AFTERMATH
        })
    };
    let elsewhere = |target: Target| matches!(target, Target::Api(server) if server != life.server);
    let mut own_faults = faults
        .iter()
        .map(|fault| fault.target)
        .filter(|target| !elsewhere(*target));
    let took = life.until - life.from;
    let own = Target::Api(life.server);
    match failure {
        // Pools are small on purpose, and a load may fill them.
        Failure::Busy | Failure::Promise => Ok(()),
        Failure::Deadline if took < life.budget => {
            Err(format!("only {took:.1?} of {:?} were over", life.budget))
        }
        Failure::Deadline => {
            let over = faults.iter().filter(|fault| fault.from <= life.until);
            let over = over.map(|fault| fault.until).chain([life.from]).max();
            let calm = life.until.saturating_sub(over.unwrap_or_default());
            match calm >= STUCK_AFTER {
                true => Err(format!("nothing was in its way for the last {calm:.1?}")),
                false => Ok(()),
            }
        }
        Failure::NoWorker if felt(Target::Bus) || felt(own) => Ok(()),
        Failure::NoWorker if nobody_could(life, faults, roles) => Ok(()),
        Failure::NoWorker => Err("somebody could have done it at any time".to_owned()),
        Failure::Bus if felt(Target::Bus) || felt(own) => Ok(()),
        Failure::Bus => Err("nothing was wrong with the bus".to_owned()),
        Failure::Worker if own_faults.any(felt) => Ok(()),
        Failure::Worker => Err("nothing was wrong with any worker".to_owned()),
        Failure::Connection if felt(own) => Ok(()),
        Failure::Connection => Err("nothing was wrong with its API server".to_owned()),
    }
}

/// Whether at some moment of a life there was no prefill and decode worker, both well, with a way between them.
fn nobody_could(life: Life, faults: &[Window], roles: &[Role]) -> bool {
    let down = |target: Target, at: Duration| {
        let lies = |fault: &Window| {
            fault.target == target && fault.from <= at && at <= fault.until + AFTERMATH
        };
        faults.iter().any(lies)
    };
    let nobody = |at: Duration| {
        let well = |does: fn(Role) -> bool| {
            let workers = roles
                .iter()
                .enumerate()
                .filter(move |(_, role)| does(**role));
            workers
                .map(|(worker, _)| worker)
                .filter(|worker| !down(Target::Worker(*worker), at))
        };
        well(Role::prefills)
            .all(|context| well(Role::decodes).all(|decode| down(Target::Way(context, decode), at)))
    };
    // the last one goes at the beginning of a window
    let moments = faults.iter().map(|fault| fault.from).chain([life.from]);
    moments
        .filter(|at| (life.from..=life.until).contains(at))
        .any(nobody)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use baton_protocol::Role;

    use super::{AFTERMATH, Life, Window, excused};
    use crate::chaos::schedule::Target;
    use crate::chaos::verdict::Failure;

    const ROLES: [Role; 4] = [Role::Context, Role::Context, Role::Decode, Role::Decode];

    fn window(target: Target, from: u64, until: u64) -> Window {
        Window {
            target,
            from: Duration::from_secs(from),
            until: Duration::from_secs(until),
        }
    }

    fn life(from: u64, until: u64) -> Life {
        Life {
            from: Duration::from_secs(from),
            until: Duration::from_secs(until),
            server: 0,
            budget: Duration::from_secs(10),
        }
    }

    #[test]
    fn no_worker_needs_all_of_a_kind_down() {
        let both = [
            window(Target::Worker(2), 0, 20),
            window(Target::Worker(3), 5, 20),
        ];
        let one_of_each = [
            window(Target::Worker(0), 0, 20),
            window(Target::Worker(3), 0, 20),
        ];
        assert!(excused(Failure::NoWorker, life(1, 6), &both, &ROLES).is_ok());
        assert!(excused(Failure::NoWorker, life(1, 4), &both, &ROLES).is_err());
        assert!(excused(Failure::NoWorker, life(1, 6), &one_of_each, &ROLES).is_err());
        let unsplit = [
            Role::Context,
            Role::Context,
            Role::Decode,
            Role::Decode,
            Role::Both,
        ];
        assert!(excused(Failure::NoWorker, life(1, 6), &both, &unsplit).is_err());
        let mut cut = vec![
            window(Target::Way(0, 3), 0, 20),
            window(Target::Way(1, 2), 0, 20),
        ];
        assert!(excused(Failure::NoWorker, life(1, 6), &cut, &ROLES).is_err());
        cut.extend([
            window(Target::Worker(0), 0, 20),
            window(Target::Worker(3), 0, 20),
        ]);
        assert!(excused(Failure::NoWorker, life(1, 6), &cut, &ROLES).is_ok());
    }

    #[test]
    fn an_error_needs_its_fault_in_its_time() {
        let faults = [window(Target::Bus, 10, 12), window(Target::Api(1), 10, 12)];
        let ends = 12 + AFTERMATH.as_secs();
        for (failure, during, after) in
            [(Failure::Bus, true, false), (Failure::Worker, true, false)]
        {
            assert_eq!(
                excused(failure, life(11, 13), &faults, &ROLES).is_ok(),
                during
            );
            assert_eq!(
                excused(failure, life(ends + 1, ends + 2), &faults, &ROLES).is_ok(),
                after
            );
        }
        assert!(excused(Failure::Connection, life(11, 12), &faults, &ROLES).is_err());
        let at_the_other = Life {
            server: 1,
            ..life(11, 12)
        };
        assert!(excused(Failure::Connection, at_the_other, &faults, &ROLES).is_ok());
        assert!(excused(Failure::Deadline, life(0, 9), &faults, &ROLES).is_err());
        assert!(excused(Failure::Deadline, life(0, 10), &faults, &ROLES).is_ok());
        let long = Life {
            budget: Duration::from_secs(60),
            ..life(0, 60)
        };
        assert!(excused(Failure::Deadline, long, &faults, &ROLES).is_err());
        let to_the_end = [window(Target::Worker(0), 10, 50)];
        assert!(excused(Failure::Deadline, long, &to_the_end, &ROLES).is_ok());
    }
}
