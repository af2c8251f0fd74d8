//! Arithmetic word problems in Italian. Every answer is a whole number, computed with the problem.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// A problem, four numbers of which one is right, and that one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The text, ending in a question.
    pub text: String,
    /// The choices, in a fixed random order.
    pub numbers: [u32; 4],
    /// The right one.
    pub answer: u32,
}

const NAMES: [&str; 10] = ["Anna", "Luca", "Giulia", "Marco", "Sara", "Paolo", "Elena", "Pietro", "Marta", "Davide"];
/// Plural nouns and whether they are feminine.
const THINGS: [(&str, bool); 10] = [
    ("mele", true),
    ("matite", true),
    ("biglie", true),
    ("figurine", true),
    ("caramelle", true),
    ("libri", false),
    ("fiori", false),
    ("quaderni", false),
    ("biscotti", false),
    ("palloncini", false),
];
/// Things with a price: singular with its article, plural.
const WARES: [(&str, &str); 6] = [
    ("Un quaderno", "quaderni"),
    ("Una penna", "penne"),
    ("Un biglietto", "biglietti"),
    ("Una maglietta", "magliette"),
    ("Un panino", "panini"),
    ("Una pianta", "piante"),
];

/// Numbers drawn for one problem.
struct Draw(ChaCha8Rng);

impl Draw {
    fn between(&mut self, low: u32, high: u32) -> u32 {
        low + ((u64::from(high - low + 1) * u64::from(self.0.next_u32())) >> 32) as u32
    }

    fn of<T: Copy, const N: usize>(&mut self, list: [T; N]) -> T {
        list[self.between(0, N as u32 - 1) as usize]
    }
}

/// The problem of a number: the same everywhere.
pub fn problem(number: u64) -> Problem {
    let mut d = Draw(ChaCha8Rng::seed_from_u64(0x5eed_0000 + number));
    let name = d.of(NAMES);
    let (things, feminine) = d.of(THINGS);
    let (how_many, others) = if feminine { ("Quante", "altre") } else { ("Quanti", "altri") };
    let (a, b, c) = (d.between(3, 30), d.between(2, 20), d.between(2, 9));
    let (small, times) = (d.between(2, 12), d.between(2, 9));
    // Text, answer, and the result of a tempting wrong step.
    let (text, answer, tempting) = match number % 12 {
        0 => (
            format!("{name} ha {a} {things} e ne compra {others} {b}. {how_many} {things} ha adesso?"),
            a + b,
            a.abs_diff(b),
        ),
        1 => (
            format!("{name} ha {} {things} e ne regala {b}. {how_many} {things} restano a {name}?", a + b),
            a,
            a + 2 * b,
        ),
        2 => (
            format!("In una sala ci sono {small} file di sedie e ogni fila ha {times} sedie. Quante sedie ci sono?"),
            small * times,
            small + times,
        ),
        3 => {
            let (one, many) = d.of(WARES);
            (format!("{one} costa {small} euro. Quanti euro costano {times} {many}?"), small * times, small + times)
        }
        4 => (
            format!(
                "{name} divide {} {things} in parti uguali fra {times} amici. {how_many} {things} riceve ogni amico?",
                small * times
            ),
            small,
            small * times - times,
        ),
        5 => (
            format!("{name} ha {a} anni e suo fratello ha {c} anni di più. Quanti anni ha il fratello di {name}?"),
            a + c,
            a.abs_diff(c),
        ),
        6 => (
            format!("Un treno parte alle {small} e arriva alle {}. Quante ore dura il viaggio?", small + c),
            c,
            2 * small + c,
        ),
        7 => {
            let pages = 10 * (a + b);
            (
                format!("Un libro ha {pages} pagine e {name} ne ha lette {}. Quante pagine mancano?", 10 * b),
                10 * a,
                pages + 10 * b,
            )
        }
        8 => (
            format!("In ogni scatola ci sono {small} uova. Quante uova ci sono in {times} scatole?"),
            small * times,
            small + times,
        ),
        9 => (
            format!("{name} ha {} euro e ne spende {b} al mercato. Quanti euro restano a {name}?", a + b),
            a,
            a + 2 * b,
        ),
        10 => (
            format!("{name} corre {small} chilometri al giorno. Quanti chilometri corre in {times} giorni?"),
            small * times,
            small + times,
        ),
        _ => (
            format!(
                "{name} ha {} {things}, ne trova {others} {b} e poi ne perde {c}. {how_many} {things} ha alla fine?",
                a + c
            ),
            a + b,
            a + b + 2 * c,
        ),
    };
    let numbers = choices(&mut d, answer, tempting);
    Problem { text, numbers, answer }
}

/// The answer among three others that are near it, the tempting one if it is a number of its own.
fn choices(d: &mut Draw, answer: u32, tempting: u32) -> [u32; 4] {
    let mut numbers = vec![answer];
    let near = [tempting, answer + 1, answer.saturating_sub(2), answer + 10, answer + 3, answer + 5];
    for number in near {
        if number > 0 && !numbers.contains(&number) && numbers.len() < 4 {
            numbers.push(number);
        }
    }
    for i in (1..4).rev() {
        let j = d.between(0, i as u32) as usize;
        numbers.swap(i, j);
    }
    [numbers[0], numbers[1], numbers[2], numbers[3]]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn choices_are_four_numbers_with_the_answer_anywhere() {
        let mut places = [0; 4];
        for number in 0..600 {
            let p = problem(number);
            assert_eq!(p.numbers.iter().collect::<HashSet<_>>().len(), 4, "{p:?}");
            assert!(p.numbers.iter().all(|n| *n > 0) && p.text.ends_with('?'), "{p:?}");
            places[p.numbers.iter().position(|n| *n == p.answer).unwrap()] += 1;
            assert_eq!(p, problem(number));
        }
        // 150 expected at each place, with a deviation of 10.6; five of them.
        assert!(places.iter().all(|n| (97..203).contains(n)), "{places:?}");
    }

    /// The numbers of a text, in order.
    fn numbers(text: &str) -> Vec<u32> {
        text.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect()
    }

    #[test]
    fn answers_follow_from_the_texts() {
        for number in 0..600 {
            let p = problem(number);
            let n = numbers(&p.text);
            let want = match number % 12 {
                0 | 5 => n[0] + n[1],
                1 | 7 | 9 => n[0] - n[1],
                2 | 3 | 8 | 10 => n[0] * n[1],
                4 => n[0] / n[1],
                6 => n[1] - n[0],
                _ => n[0] + n[1] - n[2],
            };
            assert_eq!(p.answer, want, "{p:?}");
            assert!(number % 12 != 4 || n[0].is_multiple_of(n[1]));
        }
    }
}
