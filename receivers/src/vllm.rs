//! vLLM's protocol: its routes, what is said on them, and what its answers mean.
//!
//! The routes are there with `VLLM_SERVER_DEV_MODE=1`, and what they do with `--weight-transfer-config`.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use engine_core::{Error, ErrorKind, Recovery, Result, Version};
use hyper::Method;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::chunk::{Chunk, torch_name};
use crate::fleet::{Ask, Facts, Said};
use crate::http::{Answer, ServerUrl, ask};

/// What a server's `--weight-transfer-config` has to be.
const CONFIG: &str = "start it with --weight-transfer-config '{\"backend\": \"nccl\"}'";
/// The length of NCCL's ids.
const UNIQUE_ID_BYTES: usize = 128;

/// What happens to requests that a server is at work on when an update begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum Pause {
    /// They are ended, and what is cached of the old weights is forgotten. vLLM's own default.
    #[default]
    Abort,
    /// The update waits for them, as long as any wait may take.
    Wait,
    /// They stay where they are and go on with the new weights, on what is cached of the old ones.
    Keep,
    /// Nobody is stopped: the program sees to it that nothing is generated during an update.
    None,
}

impl Pause {
    fn name(self) -> &'static str {
        match self {
            Self::Abort => "abort",
            Self::Wait => "wait",
            Self::Keep => "keep",
            Self::None => "none",
        }
    }
}

/// The world that a server's workers join.
#[derive(Clone, Debug)]
pub(crate) struct World {
    pub(crate) id: Vec<u8>,
    /// The members' number, the trainer counted.
    pub(crate) size: u32,
    /// The member that the server's first worker is.
    pub(crate) first: u32,
    /// The most bytes of a bucket.
    pub(crate) bucket_bytes: u64,
}

/// A server, and how long its answers may take.
#[derive(Clone, Debug)]
pub(crate) struct Vllm {
    pub(crate) url: ServerUrl,
    pub(crate) pause: Pause,
    /// Of questions about what is there already.
    pub(crate) short: Duration,
    /// Of those that make it do something.
    pub(crate) long: Duration,
}

impl Vllm {
    /// Asks one question of the machine.
    ///
    /// # Errors
    ///
    /// What the server says, or does not say.
    pub(crate) async fn ask(&self, question: Ask, version: Version) -> Result<Said> {
        match question {
            Ask::Look => return self.look().await.map(Said::Facts),
            Ask::Recall => return self.weights().await.map(Said::Version),
            Ask::Pause => {
                let path = format!("/pause?mode={}", self.pause.name());
                self.tell(&path, None).await?;
            }
            Ask::Reset => {
                // An update may be open or not. Once one is, ending it makes the server forget what it counted.
                self.start().await?;
                self.tell("/finish_weight_update", None).await?;
            }
            Ask::Leave => self.tell("/shutdown_weight_transfer_engine", None).await?,
            Ask::Start => return self.start().await,
            Ask::Finish => {
                let body = json!({ "weight_version": version.to_string() });
                self.tell("/finish_weight_update", Some(body)).await?;
            }
            Ask::Resume => self.tell("/resume", None).await?,
        }
        Ok(Said::Done)
    }

    async fn start(&self) -> Result<Said> {
        let path = "/start_weight_update";
        let answer = ask(&self.url, self.long, Method::POST, path, None).await?;
        let words = answer.words();
        if !answer.is_success() && words.contains("already active") {
            return Ok(Said::Open);
        }
        self.done(path, &answer)?;
        Ok(Said::Done)
    }

    /// Has the server's workers join a world; ends when they have.
    ///
    /// # Errors
    ///
    /// As [`ask`](Self::ask); `Protocol` if the world's id is none of NCCL.
    pub(crate) async fn join(&self, world: &World) -> Result<()> {
        if world.id.len() != UNIQUE_ID_BYTES {
            let message = format!("an id of {} bytes; NCCL's have 128", world.id.len());
            return Err(Error::new(ErrorKind::Protocol, "forming a world", message));
        }
        let info = init_info(&STANDARD.encode(&world.id), world);
        self.tell("/init_weight_transfer_engine", Some(json!({ "init_info": info }))).await
    }

    /// Has the server's workers receive a bucket and load it; ends when they have.
    ///
    /// # Errors
    ///
    /// As [`ask`](Self::ask).
    pub(crate) async fn update(&self, body: &Value) -> Result<()> {
        let path = "/update_weights";
        let answer = ask(&self.url, self.long, Method::POST, path, Some(body)).await?;
        self.done(path, &answer)
    }

    async fn tell(&self, path: &str, body: Option<Value>) -> Result<()> {
        let answer = ask(&self.url, self.long, Method::POST, path, body.as_ref()).await?;
        self.done(path, &answer)
    }

    async fn weights(&self) -> Result<String> {
        let path = "/weight_info";
        let answer = ask(&self.url, self.short, Method::GET, path, None).await?;
        self.done(path, &answer)?;
        let version = answer.json()["weight_version"].as_str().map(str::to_owned);
        version.ok_or_else(|| self.odd(path, &answer))
    }

