use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::*;
use crate::eval::task::{Metric, built_in};

fn rows(list: Vec<Value>) -> Vec<Row> {
    list.into_iter().map(|v| v.as_object().unwrap().clone()).collect()
}

/// Made by harness.py with the harness's own code.
#[test]
fn prompts_and_targets_are_the_harness_s_to_the_letter() {
    let fixture: BTreeMap<String, Row> = serde_json::from_str(include_str!("rows.json")).unwrap();
    let golden: BTreeMap<String, (String, Vec<String>, Option<usize>)> =
        serde_json::from_str(include_str!("harness.json")).unwrap();
    let tasks = built_in().unwrap();
    for (name, (context, continuations, target)) in &golden {
        let task = tasks.iter().find(|t| t.name == *name).unwrap_or_else(|| panic!("there is no task {name}"));
        let data = task.group.as_ref().unwrap_or(name).replace("_mc2", "_mc1");
        let row = fixture.get(&data).unwrap_or_else(|| panic!("no row for {name}"));
        assert!(task.columns.iter().all(|c| row.contains_key(c)), "{name}: {:?}", task.columns);
        let found = Rows { rows: vec![row.clone()], ..Rows::default() };
        let item = items(task, &found, 0).unwrap_or_else(|e| panic!("{name}: {e:#}")).swap_remove(0);
        assert_eq!((&item.context, &item.continuations), (context, continuations), "{name}");
        match target {
            _ if task.labels => assert_eq!(item.gold, [0, 1], "{name}"),
            Some(target) => assert_eq!(item.gold, [*target], "{name}"),
            None => assert!(item.gold.is_empty(), "{name}"),
        }
    }
    // Of the tasks with data, only those that the harness does not have are not among them.
    let own = ["squad_it", "invalsi_mate", "invalsi_ita", "lambada_openai_mt_stablelm_it"];
    for task in tasks.iter().filter(|t| t.source.is_some() && !own.contains(&t.name.as_str())) {
        assert!(golden.contains_key(&task.name), "{}", task.name);
    }
}

#[test]
fn every_bundled_task_has_items() {
    for task in built_in().unwrap().iter().filter(|t| t.source.is_none()) {
        let found = crate::eval::data::load(task, None, task.shots).unwrap();
        let items = items(task, &found, task.shots).unwrap();
        assert_eq!(items.len(), found.rows.len(), "{}", task.name);
        assert!(items.iter().enumerate().all(|(i, item)| item.doc == i && item.row == i));
        assert!(task.metrics.contains(&Metric::BitsPerByte) || items.iter().all(|i| i.context.len() < 600));
    }
}

fn quiz() -> Task {
    Task::parse(
        r#"
        name = "quiz"
        title = "Quiz"
        version = 1.0
        kind = "multiple_choice"
        where = "level > 0"
        description = "Rispondi.\n\n"
        text = "D: {{ q }}\nR:"
        choices = ["sì", "no"]
        target = "a"
        metrics = ["acc"]
        "#,
    )
    .unwrap()
}

#[test]
fn examples_stand_before_the_question_and_never_are_the_question() {
    let row = |q: &str, a: &str, level: u32| json!({ "q": q, "a": a, "level": level });
    let all = rows(vec![row("x", "sì", 0), row("a", "sì", 1), row("b", "no", 1), row("c", "no", 2)]);
    let found = Rows { rows: all.clone(), shots: all.clone(), same_split: true, ..Rows::default() };
    let contexts = |found: &Rows, shots| -> Vec<String> {
        items(&quiz(), found, shots).unwrap().into_iter().map(|i| i.context).collect()
    };
    let two = contexts(&found, 2);
    assert_eq!(two[0], "Rispondi.\n\nD: b\nR: no\n\nD: c\nR: no\n\nD: a\nR:");
    assert_eq!(two[1], "Rispondi.\n\nD: a\nR: sì\n\nD: c\nR: no\n\nD: b\nR:");
    assert_eq!(two[2], "Rispondi.\n\nD: a\nR: sì\n\nD: b\nR: no\n\nD: c\nR:");
    // From another split, an equal row is an example like any other.
    let other = Rows { same_split: false, ..found };
    assert_eq!(contexts(&other, 1)[0], "Rispondi.\n\nD: a\nR: sì\n\nD: a\nR:");
    let item = &items(&quiz(), &other, 0).unwrap()[2];
    assert_eq!((item.doc, item.row, item.gold.as_slice(), item.chance()), (2, 3, &[1][..], Some(0.5)));
    let error = items(&quiz(), &other, 4).unwrap_err().to_string();
    assert!(error.contains("4 examples") && error.contains("3 rows"), "{error}");
}

