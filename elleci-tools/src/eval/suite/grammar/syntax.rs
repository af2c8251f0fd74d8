//! Pairs of syntax: auxiliaries, clitic position, prepositions, mood, negation, comparison, tense.

use super::lexicon::*;
use super::{Pairs, Phenomenon};

/// Marco è andato / *ha andato; Marco ha dormito / *è dormito
pub fn auxiliary(out: &mut Pairs) {
    // Verbs that can have an object make a passive with essere, which is another sentence and not a wrong one.
    const TRANSITIVE: &[&str] = &["aspettare", "cantare", "studiare", "ballare"];
    for name in MEN {
        let with = |aux: &str, participle: &str, rest: &str| format!("{name} {aux} {participle} {rest}.");
        for (verb, rest) in MOVES {
            out.add((with("è", verb.2, rest), with("ha", verb.2, rest)));
        }
        for (verb, rest) in DOINGS.iter().filter(|(verb, _)| !TRANSITIVE.contains(&verb.0)) {
            out.add((with("ha", verb.2, rest), with("è", verb.2, rest)));
        }
        for (verb, noun) in HANDLINGS.iter().zip(THINGS) {
            let thing = the(noun, Sg);
            out.add((with("ha", verb.2, &thing), with("è", verb.2, &thing)));
        }
        for (participle, rest) in [
            ("lavato", "le mani"),
            ("svegliato", "alle sette"),
            ("alzato", "tardi"),
            ("vestito", "in fretta"),
            ("seduto", "vicino alla finestra"),
            ("addormentato", "sul divano"),
        ] {
            out.add((with("si è", participle, rest), with("si ha", participle, rest)));
        }
    }
}

/// Lo vedo spesso / *Vedo lo spesso; vado a comprarlo / *vado a lo comprare
pub fn clitic_position(out: &mut Pairs) {
    const VERBS: &[(&str, &str, &str)] = &[
        ("conosce", "conoscere", "bene"),
        ("vede", "vedere", "ogni giorno"),
        ("saluta", "salutare", "sempre"),
        ("chiama", "chiamare", "spesso"),
        ("aspetta", "aspettare", "in stazione"),
        ("cerca", "cercare", "dappertutto"),
        ("incontra", "incontrare", "al mercato"),
        ("ascolta", "ascoltare", "con attenzione"),
    ];
    const CLITICS: [&str; 6] = ["mi", "ti", "lo", "la", "ci", "li"];
    for (finite, infinitive, rest) in VERBS {
        let bare = &infinitive[..infinitive.len() - 1];
        for clitic in CLITICS {
            for name in MEN.iter().chain(WOMEN) {
                out.add((format!("{name} {clitic} {finite} {rest}."), format!("{name} {finite} {clitic} {rest}.")));
            }
            for start in ["Spera di", "Prova a", "Ha deciso di", "Comincia a"] {
                out.add((format!("{start} {bare}{clitic} {rest}."), format!("{start} {clitic} {infinitive} {rest}.")));
            }
            out.add((format!("Non {clitic} {finite} {rest}."), format!("{} non {finite} {rest}.", capital(clitic))));
        }
    }
}

