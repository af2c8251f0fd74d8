//! What `/metrics` tells, in the text format of Prometheus.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Metric, Registry};

/// What the content type of the text is.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Seconds that tokens a second are an average of.
const WINDOW: Duration = Duration::from_secs(10);

type Labels = Vec<(&'static str, String)>;

/// All metrics. Counting costs an atomic addition.
pub struct Metrics {
    registry: Registry,
    requests: Family<Labels, Counter>,
    /// Requests whose client went away before the end.
    pub cancelled: Counter,
    /// Tokens of prompts, cached ones included.
    pub prompt_tokens: Counter,
    /// Of these, taken from the prefix cache.
    pub cached_tokens: Counter,
    /// Tokens chosen.
    pub generated_tokens: Counter,
    /// Passes through the model.
    pub passes: Counter,
    /// Time that passes and choices took.
    pub busy_seconds: Counter<f64, AtomicU64>,
    /// What the passes took of it.
    pub model_seconds: Counter<f64, AtomicU64>,
    /// Requests that wait for their first sequence.
    pub queued: Gauge,
    /// Sequences that are being computed.
    pub active: Gauge,
    /// Open connections.
    pub connections: Gauge,
    /// Bytes of the prefix cache.
    pub cache_bytes: Gauge,
    /// Sessions in it.
    pub cache_sessions: Gauge,
    request_seconds: Histogram,
    /// From the arrival of a request to the first token of each of its texts.
    pub first_token_seconds: Histogram,
    rate: Gauge<f64, AtomicU64>,
    resident: Gauge,
    samples: Mutex<VecDeque<(Instant, u64)>>,
}

impl Default for Metrics {
    fn default() -> Metrics {
        Metrics::new()
    }
}

impl Metrics {
    /// All zero.
    pub fn new() -> Metrics {
        let seconds =
            || Histogram::new([0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0]);
        let mut metrics = Metrics {
            registry: Registry::with_prefix("elleci"),
            requests: Family::default(),
            cancelled: Counter::default(),
            prompt_tokens: Counter::default(),
            cached_tokens: Counter::default(),
            generated_tokens: Counter::default(),
            passes: Counter::default(),
            busy_seconds: Counter::default(),
            model_seconds: Counter::default(),
            queued: Gauge::default(),
            active: Gauge::default(),
            connections: Gauge::default(),
            cache_bytes: Gauge::default(),
            cache_sessions: Gauge::default(),
            request_seconds: seconds(),
            first_token_seconds: seconds(),
            rate: Gauge::default(),
            resident: Gauge::default(),
            samples: Mutex::default(),
        };
        let mut registry = std::mem::take(&mut metrics.registry);
        let mut add = |name: &str, help: &str, metric: Register| {
            metric(&mut registry, name, help);
        };
        add("requests", "Requests by endpoint and status", boxed(&metrics.requests));
        add("cancelled_requests", "Requests whose client went away before the end", boxed(&metrics.cancelled));
        add("prompt_tokens", "Tokens of prompts, cached ones included", boxed(&metrics.prompt_tokens));
        add("cached_prompt_tokens", "Tokens of prompts taken from the prefix cache", boxed(&metrics.cached_tokens));
        add("generated_tokens", "Tokens chosen", boxed(&metrics.generated_tokens));
        add("passes", "Passes through the model", boxed(&metrics.passes));
        add("busy_seconds", "Time that the engine worked", boxed(&metrics.busy_seconds));
        add("model_seconds", "Time that the engine worked in the model", boxed(&metrics.model_seconds));
        add("queued_requests", "Requests that wait for their first sequence", boxed(&metrics.queued));
        add("active_sequences", "Sequences that are being computed", boxed(&metrics.active));
        add("connections", "Open connections", boxed(&metrics.connections));
        add("cache_bytes", "Bytes of the prefix cache", boxed(&metrics.cache_bytes));
        add("cache_sessions", "Sessions in the prefix cache", boxed(&metrics.cache_sessions));
        add("request_seconds", "Duration of requests, to the end of the response", boxed(&metrics.request_seconds));
        add("first_token_seconds", "Arrival of a request to its first tokens", boxed(&metrics.first_token_seconds));
        add("tokens_per_second", "Tokens chosen a second, over the last ten seconds", boxed(&metrics.rate));
        add("resident_memory_bytes", "Memory that the process occupies", boxed(&metrics.resident));
        metrics.registry = registry;
        metrics
    }

    /// Counts a request that is over.
    pub fn request(&self, endpoint: &str, status: u16, took: Duration) {
        let labels = vec![("endpoint", endpoint.to_string()), ("status", status.to_string())];
        self.requests.get_or_create(&labels).inc();
        self.request_seconds.observe(took.as_secs_f64());
    }

    /// Notes how many tokens there are, for their rate; cheap when it was done a second ago.
    pub fn tick(&self, now: Instant) {
        let Ok(mut samples) = self.samples.lock() else { return };
        if samples.back().is_none_or(|(at, _)| now.duration_since(*at) >= Duration::from_secs(1)) {
            samples.push_back((now, self.generated_tokens.get()));
            while samples.len() > 2 && samples.front().is_some_and(|(at, _)| now.duration_since(*at) > WINDOW) {
                samples.pop_front();
            }
        }
    }

    fn tokens_per_second(&self, now: Instant) -> f64 {
        let Ok(samples) = self.samples.lock() else { return 0.0 };
        let first = samples.iter().find(|(at, _)| now.duration_since(*at) <= WINDOW);
        let Some((at, tokens)) = first else { return 0.0 };
        let seconds = now.duration_since(*at).as_secs_f64();
        // A window that has only begun says nothing.
        if seconds < 0.1 { 0.0 } else { (self.generated_tokens.get() - tokens) as f64 / seconds }
    }

    /// The text.
    ///
    /// # Errors
    /// None that a string can have.
    pub fn text(&self) -> Result<String, std::fmt::Error> {
        self.rate.set(self.tokens_per_second(Instant::now()));
        self.resident.set(resident_bytes() as i64);
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// Enters a metric under a name and a help text.
type Register = Box<dyn FnOnce(&mut Registry, &str, &str)>;

fn boxed<M: Metric + Clone>(metric: &M) -> Register {
    let metric = metric.clone();
    Box::new(move |registry, name, help| registry.register(name, help, metric))
}

/// Memory that this process occupies; 0 where the system does not say.
pub fn resident_bytes() -> u64 {
    let Ok(pid) = sysinfo::get_current_pid() else { return 0 };
    let mut system = sysinfo::System::new();
    let kind = sysinfo::ProcessRefreshKind::nothing().with_memory();
    system.refresh_processes_specifics(sysinfo::ProcessesToUpdate::Some(&[pid]), false, kind);
    system.process(pid).map_or(0, sysinfo::Process::memory)
}

/// Lowers a gauge again when it is dropped.
pub struct Raised(Gauge);

impl Raised {
    /// Raises a gauge by one.
    pub fn new(gauge: &Gauge) -> Raised {
        gauge.inc();
        Raised(gauge.clone())
    }
}

impl Drop for Raised {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metrics").field("generated_tokens", &self.generated_tokens.get()).finish_non_exhaustive()
    }
}
