use super::train::words;
use super::*;

/// Some text in two languages, repetitive enough for merges.
fn texts() -> Vec<String> {
    let a = "Il gatto dorme sul tavolo della cucina, perché la casa è calda e il sole entra dalla finestra. ";
    let b = "The cat sleeps on the table; it's warm, and we'll see what the day brings. Numbers: 123, 4567.\n\n";
    let c =
        "Nel mezzo della strada c'era un'altra persona che non diceva niente, però ascoltava tutto.\n\tfn main() {}\n";
    (0..40).map(|i| format!("{}{}{}", a.repeat(1 + i % 3), b.repeat(1 + i % 2), c)).collect()
}

fn trained(tokens: usize) -> Tokenizer {
    train_tokenizer(texts().into_iter(), &TrainOptions::new(tokens, tokens + 50)).unwrap()
}

/// Text with everything that could go wrong.
fn awkward() -> Vec<String> {
    let mut all = texts();
    all.extend(
        [
            "",
            " ",
            "\n\n\n",
            "  due  spazi   tre\t\ttab \u{a0} nbsp \u{2003}em\r\n",
            "<|endoftext|> <|im_start|>user\nciao<|im_end|>",
            "emoji 👩‍👩‍👧 中文字符 العربية e\u{301} ½ Ⅷ ٣ \u{0} \u{feff}",
            "don't DON'T 'tis l'ora dell'anno '90 'll'd",
        ]
        .map(String::from),
    );
    all.push("=".repeat(500));
    all.push("abc".repeat(400));
    // Every character of the lower planes that is not a surrogate, in blocks.
    for block in (0..0x3000u32).step_by(64) {
        all.push((block..block + 64).filter_map(char::from_u32).collect());
    }
    all
}

#[test]
fn encodes_as_the_tokenizers_crate_does() {
    let ours = trained(700);
    let mut theirs = tokenizers::Tokenizer::from_bytes(ours.json()).unwrap();
    theirs.set_encode_special_tokens(true);
    let mut cache = Cache::default();
    for text in awkward() {
        let want = theirs.encode(text.as_str(), false).unwrap();
        let mut got = Vec::new();
        ours.encode_into(&text, &mut cache, &mut got);
        assert_eq!(got, want.get_ids(), "{text:?}");
        assert_eq!(ours.encode(&text), want.get_ids(), "without a warm cache: {text:?}");
        assert_eq!(ours.decode(&got), text, "decoding loses nothing");
        let bytes: usize = got.iter().map(|t| usize::from(ours.token_bytes()[*t as usize])).sum();
        assert_eq!(bytes, text.len());
        assert!(got.iter().all(|t| *t as usize >= SPECIALS.len()), "text never makes a special token");
    }
}

#[test]
fn listed_words_are_single_tokens_in_both_forms() {
    let list: Vec<&str> = words(WORDS).collect();
    assert!(list.len() >= 200);
    assert_eq!(list.iter().collect::<std::collections::HashSet<_>>().len(), list.len(), "no word twice");
    let t = trained(4096);
    assert_eq!(t.config().single_token_words[..128], list[..128]);
    assert_eq!(t.config().single_token_words[128..], ["system", "user", "assistant"]);
    for word in &list[..128] {
        for form in [word.to_string(), format!(" {word}")] {
            assert_eq!(t.encode(&form).len(), 1, "{form:?}");
            assert_eq!(t.encode(&format!("Ecco:{form}.")).len(), t.encode("Ecco:").len() + 2, "{form:?} in text");
        }
    }
    // The whole list fits where the vocabulary is tight, too: corpus merges give way.
    let all = TrainOptions { words: list.iter().map(|w| w.to_string()).collect(), ..TrainOptions::new(1700, 1700) };
    let tight = train_tokenizer(texts().into_iter(), &all).unwrap();
    assert!(list.iter().all(|w| tight.is_single_token(w) && tight.is_single_token(&format!(" {w}"))));
    assert!(tight.config().tokens <= 1700);
}

#[test]
fn words_do_not_cut_other_words() {
    // `re` and `no` are listed words; a longer word that the corpus knows stays as the corpus cuts it.
    let options = |words: &[&str]| TrainOptions {
        words: words.iter().map(|w| w.to_string()).collect(),
        ..TrainOptions::new(900, 900)
    };
    let plain = train_tokenizer(texts().into_iter(), &options(&[])).unwrap();
    let with = train_tokenizer(texts().into_iter(), &options(&["re", "no", "mare"])).unwrap();
    for word in [" finestra", " persona", " niente", " cucina"] {
        let cut = |t: &Tokenizer| t.encode(word).iter().map(|i| t.decode(&[*i])).collect::<Vec<_>>();
        assert_eq!(cut(&plain), cut(&with), "{word}");
    }
}

