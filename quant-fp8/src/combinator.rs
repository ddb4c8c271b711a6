//! `quantize_fp8`: a stream whose matrices travel as FP8.

use std::collections::VecDeque;
use std::sync::Arc;

use engine_core::{
    DType, Error, ErrorKind, IntoWeightStream, Result, Treatment, Weight, WeightStream,
};
use futures::StreamExt;

use crate::encoding::{quantized, sizes, source_type};
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
}

#[derive(Debug)]
enum Decisions {
    Rules(Rules),
    Plan(QuantPlan),
}

impl From<Rules> for Fp8Quantizer {
    fn from(rules: Rules) -> Self {
        Self { decisions: Arc::new(Decisions::Rules(rules)), codec: Codec::best() }
    }
}

impl From<QuantPlan> for Fp8Quantizer {
    fn from(plan: QuantPlan) -> Self {
        Self { decisions: Arc::new(Decisions::Plan(plan)), codec: Codec::best() }
    }
}

impl From<&Fp8Quantizer> for Fp8Quantizer {
    fn from(quantizer: &Self) -> Self {
        quantizer.clone()
    }
}

impl Fp8Quantizer {
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
    let state = State {
        weights,
        quantizer,
        consistency: Some(Consistency::default()),
        following: VecDeque::new(),
    };
    WeightStream::new(futures::stream::try_unfold(state, |mut state| async move {
        Ok(state.next().await?.map(|weight| (weight, state)))
    }))
}

struct State<'a> {
    weights: WeightStream<'a>,
    quantizer: Fp8Quantizer,
    /// Until the end.
    consistency: Option<Consistency>,
    /// Scales, after their codes.
    following: VecDeque<Weight>,
}

impl State<'_> {
    async fn next(&mut self) -> Result<Option<Weight>> {
        if let Some(scales) = self.following.pop_front() {
            return Ok(Some(scales));
        }
        match self.weights.next().await.transpose()? {
            Some(weight) => self.treat(weight).map(Some),
            None => {
                if let Some(consistency) = self.consistency.take() {
                    consistency.finish()?;
                }
                Ok(None)
            }
        }
    }

    fn treat(&mut self, weight: Weight) -> Result<Weight> {
        let name = weight.meta().name.clone();
        let stored = stored(weight.meta().dtype);
        let (decision, rule) = match weight.treatment() {
            Treatment::Quantized => (Decision::Pass, Rule::AlreadyFp8),
            Treatment::Scale => (Decision::Pass, Rule::IsScale),
            _ => self.quantizer.decide(&name, &sizes(weight.meta())?, stored)?,
        };
        if let Some(consistency) = &mut self.consistency {
            consistency.observe(&name, stored, decision, &rule)?;
        }
        if *weight.treatment() != Treatment::Plain {
            return Ok(weight);
        }
        Ok(match (decision, rule) {
            (Decision::Quantize, _) => {
                let Fp8Quantizer { codec, .. } = self.quantizer;
                let [codes, scales] = quantized(weight, *self.quantizer.format(), codec)?;
                self.following.push_back(scales);
                codes
            }
            (Decision::Pass, Rule::IsScale) => weight.with_treatment(Treatment::Scale),
            (Decision::Pass, _) => weight.with_treatment(Treatment::PassedThrough),
            // Worth a look by name: it may be a projection under a new one.
            (Decision::Keep, Rule::Unlisted) => {
                weight.with_treatment(Treatment::Kept(format!("no rule knows {name}").into()))
            }
            (Decision::Keep, rule) => {
                weight.with_treatment(Treatment::Kept(rule.to_string().into()))
            }
        })
    }
}
