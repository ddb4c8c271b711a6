//! Makes one request to a server: HTTP/1.1 without TLS, one connection for each request, one deadline for all of it. Also interprets
//! answers, as far as that is the same for all kinds of servers.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::time::Duration;

use bytes::Bytes;
use engine_core::clock::within;
use engine_core::{Error, ErrorKind, Recovery, Result};
use futures::FutureExt;
use futures::future::{Either, select};
use http_body_util::{BodyExt, Full, Limited};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::{Method, Request, Uri};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::net::TcpStream;

use crate::key::{ApiKey, Keys};

/// The longest answer that is read.
const MAX_ANSWER_BYTES: usize = 16 << 20;
/// The deadline of a request that something else ends in time.
pub(crate) const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);
/// The most characters of a server's own words that are repeated.
pub(crate) const MAX_WORDS: usize = 600;

/// The address of a server: `http://HOST:PORT`, and a prefix of its paths if there is one.
///
/// # Examples
///
/// ```
/// use receivers::ServerUrl;
///
/// let url: ServerUrl = "http://10.0.0.7:8000/".parse()?;
/// assert_eq!(url.to_string(), "http://10.0.0.7:8000");
/// assert!("https://10.0.0.7".parse::<ServerUrl>().is_err());
/// # Ok::<(), engine_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct ServerUrl {
    host: String,
    port: u16,
    path: String,
}

impl FromStr for ServerUrl {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let refuse = |problem: &str| {
            let message = format!("`{text}`: {problem}");
            Error::new(ErrorKind::Config, "reading a server's address", message)
        };
        let uri: Uri = text.parse().map_err(|error| refuse(&format!("{error}")))?;
        match uri.scheme_str() {
            Some("http") => {}
            Some("https") => {
                return Err(refuse(
                    "https is not spoken here: name the server's own http address, on the network that \
                     the weights travel by",
                ));
            }
            _ => return Err(refuse("http://HOST:PORT is wanted")),
        }
        let host = uri.host().filter(|host| !host.is_empty());
        let host = host.ok_or_else(|| refuse("it has no host"))?.to_owned();
        let inside = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        if inside.unwrap_or(&host).contains(['[', ']']) || (inside.is_none() && host.contains(':'))
        {
            return Err(refuse("an IPv6 address stands in brackets: `http://[::1]:8000`"));
        }
        if uri.query().is_some() || uri.authority().is_some_and(|all| all.as_str().contains('@')) {
            return Err(refuse("a query and a user's name have no meaning here"));
        }
        let path = uri.path().trim_end_matches('/').to_owned();
        Ok(Self { host, port: uri.port_u16().unwrap_or(80), path })
    }
}

impl TryFrom<String> for ServerUrl {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<ServerUrl> for String {
    fn from(url: ServerUrl) -> Self {
        url.to_string()
    }
}

impl fmt::Display for ServerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}:{}{}", self.host, self.port, self.path)
    }
}

#[cfg(feature = "schema")]
impl schemars::JsonSchema for ServerUrl {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "ServerUrl".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": "string" })
    }
}

/// A server's answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: Bytes,
}

impl Answer {
    pub(crate) fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }

    /// The body as JSON; null if it is not JSON.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    /// The error message, shortened.
    pub(crate) fn words(&self) -> String {
        short(self.text())
    }

    /// The error message: the message of the forms that servers have for errors, else the whole text.
    fn text(&self) -> String {
        let json = self.json();
        let message =
            [&json["error"]["message"], &json["error"], &json["detail"], &json["message"]];
        let words = match message.into_iter().find_map(Value::as_str) {
            Some(text) => text.to_owned(),
            None => String::from_utf8_lossy(&self.body).into_owned(),
        };
        words.split_whitespace().collect::<Vec<_>>().join(" ")
    }
}

fn short(words: String) -> String {
    match words.char_indices().nth(MAX_WORDS) {
        Some((end, _)) => format!("{}…", &words[..end]),
        None => words,
    }
}

/// What requests to a server need: its address, how long its answers may take, and the remedy for a missing route.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    pub(crate) url: ServerUrl,
    /// The limit of requests that change nothing.
    pub(crate) short: Duration,
    /// The limit of requests that make it do something.
    pub(crate) long: Duration,
    /// The kind of the server.
    pub(crate) kind: Kind,
    /// The keys that it asks for.
    pub(crate) keys: Keys,
}

/// The name of a kind of server, and the remedy if one lacks a route.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    pub(crate) name: &'static str,
    pub(crate) no_route: &'static str,
}

