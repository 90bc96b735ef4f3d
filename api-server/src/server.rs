//! What the parts of one API server share: its state, and what it makes of what it hears.

mod name;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use baton_protocol::{
    ApiBeat, ApiServerId, Beat, Incarnation, PeersReply, PrefixPage, PrefixReport, WorkerId,
};
use baton_traces::Tracer;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;

use crate::bound::Bound;
use crate::bus::{Bus, Watcher};
use crate::config::Limits;
use crate::cors::Origins;
use crate::fleet::Fleet;
use crate::fleet::membership::{Membership, Taken};
use crate::fleet::router::{AskAll, Paged};
use crate::keys::ApiKeys;
use crate::metrics::Metrics;
use crate::model_names::ModelNames;
use crate::openai::responses::ResponseStore;
use crate::request::decode_room::DecodeRoom;
use crate::request::inbox::{Event, Registry, lock};
use crate::request::lifecycle::Target;
use crate::request::running::Running;
use crate::request::spent::LastSpent;
use crate::service::Promises;
use crate::text::texts::TextPool;
use crate::text::tokenizer::ModelText;

pub use self::name::Name;

/// Tables of prefixes that are cleared of workers that left, each time it is looked who fell silent: all of them in a second.
const PREFIX_TABLES_SWEPT: usize = 256;

/// What every request needs.
pub struct Server {
    /// This server's name.
    pub name: ApiServerId,
    /// Which life of it: workers end what a former one asked for.
    pub incarnation: Incarnation,
    /// The cluster's name.
    pub cluster: String,
    /// Names clients ask for.
    pub model_names: ModelNames,
    /// Most tokens of an answer where a request does not say: chats and responses.
    pub default_max_tokens: Option<u32>,
    /// The model's text side.
    pub model: ModelText,
    /// The bus.
    pub bus: Bus,
    /// Generations in flight.
    pub registry: Arc<Registry>,
    /// Metrics.
    pub metrics: Metrics,
    /// Who makes spans of requests.
    pub tracer: Tracer,
    /// The generations under way.
    pub running: Arc<Running>,
    /// Where the time of the last requests went.
    pub last_spent: LastSpent,
    /// Bounds.
    pub limits: Limits,
    /// Choices of requests that were admitted.
    pub in_flight: Arc<Bound>,
    /// Bytes that answers hold which are not streams.
    pub answers: Arc<Bound>,
    /// Responses that are kept.
    pub responses: Arc<ResponseStore>,
    /// Threads for large texts.
    pub texts: TextPool,
    /// Kibibytes that request bodies may still take.
    pub body_room: Arc<Semaphore>,
    /// Who may ask.
    pub keys: ApiKeys,
    /// Whether clients have to show certificates.
    pub wants_certificates: bool,
    /// Whose pages may ask.
    pub origins: Origins,
    /// Time a request may take.
    pub request_budget: Duration,
    /// What requests are promised.
    pub promises: Promises,
    /// When this server started, for `created` of the model.
    pub started_unix: u64,
    /// Told when a generation leaves its decode worker, to wake one that waits for a place there.
    pub decode_room: Arc<DecodeRoom>,
    /// It is asked to end: what is under way goes on, and each connection is closed after its answer.
    pub leaving: AtomicBool,
    /// Turns true when connections are to end after what is under way on them.
    pub connections_end: watch::Sender<bool>,
    /// Who is there and what they are busy with: [`Self::fleet`].
    pub fleet: Mutex<Fleet>,
    /// Whether this server's name is its own.
    pub own_name: Mutex<Name>,
}

