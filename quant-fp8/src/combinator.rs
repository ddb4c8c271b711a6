//! `quantize_fp8`: a stream whose matrices travel as FP8.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll, ready};

use engine_core::{
    ArenaArc, DType, Error, ErrorKind, IntoWeightStream, Result, TensorMeta, Treatment, Weight,
    WeightStream,
};
use futures::StreamExt;

use crate::encoding::{Fp8Layout, Layouts, quantized, sizes, source_type};
use crate::rules::{Consistency, Decision, QuantPlan, Rule, Rules, RulesConfig, Stored, Window};
use crate::{Codec, Fp8Format};

/// What decides on the weights of a stream: a [`QuantPlan`], which knows all of them, or [`Rules`], which look at a
/// weight and its neighbours.
///
/// Cheap to clone: one serves all updates.
#[derive(Clone, Debug)]
pub struct Fp8Quantizer {
    decisions: Arc<Decisions>,
    codec: Codec,
    /// The decisions of the last complete stream. The next stream is nearly always the same.
    last: Arc<Mutex<Arc<[Decided]>>>,
}

/// What was decided on a weight of a stream.
#[derive(Clone, Debug)]
pub(crate) struct Decided {
    /// The weight as it came.
    meta: ArenaArc<TensorMeta>,
    before: Treatment,
    decision: Decision,
    rule: Rule,
    becomes: Becomes,
}

#[derive(Clone, Debug)]
enum Becomes {
    Quantized(ArenaArc<Fp8Layout>),
    /// It passes unchanged, with its treatment recorded.
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

    /// The decisions of the last complete stream of all weights.
    pub(crate) fn last(&self) -> Arc<[Decided]> {
        // A panic elsewhere leaves the list as it was.
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
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
    /// Both are computed while the weight is written into its bucket; only the scales are kept. Every other weight
    /// passes unchanged, marked with the reason.
    ///
    /// Weights that are FP8 already pass through with their scales, also those of another
    /// `quantize_fp8`.
    ///
    /// # Contract
    ///
    /// A layer that the receiver makes of several weights is quantised as a whole or not at all. With [`Rules`], the
    /// first stream therefore reads ahead before it yields a weight that begins such a layer: as long as the
    /// following weights belong to the same module, and at most 256 MiB and a weight. Later streams with the same
    /// weights hold nothing back. If the parts of a layer are further apart, and a late one contradicts the decision
    /// on the first ones, the stream ends with an error. A [`QuantPlan`] does not read ahead.
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
        quantize(self.into_weight_stream(), quantizer.into(), None)
    }
}

impl<'a, M, S: IntoWeightStream<'a, M>> QuantizeFp8<'a, M> for S {}

/// A stream that brings only some weights of a version.
///
/// A layer is quantised as a whole or not at all also if the stream brings a part of it. So a weight that the version has in the same type
/// and shape is treated as it was there, and at the end of the stream every decision has to be the one that the whole version would give.
#[derive(Debug)]
pub(crate) struct Part {
    version: Arc<[Decided]>,
    /// The indices of its weights.
    places: HashMap<Arc<str>, usize>,
    rules: Arc<RulesConfig>,
    next: Arc<OnceLock<Arc<[Decided]>>>,
}

impl Part {
    /// A part of the version that comes after this one.
    pub(crate) fn after(version: Arc<[Decided]>, rules: Arc<RulesConfig>) -> Self {
        let places = (0..).zip(&*version).map(|(at, decided)| (decided.meta.name.clone(), at));
        Self { places: places.collect(), version, rules, next: Arc::default() }
    }

    /// The decisions on the new version, once the stream has ended.
    pub(crate) fn next(&self) -> Arc<OnceLock<Arc<[Decided]>>> {
        self.next.clone()
    }

    /// What was decided on a weight that the version has as well.
    fn before(&self, weight: &Weight) -> Option<(Decision, Rule)> {
        let decided = &self.version[*self.places.get(weight.name())?];
        let is_same = decided.meta == *weight.meta() && decided.before == *weight.treatment();
        is_same.then(|| (decided.decision, decided.rule.clone()))
    }

