use super::*;
use crate::eval::task::built_in;

fn task(name: &str) -> Task {
    built_in().unwrap().into_iter().find(|t| t.name == name).unwrap()
}

fn item(choices: &[&str], gold: &[usize]) -> Item {
    Item {
        doc: 0,
        row: 0,
        context: String::new(),
        continuations: choices.iter().map(|c| format!(" {c}")).collect(),
        choices: choices.iter().map(|c| c.to_string()).collect(),
        gold: gold.to_vec(),
        references: Vec::new(),
        part: None,
    }
}

fn scores(values: &[f64]) -> Answer {
    Answer::Scores(values.iter().map(|v| (*v, false)).collect())
}

fn value(task: &Task, metric: Metric, item: &Item, answer: &Answer) -> f64 {
    item_value(task, metric, item, answer)[0]
}

#[test]
fn lengths_are_of_the_choice_without_its_space_in_characters_and_in_bytes() {
    let t = task("arc_it");
    // "perché sì" has 9 characters and 11 bytes, "no" has 2 of both, "abcd" 4.
    let item = item(&["perché sì", "no", "abcd"], &[0]);
    // Sums: the second. By characters: -1.0, -1.05, -1.2: the first. By bytes: -0.818: the first.
    let answer = scores(&[-9.0, -2.1, -4.8]);
    assert_eq!(value(&t, Metric::Acc, &item, &answer), 0.0);
    assert_eq!(value(&t, Metric::AccNorm, &item, &answer), 1.0);
    // By characters -1.0 against -0.95; by bytes -0.818 against -0.95: the measures part.
    let answer = scores(&[-9.0, -1.9, -4.8]);
    assert_eq!(value(&t, Metric::AccNorm, &item, &answer), 0.0);
    assert_eq!(value(&t, Metric::AccBytes, &item, &answer), 1.0);
    // Of equals, the first.
    assert_eq!(value(&t, Metric::Acc, &item, &scores(&[-3.0, -3.0, -3.0])), 1.0);
}

#[test]
fn the_share_of_true_answers_is_of_probabilities() {
    let t = task("truthfulqa_it_mc2");
    let item = item(&["a", "b", "c"], &[0, 2]);
    // Probabilities 0.1, 0.2, 0.3 (times e^-900, which vanishes if it is taken as it is): 0.4 of 0.6.
    let answer = scores(&[0.1f64.ln() - 900.0, 0.2f64.ln() - 900.0, 0.3f64.ln() - 900.0]);
    assert!((value(&t, Metric::Mc2, &item, &answer) - 2.0 / 3.0).abs() < 1e-9);
    assert_eq!(item.chance(), Some(2.0 / 3.0));
}

#[test]
fn last_words_are_right_when_greedy() {
    let t = task("lambada_openai_mt_it");
    let item = item(&[], &[]);
    let answer = Answer::Scores(vec![(-2.5, true)]);
    assert_eq!(item_value(&t, Metric::Acc, &item, &answer), [1.0, 0.0]);
    assert_eq!(item_value(&t, Metric::Perplexity, &item, &answer), [-2.5, 0.0]);
    assert_eq!(value(&t, Metric::Acc, &item, &Answer::Scores(vec![(-2.5, false)])), 0.0);
    let perplexity = aggregate(Aggregate::ExpMean, &[[-1.0, 0.0], [-3.0, 0.0]]);
    assert!((perplexity - 2.0f64.exp()).abs() < 1e-12);
}

#[test]
fn text_is_weighed_by_words_and_bytes() {
    let t = task("it_bits_per_byte");
    let text = |text: &str| Item { context: text.into(), ..item(&[], &[]) };
    let rolled = Answer::Rolling(-8.0);
    let units = |metric, item: &Item| item_value(&t, metric, item, &rolled)[1];
    assert_eq!(units(Metric::WordPerplexity, &text("più  di\nuno")), 3.0);
    assert_eq!(units(Metric::BitsPerByte, &text("più  di\nuno")), 12.0);
    // re.split keeps the empty pieces at the ends.
    assert_eq!([" a ", "a ", "", " "].map(|s| units(Metric::WordPerplexity, &text(s))), [3.0, 2.0, 1.0, 2.0]);
    let values = [[-8.0, 4.0], [-2.0, 16.0]];
    assert!((aggregate(Aggregate::ExpWeighted, &values) - 0.5f64.exp()).abs() < 1e-12);
    assert!((aggregate(Aggregate::Bits, &values) - 0.5 / std::f64::consts::LN_2).abs() < 1e-12);
    assert_eq!(standard_error(Aggregate::Bits, &values, 0), None);
}

