//! Continuous batching: one thread owns the model and advances all sequences together, pass by pass.
//!
//! A pass takes one token of every text that is being written, and runs of the prompts that are being read, in turn, as many tokens
//! as `PROMPT_TOKENS`: so a long prompt slows the texts by a bounded amount a token, and prompts overtake each other. New requests
//! join between passes. Who is in a pass together changes no bit of anyone's result: sessions compute the same in every company, and
//! prompts are cut into runs by their own tokens alone (see [`super::cache`]).

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::time::{Duration, Instant};

use elleci_core::inference::{Batch, Feed, InferenceError, Output, Session};
use elleci_core::par;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::cache::PrefixCache;
use super::error::ApiError;
use super::job::{Ask, Event, Job, Submission, Ticket};
use super::metrics::Metrics;
use super::reading::{Gathered, Reading};
use super::writing::Writing;
use crate::data::tokenizer::Tokenizer;
use crate::run::model::OpenModel;

/// Tokens of prompts in a pass, unless the next run alone has more.
const PROMPT_TOKENS: usize = 128;

/// Limits of the engine.
#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// Sequences that are computed together.
    pub parallel: usize,
    /// Bytes of the prefix cache.
    pub cache_bytes: usize,
}

/// What the engine is told.
enum Message {
    /// Work.
    Submit(Submission),
    /// Ends everything there is and refuses what comes.
    Cut,
}

/// The engine, as seen by the HTTP side.
#[derive(Debug)]
pub struct Handle {
    sender: Sender<Message>,
    places: Arc<AtomicUsize>,
    queue: usize,
    timeout: Duration,
}

/// The engine's end of the handle.
pub struct Inbox(Receiver<Message>);

impl Handle {
    /// A handle that lets `queue` requests wait, each for `timeout` at most.
    pub fn new(queue: usize, timeout: Duration) -> (Handle, Inbox) {
        let (sender, receiver) = channel();
        (Handle { sender, places: Arc::default(), queue, timeout }, Inbox(receiver))
    }

    /// Hands in a request. What becomes of it comes out of the channel; dropping that ends it.
    ///
    /// # Errors
    /// A full queue; an engine that is gone.
    pub fn submit(&self, jobs: Vec<Job>) -> Result<UnboundedReceiver<Event>, ApiError> {
        let ticket = Ticket::take(&self.places, self.queue).ok_or_else(|| ApiError::busy(self.queue))?;
        let (replies, events) = unbounded_channel();
        let arrived = Instant::now();
        let (deadline, timeout_s) = (arrived + self.timeout, self.timeout.as_secs_f64());
        let ask = Arc::new(Ask { replies, arrived, deadline, timeout_s, active: AtomicUsize::new(0) });
        let message = Message::Submit(Submission { ask, jobs, ticket });
        self.sender.send(message).map_err(|_| ApiError::internal("the engine has ended"))?;
        Ok(events)
    }

    /// Requests that wait for their first sequence.
    pub fn queued(&self) -> usize {
        self.places.load(Relaxed)
    }

    /// Ends everything that is being computed.
    pub fn cut(&self) {
        let _ = self.sender.send(Message::Cut);
    }
}

/// A request of which prompts are left to be begun.
struct Waiting {
    ask: Arc<Ask>,
    jobs: VecDeque<(usize, Job)>,
    ticket: Option<Ticket>,
}

/// The loop and all that it owns.
pub struct Engine<'a> {
    open: &'a OpenModel,
    tokenizer: &'a Tokenizer,
    options: EngineOptions,
    metrics: &'a Metrics,
    batch: Batch,
    /// A session that has taken nothing
    fresh: Session,
    cache: PrefixCache,
    waiting: VecDeque<Waiting>,
    reading: VecDeque<Reading>,
    writing: Vec<Writing>,
    /// Tokens never chosen: `[that may end, that go on]`
    banned: [Vec<u32>; 2],
    /// `[writing, vocab_size]`
    logits: Vec<f32>,
    stopping: bool,
}