impl Client {
    /// Makes a request that changes nothing.
    ///
    /// # Errors
    ///
    /// Those of [`ask`](Self::ask); the server's own error.
    pub(crate) async fn get(&self, path: &str) -> Result<Answer> {
        let answer = self.ask(Method::GET, path, None, self.short).await?;
        self.done(path, &answer)?;
        Ok(answer)
    }

    /// The version of its weights that a server reports.
    ///
    /// # Errors
    ///
    /// As [`get`](Self::get); `Protocol` if it reports none.
    pub(crate) async fn weights(&self, path: &str) -> Result<String> {
        let answer = self.get(path).await?;
        let version = answer.json()["weight_version"].as_str().map(str::to_owned);
        version.ok_or_else(|| self.odd(path, &answer))
    }

    /// Makes a server do something.
    ///
    /// # Errors
    ///
    /// As [`get`](Self::get).
    pub(crate) async fn tell(&self, path: &str, body: Option<&Value>) -> Result<()> {
        let answer = self.post(path, body, self.long).await?;
        self.done(path, &answer)
    }

    /// Makes a server do something that lasts until others have done their part. Those have deadlines of their own.
    ///
    /// # Errors
    ///
    /// As [`get`](Self::get).
    pub(crate) async fn hold(self, path: &'static str, body: Value) -> Result<()> {
        let answer = self.post(path, Some(&body), FOREVER).await?;
        self.done(path, &answer)
    }

    /// Makes a server do something. Every status is a valid answer.
    ///
    /// # Errors
    ///
    /// Those of [`ask`](Self::ask).
    pub(crate) async fn post(
        &self,
        path: &str,
        body: Option<&Value>,
        limit: Duration,
    ) -> Result<Answer> {
        self.ask(Method::POST, path, body, limit).await
    }

    /// Makes a request. Every status is a valid answer.
    ///
    /// # Errors
    ///
    /// `Timeout` if there is no answer within the limit, `PeerLost` if the server is not there or goes away, `Protocol` if it does not
    /// speak HTTP.
    pub(crate) async fn ask(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        limit: Duration,
    ) -> Result<Answer> {
        let operation = format!("{method} {}{path}", self.url);
        let key = self.keys.of(&method);
        let answer = exchange(&self.url, key, &operation, method.clone(), path, body);
        within(limit, answer).await.unwrap_or_else(|| Err(no_answer(&operation, limit)))
    }

    /// The error of an answer without a status of success.
    pub(crate) fn done(&self, path: &str, answer: &Answer) -> Result<()> {
        match answer.status {
            200..300 => Ok(()),
            401 | 403 if self.keys.of(&Method::POST).is_none() => {
                Err(self.refusal(path, answer, "it asks for a key: configure `api_key_file`"))
            }
            401 | 403 => {
                Err(self.refusal(path, answer, "it asks for another key than the one configured"))
            }
            404 => Err(self.refusal(path, answer, self.kind.no_route)),
            _ => Err(self.refusal(path, answer, "")),
        }
    }

    /// The error of a refusal, with its remedy. Without a remedy the server may accept the same request at another time.
    pub(crate) fn refusal(&self, path: &str, answer: &Answer, remedy: &str) -> Error {
        let (status, words) = (answer.status, self.words(answer));
        let mut message = format!("status {status}");
        for part in [&*words, remedy] {
            if !part.is_empty() {
                message = format!("{message}: {part}");
            }
        }
        let operation = self.operation(path);
        match remedy.is_empty() {
            true => Error::new(ErrorKind::Io, operation, message).recovery(Recovery::Retry),
            // A server that refuses because of how it was started will refuse again.
            false => Error::new(ErrorKind::Config, operation, message),
        }
    }

    /// The error of an answer that servers of this kind never give.
    pub(crate) fn odd(&self, path: &str, answer: &Answer) -> Error {
        let Answer { status, .. } = answer;
        let (name, words) = (self.kind.name, self.words(answer));
        let message = format!("status {status} with an answer that is not {name}'s: {words}");
        Error::new(ErrorKind::Protocol, self.operation(path), message)
    }

    /// The server's words, without the keys that it may repeat.
    fn words(&self, answer: &Answer) -> String {
        short(self.keys.hide(answer.text()))
    }

    /// The name of a request in errors.
    pub(crate) fn operation(&self, path: &str) -> String {
        format!("{}{path}", self.url)
    }

