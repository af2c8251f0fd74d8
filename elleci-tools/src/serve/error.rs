//! Refusals, in the form that OpenAI's clients read.

use axum::http::StatusCode;
use axum::http::header::{HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// Why a request is not answered.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiError {
    /// Of the response.
    pub status: StatusCode,
    /// What is wrong and what to do about it.
    pub message: String,
    /// A word for programs, if there is one.
    pub code: Option<&'static str>,
    /// The field that is wrong, if it is one.
    pub param: Option<String>,
    /// Tokens of the prompt and of the context, where they do not fit.
    pub tokens: Option<[usize; 2]>,
}

impl ApiError {
    fn new(status: StatusCode, code: Option<&'static str>, message: impl Into<String>) -> ApiError {
        ApiError { status, message: message.into(), code, param: None, tokens: None }
    }

    /// A request that makes no sense.
    pub fn invalid(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, None, message)
    }

    /// A field of the request that has no meaning as it is.
    pub fn field(name: &str, problem: impl std::fmt::Display) -> ApiError {
        let message = format!("`{name}` {problem}");
        ApiError { param: Some(name.to_string()), ..ApiError::invalid(message) }
    }

    /// More tokens than the context holds: `[prompt, context]`.
    pub fn too_long(name: &str, tokens: [usize; 2], message: String) -> ApiError {
        ApiError {
            param: Some(name.to_string()),
            tokens: Some(tokens),
            ..ApiError::new(StatusCode::BAD_REQUEST, Some("context_length_exceeded"), message)
        }
    }

    /// No key, or a wrong one.
    pub fn unauthorized() -> ApiError {
        let message = "this server needs its API key: send `Authorization: Bearer KEY`";
        ApiError::new(StatusCode::UNAUTHORIZED, Some("invalid_api_key"), message)
    }

    /// A name that this server does not have.
    pub fn host(host: &str) -> ApiError {
        let message =
            format!("this server does not answer to the name {host}: `--allow-host {host}`, or a key, lets it");
        ApiError::new(StatusCode::FORBIDDEN, Some("unknown_host"), message)
    }

    /// A web page that is not one of this server.
    pub fn origin(origin: &str) -> ApiError {
        // Files and sandboxed frames have no origin that could be named.
        let cors = if origin == "null" { "*" } else { origin };
        let message =
            format!("pages of {origin} may not use this server: `--cors {cors}` lets them, and so does a key");
        ApiError::new(StatusCode::FORBIDDEN, Some("unknown_origin"), message)
    }

    /// A model that is not served here.
    pub fn model(id: &str, own: &str) -> ApiError {
        let message = format!("there is no model `{id}`; this server has `{own}`");
        ApiError {
            param: Some("model".to_string()),
            ..ApiError::new(StatusCode::NOT_FOUND, Some("model_not_found"), message)
        }
    }

    /// There is nothing at this path.
    pub fn not_found(path: &str) -> ApiError {
        ApiError::new(StatusCode::NOT_FOUND, Some("not_found"), format!("there is nothing at {path}"))
    }

    /// The path takes other methods.
    pub fn method(method: &str, path: &str) -> ApiError {
        let message = format!("{path} does not take {method}");
        ApiError::new(StatusCode::METHOD_NOT_ALLOWED, Some("method_not_allowed"), message)
    }

    /// A body that did not come in time.
    pub fn slow_body(seconds: f64) -> ApiError {
        let message = format!("the body of the request did not come within {seconds} s");
        ApiError::new(StatusCode::REQUEST_TIMEOUT, Some("request_timeout"), message)
    }

    /// A body that is larger than the limit.
    pub fn large_body(limit: usize) -> ApiError {
        let message = format!("the body of a request may have {limit} bytes (--max-body)");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, Some("request_too_large"), message)
    }

    /// The queue is full.
    pub fn busy(waiting: usize) -> ApiError {
        let message = format!("{waiting} requests are waiting already (--queue): try again later");
        ApiError::new(StatusCode::TOO_MANY_REQUESTS, Some("queue_full"), message)
    }

    /// The model is not there yet.
    pub fn loading() -> ApiError {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, Some("loading"), "the model is being loaded: try again shortly")
    }

    /// The server is about to end.
    pub fn stopping() -> ApiError {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, Some("stopping"), "the server is stopping")
    }

    /// The answer took longer than the limit.
    pub fn timed_out(seconds: f64) -> ApiError {
        let message = format!("the answer was not complete within {seconds} s (--timeout)");
        ApiError::new(StatusCode::GATEWAY_TIMEOUT, Some("timeout"), message)
    }

    /// What should not happen.
    pub fn internal(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, Some("internal"), message)
    }

    /// The body of the response.
    pub fn body(&self) -> Value {
        let kind = match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            400..=499 => "invalid_request_error",
            _ => "server_error",
        };
        let mut error = json!({ "message": self.message, "type": kind, "code": self.code, "param": self.param });
        if let Some([prompt, context]) = self.tokens {
            // As llama-server names them.
            error["n_prompt_tokens"] = prompt.into();
            error["n_ctx"] = context.into();
        }
        json!({ "error": error })
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = super::json_response(self.status, &self.body());
        let headers = response.headers_mut();
        match self.status {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
            }
            StatusCode::UNAUTHORIZED => {
                headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            _ => {}
        }
        response
    }
}