impl<'a> Engine<'a> {
    /// An engine without work.
    ///
    /// # Errors
    /// A model without a tokenizer; no memory for a session.
    pub fn new(open: &'a OpenModel, options: EngineOptions, metrics: &'a Metrics) -> anyhow::Result<Engine<'a>> {
        Ok(Engine {
            open,
            tokenizer: open.need_tokenizer()?,
            options,
            metrics,
            batch: Batch::new(),
            fresh: Session::new(open.packed())?,
            cache: PrefixCache::new(options.cache_bytes),
            waiting: VecDeque::new(),
            reading: VecDeque::new(),
            writing: Vec::new(),
            banned: [open.banned(false), open.banned(true)],
            logits: Vec::new(),
            stopping: false,
        })
    }

    /// Works until every handle is gone.
    pub fn run(&mut self, inbox: &Inbox) {
        // Threads stay awake from pass to pass: between two of them they would just have fallen asleep.
        while self.take_in(inbox) && par::together(|| self.work(inbox)) {}
    }

    /// Passes until there is nothing to do. False when nothing will come any more.
    fn work(&mut self, inbox: &Inbox) -> bool {
        loop {
            self.drop_over();
            self.start();
            let began = Instant::now();
            if !self.is_idle() {
                self.pass();
                self.metrics.passes.inc();
                self.metrics.busy_seconds.inc_by(began.elapsed().as_secs_f64());
            }
            self.metrics.tick(began);
            self.report();
            if self.is_idle() {
                return true;
            }
            if !self.take_in(inbox) {
                return false;
            }
        }
    }

    fn is_idle(&self) -> bool {
        self.writing.is_empty() && self.reading.is_empty()
    }

    fn report(&self) {
        self.metrics.active.set(self.slots() as i64);
        self.metrics.cache_bytes.set(self.cache.bytes() as i64);
        self.metrics.cache_sessions.set(self.cache.len() as i64);
    }

    /// Takes in what has come; without work waits for some. False when nothing will come any more.
    fn take_in(&mut self, inbox: &Inbox) -> bool {
        let idle = self.is_idle() && self.waiting.is_empty();
        let mut message =
            if idle { inbox.0.recv().map_err(|_| TryRecvError::Disconnected) } else { inbox.0.try_recv() };
        loop {
            match message {
                Ok(Message::Submit(Submission { ask, jobs, ticket })) => {
                    if self.stopping {
                        ask.tell(Event::Failed(ApiError::stopping()));
                    } else {
                        let jobs = jobs.into_iter().enumerate().collect();
                        self.waiting.push_back(Waiting { ask, jobs, ticket: Some(ticket) });
                    }
                }
                Ok(Message::Cut) => self.cut(),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
            message = inbox.0.try_recv();
        }
    }

    fn cut(&mut self) {
        self.stopping = true;
        let asks = self.waiting.drain(..).map(|w| w.ask);
        let asks = asks.chain(self.reading.drain(..).map(|r| r.ask)).chain(self.writing.drain(..).map(|w| w.ask));
        asks.for_each(|ask| ask.tell(Event::Failed(ApiError::stopping())));
    }

    /// Forgets sequences that nobody waits for, or that took too long.
    fn drop_over(&mut self) {
        let now = Instant::now();
        let lives = |ask: &Ask| match ask.over(now) {
            None => true,
            Some(reason) => {
                if let Some(error) = reason {
                    ask.tell(Event::Failed(error));
                }
                false
            }
        };
        self.waiting.retain(|w| lives(&w.ask));
        self.reading.retain(|r| lives(&r.ask));
        self.writing.retain(|w| lives(&w.ask));
    }

    /// Sequences that are being computed.
    fn slots(&self) -> usize {
        self.writing.len() + self.reading.iter().map(Reading::copies).sum::<usize>()
    }

    /// Begins prompts while there is room: of the request that has the fewest sequences, of those the oldest.
    fn start(&mut self) {
        let mut room = self.options.parallel.saturating_sub(self.slots());
        loop {
            let fewest = self.waiting.iter().enumerate().min_by_key(|(i, w)| (w.ask.active.load(Relaxed), *i));
            let Some((place, _)) = fewest else { return };
            if room == 0 {
                return;
            }
            let waiting = &mut self.waiting[place];
            let Some((index, job)) = waiting.jobs.front_mut() else {
                self.waiting.remove(place);
                continue;
            };
            // As many choices as there is room for; the others follow as places become free, and hold up nobody meanwhile.
            let part = job.take(room);
            room -= part.copies.len();
            waiting.ticket = None;
            let reading = Reading::new(waiting.ask.clone(), *index, part, &self.fresh, &mut self.cache);
            let (tokens, cached) = reading.tokens();
            self.metrics.prompt_tokens.inc_by(tokens as u64);
            self.metrics.cached_tokens.inc_by(cached as u64);
            self.reading.push_back(reading);
            if job.copies.is_empty() {
                waiting.jobs.pop_front();
            }
            if waiting.jobs.is_empty() {
                self.waiting.remove(place);
            }
        }
    }

    /// One pass, and what follows from it.
    fn pass(&mut self) {
        let mut taken = self.turn();
        let began = Instant::now();
        let computed = self.compute(&mut taken);
        self.metrics.model_seconds.inc_by(began.elapsed().as_secs_f64());
        if let Err(error) = computed {
            let error = ApiError::internal(format!("the model cannot go on: {error}"));
            let asks = taken.iter().map(|r| &r.ask).chain(self.writing.iter().map(|w| &w.ask));
            asks.for_each(|ask| ask.tell(Event::Failed(error.clone())));
            self.writing.clear();
            return;
        }
        let vocab = self.open.config().vocab_size;
        let mut logits = std::mem::take(&mut self.logits);
        let mut writing = std::mem::take(&mut self.writing);
        // Every text has a sampler and logits of its own: who chooses on which thread changes nothing.
        let mut go_on = vec![true; writing.len()];
        let texts = writing.iter_mut().zip(logits.chunks_exact_mut(vocab)).zip(&mut go_on).collect();
        par::for_each(texts, |((text, row), go_on)| *go_on = self.write(text, row));
        let mut go_on = go_on.into_iter();
        writing.retain(|_| go_on.next().unwrap_or(true));
        self.logits = logits;
        for mut reading in taken {
            if !reading.advance(&mut self.cache) {
                self.reading.push_back(reading);
                continue;
            }
            let (ask, copies) = (reading.ask.clone(), reading.copies());
            match reading.finish() {
                Ok((texts, last)) => {
                    ask.active.fetch_sub(copies - texts.len(), Relaxed);
                    for mut text in texts {
                        if self.write(&mut text, &mut last.clone()) {
                            writing.push(text);
                        }
                        self.metrics.first_token_seconds.observe(ask.arrived.elapsed().as_secs_f64());
                    }
                }
                Err(error) => ask.tell(Event::Failed(ApiError::invalid(error.to_string()))),
            }
        }
        self.writing = writing;
    }

    /// The prompts whose turn it is.
    fn turn(&mut self) -> Vec<Reading> {
        let (mut taken, mut tokens) = (Vec::new(), 0);
        while let Some(reading) = self.reading.front() {
            let (start, end) = reading.run();
            tokens += end - start;
            if tokens > PROMPT_TOKENS && !taken.is_empty() {
                break;
            }
            taken.extend(self.reading.pop_front());
        }
        taken
    }

    /// Runs the model: a token of every text and a run of each of the prompts.
    fn compute(&mut self, taken: &mut [Reading]) -> Result<(), InferenceError> {
        let vocab = self.open.config().vocab_size;
        let texts = self.writing.len();
        self.logits.resize(texts * vocab, 0.0);
        let mut outputs = vec![Output::Last; texts];
        let mut feeds: Vec<Feed<'_>> = Vec::with_capacity(texts + taken.len());
        for text in &mut self.writing {
            feeds.push(Feed { session: &mut text.session, tokens: std::slice::from_ref(&text.next) });
        }
        let mut prompts: Vec<Vec<u32>> = Vec::with_capacity(taken.len());
        let mut starts = Vec::with_capacity(taken.len());
        for reading in taken.iter() {
            let (start, end) = reading.run();
            outputs.push(reading.output());
            starts.push(start);
            prompts.push(reading.gathered.job.prompt[start..end].to_vec());
        }
        let mut gathered: Vec<&mut Gathered> = Vec::with_capacity(taken.len());
        for (reading, tokens) in taken.iter_mut().zip(&prompts) {
            feeds.push(Feed { session: &mut reading.session, tokens });
            gathered.push(&mut reading.gathered);
        }
        let logits = &mut self.logits;
        self.batch.extend_with(
            self.open.packed(),
            &mut feeds,
            |feed| outputs[feed],
            |feed, index, values| match feed.checked_sub(texts) {
                None => logits[feed * vocab..(feed + 1) * vocab].copy_from_slice(values),
                Some(prompt) => gathered[prompt].take(starts[prompt], index, values),
            },
        )
    }

    /// Chooses a text's next token and tells what is new. Whether it goes on.
    fn write(&self, text: &mut Writing, row: &mut [f32]) -> bool {
        if !text.ended() {
            if let Err(error) = text.choose(self.tokenizer, &self.banned, row) {
                text.ask.tell(Event::Failed(ApiError::invalid(error.to_string())));
                return false;
            }
            self.metrics.generated_tokens.inc();
        }
        let over = text.tell(Instant::now());
        if over {
            text.ask.active.fetch_sub(1, Relaxed);
        }
        !over
    }
}
