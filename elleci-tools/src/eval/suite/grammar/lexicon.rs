//! Italian words with their forms, and the articles that they take.

/// Grammatical gender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gender {
    /// Masculine.
    M,
    /// Feminine.
    F,
}
pub use Gender::{F, M};

impl Gender {
    /// The other one.
    pub fn other(self) -> Gender {
        if self == M { F } else { M }
    }
}

/// Grammatical number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Number {
    /// Singular.
    Sg,
    /// Plural.
    Pl,
}
pub use Number::{Pl, Sg};

impl Number {
    /// The other one.
    pub fn other(self) -> Number {
        if self == Sg { Pl } else { Sg }
    }
}

/// Singular, plural, gender.
#[derive(Clone, Copy, Debug)]
pub struct Noun(pub &'static str, pub &'static str, pub Gender);

impl Noun {
    /// The form of a number.
    pub fn form(&self, number: Number) -> &'static str {
        if number == Sg { self.0 } else { self.1 }
    }

    /// Whether both forms begin with a vowel (or a mute h).
    pub fn is_vocalic(&self) -> bool {
        onset(self.0) == Onset::Vowel
    }
}

/// What a word begins with, as far as articles care.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Onset {
    /// A vowel: l', gli.
    Vowel,
    /// s and a consonant, z, gn, ps, x, y: lo, gli, uno.
    Special,
    /// Anything else: il, i, un.
    Plain,
}

/// The onset of a word.
pub fn onset(word: &str) -> Onset {
    let mut letters = word.chars();
    let first = letters.next().unwrap_or(' ');
    let second = letters.next().unwrap_or(' ');
    let is_vowel = |c| "aeiouàèéìòù".contains(c);
    match first {
        c if is_vowel(c) => Onset::Vowel,
        'h' => Onset::Vowel,
        'z' | 'x' | 'y' => Onset::Special,
        's' if !is_vowel(second) => Onset::Special,
        'g' if second == 'n' => Onset::Special,
        'p' if second == 's' || second == 'n' => Onset::Special,
        _ => Onset::Plain,
    }
}

/// The definite article with its space, if it has one: `il `, `l'`.
pub fn definite(gender: Gender, number: Number, onset: Onset) -> &'static str {
    match (gender, number, onset) {
        (M, Sg, Onset::Plain) => "il ",
        (M, Sg, Onset::Special) => "lo ",
        (F, Sg, Onset::Plain | Onset::Special) => "la ",
        (_, Sg, Onset::Vowel) => "l'",
        (M, Pl, Onset::Plain) => "i ",
        (M, Pl, _) => "gli ",
        (F, Pl, _) => "le ",
    }
}

/// The indefinite article.
pub fn indefinite(gender: Gender, onset: Onset) -> &'static str {
    match (gender, onset) {
        (M, Onset::Special) => "uno ",
        (M, _) => "un ",
        (F, Onset::Vowel) => "un'",
        (F, _) => "una ",
    }
}

/// A preposition that melts with the article: a, da, di, in, su.
pub fn articulated(preposition: &str, gender: Gender, number: Number, onset: Onset) -> String {
    let stem = match preposition {
        "di" => "de",
        "in" => "ne",
        other => other,
    };
    let end = match definite(gender, number, onset) {
        "il " => "l ",
        "lo " => "llo ",
        "la " => "lla ",
        "l'" => "ll'",
        "i " => "i ",
        "gli " => "gli ",
        _ => "lle ",
    };
    format!("{stem}{end}")
}

/// A noun with its definite article.
pub fn the(noun: &Noun, number: Number) -> String {
    let form = noun.form(number);
    format!("{}{form}", definite(noun.2, number, onset(form)))
}

