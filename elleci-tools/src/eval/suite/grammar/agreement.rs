//! Pairs of agreement: gender, number, person, and the forms of articles.

use super::lexicon::*;
use super::{Pairs, Phenomenon};

/// Il libro / *La libro
pub fn article_gender(out: &mut Pairs) {
    for noun in THINGS.iter().chain(FOOD).filter(|n| !n.is_vocalic()) {
        let (g, o) = (noun.2, onset(noun.0));
        let by_gender = |f: &dyn Fn(Gender) -> String| (f(g), f(g.other()));
        out.add(by_gender(&|g| format!("{}{} è sul tavolo.", capital(definite(g, Sg, o)), noun.0)));
        out.add(by_gender(&|g| format!("Ho comprato {}{} per mia sorella.", indefinite(g, o), noun.0)));
        out.add(by_gender(&|g| format!("Di chi è {}{}?", definite(g, Sg, o), noun.0)));
        out.add(by_gender(&|g| format!("Mi piace molto {} {}.", if g == M { "questo" } else { "questa" }, noun.0)));
        out.add(by_gender(&|g| format!("Non trovo più {}{}.", definite(g, Pl, onset(noun.1)), noun.1)));
        out.add(by_gender(&|g| format!("Dammi {}{}, per favore.", definite(g, Sg, o), noun.0)));
        out.add(by_gender(&|g| {
            format!("Ho visto {} {} in vetrina.", if g == M { "questi" } else { "queste" }, noun.1)
        }));
    }
}

/// Il libro / *Lo libro; lo zaino / *il zaino
pub fn article_form(out: &mut Pairs) {
    const PLAIN: &[Noun] = &[
        Noun("libro", "libri", M),
        Noun("tavolo", "tavoli", M),
        Noun("treno", "treni", M),
        Noun("gatto", "gatti", M),
        Noun("fiore", "fiori", M),
        Noun("ponte", "ponti", M),
        Noun("quadro", "quadri", M),
        Noun("vestito", "vestiti", M),
        Noun("sasso", "sassi", M),
        Noun("cane", "cani", M),
    ];
    const SPECIAL: &[Noun] = &[
        Noun("zaino", "zaini", M),
        Noun("specchio", "specchi", M),
        Noun("sgabello", "sgabelli", M),
        Noun("scoiattolo", "scoiattoli", M),
        Noun("stivale", "stivali", M),
        Noun("straniero", "stranieri", M),
        Noun("scaffale", "scaffali", M),
        Noun("zerbino", "zerbini", M),
        Noun("spazzolino", "spazzolini", M),
        Noun("zoccolo", "zoccoli", M),
    ];
    const FRAMES: &[(&str, &str)] =
        &[("Ieri ho visto ", "."), ("Non riconosco ", "."), ("Ecco ", " di cui parlavi."), ("Hai notato ", "?")];
    for (nouns, right, wrong) in [(PLAIN, Onset::Plain, Onset::Special), (SPECIAL, Onset::Special, Onset::Plain)] {
        for noun in nouns {
            for (before, after) in FRAMES {
                for number in [Sg, Pl] {
                    let with = |o| format!("{before}{}{}{after}", definite(M, number, o), noun.form(number));
                    out.add((with(right), with(wrong)));
                }
                let with = |o| format!("{before}{}{}{after}", indefinite(M, o), noun.0);
                if !before.starts_with("Ecco") && !before.starts_with("Non") {
                    out.add((with(right), with(wrong)));
                }
            }
        }
    }
}

/// La gonna è rossa / *rosso
pub fn adjective_gender(out: &mut Pairs) {
    for noun in THINGS {
        for a in LOOKS {
            for number in [Sg, Pl] {
                let is = if number == Sg { "è" } else { "sono" };
                let subject = capital(&the(noun, number));
                let with = |g| format!("{subject} {is} {}.", a.form(g, number));
                out.add((with(noun.2), with(noun.2.other())));
            }
            let one = indefinite(noun.2, onset(noun.0));
            let with = |g| format!("Ho visto {one}{} {} nel negozio.", noun.0, a.form(g, Sg));
            out.add((with(noun.2), with(noun.2.other())));
        }
    }
    for noun in people() {
        for a in MOODS {
            let subject = capital(&the(noun, Sg));
            let with = |g| format!("{subject} sembra {} oggi.", a.form(g, Sg));
            out.add((with(noun.2), with(noun.2.other())));
        }
    }
}

/// Le gonne sono rosse / *rossa
pub fn adjective_number(out: &mut Pairs) {
    for noun in THINGS {
        for a in LOOKS {
            for number in [Sg, Pl] {
                let is = if number == Sg { "è" } else { "sono" };
                let subject = capital(&the(noun, number));
                let with = |n| format!("{subject} {is} {}.", a.form(noun.2, n));
                out.add((with(number), with(number.other())));
            }
            let with = |n| format!("In casa ho tre {} {}.", noun.1, a.form(noun.2, n));
            out.add((with(Pl), with(Sg)));
        }
    }
    for noun in people() {
        for a in MOODS {
            let subject = capital(&the(noun, Pl));
            let with = |n| format!("{subject} sembrano {} oggi.", a.form(noun.2, n));
            out.add((with(Pl), with(Sg)));
        }
    }
}

