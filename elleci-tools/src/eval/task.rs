//! Tasks as data: one TOML file each.
//!
//! ```toml
//! name = "belebele_ita_Latn"                 # the harness's name, so that numbers can be compared
//! title = "Belebele: reading comprehension"
//! version = 0.0                              # the harness's
//! kind = "multiple_choice"
//! columns = ["flores_passage", "question"]   # of the data set; their absence is reported before anything runs
//! text = "P: {{ flores_passage }}\nQ: {{ question | trim }}\nAnswer:"    # a template over the columns
//! choices = ["A", "B", "C", "D"]             # templates; or one expression that gives a list
//! target = "(correct_answer_num | int) - 1"  # an expression: the index of the right choice, or its text
//! metrics = ["acc", "acc_norm"]
//!
//! [source]
//! repo = "facebook/belebele"
//! config = "ita_Latn"
//! split = "test"
//! licence = "CC BY-SA 4.0"
//! ```
//!
//! Templates and expressions are Jinja's (see [`super::template`]).

use std::collections::BTreeMap;

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};

use crate::exit::usage;

/// What is asked of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The log-likelihood of every choice after the text.
    MultipleChoice,
    /// The log-likelihood of one continuation.
    Loglikelihood,
    /// The log-likelihood of a whole text, in windows.
    Rolling,
    /// Text after the prompt.
    Generate,
}

/// What is computed from the answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// The choice with the largest log-likelihood is right (or, without choices, every token is the likeliest).
    Acc,
    /// As `acc`, log-likelihoods divided by the choices' lengths in characters.
    AccNorm,
    /// As `acc`, log-likelihoods divided by the choices' lengths in UTF-8 bytes.
    AccBytes,
    /// Share of the probability that right choices have, of all (`TruthfulQA` mc2; the harness calls it `acc`).
    Mc2,
    /// F1 of class 1 of two.
    F1,
    /// SENTIPOLC's F1: the mean over the classes of polarity positive and polarity negative.
    F1Sentipolc,
    /// `exp` of minus the mean log-likelihood.
    Perplexity,
    /// By white-space-separated words.
    WordPerplexity,
    /// By bytes.
    BytePerplexity,
    /// Bits to encode a byte.
    BitsPerByte,
    /// The text is a reference, after both are normalised.
    ExactMatch,
    /// F1 of the words that text and reference share, the best of the references.
    TokenF1,
    /// Share of word 4-grams that occurred before in the text.
    Repetition,
    /// Share of word pairs that differ from all others in the text.
    Distinct2,
    /// The text is recognisably Italian.
    Italian,
    /// The text ends by itself, before the limit.
    Ended,
}

/// How values of items become a value of the task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aggregate {
    /// Their mean.
    Mean,
    /// `exp(-mean)`
    ExpMean,
    /// `exp(-Σ log-likelihood / Σ units)`
    ExpWeighted,
    /// `-Σ log-likelihood / Σ units / ln 2`
    Bits,
    /// F1 of class 1.
    F1,
    /// SENTIPOLC's.
    F1Sentipolc,
}

