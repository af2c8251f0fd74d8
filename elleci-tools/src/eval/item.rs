//! From the rows of a task to what is asked of the model.

use anyhow::{Context, ensure};
use minijinja::Environment;
use serde::Serialize;

use super::data::Rows;
use super::task::{Choices, Kind, Task};
use super::template::{self, Expression, Row, Template};

/// One question.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Item {
    /// Its number, counted from 0 after `where`.
    pub doc: usize,
    /// Its row in the data.
    pub row: usize,
    /// What stands before every continuation (`rolling`: the whole text).
    pub context: String,
    /// What is scored after the context, delimiter included.
    pub continuations: Vec<String>,
    /// The choices without the delimiter.
    pub choices: Vec<String>,
    /// Indices of the right choices.
    pub gold: Vec<usize>,
    /// Reference answers.
    pub references: Vec<String>,
    /// The part of the task that it belongs to.
    pub part: Option<String>,
}

impl Item {
    /// Bytes of text in it: what its share of the work is estimated by.
    pub fn weight(&self) -> u64 {
        1 + (self.context.len() + self.continuations.iter().map(String::len).sum::<usize>()) as u64
    }

    /// What guessing gets.
    pub fn chance(&self) -> Option<f64> {
        (!self.choices.is_empty()).then(|| self.gold.len() as f64 / self.choices.len() as f64)
    }
}

/// A row's parts, before examples stand around it.
struct Question {
    text: String,
    choices: Vec<String>,
    gold: Vec<usize>,
    references: Vec<String>,
}

/// A task whose templates are compiled.
struct Definition<'e> {
    task: &'e Task,
    filter: Option<Expression<'e>>,
    text: Template<'e>,
    choices: CompiledChoices<'e>,
    /// None where answers are not compared with anything.
    target: Option<Expression<'e>>,
}

