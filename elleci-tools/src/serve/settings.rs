//! The options of the server, checked.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::ensure;
use axum::http::HeaderValue;
use clap::Args;
use elleci_core::sampler::SamplerOptions;

use crate::exit::usage;
use crate::run::cli::{FilterArgs, ModelArgs};

/// `elleci-run serve`.
#[derive(Debug, Args)]
#[command(
    after_help = "The interface is OpenAI's: point its clients at http://HOST:PORT/v1; docs/server.md describes all of it. A page to
talk to the model is at http://HOST:PORT/. Sampling options are what requests get that do not say otherwise.

Ctrl-C or SIGTERM ends it: running answers have --grace seconds to finish; once more ends it at once.

Examples:
  elleci-run serve -m model.elleci
  elleci-run serve -m model.elleci --port 0 --api-key secret --cors https://example.org
  curl http://127.0.0.1:8080/v1/chat/completions -d '{\"messages\": [{\"role\": \"user\", \"content\": \"Ciao!\"}]}'"
)]
pub struct ServeArgs {
    /// Which model, on what.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Address to listen on; other machines reach the server only when this is not a loopback address
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    pub host: String,
    /// Port to listen on; 0 = a free one, which is printed
    #[arg(long, value_name = "N", default_value_t = 8080)]
    pub port: u16,
    /// Requests need this key, as `Authorization: Bearer KEY` [default: that of ELLECI_API_KEY, if set]
    #[arg(long, value_name = "KEY")]
    pub api_key: Option<String>,
    /// Web pages of this origin may use the server
    #[arg(long, value_name = "ORIGIN")]
    pub cors: Option<String>,
    /// Requests may name this host too. (Without a key and on a loopback address, names other than localhost are refused: a web page
    /// could give itself an address of this machine.) Several: --allow-host A --allow-host B
    #[arg(long, value_name = "NAME")]
    pub allow_host: Vec<String>,
    /// Tokens that prompt and answer together may have; a longer prompt is refused, never cut [default: what the model was trained on,
    /// at least 4096]
    #[arg(short, long, visible_alias = "ctx-size", value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1 << 24))]
    pub context: Option<u64>,
    /// Sequences computed together at most; fewer where memory is short
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub parallel: u32,
    /// Requests that may wait; more are answered with 429
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    pub queue: u32,
    /// MiB of sessions kept for prompts that begin alike; 0 = none
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    pub cache: u32,
    /// Connections at most
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    pub connections: u32,
    /// Bytes of a request's body at most
    #[arg(long, value_name = "BYTES", default_value_t = 4 << 20, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_body: u32,
    /// Seconds that a request may take, waiting included
    #[arg(long, value_name = "SECONDS", default_value_t = 600.0)]
    pub timeout: f64,
    /// Seconds that a client may take to send a request's head, then its body, or to take what is sent to it
    #[arg(long, value_name = "SECONDS", default_value_t = 30.0)]
    pub read_timeout: f64,
    /// Seconds that running answers have to finish when the server is stopped
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0)]
    pub grace: f64,
    /// No line a request on standard error
    #[arg(short, long)]
    pub quiet: bool,
    /// What requests get that do not say otherwise.
    #[command(flatten)]
    pub sampling: FilterArgs,
}

/// The options, as the server uses them.
#[derive(Debug)]
pub struct Settings {
    /// Of [`ServeArgs::cors`].
    pub cors: Option<HeaderValue>,
    /// Hash of the key.
    key: Option<blake3::Hash>,
    /// Names of this server, in lower case, besides those of every machine for itself.
    hosts: Vec<String>,
    /// Tokens of prompt and answer, if given.
    pub context: Option<usize>,
    /// Sequences computed together.
    pub parallel: usize,
    /// Requests that may wait.
    pub queue: usize,
    /// Of the prefix cache.
    pub cache_bytes: usize,
    /// Connections at most.
    pub connections: usize,
    /// Bytes of a body.
    pub max_body: usize,
    /// Of a request.
    pub timeout: Duration,
    /// Of a head, a body, a write.
    pub read_timeout: Duration,
    /// At the end.
    pub grace: Duration,
    /// No log.
    pub quiet: bool,
    /// Of requests that do not say otherwise.
    pub sampling: SamplerOptions,
}

