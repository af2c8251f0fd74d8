//! What is refused, cut off, or ended; and crowds.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::thread::scope;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::scene::{PATIENCE, Server, receive};
use crate::tiny::tokenizer;

/// A text that would take minutes.
fn endless() -> Value {
    json!({ "prompt": "La", "max_tokens": 1_000_000, "ignore_eos": true })
}

const ROOM: [&str; 2] = ["--context", "2000000"];

/// The head and the first event of a stream.
fn first_event(stream: TcpStream) -> BufReader<TcpStream> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    while !line.starts_with("data: ") {
        line.clear();
        assert!(reader.read_line(&mut line).unwrap() > 0, "the stream ended");
    }
    reader
}

#[test]
fn what_has_no_meaning_is_refused_by_name() {
    let server = Server::start(&["--context", "100", "--max-body", "20000"]);
    let long = "perché no? ".repeat(60);
    let tokens = tokenizer().encode(&long).len();
    let message = json!([{ "role": "user", "content": "Ciao" }]);
    for (path, body, param, part) in [
        ("completions", json!({}), "prompt", "missing"),
        ("completions", json!({ "prompt": [] }), "prompt", "empty"),
        ("completions", json!({ "prompt": {} }), "prompt", "list of lists"),
        ("completions", json!({ "prompt": [1, "x"] }), "prompt", "holds \"x\""),
        ("completions", json!({ "prompt": [1, 352] }), "prompt", "holds 352; tokens are 0 to 351"),
        ("completions", json!({ "prompt": long }), "prompt", &format!("the prompt has {tokens} and 16")),
        ("completions", json!({ "prompt": "x", "max_tokens": 100 }), "max_tokens", "the context is 100 tokens"),
        ("completions", json!({ "prompt": "x", "max_tokens": -1 }), "max_tokens", "is -1"),
        ("completions", json!({ "prompt": "x", "max_tokens": "5" }), "max_tokens", "not a string"),
        ("completions", json!({ "prompt": "x", "temperature": -1 }), "temperature", "is -1; it must be 0 to"),
        ("completions", json!({ "prompt": "x", "top_p": 1.5 }), "top_p", "is 1.5"),
        ("completions", json!({ "prompt": "x", "min_p": 2 }), "min_p", "is 2"),
        ("completions", json!({ "prompt": "x", "n": 0 }), "n", "is 0; it must be 1 to 128"),
        ("completions", json!({ "prompt": "x", "stop": 5 }), "stop", "list of strings"),
        ("completions", json!({ "prompt": "x", "stop": ["é".repeat(501)] }), "stop", "1002 bytes; it may have 1000"),
        ("completions", json!({ "prompt": "x", "repetition_penalty": 0 }), "repetition_penalty", "is 0"),
        ("completions", json!({ "prompt": "x", "repeat_penalty": 0 }), "repeat_penalty", "is 0"),
        ("completions", json!({ "prompt": "x", "logprobs": 21 }), "logprobs", "0 to 20"),
        ("completions", json!({ "prompt": "x", "suffix": "y" }), "suffix", "not supported"),
        ("completions", json!({ "prompt": "x", "best_of": 2 }), "best_of", "not supported"),
        ("completions", json!({ "prompt": "x", "stream": "yes" }), "stream", "true or false"),
        ("completions", json!({ "prompt": "x", "presence_penalty": 3 }), "presence_penalty", "-2 to 2"),
        ("completions", json!({ "prompt": "x", "logit_bias": { "x": 1 } }), "logit_bias", "`x`"),
        ("chat/completions", json!({}), "messages", "missing"),
        ("chat/completions", json!({ "messages": [{ "role": "king", "content": "x" }] }), "messages[0].role", "king"),
        ("chat/completions", json!({ "messages": [{ "role": "user" }] }), "messages[0].content", "string"),
        ("chat/completions", json!({ "messages": message, "top_logprobs": 2 }), "top_logprobs", "`logprobs`"),
        ("chat/completions", json!({ "messages": message, "tools": [{}] }), "tools", "not supported"),
        ("embeddings", json!({ "input": long }), "input", &format!("the prompt has {tokens}:")),
        ("embeddings", json!({ "input": "x", "encoding_format": "hex" }), "encoding_format", "float or base64"),
        ("embeddings", json!({ "input": "x", "dimensions": 8 }), "dimensions", "not supported"),
        ("tokenize", json!({ "text": 1 }), "prompt", "missing"),
        ("detokenize", json!({ "tokens": [-1] }), "tokens", "holds -1"),
    ] {
        let answer = server.post(&format!("/v1/{path}"), &body);
        assert_eq!(answer.status, 400, "{body}: {}", answer.body);
        let message = answer.error();
        assert!(message.contains(part), "{body}: {message}");
        assert_eq!(answer.json()["error"]["param"], param, "{body}");
    }
    let overlong = server.post("/v1/completions", &json!({ "prompt": long }));
    let error = overlong.json()["error"].clone();
    assert_eq!(error["code"], "context_length_exceeded");
    assert_eq!((&error["n_prompt_tokens"], &error["n_ctx"]), (&json!(tokens), &json!(100)));
    for malformed in ["", "{", "[1]", "{\"prompt\": \"\u{7}\"", "null"] {
        let answer = server.request("POST", "/v1/completions", &[], malformed.as_bytes());
        assert_eq!((answer.status, answer.error().contains("JSON")), (400, true), "{malformed}");
    }
    let fits = json!({ "prompt": "x", "unknown": [1], "user": "me", "max_tokens": 3, "echo": null });
    assert_eq!(server.ok("/v1/completions", &fits)["usage"]["completion_tokens"], 3);
    // A little too large, far too large, and of unknown length.
    for size in [20_001, 70_000, 3_000_000] {
        let body = json!({ "prompt": "x".repeat(size) }).to_string();
        let mut stream = server.connect();
        let head = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        // It may be cut off while it is still sending.
        let _ = stream.write_all(body.as_bytes());
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        match reader.read_line(&mut line) {
            Ok(_) => assert!(line.contains(" 413 "), "{size}: {line}"),
            Err(e) => assert!(size > 80_000, "{size}: {e}"),
        }
    }
    let mut stream = server.connect();
    stream
        .write_all(
            b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n",
        )
        .unwrap();
    for _ in 0..3 {
        stream.write_all(format!("2000\r\n{}\r\n", "x".repeat(0x2000)).as_bytes()).unwrap();
    }
    stream.write_all(b"0\r\n\r\n").unwrap();
    let answer = receive(stream);
    assert_eq!((answer.status, answer.error().contains("--max-body")), (413, true));
}