    /// Whether it is there, and all that it needs to be sent to.
    async fn look(&self) -> Result<Facts> {
        let health = ask(&self.url, self.short, Method::GET, "/health", None).await?;
        if !health.is_success() {
            return Err(self.refusal("/health", &health, "its engine is dead: start it anew"));
        }
        let path = "/get_world_size";
        let size = ask(&self.url, self.short, Method::GET, path, None).await?;
        self.done(path, &size)?;
        let workers = size.json()["world_size"].as_u64().and_then(|size| u32::try_from(size).ok());
        let workers = workers.filter(|workers| *workers > 0);
        let workers = workers.ok_or_else(|| self.odd(path, &size))?;
        let weights = self.weights().await?;
        self.is_configured().await?;
        Ok(Facts { workers, weights })
    }

    /// Whether the server was started for this transport. It says so when it is asked to join a world that cannot be:
    /// nothing else does without side effects.
    async fn is_configured(&self) -> Result<()> {
        let path = "/init_weight_transfer_engine";
        let world = World { id: Vec::new(), size: 2, first: 1, bucket_bytes: 1 };
        let body = json!({ "init_info": init_info("", &world) });
        let answer = ask(&self.url, self.short, Method::POST, path, Some(&body)).await?;
        let words = answer.words();
        if answer.is_success() {
            return Err(self.odd(path, &answer));
        }
        if words.contains("need nccl_unique_id_b64") {
            return Ok(());
        }
        let remedy = if words.contains("not configured") {
            CONFIG.to_owned()
        } else if words.contains("unexpected keyword argument 'nccl_unique_id_b64'") {
            format!(
                "its --weight-transfer-config has another backend, or it is older than 0.33: {CONFIG}"
            )
        } else if words.contains("unexpected keyword") || words.contains("missing") {
            format!("its --weight-transfer-config has another backend: {CONFIG}")
        } else {
            return self.done(path, &answer);
        };
        Err(self.refusal(path, &answer, &remedy))
    }

    /// The error of an answer that is none of success.
    fn done(&self, path: &str, answer: &Answer) -> Result<()> {
        match answer.status {
            200..300 => Ok(()),
            404 => {
                let remedy = "there is no such route: set VLLM_SERVER_DEV_MODE=1 where the server is started, and \
                              use vLLM 0.33 or later";
                Err(self.refusal(path, answer, remedy))
            }
            _ => Err(self.refusal(path, answer, "")),
        }
    }

    fn refusal(&self, path: &str, answer: &Answer, remedy: &str) -> Error {
        let (status, words) = (answer.status, answer.words());
        let mut message = format!("status {status}");
        for part in [&*words, remedy] {
            if !part.is_empty() {
                message = format!("{message}: {part}");
            }
        }
        let operation = self.operation(path);
        match remedy.is_empty() {
            true => Error::new(ErrorKind::Io, operation, message).recovery(Recovery::Retry),
            // A server that refuses because of how it was started refuses again.
            false => Error::new(ErrorKind::Config, operation, message),
        }
    }

    fn odd(&self, path: &str, answer: &Answer) -> Error {
        let message = format!(
            "status {} with an answer that is not vLLM's: {}",
            answer.status,
            answer.words()
        );
        Error::new(ErrorKind::Protocol, self.operation(path), message)
    }

    fn operation(&self, path: &str) -> String {
        format!("{}{path}", self.url)
    }
}

/// How workers meet the trainer. With a bucket that never exceeds the buffer size, or is a single weight, they take every
/// call's weights by one broadcast.
fn init_info(id: &str, world: &World) -> Value {
    json!({
        "nccl_unique_id_b64": id,
        "rank_offset": world.first,
        "world_size": world.size,
        "packed": true,
        "packed_buffer_size_bytes": world.bucket_bytes,
        "packed_num_buffers": 1,
    })
}

/// What servers are told of a bucket.
///
/// # Errors
///
/// `Weight` for types that torch does not have.
pub(crate) fn update_info(chunk: &Chunk) -> Result<Value> {
    let metas = || chunk.jobs.iter().map(|job| job.weight.meta());
    let types: Result<Vec<_>> = chunk.jobs.iter().map(|job| torch_name(&job.weight)).collect();
    Ok(json!({ "update_info": {
        "names": metas().map(|meta| &*meta.name).collect::<Vec<_>>(),
        "dtype_names": types?,
        "shapes": metas().map(|meta| &*meta.shape).collect::<Vec<_>>(),
    }}))
}

/// One thing that was looked at, and what was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: String,
    /// Whether it is as it has to be.
    pub passed: bool,
    /// What was found, in words.
    pub details: String,
}

/// Looks at a server: whether it is there, and has all that it needs to be sent to. Nothing is changed there.
pub async fn examine(url: &ServerUrl, limit: Duration) -> Vec<Check> {
    let server = Vllm { url: url.clone(), pause: Pause::None, short: limit, long: limit };
    let version = ask(url, limit, Method::GET, "/version", None).await;
    let version = version.and_then(|answer| {
        server.done("/version", &answer)?;
        let version = answer.json()["version"].as_str().map(str::to_owned);
        version.ok_or_else(|| server.odd("/version", &answer))
    });
    let looked = server.look().await.map(|facts| {
        let Facts { workers, weights } = facts;
        format!("{workers} workers take weights over NCCL; they have version `{weights}`")
    });
    let check = |name: &str, found: Result<String>| {
        let (passed, details) = match found {
            Ok(details) => (true, details),
            Err(error) => (false, error.to_string()),
        };
        Check { name: name.to_owned(), passed, details }
    };
    vec![check("version", version), check("weight transfer", looked)]
}