    /// The local address by which this process reaches the server.
    ///
    /// # Errors
    ///
    /// `PeerLost` if it cannot; `Timeout`.
    pub(crate) async fn own_address(&self) -> Result<IpAddr> {
        let operation = self.operation("");
        let reached = within(self.short, reach(&self.url, &operation)).await;
        let stream = reached.unwrap_or_else(|| Err(no_answer(&operation, self.short)))?;
        let address = stream.local_addr().map_err(|error| Error::io(operation, error))?;
        Ok(address.ip().to_canonical())
    }
}

async fn reach(url: &ServerUrl, operation: &str) -> Result<TcpStream> {
    let host = url.host.trim_start_matches('[').trim_end_matches(']');
    TcpStream::connect((host, url.port)).await.map_err(|error| {
        let message = format!("not reached: {error}");
        Error::new(ErrorKind::PeerLost, operation, message).with_source(error)
    })
}

/// The error of a request without an answer in time.
pub(crate) fn no_answer(operation: &str, limit: Duration) -> Error {
    let message = format!("no answer within {:.1} s", limit.as_secs_f64());
    Error::new(ErrorKind::Timeout, operation, message)
}

async fn exchange(
    url: &ServerUrl,
    key: Option<&ApiKey>,
    operation: &str,
    method: Method,
    path: &str,
    body: Option<&Value>,
) -> Result<Answer> {
    let lost = |message: String| Error::new(ErrorKind::PeerLost, operation, message);
    let stream = reach(url, operation).await?;
    // A request is one write. Without this the end of a long one may wait for an acknowledgement.
    stream.set_nodelay(true).map_err(|error| Error::io(operation, error))?;
    let malformed = |error: hyper::Error| {
        let kind = match error.is_parse() {
            true => ErrorKind::Protocol,
            false => ErrorKind::PeerLost,
        };
        Error::new(kind, operation, format!("the connection failed: {error}")).with_source(error)
    };
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream));
    let (mut sender, connection) = handshake.await.map_err(malformed)?;
    let body = body.map(|body| Bytes::from(body.to_string()));
    let request = Request::builder()
        .method(method)
        .uri(format!("{}{path}", url.path))
        .header(HOST, format!("{}:{}", url.host, url.port))
        .header(CONTENT_TYPE, "application/json");
    let request = match key.and_then(ApiKey::header) {
        Some(key) => request.header(AUTHORIZATION, key),
        None => request,
    };
    let request = request.body(Full::new(body.unwrap_or_default()));
    let request = request.map_err(|error| {
        Error::new(ErrorKind::Config, operation, error.to_string()).with_source(error)
    })?;
    let exchange = async {
        let response = sender.send_request(request).await.map_err(malformed)?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await;
        let body = body.map_err(|error| lost(format!("the answer broke off: {error}")))?;
        Ok(Answer { status, body: body.to_bytes() })
    };
    // The connection works only while it is polled. When it has ended, so has the exchange.
    match select(exchange.boxed(), connection.boxed()).await {
        Either::Left((answer, _)) => answer,
        Either::Right((_, exchange)) => exchange.await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_address_is_what_it_was_written_as() {
        for (text, url) in [
            ("http://10.0.0.7:8000", "http://10.0.0.7:8000"),
            ("http://host/", "http://host:80"),
            ("http://[::1]:8000/replica/1/", "http://[::1]:8000/replica/1"),
        ] {
            assert_eq!(text.parse::<ServerUrl>().unwrap().to_string(), url);
        }
    }

    #[test]
    fn brackets_within_a_host_are_refused() {
        // The host would be `33[:`, which does not parse when it is read again.
        let error = "http://33[:]:03".parse::<ServerUrl>().unwrap_err();
        assert!(error.to_string().contains("brackets"), "{error}");
    }

    proptest! {
        #[test]
        fn any_text_is_an_address_or_an_error_that_repeats_it(text in ".{0,40}", http in any::<bool>()) {
            let text = if http { format!("http://{text}") } else { text };
            match text.parse::<ServerUrl>() {
                Ok(url) => prop_assert_eq!(url.to_string().parse::<ServerUrl>().unwrap(), url),
                Err(error) => prop_assert!(error.to_string().contains(&*text)),
            }
        }

        #[test]
        fn whatever_a_server_answers_its_words_are_short(body in proptest::collection::vec(any::<u8>(), 0..3000)) {
            let answer = Answer { status: 500, body: body.into() };
            prop_assert!(answer.words().chars().count() <= MAX_WORDS + 1);
        }
    }
}