    /// Compares the decisions on all weights of the new version with those that it would have as a whole.
    fn end(self, decided: Vec<Decided>) -> Result<()> {
        let names: HashSet<Arc<str>> = decided.iter().map(|one| one.meta.name.clone()).collect();
        let others = self.version.iter().filter(|one| !names.contains(&one.meta.name)).cloned();
        let all: Vec<Decided> = decided.into_iter().chain(others).collect();
        let described = |one: &Decided| {
            Ok((one.meta.name.to_string(), sizes(&one.meta)?, stored(one.meta.dtype)))
        };
        let parameters = all.iter().map(described).collect::<Result<Vec<_>>>()?;
        let plan = QuantPlan::resolve(parameters, &self.rules)?;
        let planned = |one: &Decided| plan.get(&one.meta.name).map(|entry| entry.decision);
        let differs = |one: &&Decided| {
            one.before == Treatment::Plain && planned(one).is_some_and(|it| it != one.decision)
        };
        if let Some(one) = all.iter().find(differs) {
            let message = "with this part of a version, other weights of its layer would have to be quantised or kept than are: send the whole version";
            let error = Error::new(ErrorKind::Mismatch, "quantising to FP8", message);
            return Err(error.tensor(&*one.meta.name));
        }
        // A stream ends once.
        drop(self.next.set(all.into()));
        Ok(())
    }
}

/// [`quantize_fp8`](QuantizeFp8::quantize_fp8) for a stream of only some weights of a version.
pub(crate) fn quantize_part<'a>(
    weights: WeightStream<'a>,
    quantizer: &Fp8Quantizer,
    part: Part,
) -> WeightStream<'a> {
    quantize(weights, quantizer.clone(), Some(part))
}

fn quantize(
    weights: WeightStream<'_>,
    quantizer: Fp8Quantizer,
    part: Option<Part>,
) -> WeightStream<'_> {
    // A part has other weights than the last stream in the same places.
    let last = if part.is_some() { Arc::default() } else { quantizer.last() };
    let following = VecDeque::new();
    let ended = false;
    let mut state = State { weights, quantizer, part, last, at: 0, anew: None, following, ended };
    let mut failed = false;
    WeightStream::new(futures::stream::poll_fn(move |cx| {
        if failed {
            return Poll::Ready(None);
        }
        let next = ready!(state.poll_next(cx));
        failed = next.is_err();
        Poll::Ready(next.transpose())
    }))
}

struct State<'a> {
    weights: WeightStream<'a>,
    quantizer: Fp8Quantizer,
    /// If the stream has only some weights of a version, and has not ended.
    part: Option<Part>,
    /// The last stream's decisions, and how many of them have held so far.
    last: Arc<[Decided]>,
    at: usize,
    /// The decisions from where the stream differs from the last one.
    anew: Option<Anew>,
    /// Scales, after their codes.
    following: VecDeque<Weight>,
    /// Whether there are no more weights.
    ended: bool,
}

/// Decisions that were not made before, after those that were.
#[derive(Default)]
struct Anew {
    decided: Vec<Decided>,
    consistency: Consistency,
    /// Weights whose layer is not known yet.
    window: Window<Weight>,
    /// Of what is quantised.
    layouts: Layouts,
}

impl Anew {
    fn push(&mut self, decided: Decided) {
        self.consistency.observe(&decided.meta.name, stored(decided.meta.dtype));
        self.decided.push(decided);
    }
}