/// Sul tavolo / *su il tavolo; nella borsa / *nel borsa
pub fn articulated_preposition(out: &mut Pairs) {
    const PLACES: &[(&str, Noun)] = &[
        ("su", Noun("tavolo", "tavoli", M)),
        ("su", Noun("sedia", "sedie", F)),
        ("su", Noun("scaffale", "scaffali", M)),
        ("su", Noun("letto", "letti", M)),
        ("su", Noun("mensola", "mensole", F)),
        ("in", Noun("cassetto", "cassetti", M)),
        ("in", Noun("scatola", "scatole", F)),
        ("in", Noun("borsa", "borse", F)),
        ("in", Noun("zaino", "zaini", M)),
        ("in", Noun("cestino", "cestini", M)),
        ("in", Noun("valigia", "valigie", F)),
        ("in", Noun("giardino", "giardini", M)),
    ];
    const OTHERS: &[(&str, &str, Noun, &str)] = &[
        ("Ho telefonato ", "a", Noun("medico", "medici", M), "."),
        ("Il treno parte ", "da", Noun("stazione", "stazioni", F), " alle otto."),
        ("Questa è la casa ", "di", Noun("sindaco", "sindaci", M), "."),
        ("Abbiamo scritto ", "a", Noun("maestra", "maestre", F), "."),
        ("Torno adesso ", "da", Noun("mercato", "mercati", M), "."),
        ("Mi ricordo bene ", "di", Noun("nonna", "nonne", F), "."),
        ("Il gatto salta ", "da", Noun("finestra", "finestre", F), "."),
        ("Le chiavi ", "di", Noun("negozio", "negozi", M), " sono nuove."),
        ("Vado spesso ", "a", Noun("cinema", "cinema", M), "."),
        ("Il rumore viene ", "da", Noun("cortile", "cortili", M), "."),
    ];
    let mut both = |before: &str, preposition: &str, noun: &Noun, after: &str| {
        let o = onset(noun.0);
        let with = |joined: &str| format!("{before}{joined}{}{after}", noun.0);
        let right = with(&articulated(preposition, noun.2, Sg, o));
        out.add((right.clone(), with(&format!("{preposition} {}", definite(noun.2, Sg, o)))));
        out.add((right, with(&articulated(preposition, noun.2.other(), Sg, o))));
    };
    for (preposition, place) in PLACES {
        for thing in THINGS.iter().filter(|t| ![place.0, "bicicletta", "tappeto"].contains(&t.0)) {
            both(&format!("{} è ", capital(&the(thing, Sg))), preposition, place, ".");
            both(&format!("Ho lasciato {} ", the(thing, Sg)), preposition, place, ".");
        }
    }
    for (before, preposition, noun, after) in OTHERS {
        both(before, preposition, noun, after);
    }
}

/// Comincio a studiare / *comincio di studiare; vado a Roma / *vado in Roma
pub fn preposition_choice(out: &mut Pairs) {
    const GOVERNORS: &[(&str, &str, &str)] = &[
        ("comincia", "a", "di"),
        ("riesce", "a", "di"),
        ("impara", "a", "di"),
        ("continua", "a", "di"),
        ("si mette", "a", "di"),
        ("smette", "di", "a"),
        ("cerca", "di", "a"),
        ("decide", "di", "a"),
        ("promette", "di", "a"),
        ("ha bisogno", "di", "a"),
        ("ha voglia", "di", "a"),
        ("finge", "di", "a"),
    ];
    const WHAT: &[&str] =
        &["dormire", "cantare", "studiare", "correre", "cucinare", "lavorare in giardino", "leggere il giornale"];
    for (verb, right, wrong) in GOVERNORS {
        for what in WHAT {
            for name in MEN.iter().take(5).chain(&WOMEN[..5]) {
                out.add((format!("{name} {verb} {right} {what}."), format!("{name} {verb} {wrong} {what}.")));
            }
        }
    }
    const CITIES: &[&str] = &["Roma", "Milano", "Torino", "Parigi", "Palermo", "Bologna"];
    const COUNTRIES: &[&str] = &["Francia", "Spagna", "Germania", "Italia", "Grecia", "Svizzera"];
    // With verbs of staying, "in Roma" is the style of public offices: only movement makes it plainly wrong.
    const GOING: &[&str] = &["Domani vado", "Torniamo", "Volevano andare", "Siamo arrivati", "Ieri sono andato"];
    const BEING: &[&str] = &["Mio fratello abita", "D'estate resto", "Hanno trovato lavoro"];
    for start in GOING {
        for city in CITIES {
            out.add((format!("{start} a {city}."), format!("{start} in {city}.")));
        }
    }
    for start in GOING.iter().chain(BEING) {
        for country in COUNTRIES {
            out.add((format!("{start} in {country}."), format!("{start} a {country}.")));
        }
    }
}