impl Metric {
    /// Its key in results.
    pub fn name(self) -> &'static str {
        match self {
            Metric::Acc | Metric::Mc2 => "acc",
            Metric::AccNorm => "acc_norm",
            Metric::AccBytes => "acc_bytes",
            Metric::F1 | Metric::F1Sentipolc | Metric::TokenF1 => "f1",
            Metric::Perplexity => "perplexity",
            Metric::WordPerplexity => "word_perplexity",
            Metric::BytePerplexity => "byte_perplexity",
            Metric::BitsPerByte => "bits_per_byte",
            Metric::ExactMatch => "exact_match",
            Metric::Repetition => "repetition",
            Metric::Distinct2 => "distinct_2",
            Metric::Italian => "italian",
            Metric::Ended => "ended",
        }
    }

    /// Whether more is better.
    pub fn higher_is_better(self) -> bool {
        !matches!(
            self,
            Metric::Perplexity
                | Metric::WordPerplexity
                | Metric::BytePerplexity
                | Metric::BitsPerByte
                | Metric::Repetition
        )
    }

    /// How it is aggregated.
    pub fn aggregate(self) -> Aggregate {
        match self {
            Metric::Perplexity => Aggregate::ExpMean,
            Metric::WordPerplexity | Metric::BytePerplexity => Aggregate::ExpWeighted,
            Metric::BitsPerByte => Aggregate::Bits,
            Metric::F1 => Aggregate::F1,
            Metric::F1Sentipolc => Aggregate::F1Sentipolc,
            _ => Aggregate::Mean,
        }
    }

    /// The kinds of task that can have it.
    fn fits(self, kind: Kind) -> bool {
        match self {
            Metric::Acc => matches!(kind, Kind::MultipleChoice | Kind::Loglikelihood),
            Metric::AccNorm | Metric::AccBytes | Metric::Mc2 | Metric::F1 | Metric::F1Sentipolc => {
                kind == Kind::MultipleChoice
            }
            Metric::Perplexity => kind == Kind::Loglikelihood,
            Metric::WordPerplexity | Metric::BytePerplexity | Metric::BitsPerByte => kind == Kind::Rolling,
            _ => kind == Kind::Generate,
        }
    }
}

/// Where the data come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// `owner/name` of the data set on the Hugging Face hub.
    pub repo: String,
    /// Its configuration (subset); `default` where there is only one.
    pub config: String,
    /// The split that is evaluated.
    pub split: String,
    /// The split that examples are taken from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shots_split: Option<String>,
    /// Files of the repository by name, where it has no configurations and splits.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<String>,
    /// Under what terms, as the data set's card says.
    pub licence: String,
}

/// The choices of a multiple-choice task.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Choices {
    /// One template each.
    List(Vec<String>),
    /// An expression that gives a list of strings.
    Expression(String),
}

/// A variant of a task: what it sets in place of the task's own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prompt {
    /// The template.
    pub text: String,
    /// The choices.
    pub choices: Option<Choices>,
    /// The right one.
    pub target: Option<String>,
}

/// How text is generated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Generation {
    /// Tokens at most.
    pub max_tokens: usize,
    /// Strings that end the text.
    #[serde(default)]
    pub until: Vec<String>,
    /// 0 is greedy.
    #[serde(default)]
    pub temperature: f32,
    /// A regular expression; its first group (or the whole match) is the answer, nothing where it does not match.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub extract: Option<String>,
}

/// One task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Task {
    /// Its name; the harness's where the harness has it.
    pub name: String,
    /// What it is.
    pub title: String,
    /// The version of the definition.
    pub version: f64,
    /// What is asked.
    pub kind: Kind,
    /// Columns that the templates read.
    #[serde(default)]
    pub columns: Vec<String>,
    /// An expression: rows for which it is false are left out.
    #[serde(default, rename = "where", skip_serializing_if = "Option::is_none")]
    pub filter: Option<String>,
    /// Stands before everything.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// The template of the context (`rolling`: of the text).
    #[serde(default)]
    pub text: String,
    /// The choices of a multiple-choice task.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub choices: Option<Choices>,
    /// An expression: index or text of the right choice, a list of them, the continuation, or the reference answers.
    #[serde(default)]
    pub target: String,
    /// Whether `target` is a list of 0 and 1, one a choice.
    #[serde(default)]
    pub labels: bool,
    /// Between context and answer.
    #[serde(default = "space")]
    pub delimiter: String,
    /// Examples before the question, unless the command line says otherwise.
    #[serde(default)]
    pub shots: usize,
    /// Between examples.
    #[serde(default = "blank_line")]
    pub shots_delimiter: String,
    /// What is computed.
    pub metrics: Vec<Metric>,
    /// What guessing gets, where the choices do not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chance: Option<f64>,
    /// Tokens that a window of a rolling task shares with the one before.
    #[serde(default = "one")]
    pub overlap: usize,
    /// How text is generated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<Generation>,
    /// Variants; each becomes a task `NAME_prompt-N`, and their mean the result of the group `NAME`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prompts: Vec<Prompt>,
    /// The column whose values divide the task into parts with results of their own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part_column: Option<String>,
    /// Where the data come from; tasks of our own have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
    /// The group whose variant it is.
    #[serde(skip)]
    pub group: Option<String>,
}

