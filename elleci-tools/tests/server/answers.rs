//! What is answered.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use elleci_core::archive::{Archive, PackOptions, to_bytes};
use elleci_core::inference::{Batch, Feed, Output, Session};
use elleci_tools::eval::engine::{Engine, Pair};
use elleci_tools::run::model::OpenModel;
use serde_json::{Value, json};

use crate::scene::Server;
use crate::tiny::{config, params, tokenizer};

const PROMPT: &str = "La città è più grande";

fn floats(list: &Value) -> Vec<f64> {
    list.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

#[test]
fn every_endpoint_answers() {
    let server = Server::start(&[]);
    let health = server.get("/health").json();
    assert_eq!((&health["status"], &health["elleci"]["model"]), (&json!("ok"), &json!("tiny")));
    let props = server.get("/props").json();
    assert_eq!(props, health["elleci"]);
    assert_eq!(
        (&props["router"], &props["context"], &props["trained_context"]),
        (&json!(false), &json!(4096), &json!(64))
    );
    assert_eq!(props["vocabulary"], tokenizer().config().tokens);
    let models = server.get("/v1/models").json();
    assert_eq!((&models["object"], &models["data"][0]["id"]), (&json!("list"), &json!("tiny")));

    assert_eq!(server.get("/v1/models/tiny").json(), models["data"][0]);
    let other = server.get("/v1/models/other");
    assert_eq!((other.status, &other.json()["error"]["code"]), (404, &json!("model_not_found")));

    let page = server.get("/");
    assert!(page.body.starts_with("<!doctype html>") && page.headers["content-type"].starts_with("text/html"));
    let policy = &page.headers["content-security-policy"];
    assert!(policy.contains("default-src 'none'") && policy.contains("connect-src 'self'"), "{policy}");
    assert!(policy.contains("script-src 'sha256-") && !policy.contains("script-src 'unsafe"), "{policy}");

    for base in ["", "/v1"] {
        let tokens = server.ok(&format!("{base}/tokenize"), &json!({ "prompt": PROMPT, "add_special_tokens": false }));
        assert_eq!(tokens["tokens"], json!(tokenizer().encode(PROMPT)));
        let text = server.ok(&format!("{base}/detokenize"), &json!({ "tokens": tokens["tokens"] }));
        assert_eq!(text["prompt"], PROMPT);
        let info = server.get(&format!("{base}/tokenizer_info")).json();
        assert_eq!((&info["eos_token"], &info["bos_token"]), (&json!("<|endoftext|>"), &Value::Null));
    }
    // The harness asks so for the token that ends documents.
    let special = server.ok("/tokenize", &json!({ "content": "<|endoftext|>a<|im_start|>" }));
    assert_eq!(special["tokens"], json!([0, tokenizer().encode("a")[0], 2]));
    assert_eq!(server.ok("/detokenize", &special)["prompt"], "<|endoftext|>a<|im_start|>");

    let completion = server.ok("/v1/completions", &json!({ "prompt": PROMPT, "max_tokens": 5, "temperature": 0 }));
    assert_eq!((&completion["object"], &completion["model"]), (&json!("text_completion"), &json!("tiny")));
    assert_eq!(completion["choices"][0]["finish_reason"], "length");
    assert_eq!(completion["usage"]["prompt_tokens"], tokenizer().encode(PROMPT).len());
    assert_eq!(completion["usage"]["completion_tokens"], 5);
    let messages = json!([{ "role": "system", "content": "Sii breve." }, { "role": "user", "content": "Ciao" }]);
    let chat = server
        .ok("/v1/chat/completions", &json!({ "messages": messages, "max_completion_tokens": 4, "temperature": 0 }));
    assert_eq!(
        (&chat["object"], &chat["choices"][0]["message"]["role"]),
        (&json!("chat.completion"), &json!("assistant"))
    );

    let metrics = server.get("/metrics");
    assert!(metrics.headers["content-type"].starts_with("application/openmetrics-text"));
    for part in
        ["elleci_requests_total{endpoint=\"/v1/completions\",status=\"200\"} 1", "elleci_generated_tokens_total 9"]
    {
        assert!(metrics.body.contains(part), "{part}: {}", metrics.body);
    }
    assert!(server.metric("elleci_resident_memory_bytes") > 1e6);
    assert_eq!(server.metric("elleci_queued_requests"), 0.0);
    let nowhere = server.get("/v1/nothing");
    assert_eq!((nowhere.status, nowhere.error().contains("/v1/nothing")), (404, true));
    assert_eq!(server.get("/v1/completions").status, 405);
    assert!(server.log().contains("POST /v1/completions 200 OK"), "{}", server.log());
}

/// Scores of an echoed prompt against the evaluator's for the same tokens, and the contract of lm-evaluation-harness.
#[test]
fn echoed_prompts_have_the_evaluator_s_scores() {
    let server = Server::start(&[]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.elleci");
    let archive = to_bytes(&config(), &params(0.0), Some(tokenizer().json()), PackOptions::default()).unwrap();
    std::fs::write(&path, archive).unwrap();
    let open = OpenModel::open(&path).unwrap();
    let mut engine = Engine::new(&open, 1024).unwrap();
    let prompts: Vec<Vec<u32>> =
        (1..5u32).map(|i| (0..9 + 7 * i).map(|j| 4 + (j * j * 31 + j * i) % 320).collect()).collect();
    let body = json!({
        "model": "any", "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": true
    });
    let answer = server.ok("/v1/completions", &body);
    for (i, prompt) in prompts.iter().enumerate() {
        let choice = &answer["choices"][i];
        assert_eq!(choice["index"], i);
        let scores = &choice["logprobs"];
        let logprobs = scores["token_logprobs"].as_array().unwrap();
        let tops = scores["top_logprobs"].as_array().unwrap();
        assert_eq!((logprobs.len(), tops.len()), (prompt.len() + 1, prompt.len() + 1));
        assert!(logprobs[0].is_null() && tops[0].is_null());
        let is_greedy = |at: usize| {
            let top = tops[at].as_object().unwrap().values().map(|v| v.as_f64().unwrap());
            logprobs[at].as_f64().unwrap() == top.fold(f64::NEG_INFINITY, f64::max)
        };
        for start in [1, prompt.len() / 2, prompt.len() - 1] {
            let (context, continuation) = (prompt[..start].to_vec(), prompt[start..].to_vec());
            let pair = Pair { context, continuation, truncated: 0 };
            let want = engine.score(&[pair], None).unwrap()[0];
            // As the harness adds them up: without the token that was generated.
            let got: f64 = logprobs[start..prompt.len()].iter().map(|v| v.as_f64().unwrap()).sum();
            assert!((got - want.logprob).abs() < 1e-5, "{i} {start}: {got} {}", want.logprob);
            assert_eq!((start..prompt.len()).all(is_greedy), want.greedy);
        }
        // The token that was generated is the likeliest of those that may be.
        assert_eq!(choice["finish_reason"], "length");
        // A prompt alone has the same scores.
        let mut alone = body.clone();
        alone["prompt"] = json!(prompt);
        assert_eq!(server.ok("/v1/completions", &alone)["choices"][0]["logprobs"], *scores);
        // Nothing generated: nothing but the prompt.
        alone["max_tokens"] = json!(0);
        let only = server.ok("/v1/completions", &alone);
        assert_eq!(only["choices"][0]["logprobs"]["token_logprobs"], json!(logprobs[..prompt.len()]));
        assert_eq!(only["choices"][0]["text"], server.ok("/detokenize", &json!({ "tokens": prompt }))["prompt"]);
    }
    // A likeliest token counts as greedy: the greedy continuation of a prompt is.
    let greedy = server
        .ok("/v1/completions", &json!({ "prompt": prompts[0], "max_tokens": 6, "temperature": 0, "logprobs": 2 }));
    let scores = &greedy["choices"][0]["logprobs"];
    for (logprob, top) in floats(&scores["token_logprobs"]).iter().zip(scores["top_logprobs"].as_array().unwrap()) {
        assert!(top.as_object().unwrap().len() >= 2);
        assert!(top.as_object().unwrap().values().any(|v| v.as_f64() == Some(*logprob)));
    }
}

/// An answer with many log-probabilities is written by a thread of its own; the others find it as small ones are.
#[test]
fn large_answers_hold_what_small_ones_hold() {
    let server = Server::start(&[]);
    let scored = |length: usize| {
        let prompt: Vec<u32> = (0..length).map(|i| (20 + i * i % 300) as u32).collect();
        let body = json!({ "prompt": prompt, "echo": true, "logprobs": 3, "max_tokens": 0 });
        server.ok("/v1/completions", &body)["choices"][0]["logprobs"].clone()
    };
    let (small, large) = (scored(100), scored(3000));
    for (name, places) in small.as_object().unwrap() {
        let (small, large) = (places.as_array().unwrap(), large[name].as_array().unwrap());
        assert_eq!((small.len(), large.len()), (100, 3000), "{name}");
        // What comes first is the same but for the last bits of a longer run's sums.
        if name == "tokens" || name == "text_offset" {
            assert_eq!(small[..], large[..100], "{name}");
        }
    }
}

/// Texts and token ids, alone and in company, with a cache and without: the same seed gives the same text.
#[test]
fn answers_follow_from_the_request_alone() {
    let server = Server::start(&[]);
    let bare = Server::start(&["--cache", "0", "--parallel", "1", "-t", "1"]);
    let long = format!("{} {PROMPT}", "perché no? La città è grande. ".repeat(40));
    let prompts = [PROMPT, "perché", &long, "La"];
    let hot = |prompt: Value, seed: u64| json!({ "prompt": prompt, "max_tokens": 24, "temperature": 1.3, "top_k": 0, "min_p": 0, "seed": seed });
    let texts = |answer: &Value| -> Vec<String> {
        answer["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap().to_string()).collect()
    };
    let together = texts(&server.ok("/v1/completions", &hot(json!(prompts), 5)));
    for _ in 0..2 {
        for (prompt, want) in prompts.iter().zip(&together) {
            assert_eq!(server.text(&hot(json!(prompt), 5)), *want);
            assert_eq!(bare.text(&hot(json!(prompt), 5)), *want);
        }
    }
    assert_eq!(server.text(&hot(json!(tokenizer().encode(PROMPT)), 5)), together[0]);
    assert!(server.metric("elleci_cached_prompt_tokens_total") >= 256.0);
    assert_eq!(bare.metric("elleci_cached_prompt_tokens_total"), 0.0);
    // A prompt that goes on from one in the cache by a single token, by two, and further.
    for length in [200, 129, 130, 257] {
        let prompt: Vec<u32> = (0..length).map(|i| 20 + i * i % 300).collect();
        let body = hot(json!(prompt), 5);
        let want = bare.text(&body);
        assert_eq!((server.text(&body), server.text(&body)), (want.clone(), want), "{length}");
    }
    // Choice i has the seed plus i.
    let mut several = hot(json!([PROMPT, "perché"]), 5);
    several["n"] = json!(3);
    let several = texts(&server.ok("/v1/completions", &several));
    for (i, text) in several.iter().enumerate() {
        assert_eq!(*text, server.text(&hot(json!(prompts[i / 3]), 5 + i as u64 % 3)));
    }
    assert_ne!(several[0], several[1]);
    // Without a seed another text each time.
    let mut free = hot(json!(PROMPT), 0);
    for none in [Value::Null, json!(-1)] {
        free["seed"] = none;
        assert_ne!(server.text(&free), server.text(&free));
    }
    // With nothing but the likeliest token left, the temperature has no say.
    let mut likeliest = hot(json!(PROMPT), 5);
    likeliest["top_p"] = json!(0);
    let hottest = server.text(&likeliest);
    likeliest["temperature"] = json!(0);
    assert_eq!(hottest, server.text(&likeliest));
    // A dialogue: what an earlier turn left in the cache changes nothing.
    let mut messages = vec![json!({ "role": "user", "content": "La città è più grande, perché no? ".repeat(6) })];
    for _ in 0..3 {
        let body = json!({ "messages": messages, "max_tokens": 20, "temperature": 1, "seed": 9 });
        let say =
            |server: &Server| server.ok("/v1/chat/completions", &body)["choices"][0]["message"]["content"].clone();
        let answer = say(&server);
        assert_eq!(say(&bare), answer);
        assert_eq!(say(&server), answer);
        messages.push(json!({ "role": "assistant", "content": answer }));
        messages.push(json!({ "role": "user", "content": "perché?" }));
    }
    // An answer without text, as one that called a tool.
    messages.push(json!({ "role": "assistant", "content": null }));
    server.ok("/v1/chat/completions", &json!({ "messages": messages, "max_tokens": 1 }));
}

#[test]
fn streams_hold_what_whole_answers_hold() {
    let server = Server::start(&[]);
    let body = json!({ "prompt": [PROMPT, "perché"], "n": 2, "max_tokens": 30, "temperature": 1.2, "seed": 3, "logprobs": 2, "echo": true });
    let whole = server.ok("/v1/completions", &body);
    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    streamed["stream_options"] = json!({ "include_usage": true });
    let events = server.post("/v1/completions", &streamed).events();
    let mut choices = vec![
        json!({ "text": "", "logprobs": { "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [] } });
        4
    ];
    let (last, parts) = events.split_last().unwrap();
    assert_eq!((&last["choices"], &last["usage"]), (&json!([]), &whole["usage"]));
    for part in parts {
        assert!(part["usage"].is_null() && part["object"] == "text_completion");
        let new = &part["choices"][0];
        let choice = &mut choices[new["index"].as_u64().unwrap() as usize];
        choice["text"] = (choice["text"].as_str().unwrap().to_string() + new["text"].as_str().unwrap()).into();
        for (name, list) in choice["logprobs"].as_object_mut().unwrap() {
            list.as_array_mut().unwrap().extend(new["logprobs"][name].as_array().unwrap().iter().cloned());
        }
        choice["index"] = new["index"].clone();
        choice["finish_reason"] = new["finish_reason"].clone();
    }
    assert_eq!(json!(choices), whole["choices"]);

    let chat = json!({ "messages": [{ "role": "user", "content": [{ "type": "text", "text": "Ciao" }] }], "max_tokens": 30, "seed": 4,
                       "temperature": 1, "logprobs": true, "top_logprobs": 3 });
    let whole = server.ok("/v1/chat/completions", &chat)["choices"][0].clone();
    let mut streamed = chat.clone();
    streamed["stream"] = json!(true);
    let (mut text, mut scores) = (String::new(), Vec::new());
    let events = server.post("/v1/chat/completions", &streamed).events();
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    for event in &events {
        assert!(event.get("usage").is_none() && event["object"] == "chat.completion.chunk");
        text += event["choices"][0]["delta"]["content"].as_str().unwrap_or_default();
        scores.extend(event["choices"][0]["logprobs"]["content"].as_array().unwrap().iter().cloned());
    }
    assert_eq!((&json!(text), &json!(scores)), (&whole["message"]["content"], &whole["logprobs"]["content"]));
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "length");
    assert_eq!(scores[0]["top_logprobs"].as_array().unwrap().len(), 3);
}

/// Stop strings are found across tokens; biases and penalties decide what is chosen.
#[test]
fn texts_end_and_tokens_are_chosen_as_asked() {
    let server = Server::start(&[]);
    let body = |more: Value| {
        let mut body = json!({ "prompt": "La", "temperature": 1, "max_tokens": 60, "seed": 0 });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let text = server.text(&body(json!({})));
    let stop: String = text.chars().skip(10).take(3).collect();
    for stream in [false, true] {
        let asked = body(json!({ "stop": ["never", stop], "stream": stream }));
        let (got, end) = if stream {
            let events = server.post("/v1/completions", &asked).events();
            let got: String = events.iter().map(|e| e["choices"][0]["text"].as_str().unwrap()).collect();
            (got, events.last().unwrap()["choices"][0]["finish_reason"].clone())
        } else {
            let choice = server.ok("/v1/completions", &asked)["choices"][0].clone();
            (choice["text"].as_str().unwrap().to_string(), choice["finish_reason"].clone())
        };
        assert_eq!((got.as_str(), &end), (text.split(&stop).next().unwrap(), &json!("stop")));
    }
    assert_eq!(server.text(&body(json!({ "stop": stop }))), text.split(&stop).next().unwrap());

    let greedy = |more: Value| {
        let mut more = more;
        more["temperature"] = json!(0);
        more["logprobs"] = json!(0);
        server.ok("/v1/completions", &body(more))["choices"][0]["logprobs"]["tokens"].as_array().unwrap().clone()
    };
    let word = "grande";
    let token = tokenizer().encode(word)[0];
    let forced = greedy(json!({ "max_tokens": 3, "logit_bias": { token.to_string(): 100 } }));
    assert_eq!(forced.len(), 3);
    assert!(forced.iter().all(|t| t == &forced[0]));
    let free = greedy(json!({ "max_tokens": 3 }));
    let first = server.ok("/tokenize", &json!({ "prompt": free[0] }))["tokens"][0].to_string();
    assert_ne!(greedy(json!({ "max_tokens": 3, "logit_bias": { first: -100 } }))[0], free[0]);
    // A token that has been chosen is less likely afterwards.
    let biased = json!({ token.to_string(): 30 });
    let distinct =
        |tokens: Vec<Value>| tokens.iter().map(Value::to_string).collect::<std::collections::HashSet<_>>().len();
    let plain = distinct(greedy(json!({ "logit_bias": biased, "max_tokens": 40 })));
    let penalised =
        greedy(json!({ "logit_bias": biased, "max_tokens": 40, "frequency_penalty": 2, "presence_penalty": 2 }));
    assert!(distinct(penalised) > plain);
    // The end of text is a token that may be chosen, unless the text must go on.
    let ends = json!({ "0": 100 });
    let ended = server.ok("/v1/completions", &body(json!({ "logit_bias": ends, "logprobs": 1 })));
    let choice = &ended["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!(""), &json!("stop")));
    assert_eq!(choice["logprobs"]["tokens"], json!(["<|endoftext|>"]));
    let on = server.ok("/v1/completions", &body(json!({ "logit_bias": ends, "ignore_eos": true })));
    assert_eq!(on["usage"]["completion_tokens"], 60);
}

#[test]
fn embeddings_are_means_of_hidden_states() {
    let server = Server::start(&[]);
    let inputs = ["La città", "perché no? La città è più grande. ".repeat(20).leak()];
    let answer = server.ok("/v1/embeddings", &json!({ "input": inputs, "model": "any" }));
    let archive = Archive::open(to_bytes(&config(), &params(0.0), None, PackOptions::default()).unwrap()).unwrap();
    for (i, input) in inputs.iter().enumerate() {
        let got = floats(&answer["data"][i]["embedding"]);
        assert!((got.iter().map(|x| x * x).sum::<f64>() - 1.0).abs() < 1e-5);
        let tokens = tokenizer().encode(input);
        let mut session = Session::new(archive.model()).unwrap();
        let mut sum = vec![0.0f64; config().d_model];
        let feed = Feed { session: &mut session, tokens: &tokens };
        let add = |_, _, row: &[f32]| sum.iter_mut().zip(row).for_each(|(s, v)| *s += f64::from(*v));
        Batch::new().extend_with(archive.model(), &mut [feed], |_| Output::Hidden, add).unwrap();
        let length = sum.iter().map(|x| x * x).sum::<f64>().sqrt();
        assert!(got.iter().zip(&sum).all(|(g, s)| (g - s / length).abs() < 1e-5));
        // Alone, by its tokens, and in the other format.
        let alone = server.ok("/v1/embeddings", &json!({ "input": tokens, "encoding_format": "base64" }));
        let bytes = BASE64_STANDARD.decode(alone["data"][0]["embedding"].as_str().unwrap()).unwrap();
        let (words, _) = bytes.as_chunks::<4>();
        let decoded: Vec<f64> = words.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect();
        assert!(decoded.iter().zip(&got).all(|(d, g)| (d - g).abs() < 1e-7) && decoded.len() == got.len());
        assert_eq!(alone["usage"]["prompt_tokens"], tokens.len());
    }
}