#[test]
fn rows_that_do_not_fit_are_named() {
    let found = |row| Rows { rows: rows(vec![json!({ "q": "a", "a": "no", "level": 1 }), row]), ..Rows::default() };
    for (row, part) in [
        (json!({ "q": "a", "a": "forse", "level": 1 }), "row 2: `target` is 'forse', which is no choice"),
        (json!({ "a": "no", "level": 1 }), "row 2"),
        (json!({ "q": "a", "a": "no" }), "row 2"),
        (json!({ "q": "a", "a": 7, "level": 1 }), "row 2: `target` is 7"),
        (json!({ "q": "a", "a": { "b": 1 }, "level": 1 }), "row 2"),
    ] {
        let error = format!("{:#}", items(&quiz(), &found(row), 0).unwrap_err());
        assert!(error.contains(part), "{error}");
    }
    let none = Rows { rows: rows(vec![json!({ "q": "a", "a": "no", "level": 0 })]), ..Rows::default() };
    assert!(items(&quiz(), &none, 0).unwrap_err().to_string().contains("no rows"));
}

#[test]
fn definitions_are_checked() {
    let base = "name = \"t\"\ntitle = \"T\"\nversion = 1.0\nmetrics = [\"acc\"]\n";
    for (rest, part) in [
        ("kind = \"multiple_choice\"\ntarget = \"0\"", "`choices` is missing"),
        ("kind = \"multiple_choice\"\nchoices = [\"a\"]", "`target` is missing"),
        ("kind = \"generate\"\ntarget = \"a\"", "cannot have `acc`"),
        ("kind = \"loglikelihood\"\ntarget = \"a\"\nchoices = \"x\"", "`choices` belongs to"),
        ("kind = \"loglikelihood\"\ntarget = \"a\"\nbogus = 1", "bogus"),
        ("kind = \"loglikelihood\"\ntarget = \"a\"\noverlap = 0", "`overlap`"),
        ("kind = \"whatever\"", "whatever"),
        (
            "kind = \"loglikelihood\"\ntarget = \"a\"\n[source]\nrepo = \"../x\"\nconfig = \"it\"\nsplit = \"t\"\nlicence = \"\"",
            "`source`",
        ),
        (
            "kind = \"loglikelihood\"\ntarget = \"a\"\n[source]\nrepo = \"a/b\"\nconfig = \"it\"\nsplit = \"../t\"\nlicence = \"\"",
            "`source`",
        ),
    ] {
        let error = format!("{:#}", Task::parse(&format!("{base}{rest}")).unwrap_err());
        assert!(error.contains(part), "{rest}: {error}");
    }
    let named = |name: &str| Task::parse(&base.replace("\"t\"", name)).map(|_| ()).map_err(|e| format!("{e:#}"));
    assert!(named("\"../t\"").is_err() && named("\"\"").is_err() && named("\"a/b\"").is_err());
    let tasks = built_in().unwrap();
    let select =
        |names: &[&str]| crate::eval::task::select(&tasks, &names.iter().map(|n| n.to_string()).collect::<Vec<_>>());
    assert_eq!(select(&["evalita-mp_te", "arc_it", "arc_it"]).unwrap().len(), 7);
    assert!(select(&["arc_ti"]).unwrap_err().to_string().contains("is it `arc_it`?"));
}
