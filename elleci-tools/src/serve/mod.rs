//! `elleci-run serve`: the model behind OpenAI's HTTP interface.
//!
//! Two sides meet at a channel. The HTTP side (`listen`, `routes`, `answer`) is one thread that runs all connections: it reads
//! and checks requests (`request`), hands them in as jobs (`job`) and turns what comes back into responses (`openai`). The
//! engine (`engine`) is another thread with the compute threads at its side: it owns the model and every session, and knows nothing
//! of HTTP. A client that goes away closes its channel, which is how the engine hears of it.

mod account;
mod answer;
pub mod cache;
pub mod engine;
pub mod error;
pub mod fields;
pub mod job;
mod listen;
pub mod metrics;
mod openai;
mod page;
mod reading;
pub mod request;
mod routes;
pub mod settings;
mod vocabulary;
mod writing;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use anyhow::{Context, anyhow};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use elleci_core::config::LayerKind;
use elleci_core::inference::Session;
use elleci_core::simd::Isa;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::{oneshot, watch};

use crate::data::tokenizer::Tokenizer;
use crate::run::model::OpenModel;
use crate::train::device::{Device, available_memory};
use engine::{Engine, EngineOptions, Handle, Inbox};
use error::ApiError;
use job::{Event, Job};
use metrics::Metrics;
use request::{Limits, Reader};
use settings::{ServeArgs, Settings};

/// Tokens of the context at least, where the user does not say: models go on past what they were trained on, as `chat` lets them.
const CONTEXT: usize = 4096;

/// What the HTTP side shares.
pub struct App {
    /// The options.
    pub settings: Settings,
    /// Counters.
    pub metrics: Arc<Metrics>,
    engine: Handle,
    loaded: OnceLock<Arc<Loaded>>,
    stopping: AtomicBool,
    /// Whether requests must name this machine: see [`Settings::answers_to`]
    local: bool,
    answers: AtomicU64,
    /// Makes the ids of answers differ from those of another run
    run: u64,
}

/// The model and what follows from it.
pub struct Loaded {
    open: Arc<OpenModel>,
    limits: Limits,
    name: String,
    created: u64,
    /// What the page and other programs want to know.
    props: Value,
}

impl Loaded {
    fn tokenizer(&self) -> &Tokenizer {
        self.open.tokenizer().expect("a model without one is refused when it is loaded")
    }

    fn reader(&self) -> Reader<'_> {
        Reader { tokenizer: self.tokenizer(), limits: &self.limits }
    }
}

impl App {
    /// The model.
    ///
    /// # Errors
    /// While it is being loaded.
    fn loaded(&self) -> Result<Arc<Loaded>, ApiError> {
        self.loaded.get().cloned().ok_or_else(ApiError::loading)
    }

    /// Whether the server is about to end.
    fn is_stopping(&self) -> bool {
        self.stopping.load(Relaxed)
    }

    /// Hands work to the engine.
    fn submit(&self, jobs: Vec<Job>) -> Result<UnboundedReceiver<Event>, ApiError> {
        if self.is_stopping() { Err(ApiError::stopping()) } else { self.engine.submit(jobs) }
    }

    fn next_id(&self, prefix: &str) -> String {
        format!("{prefix}-{:08x}{:08x}", self.run & 0xffff_ffff, self.answers.fetch_add(1, Relaxed))
    }
}

/// A response with a JSON body.
fn json_response(status: StatusCode, body: &Value) -> Response {
    json_text(status, body.to_string())
}