/// An adjective of four forms: masculine singular, feminine singular, masculine plural, feminine plural.
#[derive(Clone, Copy, Debug)]
pub struct Adjective(pub [&'static str; 4]);

impl Adjective {
    /// The form for a gender and number.
    pub fn form(&self, gender: Gender, number: Number) -> &'static str {
        self.0[usize::from(gender == F) + 2 * usize::from(number == Pl)]
    }
}

/// A verb: infinitive; present of io, tu, lui, noi, voi, loro; past participle (masculine singular).
#[derive(Clone, Copy, Debug)]
pub struct Verb(pub &'static str, pub [&'static str; 6], pub &'static str);

/// A participle in -o with the ending of a gender and number.
pub fn participle(form: &str, gender: Gender, number: Number) -> String {
    let ending = match (gender, number) {
        (M, Sg) => "o",
        (F, Sg) => "a",
        (M, Pl) => "i",
        (F, Pl) => "e",
    };
    format!("{}{ending}", form.strip_suffix('o').unwrap_or(form))
}

/// The first letter as a capital.
pub fn capital(text: &str) -> String {
    let mut rest = text.chars();
    rest.next().map_or(String::new(), |c| c.to_uppercase().chain(rest).collect())
}

/// Men's names.
pub const MEN: &[&str] =
    &["Marco", "Luca", "Paolo", "Giovanni", "Roberto", "Pietro", "Stefano", "Matteo", "Carlo", "Davide"];
/// Women's names.
pub const WOMEN: &[&str] =
    &["Maria", "Giulia", "Anna", "Francesca", "Elena", "Chiara", "Sara", "Lucia", "Teresa", "Marta"];

/// People.
pub const PEOPLE: &[Noun] = &[
    Noun("ragazzo", "ragazzi", M),
    Noun("ragazza", "ragazze", F),
    Noun("bambino", "bambini", M),
    Noun("bambina", "bambine", F),
    Noun("maestro", "maestri", M),
    Noun("maestra", "maestre", F),
    Noun("cuoco", "cuochi", M),
    Noun("cuoca", "cuoche", F),
    Noun("vicino", "vicini", M),
    Noun("vicina", "vicine", F),
    Noun("studente", "studenti", M),
    Noun("studentessa", "studentesse", F),
    Noun("pittore", "pittori", M),
    Noun("pittrice", "pittrici", F),
    Noun("medico", "medici", M),
    Noun("dottoressa", "dottoresse", F),
    Noun("postino", "postini", M),
    Noun("signora", "signore", F),
    Noun("contadino", "contadini", M),
    Noun("contadina", "contadine", F),
    Noun("turista", "turisti", M),
    Noun("sarta", "sarte", F),
];

/// Things that are held, moved and bought.
pub const THINGS: &[Noun] = &[
    Noun("libro", "libri", M),
    Noun("quaderno", "quaderni", M),
    Noun("vaso", "vasi", M),
    Noun("piatto", "piatti", M),
    Noun("bicchiere", "bicchieri", M),
    Noun("cappello", "cappelli", M),
    Noun("coltello", "coltelli", M),
    Noun("cestino", "cestini", M),
    Noun("cuscino", "cuscini", M),
    Noun("tappeto", "tappeti", M),
    Noun("specchio", "specchi", M),
    Noun("zaino", "zaini", M),
    Noun("penna", "penne", F),
    Noun("tazza", "tazze", F),
    Noun("borsa", "borse", F),
    Noun("bottiglia", "bottiglie", F),
    Noun("scatola", "scatole", F),
    Noun("lampada", "lampade", F),
    Noun("coperta", "coperte", F),
    Noun("camicia", "camicie", F),
    Noun("giacca", "giacche", F),
    Noun("sciarpa", "sciarpe", F),
    Noun("gonna", "gonne", F),
    Noun("bicicletta", "biciclette", F),
];

/// Food, as one eats it piece by piece.
pub const FOOD: &[Noun] = &[
    Noun("panino", "panini", M),
    Noun("gelato", "gelati", M),
    Noun("biscotto", "biscotti", M),
    Noun("pomodoro", "pomodori", M),
    Noun("cornetto", "cornetti", M),
    Noun("peperone", "peperoni", M),
    Noun("mela", "mele", F),
    Noun("pera", "pere", F),
    Noun("torta", "torte", F),
    Noun("frittata", "frittate", F),
    Noun("pizza", "pizze", F),
    Noun("pesca", "pesche", F),
];

/// Looks and states of things.
pub const LOOKS: &[Adjective] = &[
    Adjective(["rosso", "rossa", "rossi", "rosse"]),
    Adjective(["nero", "nera", "neri", "nere"]),
    Adjective(["bianco", "bianca", "bianchi", "bianche"]),
    Adjective(["giallo", "gialla", "gialli", "gialle"]),
    Adjective(["nuovo", "nuova", "nuovi", "nuove"]),
    Adjective(["pulito", "pulita", "puliti", "pulite"]),
    Adjective(["sporco", "sporca", "sporchi", "sporche"]),
    Adjective(["piccolo", "piccola", "piccoli", "piccole"]),
    Adjective(["vecchio", "vecchia", "vecchi", "vecchie"]),
    Adjective(["rotto", "rotta", "rotti", "rotte"]),
];

/// Moods and traits of people.
pub const MOODS: &[Adjective] = &[
    Adjective(["stanco", "stanca", "stanchi", "stanche"]),
    Adjective(["contento", "contenta", "contenti", "contente"]),
    Adjective(["preoccupato", "preoccupata", "preoccupati", "preoccupate"]),
    Adjective(["sereno", "serena", "sereni", "serene"]),
    Adjective(["arrabbiato", "arrabbiata", "arrabbiati", "arrabbiate"]),
    Adjective(["simpatico", "simpatica", "simpatici", "simpatiche"]),
    Adjective(["malato", "malata", "malati", "malate"]),
    Adjective(["pronto", "pronta", "pronti", "pronte"]),
];

/// What people do, without an object; auxiliary avere. Each with something that can follow.
pub const DOINGS: &[(Verb, &str)] = &[
    (Verb("lavorare", ["lavoro", "lavori", "lavora", "lavoriamo", "lavorate", "lavorano"], "lavorato"), "in città"),
    (Verb("dormire", ["dormo", "dormi", "dorme", "dormiamo", "dormite", "dormono"], "dormito"), "fino a tardi"),
    (
        Verb("camminare", ["cammino", "cammini", "cammina", "camminiamo", "camminate", "camminano"], "camminato"),
        "nel bosco",
    ),
    (Verb("cantare", ["canto", "canti", "canta", "cantiamo", "cantate", "cantano"], "cantato"), "in coro"),
    (Verb("studiare", ["studio", "studi", "studia", "studiamo", "studiate", "studiano"], "studiato"), "in biblioteca"),
    (Verb("nuotare", ["nuoto", "nuoti", "nuota", "nuotiamo", "nuotate", "nuotano"], "nuotato"), "nel lago"),
    (Verb("ballare", ["ballo", "balli", "balla", "balliamo", "ballate", "ballano"], "ballato"), "in piazza"),
    (Verb("ridere", ["rido", "ridi", "ride", "ridiamo", "ridete", "ridono"], "riso"), "di gusto"),
    (
        Verb("viaggiare", ["viaggio", "viaggi", "viaggia", "viaggiamo", "viaggiate", "viaggiano"], "viaggiato"),
        "in treno",
    ),
    (Verb("cenare", ["ceno", "ceni", "cena", "ceniamo", "cenate", "cenano"], "cenato"), "a casa"),
    (Verb("parlare", ["parlo", "parli", "parla", "parliamo", "parlate", "parlano"], "parlato"), "a bassa voce"),
    (
        Verb("aspettare", ["aspetto", "aspetti", "aspetta", "aspettiamo", "aspettate", "aspettano"], "aspettato"),
        "con pazienza",
    ),
];

/// Movements and changes; auxiliary essere. Each with something that can follow.
pub const MOVES: &[(Verb, &str)] = &[
    (Verb("andare", ["vado", "vai", "va", "andiamo", "andate", "vanno"], "andato"), "al mercato"),
    (Verb("partire", ["parto", "parti", "parte", "partiamo", "partite", "partono"], "partito"), "per Milano"),
    (Verb("arrivare", ["arrivo", "arrivi", "arriva", "arriviamo", "arrivate", "arrivano"], "arrivato"), "in ritardo"),
    (Verb("tornare", ["torno", "torni", "torna", "torniamo", "tornate", "tornano"], "tornato"), "a casa"),
    (Verb("uscire", ["esco", "esci", "esce", "usciamo", "uscite", "escono"], "uscito"), "dal cinema"),
    (Verb("entrare", ["entro", "entri", "entra", "entriamo", "entrate", "entrano"], "entrato"), "nel negozio"),
    (Verb("venire", ["vengo", "vieni", "viene", "veniamo", "venite", "vengono"], "venuto"), "alla festa"),
    (Verb("restare", ["resto", "resti", "resta", "restiamo", "restate", "restano"], "restato"), "in albergo"),
    (Verb("scappare", ["scappo", "scappi", "scappa", "scappiamo", "scappate", "scappano"], "scappato"), "dal cortile"),
    (Verb("cadere", ["cado", "cadi", "cade", "cadiamo", "cadete", "cadono"], "caduto"), "dalle scale"),
];

/// What one does with a thing or with food; auxiliary avere.
pub const HANDLINGS: &[Verb] = &[
    Verb("comprare", ["compro", "compri", "compra", "compriamo", "comprate", "comprano"], "comprato"),
    Verb("cercare", ["cerco", "cerchi", "cerca", "cerchiamo", "cercate", "cercano"], "cercato"),
    Verb("prendere", ["prendo", "prendi", "prende", "prendiamo", "prendete", "prendono"], "preso"),
    Verb("portare", ["porto", "porti", "porta", "portiamo", "portate", "portano"], "portato"),
    Verb("vendere", ["vendo", "vendi", "vende", "vendiamo", "vendete", "vendono"], "venduto"),
    Verb("guardare", ["guardo", "guardi", "guarda", "guardiamo", "guardate", "guardano"], "guardato"),
    Verb("scegliere", ["scelgo", "scegli", "sceglie", "scegliamo", "scegliete", "scelgono"], "scelto"),
    Verb("lavare", ["lavo", "lavi", "lava", "laviamo", "lavate", "lavano"], "lavato"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn articles_follow_the_beginning_of_the_word() {
        for (noun, sg, pl, one) in [
            (Noun("libro", "libri", M), "il libro", "i libri", "un "),
            (Noun("zaino", "zaini", M), "lo zaino", "gli zaini", "uno "),
            (Noun("specchio", "specchi", M), "lo specchio", "gli specchi", "uno "),
            (Noun("albero", "alberi", M), "l'albero", "gli alberi", "un "),
            (Noun("sciarpa", "sciarpe", F), "la sciarpa", "le sciarpe", "una "),
            (Noun("isola", "isole", F), "l'isola", "le isole", "un'"),
            (Noun("sarta", "sarte", F), "la sarta", "le sarte", "una "),
        ] {
            assert_eq!((the(&noun, Sg).as_str(), the(&noun, Pl).as_str()), (sg, pl));
            assert_eq!(indefinite(noun.2, onset(noun.0)), one);
        }
        assert_eq!(articulated("di", M, Sg, Onset::Plain), "del ");
        assert_eq!(articulated("in", F, Sg, Onset::Vowel), "nell'");
        assert_eq!(articulated("su", M, Pl, Onset::Special), "sugli ");
        assert_eq!(articulated("a", M, Sg, Onset::Special), "allo ");
        assert_eq!(articulated("da", F, Pl, Onset::Plain), "dalle ");
        assert_eq!(articulated("in", M, Pl, Onset::Plain), "nei ");
    }
}
