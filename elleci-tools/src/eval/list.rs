//! `elleci-eval list`.

use std::fmt::Write;

use serde_json::json;

use super::cli::ListArgs;
use super::task::{self, Aggregate, Choices, Task};
use super::{data, item};

/// Between two columns.
const GAP: usize = 2;

/// Runs the verb.
///
/// # Errors
/// A definition that is not sound: a fault of the program.
pub fn run(args: &ListArgs) -> anyhow::Result<()> {
    let tasks = task::built_in()?;
    if args.json {
        crate::exit::outln!("{}", json!({ "tasks": tasks }));
    } else {
        crate::exit::out!("{}", table(&tasks));
    }
    Ok(())
}

/// Two lines a task, the variants of a group together: what is measured and under what terms, then what it is and where it comes from.
fn table(tasks: &[Task]) -> String {
    let mut rows = vec![(["task", "metrics", "shots", "chance", "licence"].map(String::from), String::new())];
    let mut several = None;
    let mut rest = tasks;
    while let Some(first) = rest.first() {
        let variants = rest.iter().take_while(|t| t.group.is_some() && t.group == first.group).count().max(1);
        rest = &rest[variants..];
        let metrics: Vec<&str> = first.metrics.iter().map(|m| m.name()).collect();
        let name = match &first.group {
            Some(group) => {
                several.get_or_insert_with(|| format!("{group}_prompt-{variants}"));
                format!("{group} ({variants} prompts)")
            }
            None => first.name.clone(),
        };
        let licence = first.source.as_ref().map_or("this program's", |s| s.licence.as_str());
        // A set whose card tells it, but not this program.
        let licence = if licence.starts_with("see ") { "see its card" } else { licence };
        let source = first.source.as_ref().map_or("bundled".into(), |s| format!("{} {}", s.repo, s.config));
        let cells = [name, metrics.join(", "), first.shots.to_string(), chance(first), licence.to_string()];
        rows.push((cells, format!("{} [{source}]", first.title)));
    }
    let width = |column: usize| rows.iter().map(|r| r.0[column].chars().count()).max().unwrap_or(0) + GAP;
    let widths: [usize; 5] = std::array::from_fn(width);
    let mut out = String::new();
    for (cells, about) in &rows {
        let line: String = cells.iter().zip(widths).map(|(cell, w)| format!("{cell:<w$}")).collect();
        let _ = writeln!(out, "{}", line.trim_end());
        if !about.is_empty() {
            let _ = writeln!(out, "    {about}");
        }
    }
    out.push_str("\nchance: what guessing gets; `data`: it depends on the data, and stands beside the results.\n");
    if let Some(name) = several {
        let _ = writeln!(out, "Each of several prompts has a name of its own for --tasks, such as {name}.");
    }
    out
}

/// What guessing gets at the first metric, as far as it is known without the data; empty where nothing can be guessed.
fn chance(task: &Task) -> String {
    let known = task.chance.or_else(|| match &task.choices {
        Some(_) if task.metrics[0].aggregate() != Aggregate::Mean => None,
        Some(Choices::List(list)) => Some(1.0 / list.len() as f64),
        Some(Choices::Expression(_)) if task.source.is_none() => of_bundled(task),
        Some(Choices::Expression(e)) => literal_length(e).map(|n| 1.0 / n as f64),
        None => None,
    });
    match known {
        Some(value) => format!("{value:.2}"),
        None if task.choices.is_some() => "data".into(),
        None => String::new(),
    }
}

fn of_bundled(task: &Task) -> Option<f64> {
    let items = item::items(task, &data::load(task, None, 0).ok()?, 0).ok()?;
    let all: Option<Vec<f64>> = items.iter().map(item::Item::chance).collect();
    all.map(|all| all.iter().sum::<f64>() / all.len() as f64)
}

/// Entries of an expression that is a list literal of columns: `[choice1 | lower_first, choice2 | lower_first]` has two.
fn literal_length(expression: &str) -> Option<usize> {
    let inner = expression.trim().strip_prefix('[')?.strip_suffix(']')?;
    let plain = |c: char| c.is_ascii_alphanumeric() || "_|, ".contains(c);
    inner.chars().all(plain).then(|| inner.split(',').count())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_have_two_short_lines_and_groups_are_one() {
        let tasks = task::built_in().unwrap();
        let table = table(&tasks);
        for line in table.lines() {
            assert!(line.chars().count() <= 130, "{line}");
        }
        let line = |name: &str| {
            let mut found = table.lines().filter(|l| l.split_whitespace().next() == Some(name));
            let line = found.next().unwrap_or_else(|| panic!("{name}: {table}"));
            assert_eq!(found.next(), None, "{name}");
            line
        };
        let columns = |name: &str| line(name).split("  ").map(str::trim).filter(|c| !c.is_empty()).collect::<Vec<_>>();
        assert_eq!(columns("evalita-mp_te"), ["evalita-mp_te (6 prompts)", "acc", "0", "0.50", "CC BY-NC-SA 4.0"]);
        assert_eq!(
            columns("evalita-mp_at"),
            ["evalita-mp_at (6 prompts)", "acc, acc_norm", "0", "0.20", "see its card"]
        );
        assert_eq!(columns("m_mmlu_it"), ["m_mmlu_it", "acc", "5", "0.25", "CC BY-NC 4.0"]);
        assert_eq!(columns("it_arithmetic"), ["it_arithmetic", "acc", "2", "0.25", "this program's"]);
        assert_eq!(columns("evalita-mp_hs")[3], "data");
        assert_eq!(columns("truthfulqa_it_mc1")[3], "data");
        assert_eq!(columns("it_bits_per_byte").len(), 4);
        // Every task is there, by itself or by its group.
        for task in &tasks {
            line(task.group.as_ref().unwrap_or(&task.name));
        }
    }
}