#[test]
fn training_is_deterministic_and_order_does_not_matter() {
    let options = TrainOptions::new(800, 1000);
    let forward = train_tokenizer(texts().into_iter(), &options).unwrap();
    let backward = train_tokenizer(texts().into_iter().rev(), &options).unwrap();
    assert_eq!(forward.json(), backward.json());
    assert_eq!(forward.config(), backward.config());
}

#[test]
fn sizes_and_ids() {
    let t = trained(400);
    assert_eq!((t.config().tokens, t.vocab_size(), t.token_bytes().len()), (400, 450, 450));
    assert!(trained(2000).config().tokens < 2000, "a small corpus has no more merges to give");
    let crate_view = tokenizers::Tokenizer::from_bytes(t.json()).unwrap();
    for (id, special) in (0..).zip(SPECIALS) {
        assert_eq!(crate_view.token_to_id(special), Some(id));
    }
    assert_eq!(t.decode(&[0, 1, 2, 3, 440, 9999]), "");
}

#[test]
fn impossible_options_are_explained() {
    let fails = |o: TrainOptions| format!("{:#}", train_tokenizer(texts().into_iter(), &o).unwrap_err());
    assert!(fails(TrainOptions::new(100, 100)).contains("it must be 260"));
    assert!(fails(TrainOptions::new(70_000, 70_000)).contains("to 65536"));
    assert!(fails(TrainOptions::new(600, 500)).contains("padding to 500"));
    let words = |w: &str| TrainOptions { words: vec![w.to_string()], ..TrainOptions::new(600, 600) };
    assert!(fails(words("due parole")).contains("`due parole` is split"));
    // A file of another kind as the list: its beginning is enough.
    let e = fails(words(&"parola".repeat(10_000)));
    assert!(e.contains("paro…` has 60000 bytes") && e.len() < 200, "{e}");
    let many =
        TrainOptions { words: super::train::words(WORDS).map(String::from).collect(), ..TrainOptions::new(300, 300) };
    assert!(fails(many).contains("no room"));
    let empty = train_tokenizer(["  \n".to_string()].into_iter(), &TrainOptions::new(600, 600)).unwrap_err();
    assert!(empty.to_string().contains("no text"), "{empty}");
}

#[test]
fn saved_files_load_and_damaged_ones_are_named() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("tokenizer.json");
    let t = trained(600);
    t.save(&path).unwrap();
    let loaded = Tokenizer::load(tmp.path()).unwrap();
    assert_eq!((loaded.json(), loaded.config()), (t.json(), t.config()));
    assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 2, "no temporary file stays");

    let fails = |from: &str, to: &str| {
        let json = String::from_utf8(t.json().to_vec()).unwrap();
        assert!(json.contains(from), "{from}");
        format!("{:#}", Tokenizer::from_json(json.replacen(from, to, 1).into_bytes(), None).unwrap_err())
    };
    assert!(fails("\"version\"", "\"").contains("not a valid tokenizer"));
    assert!(
        fails("\"add_prefix_space\": false", "\"add_prefix_space\": true").contains("pre_tokenizer.add_prefix_space")
    );
    // What the crate would panic on: a control character within the decoder, and one that it does not know.
    assert!(fails("\"decoder\": {", "\"decoder\": {\"\n\": 0, ").contains("not a valid tokenizer"));
    assert!(fails("\"decoder\": {", "\"decoder\": {\"type\": 7}, \"other\": {").contains("`decoder.type` is 7"));
    assert!(fails("\"normalizer\": null", "\"normalizer\": {\"type\": \"NFC\"}").contains("`normalizer`"));
    let renamed = String::from_utf8(t.json().to_vec()).unwrap().replace("<|im_end|>", "<|im_stop|>");
    let e = format!("{:#}", Tokenizer::from_json(renamed.into_bytes(), None).unwrap_err());
    assert!(e.contains("<|im_stop|>"), "{e}");

    let config = tmp.path().join("tokenizer.config.json");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("\"vocab_size\": 650", "\"vocab_size\": 70000")).unwrap();
    assert!(format!("{:#}", Tokenizer::load(&path).unwrap_err()).contains("`vocab_size` is 70000"));
    fs::write(&config, text.replace(t.sha256(), &"0".repeat(64))).unwrap();
    assert!(format!("{:#}", Tokenizer::load(&path).unwrap_err()).contains("do not belong together"));
    fs::write(&config, "{").unwrap();
    assert!(format!("{:#}", Tokenizer::load(&path).unwrap_err()).contains("tokenizer.config.json"));
    let missing = format!("{:#}", Tokenizer::load(&tmp.path().join("none.json")).unwrap_err());
    assert!(missing.contains("none.json") && missing.contains("elleci-data tokenizer"));
}
