//! What is served where.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{MatchedPath, Path, Request, State};
use axum::http::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, EXPECT, HOST, ORIGIN};
use axum::http::uri::Authority;
use axum::http::{Method, StatusCode, Uri};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Router};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytemuck::cast_slice;
use futures_util::StreamExt;
use serde_json::{Value, json};
use tower_http::cors::{AllowHeaders, CorsLayer};

use super::account::Account;
use super::answer::{collect, stream};
use super::error::ApiError;
use super::job::{Count, Event, Job, Task};
use super::openai::{Form, Head, now};
use super::request::{Delivery, EmbeddingFormat, Reader};
use super::{App, Loaded, json_response, metrics, page, vocabulary};
use crate::data::tokenizer::{END_OF_TEXT, IM_END, IM_START, PADDING};

/// Bodies from this size on are read by a thread of their own: turning them into tokens would hold up everyone else.
const LARGE_BODY: usize = 8 << 10;

/// ChatML as a Jinja template, the same tokens as [`crate::data::chatml::encode_prompt`].
const CHAT_TEMPLATE: &str = "{% for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}\
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}{% endfor %}\
{% if add_generation_prompt %}{% if messages %}{{ '\\n' }}{% endif %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

type Answer = Result<Response, ApiError>;

/// All routes, with what stands before them.
pub fn router(app: Arc<App>) -> Router {
    let mut router = Router::new()
        .route("/", get(page::page))
        .route("/health", get(health))
        .route("/props", get(props))
        .route("/metrics", get(metrics_text))
        .route("/v1/models", get(models))
        .route("/v1/models/{id}", get(model))
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/embeddings", post(embeddings));
    // The harness takes `/v1/completions` off its address; others have `/v1` for their base.
    for base in ["", "/v1"] {
        router = router
            .route(&format!("{base}/tokenize"), post(tokenize))
            .route(&format!("{base}/detokenize"), post(detokenize))
            .route(&format!("{base}/tokenizer_info"), get(tokenizer_info));
    }
    let mut router = router
        .fallback(|uri: Uri| async move { ApiError::not_found(uri.path()) })
        .method_not_allowed_fallback(
            |method: Method, uri: Uri| async move { ApiError::method(method.as_str(), uri.path()) },
        )
        .layer(from_fn_with_state(app.clone(), gate));
    if let Some(origin) = &app.settings.cors {
        // `*` would not cover the key, and clients send headers of their own.
        let (methods, headers) = ([Method::GET, Method::POST], AllowHeaders::mirror_request());
        router =
            router.layer(CorsLayer::new().allow_origin(origin.clone()).allow_methods(methods).allow_headers(headers));
    }
    router.with_state(app)
}

/// Opens the account of a request and lets it pass if it may.
async fn gate(State(app): State<Arc<App>>, matched: Option<MatchedPath>, mut request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let endpoint = matched.as_ref().map_or("other", MatchedPath::as_str);
    let account = Account::new(app.clone(), &request, endpoint);
    if request.method() != Method::POST {
        // There is no body to wait for.
        account.work();
    }
    let open = ["/", "/health"].contains(&path);
    let stranger = if app.local { host_of(&request).filter(|host| !app.settings.answers_to(host)) } else { None };
    let foreign = if app.local { foreign_origin(&app, &request) } else { None };
    let response = if let Some(host) = stranger {
        ApiError::host(&host).into_response()
    } else if let Some(origin) = foreign {
        ApiError::origin(&origin).into_response()
    } else if open || app.settings.lets_in(request.headers().get(AUTHORIZATION)) {
        request.extensions_mut().insert(account.clone());
        next.run(request).await
    } else {
        ApiError::unauthorized().into_response()
    };
    account.hold(response)
}

/// The name that a request calls this server by, without the port. Only old clients that are no browsers give none.
fn host_of(request: &Request) -> Option<String> {
    let header = request.headers().get(HOST).map(|value| value.to_str().unwrap_or("?"));
    let name = request.uri().authority().map(Authority::as_str).or(header)?;
    Some(name.parse::<Authority>().map_or_else(|_| name.to_string(), |authority| authority.host().to_string()))
}

