//! `quantize_fp8`: a stream whose matrices travel as FP8.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use engine_core::{
    DType, Error, ErrorKind, IntoWeightStream, Result, TensorMeta, Treatment, Weight, WeightStream,
};
use futures::StreamExt;

use crate::encoding::{Fp8Layout, quantized, sizes, source_type};
use crate::rules::{Consistency, Decision, QuantPlan, Rule, Rules, Stored};
use crate::{Codec, Fp8Format};

/// What decides on the weights of a stream: a [`QuantPlan`], which knows all of them, or [`Rules`],
/// which look at one after the other.
///
/// Cheap to clone: one serves all updates.
#[derive(Clone, Debug)]
pub struct Fp8Quantizer {
    decisions: Arc<Decisions>,
    codec: Codec,
    /// What was decided in the last stream that was whole: the next one hardly ever differs.
    last: Arc<Mutex<Arc<[Decided]>>>,
}

/// What was decided on a weight of a stream.
#[derive(Clone, Debug)]
struct Decided {
    /// The weight as it came.
    meta: TensorMeta,
    before: Treatment,
    decision: Decision,
    rule: Rule,
    becomes: Becomes,
}

#[derive(Clone, Debug)]
enum Becomes {
    Quantized(Arc<Fp8Layout>),
    /// It passes as it is, recorded as treated so.
    Recorded(Treatment),
}

#[derive(Debug)]
enum Decisions {
    Rules(Rules),
    Plan(QuantPlan),
}

impl From<Rules> for Fp8Quantizer {
    fn from(rules: Rules) -> Self {
        Self::new(Decisions::Rules(rules))
    }
}

impl From<QuantPlan> for Fp8Quantizer {
    fn from(plan: QuantPlan) -> Self {
        Self::new(Decisions::Plan(plan))
    }
}

impl From<&Fp8Quantizer> for Fp8Quantizer {
    fn from(quantizer: &Self) -> Self {
        quantizer.clone()
    }
}

impl Fp8Quantizer {
    fn new(decisions: Decisions) -> Self {
        Self { decisions: Arc::new(decisions), codec: Codec::best(), last: Arc::default() }
    }

    /// What quantised weights look like.
    pub fn format(&self) -> &Fp8Format {
        match &*self.decisions {
            Decisions::Rules(rules) => rules.format(),
            Decisions::Plan(plan) => plan.format(),
        }
    }

    fn decide(&self, name: &str, shape: &[usize], stored: Stored) -> Result<(Decision, Rule)> {
        let plan = match &*self.decisions {
            Decisions::Rules(rules) => return Ok(rules.decide(name, shape, stored)?),
            Decisions::Plan(plan) => plan,
        };
        let refuse = |message: String| {
            Error::new(ErrorKind::Mismatch, "quantising to FP8", message).tensor(name)
        };
        let entry = plan.get(name).ok_or_else(|| refuse("the plan was made without it".into()))?;
        if entry.shape != shape {
            let message = format!("its shape is {shape:?}, in the plan it is {:?}", entry.shape);
            return Err(refuse(message));
        }
        Ok((entry.decision, entry.rule.clone()))
    }
}

/// What a data type's elements are to the rules.
pub fn stored(dtype: DType) -> Stored {
    match dtype {
        DType::F8_E4M3 | DType::F8_E5M2 | DType::F8_E4M3FNUZ | DType::F8_E5M2FNUZ => Stored::Fp8,
        dtype if source_type(dtype).is_some() => Stored::Float,
        _ => Stored::Other,
    }
}

/// FP8 quantisation as a combinator on anything that yields weights.
pub trait QuantizeFp8<'a, M>: IntoWeightStream<'a, M> {
    /// Quantises the weights that the plan or the rules say, as they are packed.
    ///
    /// A weight `[rows, cols]` (or `[experts, rows, cols]`) becomes F8_E4M3 of the same name and
    /// shape, followed by its F32 scales under the name and in the shape that the format gives them.
    /// Both are computed while the weight is written into its bucket; nothing is kept but the
    /// scales. Every other weight passes as it is, marked with the reason.
    ///
    /// Weights that are FP8 already pass through with their scales, also those of another
    /// `quantize_fp8`.
    ///
    /// # Cancel safety
    ///
    /// The stream may be dropped at any time.
    ///
    /// # Errors
    ///
    /// The stream ends with an error that names the tensor: a weight that the plan or the receiver's
    /// manifest does not know or has in another shape; parts of a fused layer that would be treated
    /// differently; at the end, an FP8 weight without its scale or a scale without its weight. A
    /// block that holds NaN or infinity is an error when the weight is encoded.
    ///
    /// # Examples
    ///
    /// ```
    /// use engine_core::{DType, Weight};
    /// use futures::StreamExt;
    /// use quant_fp8::rules::{Rules, RulesConfig};
    /// use quant_fp8::QuantizeFp8;
    ///
    /// # futures::executor::block_on(async {
    /// let name = "model.layers.0.mlp.up_proj.weight";
    /// let weight = Weight::new(name, DType::BF16, [256, 384], vec![0_u8; 256 * 384 * 2])?;
    /// let mut stream = vec![weight].quantize_fp8(Rules::new(&RulesConfig::default())?);
    ///
    /// let codes = stream.next().await.expect("the codes")?;
    /// assert_eq!((codes.meta().dtype, codes.byte_len()), (DType::F8_E4M3, 256 * 384));
    /// let scales = stream.next().await.expect("the scales")?;
    /// assert_eq!(scales.name(), "model.layers.0.mlp.up_proj.weight_scale_inv");
    /// assert_eq!(&*scales.meta().shape, [2, 3]);
    /// # Ok::<(), engine_core::Error>(())
    /// # }).unwrap();
    /// ```
    fn quantize_fp8(self, quantizer: impl Into<Fp8Quantizer>) -> WeightStream<'a> {
        quantize(self.into_weight_stream(), quantizer.into())
    }
}