impl Server {
    /// The fleet, locked: every choice waits for it. Never held across an await.
    pub fn fleet(&self) -> MutexGuard<'_, Fleet> {
        lock(&self.fleet)
    }

    /// The members as they are now, to be looked at for any length of time.
    pub fn members(&self) -> Membership {
        self.fleet().members().clone()
    }

    /// Why requests cannot be served now; empty if they can.
    pub fn faults(&self) -> Vec<String> {
        if self.leaving.load(Ordering::Relaxed) {
            return vec!["this API server is leaving".to_owned()];
        }
        let now = Instant::now();
        if let Some(fault) = self.bus.fault(now) {
            return vec![fault.to_string()];
        }
        let own_name = self.looked_at_name(now).fault(now);
        let members = self.members();
        let mut faults = members.faults(&self.model.fingerprint, now);
        faults.extend(own_name);
        faults
    }

    /// Whether nobody else has this server's name: workers must be given no jobs otherwise.
    pub fn has_its_name(&self) -> bool {
        self.looked_at_name(Instant::now()).serves()
    }

    fn looked_at_name(&self, now: Instant) -> MutexGuard<'_, Name> {
        let mut own_name = lock(&self.own_name);
        own_name.look(now, self.bus.fault(now).is_none());
        own_name
    }

    /// What is broken, also where requests go round it: workers that do not serve, and links for KV. Empty if all is well.
    pub fn degraded(&self) -> Vec<String> {
        let now = Instant::now();
        let members = self.members();
        let mut broken = members.complaints(now);
        broken.extend(members.broken_links(&self.model.fingerprint, now));
        broken.extend(members.too_small(&self.model.fingerprint, now));
        broken
    }

    fn lost(&self, targets: Vec<Target>) {
        for target in targets {
            tracing::warn!(worker = %target.worker, incarnation = %target.incarnation, "worker gone");
            self.registry
                .broadcast(|| Event::WorkerLost(target.clone()));
        }
    }
}

impl Watcher for Server {
    fn beat(&self, beat: Beat, now: Instant) -> bool {
        let joins = (beat.worker.clone(), beat.role.label(), beat.device.clone());
        let (taken, asks) = {
            let mut fleet = self.fleet();
            (fleet.beat(beat, now), fleet.asks(&joins.0, now))
        };
        match taken {
            Taken::Joined(_) => {
                let (worker, role, device) = joins;
                tracing::info!(%worker, role, device, "worker joined");
            }
            Taken::Restarted(_, target) => self.lost(vec![target]),
            Taken::NoRoom => self.bus_fault("beat_no_room"),
            Taken::Known(_) | Taken::Late => {}
        }
        asks
    }

    fn peers(&self, reply: PeersReply) {
        self.fleet().peers(reply);
    }

    fn prefixes(&self, report: PrefixReport) {
        self.fleet().prefixes(report);
    }

    fn asks_prefixes(&self, worker: &WorkerId, now: Instant) -> Option<AskAll> {
        self.fleet().asks_prefixes(worker, now)
    }

    fn prefix_page(&self, ask: AskAll, block: u32, page: Option<&PrefixPage>) -> Paged {
        self.fleet().prefix_page(ask, block, page)
    }

    fn take_in_prefixes(&self) -> bool {
        self.fleet().take_in_prefixes()
    }

    fn api_beat(&self, beat: ApiBeat, now: Instant) {
        let loses_name = lock(&self.own_name).heard(&beat, now);
        if loses_name {
            self.registry.broadcast(|| Event::NameLost);
        }
        self.fleet().api_beat(beat, now);
    }

    fn bus_back(&self, now: Instant) {
        self.fleet().suspect_all(now);
        self.registry.broadcast(|| Event::BusBack);
    }

    fn sweep(&self, now: Instant) {
        let lost = self.fleet().sweep(now);
        self.lost(lost);
        let known = self.fleet().known_prefixes();
        self.metrics.known_prefixes.set(known as i64);
        // One table at a time: nobody waits long for the fleet.
        for _ in 0..PREFIX_TABLES_SWEPT {
            if !self.fleet().sweep_prefixes() {
                break;
            }
        }
    }

    fn in_flight(&self) -> u32 {
        self.registry.len() as u32
    }

    fn serving_ms(&self, now: Instant) -> u64 {
        self.looked_at_name(now).serving_ms(now)
    }

    fn bus_fault(&self, kind: &'static str) {
        self.metrics
            .bus_faults_total
            .with_label_values(&[kind])
            .inc();
    }
}