/// People whose noun tells whether they are men or women.
fn people() -> impl Iterator<Item = &'static Noun> {
    PEOPLE.iter().filter(|n| n.0 != "turista" && n.0 != "medico")
}

/// I bambini giocano / *gioca; la figlia dei vicini dorme / *dormono
pub fn verb_number(out: &mut Pairs) {
    const HEADS: &[Noun] = &[
        Noun("figlio", "figli", M),
        Noun("figlia", "figlie", F),
        Noun("collega", "colleghi", M),
        Noun("cugina", "cugine", F),
        Noun("nonno", "nonni", M),
        Noun("zia", "zie", F),
    ];
    for (verb, rest) in DOINGS.iter().chain(MOVES) {
        let form = |n| verb.1[if n == Sg { 2 } else { 5 }];
        for noun in PEOPLE {
            for number in [Sg, Pl] {
                let subject = capital(&the(noun, number));
                let with = |n| format!("{subject} {} {rest}.", form(n));
                out.add((with(number), with(number.other())));
            }
        }
        for head in HEADS {
            for (of, number) in [("dei vicini", Sg), ("delle maestre", Sg), ("del sindaco", Pl), ("della sarta", Pl)] {
                let subject = capital(&the(head, number));
                let with = |n| format!("{subject} {of} {} {rest}.", form(n));
                out.add((with(number), with(number.other())));
            }
        }
    }
}

/// Io lavoro / *Io lavora
pub fn verb_person(out: &mut Pairs) {
    const PERSONS: [&[&str]; 6] = [&["Io"], &["Tu"], &["Lui", "Lei"], &["Noi"], &["Voi"], &["Loro"]];
    for (verb, rest) in DOINGS.iter().chain(MOVES) {
        for (person, pronouns) in PERSONS.iter().enumerate() {
            // Another person of the same number.
            let wrong = [1, 2, 0, 4, 5, 3][person];
            for pronoun in *pronouns {
                out.add((
                    format!("{pronoun} {} {rest}.", verb.1[person]),
                    format!("{pronoun} {} {rest}.", verb.1[wrong]),
                ));
                out.add((
                    format!("Oggi {} non {} {rest}.", pronoun.to_lowercase(), verb.1[person]),
                    format!("Oggi {} non {} {rest}.", pronoun.to_lowercase(), verb.1[wrong]),
                ));
            }
        }
    }
}

/// Compro la mela e la mangio / *lo mangio
pub fn clitic_agreement(out: &mut Pairs) {
    let clitic = |g, n| match (g, n) {
        (M, Sg) => "lo",
        (F, Sg) => "la",
        (M, Pl) => "li",
        (F, Pl) => "le",
    };
    for number in [Sg, Pl] {
        for noun in THINGS.iter().chain(FOOD) {
            let thing = the(noun, number);
            let by_gender = |f: &dyn Fn(&str) -> String| (f(clitic(noun.2, number)), f(clitic(noun.2.other(), number)));
            out.add(by_gender(&|c| format!("Prendi {thing} e metti{c} sul tavolo.")));
            out.add(by_gender(&|c| format!("Se trovi {thing}, {c} porti in cucina?")));
            out.add(by_gender(&|c| format!("{} {c} compro domani.", capital(&thing))));
            out.add(by_gender(&|c| format!("Cerco {thing} da un'ora, ma non {c} trovo.")));
            out.add(by_gender(&|c| format!("Ho preso {thing} per portar{c} a casa.")));
        }
    }
    for noun in people() {
        let person = the(noun, Pl);
        let by_gender = |f: &dyn Fn(&str) -> String| (f(clitic(noun.2, Pl)), f(clitic(noun.2.other(), Pl)));
        out.add(by_gender(&|c| format!("Conosco bene {person}: {c} incontro ogni mattina.")));
    }
}

/// Maria è partita / *partito; le mele le ho mangiate / *mangiato
pub fn participle_agreement(out: &mut Pairs) {
    for (verb, rest) in MOVES {
        for name in WOMEN {
            let with = |g| format!("{name} è {} {rest}.", participle(verb.2, g, Sg));
            out.add((with(F), with(M)));
        }
        for name in MEN {
            let with = |g| format!("{name} è {} {rest}.", participle(verb.2, g, Sg));
            out.add((with(M), with(F)));
        }
        for noun in people() {
            let subject = capital(&the(noun, Pl));
            let with = |n| format!("{subject} sono {} {rest}.", participle(verb.2, noun.2, n));
            out.add((with(Pl), with(Sg)));
        }
    }
    for noun in FOOD.iter().chain(THINGS) {
        for verb in HANDLINGS {
            if ["guardare", "lavare"].contains(&verb.0) {
                continue;
            }
            let clitic = if noun.2 == M { "li" } else { "le" };
            let things = capital(&the(noun, Pl));
            let right = participle(verb.2, noun.2, Pl);
            out.add((format!("{things} {clitic} ho {right} ieri."), format!("{things} {clitic} ho {} ieri.", verb.2)));
        }
    }
}

/// The phenomena of this module.
pub const ALL: [Phenomenon; 8] = [
    ("article_gender", article_gender),
    ("article_form", article_form),
    ("adjective_gender", adjective_gender),
    ("adjective_number", adjective_number),
    ("verb_number", verb_number),
    ("verb_person", verb_person),
    ("clitic_agreement", clitic_agreement),
    ("participle_agreement", participle_agreement),
];