impl<'a, M, S: IntoWeightStream<'a, M>> QuantizeFp8<'a, M> for S {}

fn quantize(weights: WeightStream<'_>, quantizer: Fp8Quantizer) -> WeightStream<'_> {
    // A panic elsewhere leaves the list as it was.
    let last = quantizer.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let state = State { weights, quantizer, last, at: 0, anew: None, following: VecDeque::new() };
    WeightStream::new(futures::stream::try_unfold(state, |mut state| async move {
        Ok(state.next().await?.map(|weight| (weight, state)))
    }))
}

struct State<'a> {
    weights: WeightStream<'a>,
    quantizer: Fp8Quantizer,
    /// The last stream's decisions, and how many of them have held so far.
    last: Arc<[Decided]>,
    at: usize,
    /// The decisions from where the stream differs from the last one.
    anew: Option<Anew>,
    /// Scales, after their codes.
    following: VecDeque<Weight>,
}

/// Decisions that were not made before, after those that were.
#[derive(Default)]
struct Anew {
    decided: Vec<Decided>,
    consistency: Consistency,
}

impl Anew {
    fn push(&mut self, decided: Decided) -> Result<()> {
        let Decided { meta, decision, rule, .. } = &decided;
        self.consistency.observe(&meta.name, stored(meta.dtype), *decision, rule)?;
        self.decided.push(decided);
        Ok(())
    }
}

impl State<'_> {
    async fn next(&mut self) -> Result<Option<Weight>> {
        if let Some(scales) = self.following.pop_front() {
            return Ok(Some(scales));
        }
        match self.weights.next().await.transpose()? {
            Some(weight) => self.treat(weight).map(Some),
            None => {
                self.end()?;
                Ok(None)
            }
        }
    }

    fn treat(&mut self, weight: Weight) -> Result<Weight> {
        let as_before = self.last.get(self.at).filter(|decided| {
            let Decided { meta, before, .. } = decided;
            self.anew.is_none() && meta == weight.meta() && before == weight.treatment()
        });
        let becomes = match as_before {
            Some(decided) => {
                self.at += 1;
                decided.becomes.clone()
            }
            None => self.decide(&weight)?,
        };
        match becomes {
            Becomes::Recorded(treatment) => Ok(weight.with_treatment(treatment)),
            Becomes::Quantized(layout) => {
                let [codes, scales] = quantized(weight, &layout, self.quantizer.codec)?;
                self.following.push_back(scales);
                Ok(codes)
            }
        }
    }

    fn decide(&mut self, weight: &Weight) -> Result<Becomes> {
        let (meta, before) = (weight.meta().clone(), weight.treatment().clone());
        let (decision, rule) = match before {
            Treatment::Quantized => (Decision::Pass, Rule::AlreadyFp8),
            Treatment::Scale => (Decision::Pass, Rule::IsScale),
            _ => self.quantizer.decide(&meta.name, &sizes(&meta)?, stored(meta.dtype))?,
        };
        let becomes = match (decision, &rule) {
            _ if before != Treatment::Plain => Becomes::Recorded(before.clone()),
            (Decision::Quantize, _) => {
                Becomes::Quantized(Arc::new(Fp8Layout::new(&meta, *self.quantizer.format())?))
            }
            (Decision::Pass, Rule::IsScale) => Becomes::Recorded(Treatment::Scale),
            (Decision::Pass, _) => Becomes::Recorded(Treatment::PassedThrough),
            // Worth a look by name: it may be a projection under a new one.
            (Decision::Keep, Rule::Unlisted) => {
                Becomes::Recorded(Treatment::Kept(format!("no rule knows {}", meta.name).into()))
            }
            (Decision::Keep, rule) => Becomes::Recorded(Treatment::Kept(rule.to_string().into())),
        };
        let decided = Decided { meta, before, decision, rule, becomes: becomes.clone() };
        self.anew()?.push(decided)?;
        Ok(becomes)
    }

    /// Leaves the last stream's decisions, which stay true of what came so far.
    fn anew(&mut self) -> Result<&mut Anew> {
        if self.anew.is_none() {
            let mut anew = Anew::default();
            for decided in &self.last[..self.at] {
                anew.push(decided.clone())?;
            }
            self.anew = Some(anew);
        }
        Ok(self.anew.get_or_insert_default())
    }

    /// Checks what can only be checked at the end.
    fn end(&mut self) -> Result<()> {
        if self.anew.is_none() && self.at == self.last.len() {
            return Ok(()); // The last stream was checked, and this one was the same.
        }
        let Anew { decided, consistency } = std::mem::take(self.anew()?);
        consistency.finish()?;
        // A stream that is asked again at its end compares with itself.
        (self.at, self.last, self.anew) = (decided.len(), decided.into(), None);
        let mut last = self.quantizer.last.lock().unwrap_or_else(PoisonError::into_inner);
        *last = self.last.clone();
        Ok(())
    }
}