/// The web page that a request comes from, if that is neither one of this server nor one that `--cors` names. Browsers send even what
/// a page may not read the answer to, and it would be computed.
fn foreign_origin(app: &App, request: &Request) -> Option<String> {
    let origin = request.headers().get(ORIGIN)?;
    let own = request.headers().get(HOST).is_some_and(|host| {
        let authority = origin.as_bytes().strip_prefix(b"http://").or(origin.as_bytes().strip_prefix(b"https://"));
        authority.is_some_and(|authority| authority.eq_ignore_ascii_case(host.as_bytes()))
    });
    let named = app.settings.cors.as_ref().is_some_and(|cors| cors == origin || cors == "*");
    (!own && !named).then(|| origin.to_str().unwrap_or("?").to_string())
}

/// Reads a body of bounded size in bounded time.
async fn body_of(app: &App, request: Request) -> Result<Bytes, ApiError> {
    let (limit, timeout) = (app.settings.max_body, app.settings.read_timeout);
    let declared = request.headers().get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<usize>().ok());
    if declared.is_some_and(|n| n > limit && (n > 4 * limit || request.headers().contains_key(EXPECT))) {
        return Err(ApiError::large_body(limit));
    }
    let read = async {
        let (mut body, mut size) = (Vec::new(), 0);
        let mut parts = request.into_body().into_data_stream();
        while let Some(part) = parts.next().await {
            let part = part.map_err(|_| ApiError::invalid("the body of the request broke off"))?;
            size += part.len();
            // One that is a little too large is read all the same: clients look at the answer only when they have sent everything.
            if size > 4 * limit {
                break;
            }
            if size <= limit {
                body.extend_from_slice(&part);
            }
        }
        if size > limit { Err(ApiError::large_body(limit)) } else { Ok(Bytes::from(body)) }
    };
    match tokio::time::timeout(timeout, read).await {
        Ok(body) => body,
        Err(_) => Err(ApiError::slow_body(timeout.as_secs_f64())),
    }
}

/// Reads the body and makes something of it, away from the other connections if it is large.
async fn parse<T: Send + 'static>(
    app: &Arc<App>,
    request: Request,
    read: impl FnOnce(Reader<'_>, &Value) -> Result<T, ApiError> + Send + 'static,
) -> Result<(Arc<Loaded>, T), ApiError> {
    let loaded = app.loaded()?;
    let account = request.extensions().get::<Arc<Account>>().cloned();
    let body = body_of(app, request).await?;
    if let Some(account) = account {
        account.work();
    }
    let (own, large) = (loaded.clone(), body.len() >= LARGE_BODY);
    let work = move || {
        let value =
            serde_json::from_slice(&body).map_err(|e| ApiError::invalid(format!("the body is no JSON: {e}")))?;
        read(own.reader(), &value)
    };
    let read = if large {
        tokio::task::spawn_blocking(work).await.map_err(|_| ApiError::internal("reading the request failed"))?
    } else {
        work()
    };
    Ok((loaded, read?))
}

async fn health(State(app): State<Arc<App>>) -> Response {
    if app.is_stopping() {
        return json_response(StatusCode::SERVICE_UNAVAILABLE, &json!({ "status": "stopping" }));
    }
    match app.loaded() {
        Ok(loaded) => json_response(StatusCode::OK, &json!({ "status": "ok", "elleci": loaded.props })),
        Err(_) => json_response(StatusCode::SERVICE_UNAVAILABLE, &json!({ "status": "loading" })),
    }
}

async fn props(State(app): State<Arc<App>>) -> Answer {
    Ok(json_response(StatusCode::OK, &app.loaded()?.props))
}

