//! Why a score is what it is, line by line as it comes. What is scored again goes the way of all calls, behind training.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::response::IntoResponse;
use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
use http::{Request, Response, header};
use serde::{Deserialize, Serialize};

use super::form;
use super::score::{Asked, ErrorAnswer, Item, QuestionAsked, Receipt, Score};
use crate::edge::grpc::{MadeUp, claim, code_name, work_item};
use crate::edge::http::json::{Base64, Plain, Structured};
use crate::edge::http::response::Refused;
use crate::edge::http::{Call, Edge, Outcome, Served, outcomes};
use crate::edge::layers::arrivals::Arrivals;
use crate::edge::layers::byte_budget::Hold;
use crate::edge::proto;
use crate::error::{ScoreError, quoted};
use crate::explain::{Plan, Probe};
use crate::request_context::{Claim, Priority};

/// The cells where a call says nothing.
const CELLS: usize = 49;
/// The most scores of one call of those that an explanation is made of, and the bytes of pictures after which it has no more.
const MOST_AT_ONCE: usize = 16;
const BYTES_AT_ONCE: usize = 16 << 20;

/// The body of `POST /v1/explain` in JSON.
#[derive(Deserialize)]
struct ExplainRequest {
    prompt: Option<String>,
    image: Base64,
    references: Option<Structured<Vec<Base64>>>,
    questions: Option<Structured<Vec<Structured<QuestionAsked>>>>,
    model: Option<String>,
    cells: Option<Plain<usize>>,
}

/// What a call asks to be explained.
struct Question {
    asked: Asked,
    cells: Option<usize>,
}

impl From<ExplainRequest> for Question {
    fn from(asked: ExplainRequest) -> Self {
        let ExplainRequest { prompt, image, references, questions, model, cells } = asked;
        let item = Item { prompt, image, references, questions };
        let models = model.into_iter().collect();
        let asked = Asked { prompt: None, items: vec![item.into()], models, inspect: false };
        Self { asked, cells: cells.map(|Plain(cells)| cells) }
    }
}

/// A line of the answer.
#[derive(Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
enum Line {
    /// The first: what is to come.
    Plan {
        model: String,
        scores: usize,
        rows: usize,
        columns: usize,
        reach: usize,
    },
    Whole(Found),
    Mirrored(Found),
    Dropped {
        text: String,
        without: String,
        #[serde(flatten)]
        found: Found,
    },
    Turned {
        from: String,
        to: String,
        prompt: String,
        #[serde(flatten)]
        found: Found,
    },
    Cell {
        row: usize,
        column: usize,
        #[serde(flatten)]
        found: Found,
    },
    /// The last, where all went well.
    Done {
        receipt: Receipt,
    },
    /// The last, where it did not.
    Error {
        error: ErrorAnswer,
    },
}

/// A score, and how much it is below the whole one; or why there is none.
#[derive(Serialize)]
#[serde(untagged)]
enum Found {
    Score {
        #[serde(flatten)]
        score: Score,
        cost: f64,
    },
    Error {
        error: ErrorAnswer,
    },
}

impl Line {
    fn of(probe: Probe, found: Found) -> Self {
        match probe {
            Probe::Whole => Self::Whole(found),
            Probe::Mirrored => Self::Mirrored(found),
            Probe::Dropped(clause) => Self::Dropped { text: clause.text, without: clause.without, found },
            Probe::Turned(turned) => {
                Self::Turned { from: turned.from, to: turned.to, prompt: turned.prompt, found }
            }
            Probe::Covered(cell) => Self::Cell { row: cell.row, column: cell.column, found },
        }
    }
}

/// `POST /v1/explain`.
pub(in crate::edge::http) async fn explain(
    State(edge): State<Edge>,
    request: Request<Body>,
) -> Result<Response<Body>, Refused> {
    let parse = form::or_json::<ExplainRequest, _, _>(request.headers(), "cells", |asked, cells| {
        let number = |text: String| {
            text.parse().map_err(|_| ScoreError::invalid("cells", format!("is {}, no number", quoted(&text))))
        };
        Ok(Question { asked, cells: cells.map(number).transpose()? })
    })?;
    let most = edge.explain_cells;
    let ((question, own), call) = edge
        .read_as(request, parse, |question, served: &Served| Ok((question, served.own.info.name.clone())))
        .await?;
    let Question { asked: Asked { prompt, items, mut models, .. }, cells } = question;
    if cells.is_some_and(|cells| cells > most) {
        return Err(ScoreError::invalid("cells", format!("is more than the {most} that there may be")).into());
    }
    let Ok([item]) = <[_; 1]>::try_from(items) else {
        return Err(ScoreError::invalid("image", "must be one; each is explained by itself").into());
    };
    if models.is_empty() {
        models.push(own);
    }
    let item = proto::ScoreItem { prompt: item.prompt.clone().or(prompt), ..item.into() };
    let mut explanation =
        Explanation::new(edge, item, models, cells.unwrap_or(CELLS.min(most)), call).await?;
    // What is refused as a whole is refused as other calls are.
    explanation.step().await?;
    let lines = explanation.lines().map(|line| {
        let mut line = serde_json::to_vec(&line).unwrap_or_default();
        line.push(b'\n');
        Ok::<_, Infallible>(Bytes::from(line))
    });
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response())
}

