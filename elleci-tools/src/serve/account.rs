//! The account of a request: counted and logged when the last of its response is gone.

use std::pin::Pin;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Instant;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::http::StatusCode;
use axum::response::Response;
use http_body::{Frame, SizeHint};

use super::App;
use super::job::Count;
use super::listen::{Busy, Seat};

/// What is known of a request. Everything that works on it holds one; the last one to let go of it closes the account.
pub struct Account {
    app: Arc<App>,
    method: String,
    path: String,
    /// The route, a name from a fixed set
    endpoint: String,
    began: Instant,
    status: AtomicU16,
    prompt: AtomicUsize,
    cached: AtomicUsize,
    chosen: AtomicUsize,
    complete: AtomicBool,
    /// The connection that it came by
    seat: Option<Arc<Seat>>,
    busy: OnceLock<Busy>,
}

impl Account {
    /// Opens an account.
    pub fn new(app: Arc<App>, request: &Request, endpoint: &str) -> Arc<Account> {
        let method = request.method().to_string();
        Arc::new(Account {
            app,
            path: request.uri().path().to_string(),
            endpoint: endpoint.to_string(),
            seat: request.extensions().get().cloned(),
            busy: OnceLock::new(),
            began: Instant::now(),
            status: AtomicU16::new(0),
            prompt: AtomicUsize::new(0),
            cached: AtomicUsize::new(0),
            chosen: AtomicUsize::new(0),
            // There is nothing to wait for.
            complete: AtomicBool::new(method == "HEAD"),
            method,
        })
    }

    /// The request is there, and its answer begins to cost something.
    pub fn work(&self) {
        if let Some(seat) = &self.seat {
            self.busy.get_or_init(|| seat.work());
        }
    }

    /// Adds the tokens of a choice.
    pub fn count(&self, count: Count) {
        self.prompt.fetch_add(count.prompt, Relaxed);
        self.cached.fetch_add(count.cached, Relaxed);
        self.chosen.fetch_add(count.chosen, Relaxed);
    }

    /// The answer as it will be sent, which keeps the account open.
    pub fn hold(self: Arc<Account>, response: Response) -> Response {
        self.status.store(response.status().as_u16(), Relaxed);
        response.map(|body| {
            self.note_end(&body);
            Body::new(Held { body, account: self })
        })
    }

    fn note_end(&self, body: &Body) {
        if body.is_end_stream() {
            self.complete.store(true, Relaxed);
        }
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        let complete = self.complete.load(Relaxed);
        // What nginx notes for a client that went away.
        let status = if complete { self.status.load(Relaxed) } else { 499 };
        let took = self.began.elapsed();
        if !complete {
            self.app.metrics.cancelled.inc();
        }
        self.app.metrics.request(&self.endpoint, status, took);
        if self.app.settings.quiet {
            return;
        }
        let tokens = match (self.prompt.load(Relaxed), self.chosen.load(Relaxed)) {
            (0, 0) => String::new(),
            (prompt, chosen) => format!(" | {prompt} tokens ({} cached) + {chosen}", self.cached.load(Relaxed)),
        };
        let gone = if complete { "" } else { " | client gone" };
        let name = StatusCode::from_u16(status).ok().and_then(|s| s.canonical_reason()).unwrap_or_default();
        let (method, path, ms) = (&self.method, &self.path, took.as_secs_f64() * 1e3);
        crate::exit::errln!("{method} {path} {status} {name}{tokens} | {ms:.1} ms{gone}");
    }
}

/// A body that holds an account open.
struct Held {
    body: Body,
    account: Arc<Account>,
}

impl HttpBody for Held {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        match &polled {
            Poll::Ready(None) => self.account.complete.store(true, Relaxed),
            Poll::Ready(Some(Ok(_))) => self.account.note_end(&self.body),
            Poll::Ready(Some(Err(_))) | Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
