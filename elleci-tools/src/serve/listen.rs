//! Connections: how many there may be, how slow they may be, and how they end.

use std::collections::VecDeque;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore, oneshot, watch};
use tokio_io_timeout::TimeoutStream;

use super::metrics::Raised;
use super::{App, routes};

/// Bytes of a request's head at most.
const HEAD: usize = 64 << 10;
/// A connection that has had an answer is ended for another only so long after: its last bytes may be under way.
const REST: Duration = Duration::from_secs(2);
/// Between two looks for a connection that can be ended.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// Answers that were cut have so long to reach their clients.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Serves until a signal comes, then lets answers finish.
///
/// # Errors
/// When the engine ends by itself.
pub async fn run(
    app: &Arc<App>,
    listener: TcpListener,
    mut signal: watch::Receiver<bool>,
    mut engine_end: oneshot::Receiver<anyhow::Error>,
) -> anyhow::Result<()> {
    let service = TowerToHyperService::new(routes::router(app.clone()));
    let places = Arc::new(Semaphore::new(app.settings.connections));
    let connections = GracefulShutdown::new();
    let mut seats = Seats::default();
    loop {
        let next = async {
            let accepted = listener.accept().await;
            // Others wait in the system's queue.
            loop {
                if let Ok(place) = places.clone().try_acquire_owned() {
                    return (place, accepted);
                }
                seats.make_room();
                tokio::select! {
                    place = places.clone().acquire_owned() => match place {
                        Ok(place) => return (place, accepted),
                        // Nobody closes it.
                        Err(_) => continue,
                    },
                    // One may have become idle meanwhile.
                    () = tokio::time::sleep(LOOK_AGAIN) => {}
                }
            }
        };
        let (place, accepted) = tokio::select! {
            next = next => next,
            error = &mut engine_end => return Err(error.unwrap_or_else(|_| anyhow::anyhow!("the engine is gone"))),
            _ = signal.changed() => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Mostly no more file descriptors: some will come back.
                crate::exit::errln!("warning: a connection could not be taken: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let raised = Raised::new(&app.metrics.connections);
        let seat = seats.take();
        let (service, own) = (service.clone(), seat.clone());
        let service = service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(own.clone());
            service.call(request)
        });
        let connection = connections.watch(builder(app).serve_connection(io(app, stream), service));
        tokio::spawn(async move {
            // What goes wrong with a connection concerns its client, which is gone then.
            tokio::select! {
                _ = connection => {}
                () = seat.left.notified() => {}
            }
            drop((place, raised));
        });
    }
    drop(listener);
    stop(app, connections).await;
    Ok(())
}

/// A connection, as far as others may have to end it.
#[derive(Debug, Default)]
pub struct Seat {
    state: Mutex<State>,
    left: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// Requests that are being answered
    busy: usize,
    /// When the last of them was
    answered: Option<Instant>,
}

/// A request that is being answered; its connection is not ended for another.
#[derive(Debug)]
pub struct Busy(Arc<Seat>);

impl Seat {
    /// From now on a request is being answered.
    pub fn work(self: &Arc<Seat>) -> Busy {
        self.state().busy += 1;
        Busy(self.clone())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_idle(&self) -> bool {
        let state = self.state();
        state.busy == 0 && state.answered.is_none_or(|when| when.elapsed() >= REST)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.busy -= 1;
        state.answered = Some(Instant::now());
    }
}

/// All connections, the oldest first.
#[derive(Debug, Default)]
struct Seats(VecDeque<Weak<Seat>>);

impl Seats {
    fn take(&mut self) -> Arc<Seat> {
        self.0.retain(|seat| seat.strong_count() > 0);
        let seat = Arc::new(Seat::default());
        self.0.push_back(Arc::downgrade(&seat));
        seat
    }

    /// Ends the oldest connection that has not sent a whole request, or none since its last answer: whoever holds many and sends slowly
    /// must not keep others out.
    fn make_room(&mut self) {
        while let Some(place) = self.0.iter().position(|s| s.upgrade().is_none_or(|s| s.is_idle())) {
            if let Some(seat) = self.0.remove(place).and_then(|s| s.upgrade()) {
                seat.left.notify_one();
                return;
            }
        }
    }
}

type Io = TokioIo<std::pin::Pin<Box<TimeoutStream<TcpStream>>>>;

fn io(app: &App, stream: TcpStream) -> Io {
    // A token is a small packet that should not wait for the next; where that cannot be had it is only slower.
    let _ = stream.set_nodelay(true);
    let mut stream = TimeoutStream::new(stream);
    // Clients that do not read. While an answer is being computed nothing is written, and nothing times out.
    stream.set_write_timeout(Some(app.settings.read_timeout));
    TokioIo::new(Box::pin(stream))
}

fn builder(app: &App) -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(app.settings.read_timeout).max_buf_size(HEAD);
    builder
}

/// Lets answers finish, then cuts what is left.
async fn stop(app: &App, connections: GracefulShutdown) {
    app.stopping.store(true, Relaxed);
    let open = connections.count();
    let grace = app.settings.grace;
    if open > 0 {
        crate::exit::errln!(
            "stopping: {open} connections have {} s to finish; Ctrl-C again ends at once",
            grace.as_secs_f64()
        );
    }
    let finished = connections.shutdown();
    tokio::pin!(finished);
    if tokio::time::timeout(grace, &mut finished).await.is_err() {
        app.engine.cut();
        let _ = tokio::time::timeout(LAST_WORDS, finished).await;
    }
    crate::exit::errln!("stopped");
}