enum CompiledChoices<'e> {
    List(Vec<Template<'e>>),
    Expression(Expression<'e>),
}

impl<'e> Definition<'e> {
    fn new(environment: &'e Environment<'_>, task: &'e Task) -> anyhow::Result<Definition<'e>> {
        let expression = |source: &'e String| Expression::new(environment, source);
        let template = |source: &'e String| Template::new(environment, source);
        let choices = match &task.choices {
            Some(Choices::List(list)) => {
                CompiledChoices::List(list.iter().map(template).collect::<anyhow::Result<_>>()?)
            }
            Some(Choices::Expression(source)) => CompiledChoices::Expression(expression(source)?),
            None => CompiledChoices::List(Vec::new()),
        };
        let asked = task.kind == Kind::MultipleChoice || !task.target.is_empty() && task.kind != Kind::Rolling;
        Ok(Definition {
            task,
            filter: task.filter.as_ref().map(expression).transpose()?,
            text: template(&task.text)?,
            choices,
            target: asked.then(|| expression(&task.target)).transpose()?,
        })
    }

    fn filtered<'r>(&self, rows: &'r [Row]) -> anyhow::Result<Vec<(usize, &'r Row)>> {
        let Some(filter) = &self.filter else { return Ok(rows.iter().enumerate().collect()) };
        let mut kept = Vec::new();
        for (number, row) in rows.iter().enumerate() {
            let value = filter.evaluate(&template::context(row));
            if value.with_context(|| format!("row {}", number + 1))?.is_true() {
                kept.push((number, row));
            }
        }
        Ok(kept)
    }

    fn question(&self, row: &Row) -> anyhow::Result<Question> {
        let (task, values) = (self.task, template::context(row));
        let text = self.text.render(&values)?;
        let mut q = Question { text, choices: Vec::new(), gold: Vec::new(), references: Vec::new() };
        let Some(target) = &self.target else { return Ok(q) };
        if task.kind == Kind::MultipleChoice {
            q.choices = match &self.choices {
                CompiledChoices::List(list) => list.iter().map(|t| t.render(&values)).collect::<anyhow::Result<_>>()?,
                CompiledChoices::Expression(expression) => expression.strings(&values)?,
            };
            ensure!(!q.choices.is_empty(), "it has no choices");
            if let Some(empty) = q.choices.iter().position(|c| c.is_empty() && task.delimiter.is_empty()) {
                anyhow::bail!("choice {} is empty", empty + 1);
            }
            let target = target.evaluate(&values)?;
            q.gold =
                if task.labels { labelled(&target, q.choices.len())? } else { template::gold(&target, &q.choices)? };
        } else {
            q.references = target.strings(&values)?;
            ensure!(!q.references.is_empty(), "`target` is an empty list");
            ensure!(
                task.kind == Kind::Generate || q.references.len() == 1 && !q.references[0].is_empty(),
                "`target` must be one text"
            );
        }
        Ok(q)
    }
}

/// All questions of a task, with `shots` examples each: the first of their split, as the harness has them for MMLU and Belebele
/// (elsewhere it draws them).
///
/// # Errors
/// Rows that the templates do not fit, by row; too few rows for the examples.
pub fn items(task: &Task, rows: &Rows, shots: usize) -> anyhow::Result<Vec<Item>> {
    let environment = template::environment();
    let definition = Definition::new(&environment, task)?;
    let wanted = definition.filtered(&rows.rows)?;
    let pool = if shots > 0 { definition.filtered(&rows.shots)? } else { Vec::new() };
    // The first ones, one more for the row that must not be its own example.
    let needed = shots + usize::from(rows.same_split && shots > 0);
    ensure!(pool.len() >= needed, "{shots} examples are wanted, and the split has {} rows", pool.len());
    let mut examples = Vec::with_capacity(needed);
    for (_, row) in pool.iter().take(needed) {
        examples.push((*row, example(task, &definition.question(row)?)));
    }
    let mut items = Vec::with_capacity(wanted.len());
    for (doc, (number, row)) in wanted.into_iter().enumerate() {
        let q = definition.question(row).with_context(|| format!("row {}", number + 1))?;
        let others = examples.iter().filter(|(other, _)| !rows.same_split || *other != row);
        let mut context = task.description.clone();
        others.take(shots).for_each(|(_, example)| context += example);
        context += &q.text;
        let continuations = match task.kind {
            Kind::MultipleChoice => q.choices.iter().map(|c| format!("{}{c}", task.delimiter)).collect(),
            Kind::Loglikelihood => q.references.clone(),
            Kind::Rolling | Kind::Generate => Vec::new(),
        };
        let part = task.part_column.as_ref().and_then(|c| row.get(c)).and_then(|v| v.as_str()).map(str::to_string);
        let Question { choices, gold, references, .. } = q;
        items.push(Item { doc, row: number, context, continuations, choices, gold, references, part });
    }
    ensure!(!items.is_empty(), "no rows are left after `where`");
    let nothing = task.kind == Kind::Rolling && items.iter().all(|i| i.context.is_empty());
    ensure!(!nothing, "all texts are empty, and there is nothing to score");
    Ok(items)
}

/// The indices of the labels that are 1.
fn labelled(target: &minijinja::Value, choices: usize) -> anyhow::Result<Vec<usize>> {
    let labels: Vec<_> = target.try_iter().context("`target` must give a list of labels")?.collect();
    ensure!(labels.len() == choices, "there are {} labels and {choices} choices", labels.len());
    Ok((0..choices).filter(|i| labels[*i].as_i64() == Some(1)).collect())
}

/// A question with its answer and what separates it from the next, as the harness builds it.
fn example(task: &Task, q: &Question) -> String {
    let answer = match task.kind {
        Kind::MultipleChoice => q.gold.first().map_or("", |i| q.choices[*i].as_str()),
        _ => q.references.first().map_or("", String::as_str),
    };
    format!("{}{}{answer}{}", q.text, task.delimiter, task.shots_delimiter)
}

#[cfg(test)]
mod tests;