/// A web page can give its own name an address of this machine (DNS rebinding), and would then be taken for a page of the server.
#[test]
fn names_of_other_machines_are_refused() {
    let ask = |server: &Server, path: &str, host: &str| {
        let mut stream = server.connect();
        stream.write_all(format!("GET {path} HTTP/1.1\r\n{host}connection: close\r\n\r\n").as_bytes()).unwrap();
        receive(stream)
    };
    let server = Server::start(&["--allow-host", "Elleci.example"]);
    for own in
        ["localhost", "LOCALHOST:8080", "a.localhost", "127.0.0.1:1", "127.9.9.9", "[::1]:80", "elleci.example:443"]
    {
        for path in ["/", "/v1/models"] {
            assert_eq!(ask(&server, path, &format!("host: {own}\r\n")).status, 200, "{own}");
        }
    }
    for other in
        ["evil.example", "localhost.evil.example", "notlocalhost", "10.0.0.1:8080", "127.0.0.1.evil.example", "a b", ""]
    {
        for path in ["/", "/health", "/v1/models"] {
            let answer = ask(&server, path, &format!("host: {other}\r\n"));
            assert_eq!((answer.status, &answer.json()["error"]["code"]), (403, &json!("unknown_host")), "{other}");
        }
    }
    let absolute = ask(&server, "http://evil.example/v1/models", "host: localhost\r\n");
    assert_eq!((absolute.status, absolute.error().contains("--allow-host evil.example")), (403, true));
    // With a key no page can use it anyway.
    let server = Server::start(&["--api-key", "segreta"]);
    assert_eq!(ask(&server, "/health", "host: evil.example\r\n").status, 200);
}