fn space() -> String {
    " ".into()
}

fn blank_line() -> String {
    "\n\n".into()
}

fn one() -> usize {
    1
}

impl Task {
    /// Reads a definition.
    ///
    /// # Errors
    /// What is wrong with it, by field.
    pub fn parse(toml: &str) -> anyhow::Result<Task> {
        let task: Task = toml::from_str(toml).map_err(|e| anyhow::anyhow!("{}", e.to_string().trim_end()))?;
        task.check().with_context(|| format!("task `{}`", task.name))?;
        Ok(task)
    }

    fn check(&self) -> anyhow::Result<()> {
        let sound = |name: &str| {
            let plain = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
            !name.is_empty() && name.chars().all(plain) && !name.starts_with('.')
        };
        ensure!(sound(&self.name), "`name` may hold letters, digits, `_`, `-` and `.` only; it names files");
        if let Some(source) = &self.source {
            let (owner, name) = source.repo.split_once('/').unwrap_or_default();
            let parts = [Some(owner), Some(name), Some(&source.config), Some(&source.split)];
            let parts = parts.into_iter().chain([source.shots_split.as_deref()]).flatten();
            ensure!(
                parts.clone().all(sound) && source.files.iter().all(|f| sound(f)),
                "`source`: `repo` must be owner/name, and `config`, `split` and `files` plain names"
            );
        }
        ensure!(!self.metrics.is_empty(), "`metrics` is empty");
        for metric in &self.metrics {
            ensure!(
                metric.fits(self.kind),
                "`metrics`: a task of kind {:?} cannot have `{}`",
                self.kind,
                metric.name()
            );
        }
        let mut names: Vec<&str> = self.metrics.iter().map(|m| m.name()).collect();
        names.sort_unstable();
        names.dedup();
        ensure!(names.len() == self.metrics.len(), "`metrics` holds two of the same name");
        ensure!(self.overlap > 0, "`overlap` must be at least 1");
        let choices = self.choices.is_some() || self.prompts.iter().any(|p| p.choices.is_some());
        match self.kind {
            Kind::MultipleChoice => ensure!(choices, "`choices` is missing"),
            _ => ensure!(!choices, "`choices` belongs to multiple_choice"),
        }
        ensure!(
            (self.kind == Kind::Generate) == self.generation.is_some(),
            "`generation` must be there for the kind generate, and only for it"
        );
        if let Some(pattern) = self.generation.as_ref().and_then(|g| g.extract.as_ref()) {
            regex::Regex::new(pattern).context("`generation.extract`")?;
        }
        ensure!(
            self.kind == Kind::Rolling || self.generation.is_some() || !self.target.is_empty(),
            "`target` is missing"
        );
        Ok(())
    }

    /// The task itself, or its variants.
    fn expand(self) -> Vec<Task> {
        if self.prompts.is_empty() {
            return vec![self];
        }
        let variant = |(number, prompt): (usize, &Prompt)| Task {
            name: format!("{}_prompt-{number}", self.name),
            text: prompt.text.clone(),
            choices: prompt.choices.clone().or_else(|| self.choices.clone()),
            target: prompt.target.clone().unwrap_or_else(|| self.target.clone()),
            prompts: Vec::new(),
            group: Some(self.name.clone()),
            ..self.clone()
        };
        (1..).zip(&self.prompts).map(variant).collect()
    }
}