#[test]
fn classes_are_counted_as_scikit_learn_and_sentipolc_count_them() {
    let pairs = |gold: &[u8], chosen: &[u8]| -> Vec<ItemValue> {
        gold.iter().zip(chosen).map(|(g, c)| [f64::from(*g), f64::from(*c)]).collect()
    };
    // From sklearn.metrics.f1_score and the harness's _aggreg_sa on these lists.
    let f1 = aggregate(Aggregate::F1, &pairs(&[1, 0, 1, 1, 0, 0, 1, 0], &[1, 1, 1, 0, 0, 1, 1, 0]));
    assert!((f1 - 0.666_666_666_666_666_6).abs() < 1e-12, "{f1}");
    let many = pairs(&[0, 1, 2, 3, 1, 1, 2, 0, 3, 2, 1, 0], &[0, 1, 1, 0, 1, 2, 2, 0, 3, 1, 1, 3]);
    assert!((aggregate(Aggregate::F1Sentipolc, &many) - 0.790_209_790_209_790_2).abs() < 1e-12);
    assert_eq!(aggregate(Aggregate::F1Sentipolc, &pairs(&[2, 2, 2], &[2, 2, 2])), 0.5);
    assert_eq!(aggregate(Aggregate::F1, &pairs(&[0, 0], &[0, 0])), 0.0);
}

#[test]
fn standard_errors_are_of_the_mean_or_bootstrapped() {
    let values = [[1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [1.0, 0.0]];
    // Sample variance 0.25, over 4 items.
    assert!((standard_error(Aggregate::Mean, &values, 0).unwrap() - 0.25).abs() < 1e-12);
    assert_eq!(standard_error(Aggregate::Mean, &values[..1], 0), None);
    // exp(-mean) of 400 values of deviation 0.5 around 0: the error is near exp(0) · 0.5 / 20 = 0.025; the estimate from 1,000
    // draws has a relative deviation of 1 / sqrt(2000) = 2.2 %; eight of them.
    let spread: Vec<ItemValue> = (0..400).map(|i| [if i % 2 == 0 { 0.5 } else { -0.5 }, 0.0]).collect();
    let error = standard_error(Aggregate::ExpMean, &spread, 7).unwrap();
    assert!((0.0205..0.0295).contains(&error), "{error}");
    assert_eq!(standard_error(Aggregate::ExpMean, &spread, 7), Some(error));
    let draws = |seed| bootstrap(400, seed, 3, |picked| picked.iter().sum::<usize>() as f64);
    assert_eq!(draws(1), draws(1));
    assert_ne!(draws(1), draws(2));
}

#[test]
fn answers_are_extracted_before_they_are_compared() {
    let t = task("it_arithmetic_generate");
    let item = Item { references: vec!["12".into()], ..item(&[], &[]) };
    let exact = |text: &str| value(&t, Metric::ExactMatch, &item, &Answer::Text { text: text.into(), ended: true });
    assert_eq!([" 12", "12.", " Sono 12 mele", "112", "dodici", ""].map(exact), [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]);
}

#[test]
fn guessing_at_classes_gets_the_mean_over_all_guesses() {
    // Every way to answer: n digits of base `choices`.
    let mean = |how, right: &[usize], choices: usize| {
        let ways = choices.pow(right.len() as u32);
        let value = |way: usize| {
            let chosen = (0..right.len()).map(|i| way / choices.pow(i as u32) % choices);
            let values: Vec<ItemValue> = right.iter().zip(chosen).map(|(r, c)| [*r as f64, c as f64]).collect();
            aggregate(how, &values)
        };
        (0..ways).map(value).sum::<f64>() / ways as f64
    };
    for (how, right, choices) in [
        (Aggregate::F1, &[1, 0, 1, 1, 0, 0, 1, 0, 0][..], 2),
        (Aggregate::F1, &[0, 0, 0], 2),
        (Aggregate::F1, &[1, 1, 1], 2),
        (Aggregate::F1, &[1, 2, 0, 1], 3),
        (Aggregate::F1Sentipolc, &[2, 1, 0, 3, 2], 4),
        (Aggregate::F1Sentipolc, &[2, 2, 2], 4),
    ] {
        let values: Vec<ItemValue> = right.iter().map(|r| [*r as f64, 0.0]).collect();
        let (found, want) = (guessed(how, &values, choices).unwrap(), mean(how, right, choices));
        assert!((found - want).abs() < 1e-12, "{how:?} {right:?}: {found} {want}");
    }
    assert_eq!(guessed(Aggregate::Mean, &[[1.0, 0.0]], 2), None);
    // Of many items, half of them of the class: precision and recall are near 1/2.
    let many: Vec<ItemValue> = (0..20_000).map(|i| [f64::from(i % 2), 0.0]).collect();
    let large = guessed(Aggregate::F1, &many, 2).unwrap();
    assert!((large - 0.5).abs() < 1e-4, "{large}");
}