/// A page elsewhere cannot read the answers, but its requests would be computed.
#[test]
fn pages_of_other_origins_are_refused() {
    let from = |server: &Server, origin: &str| {
        let body = json!({ "prompt": "La", "max_tokens": 1 }).to_string();
        server.request(
            "POST",
            "/v1/completions",
            &[&format!("origin: {origin}"), "content-type: text/plain"],
            body.as_bytes(),
        )
    };
    let server = Server::start(&["--cors", "https://example.org"]);
    for own in ["http://localhost", "https://example.org"] {
        assert_eq!(from(&server, own).status, 200, "{own}");
    }
    for other in ["https://evil.example", "http://localhost:9999", "http://127.0.0.1", "null"] {
        let answer = from(&server, other);
        assert_eq!((answer.status, &answer.json()["error"]["code"]), (403, &json!("unknown_origin")), "{other}");
        let remedy = format!("--cors {}", if other == "null" { "*" } else { other });
        assert!(answer.error().contains(&remedy), "{}", answer.error());
    }
    assert_eq!(server.metric("elleci_generated_tokens_total"), 2.0);
    assert_eq!(from(&Server::start(&["--cors", "*"]), "https://evil.example").status, 200);
}

#[test]
fn keys_and_origins_are_checked() {
    let server = Server::start(&["--api-key", "segreta", "--cors", "https://example.org"]);
    for path in ["/", "/health"] {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
    for headers in
        [vec![], vec!["authorization: Bearer segret"], vec!["authorization: segreta"], vec!["x-api-key: segreta"]]
    {
        for path in ["/v1/models", "/metrics", "/props", "/nothing"] {
            let answer = server.request("GET", path, &headers, b"");
            assert_eq!((answer.status, &answer.json()["error"]["code"]), (401, &json!("invalid_api_key")), "{path}");
        }
    }
    assert_eq!(server.request("GET", "/v1/models", &["authorization: bearer segreta"], b"").status, 200);
    let key = "authorization: Bearer segreta";
    let answer = server.request("GET", "/v1/models", &[key, "origin: https://example.org"], b"");
    assert_eq!((answer.status, &answer.headers["access-control-allow-origin"][..]), (200, "https://example.org"));
    // A browser asks without the key.
    let asks = [
        "origin: https://example.org",
        "access-control-request-method: POST",
        "access-control-request-headers: authorization",
    ];
    let asked = server.request("OPTIONS", "/v1/completions", &asks, b"");
    assert_eq!(asked.status, 200);
    assert!(asked.headers["access-control-allow-headers"].contains("authorization"), "a `*` does not stand for it");
    let closed = Server::start(&[]);
    assert!(!closed.request("GET", "/health", &asks, b"").headers.contains_key("access-control-allow-origin"));
}

#[test]
fn a_full_queue_says_so_and_clients_that_leave_make_room() {
    let server = Server::start(&[&ROOM[..], &["--parallel", "1", "--queue", "1"]].concat());
    let endless = endless().to_string();
    let post = |body: &str| server.send("POST", "/v1/completions", &[], body.as_bytes());
    let first = post(&endless);
    server.wait_for("elleci_active_sequences", |n| n == 1.0);
    let second = post(&endless);
    server.wait_for("elleci_queued_requests", |n| n == 1.0);
    let third = server.request("POST", "/v1/completions", &[], endless.as_bytes());
    assert_eq!(
        (third.status, &third.headers["retry-after"][..], third.error().contains("1 requests")),
        (429, "1", true)
    );
    // The one that waits goes, then the one that runs.
    drop(second);
    server.wait_for("elleci_queued_requests", |n| n == 0.0);
    server.wait_for("elleci_cancelled_requests_total", |n| n == 1.0);
    assert_eq!(server.metric("elleci_active_sequences"), 1.0);
    drop(first);
    server.wait_for("elleci_active_sequences", |n| n == 0.0);
    // In the middle of a stream too.
    let mut streaming: Value = serde_json::from_str(&endless).unwrap();
    streaming["stream"] = json!(true);
    let stream = first_event(post(&streaming.to_string()));
    // The gauge is set when the pass that wrote the first piece is over.
    server.wait_for("elleci_active_sequences", |n| n == 1.0);
    drop(stream);
    server.wait_for("elleci_active_sequences", |n| n == 0.0);
    server.wait_for("elleci_cancelled_requests_total", |n| n == 3.0);
    let before = server.metric("elleci_generated_tokens_total");
    assert_eq!(server.metric("elleci_generated_tokens_total"), before);
    assert!(server.log().contains("client gone"));
    assert_eq!(server.ok("/v1/completions", &json!({ "prompt": "La" }))["choices"][0]["finish_reason"], "length");
}

#[test]
fn answers_have_a_time_limit() {
    let server = Server::start(&[&ROOM[..], &["--timeout", "0.3"]].concat());
    let answer = server.post("/v1/completions", &endless());
    assert_eq!((answer.status, answer.error().contains("0.3 s")), (504, true));
    let mut streaming = endless();
    streaming["stream"] = json!(true);
    let answer = server.post("/v1/completions", &streaming);
    assert!(answer.body.trim_end().ends_with("\"type\":\"server_error\"}}"), "{}", answer.body);
    server.wait_for("elleci_active_sequences", |n| n == 0.0);
}

/// Clients that send too slowly, or nothing, are cut off; meanwhile the others are served.
#[test]
fn slow_clients_are_cut_off() {
    let server = Server::start(&["--read-timeout", "0.5"]);
    let begun = Instant::now();
    let cut = |mut stream: TcpStream, sent: &[u8]| {
        stream.write_all(sent).unwrap();
        let mut got = Vec::new();
        let _ = stream.read_to_end(&mut got);
        assert!(begun.elapsed() < PATIENCE);
        String::from_utf8(got).unwrap()
    };
    let dripping = scope(|scope| {
        // A head that never ends, a byte at a time.
        let drip = scope.spawn(|| {
            let mut stream = server.connect();
            stream.write_all(b"GET /health HTTP/1.1\r\nx: ").unwrap();
            while stream.write_all(b"x").is_ok() && begun.elapsed() < PATIENCE {
                std::thread::sleep(Duration::from_millis(50));
            }
            begun.elapsed()
        });
        let half = cut(server.connect(), b"GET /health HTTP/1.1\r\n");
        assert!(half.is_empty() || half.starts_with("HTTP/1.1 408 "), "{half}");
        assert_eq!(cut(server.connect(), b""), "");
        let body = cut(
            server.connect(),
            b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 9\r\n\r\n{",
        );
        assert!(body.starts_with("HTTP/1.1 408 "), "{body}");
        assert_eq!(server.get("/health").status, 200);
        drip.join().unwrap()
    });
    assert!(dripping < PATIENCE);
    // A head without end.
    let mut stream = server.connect();
    stream.write_all(b"GET /health HTTP/1.1\r\nx: ").unwrap();
    let _ = stream.write_all(&vec![b'x'; 1 << 20]);
    let mut got = Vec::new();
    let _ = stream.read_to_end(&mut got);
    assert!(got.is_empty() || got.starts_with(b"HTTP/1.1 431 "), "{}", String::from_utf8_lossy(&got));
    assert_eq!(cut(server.connect(), b"no http at all\r\n\r\n").split(' ').nth(1), Some("400"));
}

#[test]
fn connections_are_limited() {
    let server = Server::start(&[&ROOM[..], &["--connections", "2", "--read-timeout", "600"]].concat());
    // Whoever has sent nothing, or not all of it, makes room for others, the oldest first.
    let mut idle = [server.connect(), server.connect()];
    idle[0].write_all(b"GET /health HTTP/1.1\r\nx:").unwrap();
    idle[1].write_all(b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{").unwrap();
    let mut later = Vec::new();
    for mut idle in idle {
        assert_eq!(server.get("/health").status, 200);
        match idle.read(&mut [0]) {
            Ok(0) => {}
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => {}
            other => panic!("the oldest is still there: {other:?}"),
        }
        later.push(server.connect());
    }
    drop(later);
    // Not whoever is being answered.
    let mut streaming = endless();
    streaming["stream"] = json!(true);
    let stream = || first_event(server.send("POST", "/v1/completions", &[], streaming.to_string().as_bytes()));
    let (_a, b) = (stream(), stream());
    let third = server.send("GET", "/health", &[], b"");
    third.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let mut byte = [0];
    assert!((&third).read(&mut byte).is_err(), "a third connection was served");
    drop(b);
    third.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(receive(third).status, 200);
}

#[test]
fn a_signal_ends_it_in_good_order() {
    // Running answers finish.
    let mut server = Server::start(&["--grace", "60"]);
    let body = json!({ "prompt": "La", "max_tokens": 1000, "ignore_eos": true, "stream": true });
    let mut stream = first_event(server.send("POST", "/v1/completions", &[], body.to_string().as_bytes()));
    server.terminate();
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\"finish_reason\":\"length\"") && rest.contains("data: [DONE]"), "{rest}");
    assert_eq!(server.wait().code(), Some(0), "{}", server.log());
    assert!(server.log().contains("stopped"));
    // Those that would take too long are cut, and told.
    let mut server = Server::start(&[&ROOM[..], &["--grace", "0.2"]].concat());
    let whole = server.send("POST", "/v1/completions", &[], endless().to_string().as_bytes());
    let mut streaming = endless();
    streaming["stream"] = json!(true);
    let mut stream = first_event(server.send("POST", "/v1/completions", &[], streaming.to_string().as_bytes()));
    server.wait_for("elleci_active_sequences", |n| n == 2.0);
    server.terminate();
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("the server is stopping"), "{}", &rest[rest.len().saturating_sub(300)..]);
    let whole = receive(whole);
    assert_eq!((whole.status, &whole.json()["error"]["code"]), (503, &json!("stopping")));
    assert_eq!(server.wait().code(), Some(0), "{}", server.log());
    assert!(TcpStream::connect(("127.0.0.1", server.port)).is_err());
}

/// More choices than there are places begin as these become free, and are the same as with places for all.
#[test]
fn choices_wait_for_places_and_hold_up_nobody() {
    let asked = json!({ "prompt": "La città", "n": 7, "seed": 5, "max_tokens": 6, "ignore_eos": true, "logprobs": 1, "echo": true });
    let wide = Server::start(&[]).ok("/v1/completions", &asked);
    let server = Server::start(&[&ROOM[..], &["--parallel", "3"]].concat());
    let narrow = server.ok("/v1/completions", &asked);
    assert_eq!((&narrow["choices"], &narrow["usage"]), (&wide["choices"], &wide["usage"]));
    assert_eq!(narrow["choices"].as_array().unwrap().len(), 7);
    // Two of three places are free for good; the request wants seven.
    let long = server.send("POST", "/v1/completions", &[], endless().to_string().as_bytes());
    server.wait_for("elleci_active_sequences", |n| n == 1.0);
    assert_eq!(server.ok("/v1/completions", &asked)["choices"], wide["choices"]);
    server.wait_for("elleci_active_sequences", |n| n == 1.0);
    drop(long);
}

/// 64 streams at once, each with a prompt and a seed of its own: all complete, all what they would be alone, nobody long after the
/// others.
#[test]
fn a_crowd_is_served() {
    let server = Server::start(&[]);
    let body = |i: usize| {
        let prompt = "La città è più grande. ".repeat(1 + i % 7 * 5) + &i.to_string();
        json!({ "prompt": prompt, "max_tokens": 40, "seed": i, "temperature": 1.1, "ignore_eos": true, "stream": true })
    };
    let texts: Vec<String> = scope(|scope| {
        let one = |i: usize| {
            let events = server.post("/v1/completions", &body(i)).events();
            events.iter().map(|e| e["choices"][0]["text"].as_str().unwrap()).collect()
        };
        let all: Vec<_> = (0..64).map(|i| scope.spawn(move || one(i))).collect();
        all.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert_eq!(server.metric("elleci_generated_tokens_total"), 64.0 * 40.0);
    for i in [0, 13, 38, 63] {
        let mut alone = body(i);
        alone["stream"] = json!(false);
        assert_eq!(server.text(&alone), texts[i], "{i}");
    }
}

#[test]
fn starting_can_fail() {
    use std::process::Command;
    let run = |args: &[&str]| {
        let out = Command::new(env!("CARGO_BIN_EXE_elleci-run")).arg("serve").args(args).output().unwrap();
        (out.status.code(), String::from_utf8_lossy(&out.stderr).into_owned())
    };
    let (code, message) = run(&["-m", "no-such.elleci", "--port", "0"]);
    assert!(code == Some(1) && message.contains("--model"), "{message}");
    let (code, message) = run(&["-m", "x", "--cors", "https://example.org/"]);
    assert!(code == Some(2) && message.contains("an origin is like https://example.org"), "{message}");
    let (code, message) = run(&["-m", "x", "--host", "a b"]);
    assert!(code == Some(2) && message.contains("--host a b"), "{message}");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (code, message) = run(&["-m", "x", "--port", &taken.local_addr().unwrap().port().to_string()]);
    assert!(code == Some(1) && message.contains("--port 0 takes a free one"), "{message}");
    let (code, message) = run(&["-m", "x", "--cors", "here"]);
    assert!(code == Some(2) && message.contains("--cors here"), "{message}");
    let (code, message) = run(&["-m", "x", "--temp", "-1"]);
    assert!(code == Some(2) && message.contains("`temperature` is -1"), "{message}");
    let server = Server::begin(&[]);
    let (code, message) = run(&["-m", "x", "--port", &server.port.to_string()]);
    assert!(code == Some(1) && message.contains("listening on 127.0.0.1"), "{message}");
}