/// The same with a body that is written already.
fn json_text(status: StatusCode, body: String) -> Response {
    let mut response = (status, body).into_response();
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// Runs the verb, until a signal ends it.
///
/// # Errors
/// [`crate::exit::Usage`] for options without a meaning; an address that cannot be listened on; a model that cannot be used.
pub fn run(args: &ServeArgs) -> anyhow::Result<()> {
    let settings = Settings::new(args)?;
    let device = Device::choose(&args.model.device.device, args.model.device.threads)?;
    crate::exit::errln!("{}", device.announcement);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the server")?;
    runtime.block_on(serve(args, settings, device))
}

async fn serve(args: &ServeArgs, settings: Settings, device: Device) -> anyhow::Result<()> {
    let address = settings::address(args).await?;
    let listener = TcpListener::bind(address).await.with_context(|| match address.port() {
        0 => format!("listening on {address}"),
        port => format!("listening on {address} (--port {port}; --port 0 takes a free one)"),
    })?;
    let address = listener.local_addr().context("the address to listen on")?;
    crate::exit::errln!(
        "listening on http://{address} | API key {}",
        if settings.has_key() { "needed" } else { "not needed" }
    );
    if !address.ip().is_loopback() && !settings.has_key() {
        crate::exit::errln!("warning: whoever reaches {address} can use this server; --api-key protects it");
    }
    let (handle, inbox) = Handle::new(settings.queue, settings.timeout);
    let app = Arc::new(App {
        metrics: Arc::new(Metrics::new()),
        engine: handle,
        loaded: OnceLock::new(),
        stopping: AtomicBool::new(false),
        local: address.ip().is_loopback() && !settings.has_key(),
        answers: AtomicU64::new(0),
        run: openai::now() ^ (u64::from(std::process::id()) << 20),
        settings,
    });
    let engine_end = start_engine(args, &app, device, inbox)?;
    let signal = signals()?;
    listen::run(&app, listener, signal, engine_end).await
}

/// Starts the thread of the engine, which loads the model first. The receiver hears why it has ended.
fn start_engine(
    args: &ServeArgs,
    app: &Arc<App>,
    device: Device,
    inbox: Inbox,
) -> anyhow::Result<oneshot::Receiver<anyhow::Error>> {
    let (tell, end) = oneshot::channel();
    let (path, app) = (args.model.model.clone(), app.clone());
    let work = move || {
        let threads = device.threads;
        device.install(move || {
            let open = Arc::new(OpenModel::chosen(path.as_deref())?);
            crate::exit::errln!("{}", open.announcement());
            let (loaded, options) = load(open, &app.settings, threads)?;
            let open = loaded.open.clone();
            let metrics = app.metrics.clone();
            let mut engine = Engine::new(&open, options, &metrics)?;
            let Limits { context, .. } = loaded.limits;
            crate::exit::errln!("ready | context {context} | {} sequences together | Ctrl-C ends", options.parallel);
            // Only this thread ever sets it.
            let _ = app.loaded.set(Arc::new(loaded));
            // The handle lives in what this thread would keep alive.
            drop(app);
            engine.run(&inbox);
            Ok(())
        })
    };
    let thread = move || {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        let error = match result {
            Ok(Ok(())) => anyhow!("the engine has ended"),
            Ok(Err(error)) => error,
            Err(_) => anyhow!("the engine has failed"),
        };
        let _ = tell.send(error);
    };
    std::thread::Builder::new().name("engine".into()).spawn(thread).context("starting the engine")?;
    Ok(end)
}

/// Checks what the model allows.
fn load(open: Arc<OpenModel>, settings: &Settings, threads: usize) -> anyhow::Result<(Loaded, EngineOptions)> {
    let tokenizer = open.need_tokenizer()?;
    let config = open.config().clone();
    let context = settings.context.unwrap_or(config.max_seq_len.max(CONTEXT));
    // Half of what is free may become sessions; a cache that is full counts as one more.
    let fresh = Session::new(open.packed())?.bytes();
    let attention = config.layer_kinds().into_iter().filter(|k| *k == LayerKind::Mla).count();
    let token_bytes = attention * (config.kv_rank + 4 + 4 * config.d_rope);
    let session_bytes = fresh + token_bytes * context.next_multiple_of(256);
    let free = (available_memory() / 2).saturating_sub(settings.cache_bytes as u64);
    let fit = usize::try_from(free / session_bytes as u64).unwrap_or(usize::MAX).max(1);
    let parallel = settings.parallel.min(fit);
    let name = open.name.trim_end_matches(".elleci").to_string();
    let props = json!({
        "model": name,
        "version": env!("CARGO_PKG_VERSION"),
        "parameters": open.parameters(),
        "model_bytes": open.bytes(),
        "context": context,
        "trained_context": config.max_seq_len,
        "vocabulary": tokenizer.config().tokens,
        "d_model": config.d_model,
        "layers": config.layer_pattern,
        "router": false,
        "kernel": Isa::detect().name(),
        "threads": threads,
        "parallel": parallel,
        "defaults": {
            "temperature": settings.sampling.temperature,
            "top_k": settings.sampling.top_k,
            "top_p": settings.sampling.top_p,
            "min_p": settings.sampling.min_p,
            "repetition_penalty": settings.sampling.repetition_penalty
        }
    });
    let limits = Limits { vocab_size: config.vocab_size, context, sampling: settings.sampling };
    let options = EngineOptions { parallel, cache_bytes: settings.cache_bytes };
    Ok((Loaded { open, limits, name, created: openai::now(), props }, options))
}

/// Hears of Ctrl-C and SIGTERM; a second one ends the process at once.
fn signals() -> anyhow::Result<watch::Receiver<bool>> {
    let (tell, signal) = watch::channel(false);
    let handler = move || {
        if tell.send_replace(true) {
            std::process::exit(130);
        }
    };
    ctrlc::set_handler(handler).context("listening for Ctrl-C")?;
    Ok(signal)
}
