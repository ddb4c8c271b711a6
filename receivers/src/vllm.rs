//! vLLM's protocol: its routes, what is said on them, and what its answers mean.
//!
//! The routes are there with `VLLM_SERVER_DEV_MODE=1`, and what they do with `--weight-transfer-config`.

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use engine_core::{Result, Version};
use hyper::Method;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::chunk::Tensors;
use crate::fleet::{Ask, Facts, Said};
use crate::http::{Client, Kind, ServerUrl, ask};
use crate::server::{Server, World};

/// What a server's `--weight-transfer-config` has to be.
const CONFIG: &str = "start it with --weight-transfer-config '{\"backend\": \"nccl\"}'";

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

/// A server of vLLM.
#[derive(Clone, Debug)]
pub(crate) struct Vllm {
    pub(crate) client: Client,
    pub(crate) pause: Pause,
}

/// What is said of these servers.
pub(crate) const KIND: Kind = Kind {
    name: "vLLM",
    no_route: "there is no such route: set VLLM_SERVER_DEV_MODE=1 where the server is started, and use vLLM 0.33 or \
               later",
};

#[async_trait]
impl Server for Vllm {
    fn url(&self) -> &ServerUrl {
        &self.client.url
    }

    async fn ask(&self, question: Ask, version: Version) -> Result<Said> {
        let tell =
            async |path: &str, body: Option<Value>| self.client.tell(path, body.as_ref()).await;
        match question {
            Ask::Look => return self.look().await.map(Said::Facts),
            Ask::Recall => return self.weights().await.map(Said::Version),
            Ask::Pause => tell(&format!("/pause?mode={}", self.pause.name()), None).await?,
            Ask::Reset => {
                // An update may be open or not. Once one is, ending it makes the server forget what it counted.
                self.start().await?;
                tell("/finish_weight_update", None).await?;
            }
            Ask::Leave => tell("/shutdown_weight_transfer_engine", None).await?,
            Ask::Start => return self.start().await,
            Ask::Finish => {
                let body = json!({ "weight_version": version.to_string() });
                tell("/finish_weight_update", Some(body)).await?;
            }
            Ask::Resume => tell("/resume", None).await?,
        }
        Ok(Said::Done)
    }

    async fn join(&self, world: &World) -> Result<()> {
        let info = init_info(&STANDARD.encode(&world.id), world);
        let body = json!({ "init_info": info });
        self.client.tell("/init_weight_transfer_engine", Some(&body)).await
    }

    fn describe(&self, tensors: &Tensors) -> Value {
        let Tensors { names, types, shapes } = tensors;
        json!({ "update_info": { "names": names, "dtype_names": types, "shapes": shapes } })
    }

    async fn update(&self, body: &Value) -> Result<()> {
        self.client.tell("/update_weights", Some(body)).await
    }
}

impl Vllm {
    async fn start(&self) -> Result<Said> {
        let path = "/start_weight_update";
        let answer = self.client.post(path, None, self.client.long).await?;
        if !answer.is_success() && answer.words().contains("already active") {
            return Ok(Said::Open);
        }
        self.client.done(path, &answer)?;
        Ok(Said::Done)
    }

    async fn weights(&self) -> Result<String> {
        let path = "/weight_info";
        let answer = self.client.get(path).await?;
        let version = answer.json()["weight_version"].as_str().map(str::to_owned);
        version.ok_or_else(|| self.client.odd(path, &answer))
    }

    /// Whether it is there, and all that it needs to be sent to.
    async fn look(&self) -> Result<Facts> {
        let Client { url, short, .. } = &self.client;
        let health = ask(url, *short, Method::GET, "/health", None).await?;
        if !health.is_success() {
            let remedy = "its engine is dead: start it anew";
            return Err(self.client.refusal("/health", &health, remedy));
        }
        let path = "/get_world_size";
        let size = self.client.get(path).await?;
        let workers = size.json()["world_size"].as_u64().and_then(|size| u32::try_from(size).ok());
        let workers = workers.filter(|workers| *workers > 0);
        let workers = workers.ok_or_else(|| self.client.odd(path, &size))?;
        let weights = self.weights().await?;
        self.is_configured().await?;
        Ok(Facts { workers, weights })
    }

    /// Whether the server was started for this transport. It says so when it is asked to join a world that cannot be:
    /// nothing else does without side effects.
    async fn is_configured(&self) -> Result<()> {
        let path = "/init_weight_transfer_engine";
        let world = World { id: Vec::new(), size: 2, first: 1, bucket_bytes: 1, meeting: None };
        let body = json!({ "init_info": init_info("", &world) });
        let answer = self.client.post(path, Some(&body), self.client.short).await?;
        let words = answer.words();
        if answer.is_success() {
            return Err(self.client.odd(path, &answer));
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
            return self.client.done(path, &answer);
        };
        Err(self.client.refusal(path, &answer, &remedy))
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

/// Looks at a server of vLLM, of this version, without changing anything there: what it is, in words.
///
/// # Errors
///
/// What it lacks to be sent to.
pub(crate) async fn examine(client: Client) -> Result<String> {
    let Facts { workers, weights } = Vllm { client, pause: Pause::None }.look().await?;
    Ok(format!("{workers} workers take weights over NCCL; they have version `{weights}`"))
}