/// The definitions that come with the program, in the order of their reports.
const DEFINITIONS: &[&str] = &[
    include_str!("tasks/it_minimal_pairs.toml"),
    include_str!("tasks/it_arithmetic.toml"),
    include_str!("tasks/it_arithmetic_generate.toml"),
    include_str!("tasks/it_bits_per_byte.toml"),
    include_str!("tasks/en_bits_per_byte.toml"),
    include_str!("tasks/it_generation.toml"),
    include_str!("tasks/multiblimp_ita.toml"),
    include_str!("tasks/xcopa_it.toml"),
    include_str!("tasks/arc_it.toml"),
    include_str!("tasks/hellaswag_it.toml"),
    include_str!("tasks/m_mmlu_it.toml"),
    include_str!("tasks/belebele_ita_Latn.toml"),
    include_str!("tasks/lambada_openai_mt_it.toml"),
    include_str!("tasks/lambada_openai_mt_stablelm_it.toml"),
    include_str!("tasks/truthfulqa_it_mc1.toml"),
    include_str!("tasks/truthfulqa_it_mc2.toml"),
    include_str!("tasks/global_piqa_nonparallel_cloze_ita_latn.toml"),
    include_str!("tasks/global_piqa_parallel_cloze_ita_latn.toml"),
    include_str!("tasks/evalita-mp_te.toml"),
    include_str!("tasks/evalita-mp_sa.toml"),
    include_str!("tasks/evalita-mp_wic.toml"),
    include_str!("tasks/evalita-mp_hs.toml"),
    include_str!("tasks/evalita-mp_at.toml"),
    include_str!("tasks/evalita-mp_faq.toml"),
    include_str!("tasks/squad_it.toml"),
    include_str!("tasks/invalsi_mate.toml"),
    include_str!("tasks/invalsi_ita.toml"),
];

/// All tasks there are, variants one by one.
///
/// # Errors
/// A definition that is not sound: a fault of the program.
pub fn built_in() -> anyhow::Result<Vec<Task>> {
    let mut tasks = Vec::new();
    for definition in DEFINITIONS {
        tasks.extend(Task::parse(definition)?.expand());
    }
    Ok(tasks)
}

/// The tasks that the names ask for: tasks, groups, or files that end in `.toml`.
///
/// # Errors
/// [`crate::exit::Usage`] for a name that there is not, with the nearest one that there is.
pub fn select(all: &[Task], names: &[String]) -> anyhow::Result<Vec<Task>> {
    let mut chosen: BTreeMap<usize, Task> = BTreeMap::new();
    let mut own = Vec::new();
    for name in names {
        if name.trim().is_empty() {
            return Err(usage("--tasks: a name is empty; `elleci-eval list` names the tasks"));
        }
        if name.ends_with(".toml") {
            let text =
                std::fs::read_to_string(name).map_err(|e| usage(format!("{name}: cannot read the task: {e}")))?;
            let task = Task::parse(&text).map_err(|e| usage(format!("{name}: {e:#}")))?;
            own.extend(task.expand());
            continue;
        }
        let matches = |t: &Task| t.name == *name || t.group.as_ref() == Some(name);
        let mut found = all.iter().enumerate().filter(|(_, t)| matches(t)).peekable();
        if found.peek().is_none() {
            let known = all.iter().flat_map(|t| [Some(&t.name), t.group.as_ref()]).flatten();
            let nearest = known.max_by(|a, b| strsim::jaro_winkler(a, name).total_cmp(&strsim::jaro_winkler(b, name)));
            let nearest = nearest.map_or(String::new(), |n| format!("; is it `{n}`?"));
            return Err(usage(format!("there is no task `{name}`{nearest} `elleci-eval list` names them all")));
        }
        chosen.extend(found.map(|(i, t)| (i, t.clone())));
    }
    let tasks: Vec<Task> = chosen.into_values().chain(own).collect();
    for (i, task) in tasks.iter().enumerate() {
        if tasks[..i].iter().any(|t| t.name == task.name) {
            return Err(usage(format!("two tasks are called `{}`", task.name)));
        }
    }
    Ok(tasks)
}
