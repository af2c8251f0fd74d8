//! Connections: how many there may be, how slow they may be, and how they end.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, oneshot, watch};
use tokio_io_timeout::TimeoutStream;

use super::metrics::Raised;
use super::{App, routes};

/// Bytes of a request's head at most.
const HEAD: usize = 64 << 10;
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
    let router = routes::router(app.clone());
    let places = Arc::new(Semaphore::new(app.settings.connections));
    let connections = GracefulShutdown::new();
    loop {
        // Those that find no place wait in the system's queue.
        let place = places.clone().acquire_owned();
        let next = async { (place.await, listener.accept().await) };
        let (place, accepted) = tokio::select! {
            next = next => next,
            error = &mut engine_end => return Err(error.unwrap_or_else(|_| anyhow::anyhow!("the engine is gone"))),
            _ = signal.changed() => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Mostly no more file descriptors: some will come back.
                eprintln!("warning: a connection could not be taken: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let raised = Raised::new(&app.metrics.connections);
        let connection = connections.watch(connection(app, stream, router.clone()));
        tokio::spawn(async move {
            // What goes wrong with a connection concerns its client, which is gone then.
            let _ = connection.await;
            drop((place, raised));
        });
    }
    drop(listener);
    stop(app, connections).await;
    Ok(())
}

type Io = TokioIo<std::pin::Pin<Box<TimeoutStream<TcpStream>>>>;
type Connection = http1::Connection<Io, TowerToHyperService<Router>>;

fn connection(app: &App, stream: TcpStream, router: Router) -> Connection {
    // A token is a small packet that should not wait for the next; where that cannot be had it is only slower.
    let _ = stream.set_nodelay(true);
    let mut stream = TimeoutStream::new(stream);
    // Clients that do not read. While an answer is being computed nothing is written, and nothing times out.
    stream.set_write_timeout(Some(app.settings.read_timeout));
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(app.settings.read_timeout)
        .max_buf_size(HEAD)
        .serve_connection(TokioIo::new(Box::pin(stream)), TowerToHyperService::new(router))
}

/// Lets answers finish, then cuts what is left.
async fn stop(app: &App, connections: GracefulShutdown) {
    app.stopping.store(true, Relaxed);
    let open = connections.count();
    let grace = app.settings.grace;
    if open > 0 {
        eprintln!("stopping: {open} connections have {} s to finish; Ctrl-C again ends at once", grace.as_secs_f64());
    }
    let finished = connections.shutdown();
    tokio::pin!(finished);
    if tokio::time::timeout(grace, &mut finished).await.is_err() {
        app.engine.cut();
        let _ = tokio::time::timeout(LAST_WORDS, finished).await;
    }
    eprintln!("stopped");
}