impl Settings {
    /// Checks the options.
    ///
    /// # Errors
    /// [`crate::exit::Usage`] for one without a meaning.
    pub fn new(args: &ServeArgs) -> anyhow::Result<Settings> {
        let seconds = |name: &str, value: f64, least: f64| {
            let fits = (least..=1e6).contains(&value);
            ensure!(fits, usage(format!("--{name} is {value}; it must be {least} to 1000000 seconds")));
            Ok(Duration::from_secs_f64(value))
        };
        let cors = args.cors.as_deref().map(|origin| {
            // A path, if only `/`, is not part of what browsers send.
            let origin_like = origin == "*" || origin.split_once("://").is_some_and(|(_, host)| !host.contains('/'));
            let value = HeaderValue::from_str(origin).ok().filter(|_| origin_like);
            value.ok_or_else(|| usage(format!("--cors {origin}: an origin is like https://example.org, or *")))
        });
        let key = args.api_key.clone().or_else(|| std::env::var("ELLECI_API_KEY").ok()).filter(|k| !k.is_empty());
        Ok(Settings {
            cors: cors.transpose()?,
            key: key.map(|k| blake3::hash(k.as_bytes())),
            hosts: args.allow_host.iter().chain([&args.host]).map(|h| h.to_ascii_lowercase()).collect(),
            context: args.context.map(|n| n as usize),
            parallel: args.parallel as usize,
            queue: args.queue as usize,
            cache_bytes: (args.cache as usize) << 20,
            connections: args.connections as usize,
            max_body: args.max_body as usize,
            timeout: seconds("timeout", args.timeout, 0.001)?,
            read_timeout: seconds("read-timeout", args.read_timeout, 0.001)?,
            grace: seconds("grace", args.grace, 0.0)?,
            quiet: args.quiet,
            sampling: args.sampling.options(0)?,
        })
    }

    /// Whether a request with this `Authorization` header may pass. Takes as long for a key that is nearly right as for any other:
    /// hashes are compared, in constant time.
    pub fn lets_in(&self, header: Option<&HeaderValue>) -> bool {
        let Some(key) = &self.key else { return true };
        // The name of the scheme may be written in any case.
        let given = header.and_then(|h| h.as_bytes().split_at_checked(b"Bearer ".len()));
        given.is_some_and(|(scheme, given)| scheme.eq_ignore_ascii_case(b"Bearer ") && blake3::hash(given) == *key)
    }

    /// Whether a server without a key on a loopback address answers to this name: that of another machine is one that a web page has
    /// given itself an address of this one under, to be taken for a page of the server (DNS rebinding).
    pub fn answers_to(&self, host: &str) -> bool {
        let bare = host.trim_start_matches('[').trim_end_matches(']').trim_end_matches('.').to_ascii_lowercase();
        bare == "localhost"
            || bare.ends_with(".localhost")
            || bare.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
            || self.hosts.contains(&bare)
    }

    /// Whether requests need a key.
    pub fn has_key(&self) -> bool {
        self.key.is_some()
    }
}

/// The address to listen on.
///
/// # Errors
/// [`crate::exit::Usage`] for a host without an address.
pub async fn address(args: &ServeArgs) -> anyhow::Result<SocketAddr> {
    let host = &args.host;
    let mut found = tokio::net::lookup_host((host.as_str(), args.port)).await.map_err(|e| {
        usage(format!("--host {host}: {e}; name an address of this machine, as 127.0.0.1, or 0.0.0.0 for all"))
    })?;
    found.next().ok_or_else(|| usage(format!("--host {host}: it has no address")))
}