/// The item of a probe.
fn changed(plan: &Plan, item: &proto::ScoreItem, probe: &Probe) -> proto::ScoreItem {
    let (picture, prompt) = plan.item(probe);
    let raw = proto::RawImage { width: picture.width, height: picture.height, rgb8: picture.pixels };
    let image = Some(proto::Image { source: Some(proto::image::Source::Raw(raw)) });
    proto::ScoreItem { prompt: Some(prompt.to_owned()), image, ..item.clone() }
}

/// An explanation on its way.
struct Explanation {
    edge: Edge,
    call: Call,
    /// What is scored, but for its picture and prompt.
    item: proto::ScoreItem,
    models: Vec<String>,
    plan: Arc<Plan>,
    /// How many of the plan's probes are scored.
    done: usize,
    /// The score of the whole.
    whole: Option<f64>,
    receipt: Option<Receipt>,
    /// What is known and not told.
    lines: VecDeque<Line>,
    over: bool,
    _room: Option<Hold>,
}

impl Explanation {
    async fn new(
        edge: Edge,
        item: proto::ScoreItem,
        models: Vec<String>,
        cells: usize,
        mut call: Call,
    ) -> Result<Self, Refused> {
        call.priority = Priority::Evaluation;
        call.extensions.insert(MadeUp);
        let engine = edge.handlers.engine()?;
        let claim = Claim { priority: call.priority, ..claim(&call.extensions) };
        let ready = engine.models().ready(&models).await?;
        let [model] = ready.as_slice() else {
            return Err(ScoreError::invalid("model", "must be one; each explains by itself").into());
        };
        let work = work_item(item.clone(), None)?;
        let prompt = work.prompt.to_string();
        let look = engine.admit_look(model, work, &claim).await?;
        let arrivals: Arrivals = call.extensions.get().cloned().unwrap_or_default();
        // The picture, and copies of it with a part covered: one more than go together.
        let room = arrivals.beside(3 * look.decoded_bytes() + BYTES_AT_ONCE)?;
        let picture = engine.decode(look, &claim).await?;
        let cost = picture.pixels.len();
        let plan =
            engine.unpack(&claim, cost, move || Ok(Arc::new(Plan::new(picture, prompt, cells)))).await?;
        let first = Line::Plan {
            model: model.info.name.clone(),
            scores: plan.probes.len(),
            rows: plan.grid.rows,
            columns: plan.grid.columns,
            reach: plan.grid.reach(),
        };
        Ok(Self {
            edge,
            call,
            item,
            models,
            plan,
            done: 0,
            whole: None,
            receipt: None,
            lines: VecDeque::from([first]),
            over: false,
            _room: room,
        })
    }

    /// Scores the next few.
    async fn step(&mut self) -> Result<(), Refused> {
        let engine = self.edge.handlers.engine()?;
        let most = (BYTES_AT_ONCE / self.plan.bytes().max(1)).clamp(1, MOST_AT_ONCE);
        let most = most.min(engine.limits().max_items_per_request);
        let probes: Vec<Probe> = self.plan.probes.iter().skip(self.done).take(most).cloned().collect();
        let claim = Claim { priority: self.call.priority, ..claim(&self.call.extensions) };
        let (plan, item, these) = (Arc::clone(&self.plan), self.item.clone(), probes.clone());
        let work = move || Ok(these.iter().map(|probe| changed(&plan, &item, probe)).collect());
        let items = engine.unpack(&claim, probes.len() * self.plan.bytes(), work).await?;
        let message = proto::ScoreRequest { items, models: self.models.clone(), ..Default::default() };
        let proto::ScoreResponse { results, receipts, .. } = self.edge.ask(message, &self.call).await?;
        let receipt = receipts.into_iter().next().map(Receipt::from);
        if self.receipt.is_some() && receipt != self.receipt {
            return Err(ScoreError::Unavailable("the model was replaced meanwhile: try again").into());
        }
        self.receipt = receipt;
        self.done += probes.len();
        for (probe, result) in probes.into_iter().zip(results) {
            let Some(outcome) = outcomes(result).pop() else { continue };
            let found = self.found(outcome);
            if probe == Probe::Whole && self.whole.is_none() {
                // There is nothing to hold the others against.
                self.over = true;
                if let Found::Error { error } = found {
                    self.lines.push_back(Line::Error { error });
                }
                return Ok(());
            }
            self.lines.push_back(Line::of(probe, found));
        }
        if self.done == self.plan.probes.len() {
            self.over = true;
            self.lines.extend(self.receipt.take().map(|receipt| Line::Done { receipt }));
        }
        Ok(())
    }

    fn found(&mut self, outcome: Outcome) -> Found {
        match outcome {
            Ok(score) => {
                let mean = f64::from(score.mean);
                let whole = *self.whole.get_or_insert(mean);
                Found::Score { score: score.into(), cost: whole - mean }
            }
            Err(error) => Found::Error { error: error.into() },
        }
    }

    /// All lines to the last.
    fn lines(self) -> impl Stream<Item = Line> {
        stream::unfold(self, |mut this| async {
            loop {
                if let Some(line) = this.lines.pop_front() {
                    return Some((line, this));
                }
                if this.over {
                    return None;
                }
                if let Err(refused) = this.step().await {
                    this.over = true;
                    let status = refused.status();
                    let (code, message) = (code_name(status.code()), status.message().to_owned());
                    this.lines.push_back(Line::Error { error: ErrorAnswer { code, message } });
                }
            }
        })
    }
}