async fn metrics_text(State(app): State<Arc<App>>) -> Answer {
    app.metrics.queued.set(app.engine.queued() as i64);
    let text = app.metrics.text().map_err(|_| ApiError::internal("the metrics cannot be written"))?;
    Ok(([(CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response())
}

fn described(loaded: &Loaded) -> Value {
    json!({
        "id": loaded.name, "object": "model", "created": loaded.created, "owned_by": "elleci",
        "max_model_len": loaded.limits.context, "meta": loaded.props
    })
}

async fn models(State(app): State<Arc<App>>) -> Answer {
    let list = json!({ "object": "list", "data": [described(&*app.loaded()?)] });
    Ok(json_response(StatusCode::OK, &list))
}

async fn model(State(app): State<Arc<App>>, Path(id): Path<String>) -> Answer {
    let loaded = app.loaded()?;
    if id != loaded.name {
        return Err(ApiError::model(&id, &loaded.name));
    }
    Ok(json_response(StatusCode::OK, &described(&loaded)))
}

async fn completions(state: State<Arc<App>>, account: Extension<Arc<Account>>, request: Request) -> Answer {
    generate(state, account, request, Form::Text).await
}

async fn chat(state: State<Arc<App>>, account: Extension<Arc<Account>>, request: Request) -> Answer {
    generate(state, account, request, Form::Chat).await
}

async fn generate(
    State(app): State<Arc<App>>,
    Extension(account): Extension<Arc<Account>>,
    request: Request,
    form: Form,
) -> Answer {
    let read = move |reader: Reader<'_>, body: &Value| match form {
        Form::Text => reader.completion(body),
        Form::Chat => reader.chat(body),
    };
    let (loaded, asked) = parse(&app, request, read).await?;
    let events = app.submit(asked.jobs())?;
    let prefix = if form == Form::Text { "cmpl" } else { "chatcmpl" };
    let head = Head { form, id: app.next_id(prefix), created: now(), model: loaded.name.clone() };
    match asked.delivery {
        Delivery::Whole => collect(loaded, head, asked, events, &account).await,
        Delivery::Stream { usage } => Ok(stream(loaded, head, asked, events, account, usage)),
    }
}

async fn embeddings(
    State(app): State<Arc<App>>,
    Extension(account): Extension<Arc<Account>>,
    request: Request,
) -> Answer {
    let d_model = app.loaded()?.open.config().d_model;
    let read = move |reader: Reader<'_>, body: &Value| reader.embeddings(body, d_model);
    let (loaded, (prompts, format)) = parse(&app, request, read).await?;
    let mut vectors = vec![Value::Null; prompts.len()];
    let (mut left, mut total) = (prompts.len(), 0);
    let jobs = prompts.iter().map(|p| Job::new(&p.tokens, Task::Embed)).collect();
    let mut events = app.submit(jobs)?;
    while left > 0 {
        match events.recv().await {
            Some(Event::Embedding { prompt, vector, tokens }) => {
                vectors[prompt] = match format {
                    EmbeddingFormat::Float => vector.into(),
                    EmbeddingFormat::Base64 => little_endian(&vector).into(),
                };
                left -= 1;
                total += tokens;
                account.count(Count { prompt: tokens, cached: 0, chosen: 0 });
            }
            Some(Event::Failed(error)) => return Err(error),
            Some(_) => {}
            None => return Err(ApiError::internal("the engine has ended")),
        }
    }
    let entry = |(index, embedding)| json!({ "object": "embedding", "index": index, "embedding": embedding });
    let data: Vec<Value> = vectors.into_iter().enumerate().map(entry).collect();
    let usage = json!({ "prompt_tokens": total, "total_tokens": total });
    let body = json!({ "object": "list", "model": loaded.name, "data": data, "usage": usage });
    Ok(json_response(StatusCode::OK, &body))
}

fn little_endian(vector: &[f32]) -> String {
    let words: Vec<[u8; 4]> = vector.iter().map(|v| v.to_le_bytes()).collect();
    BASE64_STANDARD.encode(cast_slice::<[u8; 4], u8>(&words))
}

async fn tokenize(State(app): State<Arc<App>>, request: Request) -> Answer {
    let read = |reader: Reader<'_>, body: &Value| Ok(vocabulary::encode(reader.tokenizer, reader.text(body)?));
    let (loaded, tokens) = parse(&app, request, read).await?;
    let body = json!({ "tokens": tokens, "count": tokens.len(), "max_model_len": loaded.limits.context });
    Ok(json_response(StatusCode::OK, &body))
}

async fn detokenize(State(app): State<Arc<App>>, request: Request) -> Answer {
    let read = |reader: Reader<'_>, body: &Value| Ok(vocabulary::decode(reader.tokenizer, &reader.tokens(body)?));
    let (_, text) = parse(&app, request, read).await?;
    Ok(json_response(StatusCode::OK, &json!({ "prompt": text, "content": text })))
}

async fn tokenizer_info(State(app): State<Arc<App>>) -> Answer {
    let loaded = app.loaded()?;
    let body = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "bos_token": null,
        "pad_token": PADDING,
        "unk_token": null,
        "additional_special_tokens": [IM_START, IM_END],
        "model_max_length": loaded.limits.context,
        "vocab_size": loaded.tokenizer().config().tokens,
        "tokenizer_sha256": loaded.tokenizer().sha256(),
        "chat_template": CHAT_TEMPLATE
    });
    Ok(json_response(StatusCode::OK, &body))
}
