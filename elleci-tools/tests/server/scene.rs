//! A server on a free port, and a client that does exactly what a test says.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use elleci_core::archive::{PackOptions, to_bytes};
use serde_json::Value;

use crate::tiny::{config, params, tokenizer};

/// Longer than anything here should take, on a busy machine too.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What a server answered.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HashMap<String, String>,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// The message of an error, whose body must have the agreed form.
    pub fn error(&self) -> String {
        let error = &self.json()["error"];
        assert!(error["type"].is_string() && error.get("code").is_some() && error.get("param").is_some(), "{error}");
        error["message"].as_str().unwrap().to_string()
    }

    /// The data of server-sent events but the last one, which says that it is.
    pub fn events(&self) -> Vec<Value> {
        assert_eq!((self.status, &self.headers["content-type"][..]), (200, "text/event-stream"), "{}", self.body);
        let mut data: Vec<&str> = self.body.lines().filter_map(|l| l.strip_prefix("data: ")).collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{}", self.body);
        data.iter().map(|d| serde_json::from_str(d).unwrap()).collect()
    }
}

/// A running server; it ends with the value.
pub struct Server {
    child: Child,
    pub port: u16,
    log: Arc<Mutex<String>>,
    _dir: tempfile::TempDir,
}

impl Server {
    /// The tiny model behind a server with these options, ready to answer.
    pub fn start(args: &[&str]) -> Server {
        let server = Server::begin(args);
        let begun = Instant::now();
        while server.get("/health").status != 200 {
            assert!(begun.elapsed() < PATIENCE, "{}", server.log());
            std::thread::sleep(Duration::from_millis(5));
        }
        server
    }

    /// As soon as it listens.
    pub fn begin(args: &[&str]) -> Server {
        let dir = tempfile::tempdir().unwrap();
        let archive = to_bytes(&config(), &params(0.0), Some(tokenizer().json()), PackOptions::default()).unwrap();
        fs::write(dir.path().join("tiny.elleci"), archive).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_elleci-run"))
            .args(["serve", "-m", "tiny.elleci", "--port", "0"])
            .args(args)
            .current_dir(dir.path())
            .env_remove("ELLECI_API_KEY")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let log = Arc::new(Mutex::new(String::new()));
        let mut port = None;
        while port.is_none() {
            let line = lines.next().expect("the server says where it listens").unwrap();
            port = line
                .strip_prefix("listening on http://127.0.0.1:")
                .map(|rest| rest.split_whitespace().next().unwrap().parse().unwrap());
            *log.lock().unwrap() += &format!("{line}\n");
        }
        let rest = log.clone();
        std::thread::spawn(move || {
            lines.map_while(Result::ok).for_each(|l| *rest.lock().unwrap() += &format!("{l}\n"))
        });
        Server { child, port: port.unwrap(), log, _dir: dir }
    }

    /// What it has written to standard error.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Sends a request; the connection may be read or dropped.
    pub fn send(&self, method: &str, path: &str, headers: &[&str], body: &[u8]) -> TcpStream {
        let mut stream = self.connect();
        let mut head = format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n");
        head += &format!("content-length: {}\r\n", body.len());
        headers.iter().for_each(|h| head += &format!("{h}\r\n"));
        stream.write_all(format!("{head}\r\n").as_bytes()).unwrap();
        stream.write_all(body).unwrap();
        stream
    }

    pub fn request(&self, method: &str, path: &str, headers: &[&str], body: &[u8]) -> Answer {
        receive(self.send(method, path, headers, body))
    }

    pub fn get(&self, path: &str) -> Answer {
        self.request("GET", path, &[], b"")
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.request("POST", path, &["content-type: application/json"], body.to_string().as_bytes())
    }

    /// The body of an answer that must be one.
    pub fn ok(&self, path: &str, body: &Value) -> Value {
        let answer = self.post(path, body);
        assert_eq!(answer.status, 200, "{body}: {}", answer.body);
        answer.json()
    }

    /// The first choice's text of a completion.
    pub fn text(&self, body: &Value) -> String {
        self.ok("/v1/completions", body)["choices"][0]["text"].as_str().unwrap().to_string()
    }

    /// The value of a metric without labels.
    pub fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").body;
        let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{name}: {text}")).parse().unwrap()
    }

    /// Waits until a metric has a value.
    pub fn wait_for(&self, name: &str, wanted: impl Fn(f64) -> bool) {
        let begun = Instant::now();
        while !wanted(self.metric(name)) {
            assert!(begun.elapsed() < PATIENCE, "{name}: {}\n{}", self.get("/metrics").body, self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Asks it to end, as a service manager does.
    pub fn terminate(&self) {
        let done = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status().unwrap();
        assert!(done.success());
    }

    pub fn wait(&mut self) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(begun.elapsed() < PATIENCE, "{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads an answer up to the end of the connection.
pub fn receive(mut stream: TcpStream) -> Answer {
    let mut bytes = Vec::new();
    // A server that cuts a client off may reset the connection after its answer.
    let _ = stream.read_to_end(&mut bytes);
    parse(&bytes)
}

fn parse(bytes: &[u8]) -> Answer {
    let end = bytes.windows(4).position(|w| w == b"\r\n\r\n").unwrap_or_else(|| panic!("no head: {bytes:?}"));
    let head = std::str::from_utf8(&bytes[..end]).unwrap();
    let mut lines = head.split("\r\n");
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let headers: HashMap<String, String> = lines
        .map(|l| l.split_once(": ").unwrap())
        .map(|(name, value)| (name.to_lowercase(), value.to_string()))
        .collect();
    let mut rest = &bytes[end + 4..];
    let mut body = Vec::new();
    if headers.get("transfer-encoding").is_some_and(|v| v == "chunked") {
        while let Some(line) = rest.windows(2).position(|w| w == b"\r\n") {
            let size = usize::from_str_radix(std::str::from_utf8(&rest[..line]).unwrap(), 16).unwrap();
            body.extend_from_slice(&rest[line + 2..line + 2 + size]);
            rest = &rest[line + 4 + size..];
        }
    } else {
        body.extend_from_slice(rest);
    }
    Answer { status, headers, body: String::from_utf8(body).unwrap() }
}