/// Voglio che venga / *viene
pub fn subjunctive(out: &mut Pairs) {
    const TRIGGERS: &[&str] = &["Voglio che", "È necessario che", "Bisogna che", "Preferisco che", "Desidero che"];
    const CONJUNCTIONS: &[&str] = &["Usciamo prima che", "Sono felice benché", "Ve lo dico affinché"];
    const VERBS: &[(&str, &str, &str)] = &[
        ("venga", "viene", "con noi"),
        ("vada", "va", "dal medico"),
        ("faccia", "fa", "i compiti"),
        ("sia", "è", "in casa"),
        ("parta", "parte", "con il treno"),
        ("esca", "esce", "di casa"),
        ("stia", "sta", "in silenzio"),
        ("finisca", "finisce", "il lavoro"),
        ("legga", "legge", "la lettera"),
        ("scriva", "scrive", "alla nonna"),
        ("dorma", "dorme", "in albergo"),
        ("prenda", "prende", "l'autobus"),
    ];
    for name in MEN.iter().chain(WOMEN) {
        for (right, wrong, rest) in VERBS {
            for start in TRIGGERS.iter().chain(CONJUNCTIONS) {
                out.add((format!("{start} {name} {right} {rest}."), format!("{start} {name} {wrong} {rest}.")));
            }
        }
    }
}

/// Non mangia niente / *mangia niente
pub fn negation(out: &mut Pairs) {
    const VERBS: &[(&str, &str)] = &[
        ("mangia", "niente"),
        ("dice", "niente"),
        ("compra", "niente"),
        ("capisce", "niente"),
        ("vede", "nessuno"),
        ("conosce", "nessuno"),
        ("saluta", "nessuno"),
        ("ascolta", "nessuno"),
        ("dorme", "affatto"),
        ("esce", "mai"),
        ("ride", "mai"),
        ("telefona", "mai"),
    ];
    let people = PEOPLE.iter().map(|n| capital(&the(n, Sg)));
    for subject in MEN.iter().chain(WOMEN).map(|n| n.to_string()).chain(people) {
        for (verb, word) in VERBS {
            out.add((format!("{subject} non {verb} {word}."), format!("{subject} {verb} {word}.")));
        }
    }
}

/// Più alto di Marco / *più alto che Marco
pub fn comparison(out: &mut Pairs) {
    const TRAITS: &[Adjective] = &[
        Adjective(["alto", "alta", "alti", "alte"]),
        Adjective(["bravo", "brava", "bravi", "brave"]),
        Adjective(["simpatico", "simpatica", "simpatici", "simpatiche"]),
        Adjective(["generoso", "generosa", "generosi", "generose"]),
        Adjective(["ricco", "ricca", "ricchi", "ricche"]),
        Adjective(["timido", "timida", "timidi", "timide"]),
    ];
    for (i, other) in MEN.iter().chain(WOMEN).enumerate() {
        for (names, gender) in [(MEN, M), (WOMEN, F)] {
            let name = names[(i + 3) % names.len()];
            if name == *other {
                continue;
            }
            for a in TRAITS {
                for more in ["più", "meno"] {
                    let with = |than: &str| format!("{name} è {more} {} {than} {other}.", a.form(gender, Sg));
                    out.add((with("di"), with("che")));
                }
            }
        }
    }
}

/// Domani partirà / *è partito
pub fn tense(out: &mut Pairs) {
    const FUTURE: &[&str] = &["andrà", "partirà", "arriverà", "tornerà", "uscirà", "entrerà", "verrà", "resterà"];
    for (i, (verb, rest)) in MOVES.iter().take(FUTURE.len()).enumerate() {
        for name in MEN {
            let (past, future) = (format!("è {} {rest}", verb.2), format!("{} {rest}", FUTURE[i]));
            for when in ["Ieri", "La settimana scorsa", "Due anni fa"] {
                out.add((format!("{when} {name} {past}."), format!("{when} {name} {future}.")));
            }
            for when in ["Domani", "La settimana prossima", "Fra due anni"] {
                out.add((format!("{when} {name} {future}."), format!("{when} {name} {past}.")));
            }
        }
    }
}

/// The phenomena of this module.
pub const ALL: [Phenomenon; 8] = [
    ("auxiliary", auxiliary),
    ("clitic_position", clitic_position),
    ("articulated_preposition", articulated_preposition),
    ("preposition_choice", preposition_choice),
    ("subjunctive", subjunctive),
    ("negation", negation),
    ("comparison", comparison),
    ("tense", tense),
];