impl State<'_> {
    /// The next weight, or the end.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Weight>>> {
        if let Some(scales) = self.following.pop_front() {
            return Poll::Ready(Ok(Some(scales)));
        }
        loop {
            if let Some(weight) = self.settled()? {
                return Poll::Ready(self.treat(weight).map(Some));
            }
            if self.ended {
                self.end()?;
                return Poll::Ready(Ok(None));
            }
            match ready!(self.weights.poll_next_unpin(cx)).transpose()? {
                Some(weight) => {
                    if let Some(becomes) = self.as_before(&weight) {
                        return Poll::Ready(self.become_(weight, &becomes).map(Some));
                    }
                    self.look_at(weight)?;
                }
                None => self.ended = true,
            }
        }
    }

    /// What becomes of a weight at the same position as in the last stream.
    fn as_before(&mut self, weight: &Weight) -> Option<Becomes> {
        let decided = self.last.get(self.at).filter(|decided| {
            let Decided { meta, before, .. } = decided;
            self.anew.is_none() && meta == weight.meta() && before == weight.treatment()
        })?;
        self.at += 1;
        Some(decided.becomes.clone())
    }

    /// Decides on a weight by itself.
    fn look_at(&mut self, weight: Weight) -> Result<()> {
        let shape = sizes(weight.meta())?;
        let name = weight.meta().name.clone();
        let by_itself = match weight.treatment() {
            Treatment::Converted => (Decision::Pass, Rule::AlreadyFp8),
            Treatment::Added => (Decision::Pass, Rule::IsScale),
            _ if let Some(before) = self.part.as_ref().and_then(|part| part.before(&weight)) => {
                before
            }
            _ => self.quantizer.decide(&name, &shape, stored(weight.meta().dtype))?,
        };
        let bytes = weight.source_bytes();
        self.anew()?.window.push(weight, &name, &shape, bytes, by_itself);
        Ok(())
    }

    /// The next weight that the rest of the stream will not change anything about.
    fn settled(&mut self) -> Result<Option<(Weight, Decision, Rule)>> {
        let Some(anew) = &mut self.anew else { return Ok(None) };
        Ok(match &*self.quantizer.decisions {
            Decisions::Rules(rules) => anew.window.pop(rules, self.ended)?,
            Decisions::Plan(_) => anew.window.pop_as_it_is(),
        })
    }

    fn treat(&mut self, (weight, decision, rule): (Weight, Decision, Rule)) -> Result<Weight> {
        let (meta, before) = (weight.meta().clone(), weight.treatment().clone());
        let becomes = match (decision, &rule) {
            _ if before != Treatment::Plain => Becomes::Recorded(before.clone()),
            (Decision::Quantize, _) => {
                let format = *self.quantizer.format();
                Becomes::Quantized(self.anew()?.layouts.layout(&meta, format)?)
            }
            (Decision::Pass, Rule::IsScale) => Becomes::Recorded(Treatment::Added),
            (Decision::Pass, _) => Becomes::Recorded(Treatment::PassedThrough),
            // Worth a look by name: it may be a projection under a new one.
            (Decision::Keep, Rule::Unlisted) => {
                Becomes::Recorded(Treatment::Kept(format!("no rule knows {}", meta.name).into()))
            }
            (Decision::Keep, rule) => Becomes::Recorded(Treatment::Kept(rule.to_string().into())),
        };
        let decided = Decided { meta, before, decision, rule, becomes: becomes.clone() };
        self.anew()?.push(decided);
        self.become_(weight, &becomes)
    }

    fn become_(&mut self, weight: Weight, becomes: &Becomes) -> Result<Weight> {
        match becomes {
            Becomes::Recorded(treatment) => Ok(weight.with_treatment(treatment.clone())),
            Becomes::Quantized(layout) => {
                let [codes, scales] = quantized(weight, layout, self.quantizer.codec)?;
                self.following.push_back(scales);
                Ok(codes)
            }
        }
    }

    /// Leaves the last stream's decisions, which stay true of what came so far.
    fn anew(&mut self) -> Result<&mut Anew> {
        if self.anew.is_none() {
            let mut anew = Anew::default();
            for decided in &self.last[..self.at] {
                let Decided { meta, decision, rule, .. } = decided;
                anew.window.passed(&meta.name, &sizes(meta)?, *decision, rule.clone());
                anew.push(decided.clone());
            }
            self.anew = Some(anew);
        }
        Ok(self.anew.get_or_insert_default())
    }

    /// Checks what can only be checked at the end.
    fn end(&mut self) -> Result<()> {
        if self.anew.is_none() && self.at == self.last.len() && self.part.is_none() {
            return Ok(()); // The last stream was checked, and this one was the same.
        }
        let Anew { decided, consistency, .. } = std::mem::take(self.anew()?);
        consistency.finish()?;
        if let Some(part) = self.part.take() {
            self.anew = None;
            return part.end(decided);
        }
        // A stream that is asked again at its end compares with itself.
        (self.at, self.last, self.anew) = (decided.len(), decided.into(), None);
        let mut last = self.quantizer.last.lock().unwrap_or_else(PoisonError::into_inner);
        *last = self.last.clone();
        Ok(())
    }
}
