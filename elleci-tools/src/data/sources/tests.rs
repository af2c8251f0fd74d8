use super::*;
use ::parquet::basic::{LogicalType, Repetition, Type as PhysicalType};
use ::parquet::data_type::{ByteArray, ByteArrayType, Int32Type};
use ::parquet::file::properties::WriterProperties;
use ::parquet::file::writer::SerializedFileWriter;
use ::parquet::schema::types::Type;
use std::fs;
use std::io::Write;
use std::path::Path;

/// Documents, and rejected rows with their reasons.
type Contents = (Vec<Document>, Vec<(u64, String)>);

/// Everything in one file: documents, and reasons of rejected rows with their numbers.
fn read_file(path: &Path, options: &ReadOptions) -> Result<Contents> {
    let inputs = find_inputs(&[path.to_path_buf()], options)?.inputs;
    let (mut documents, mut rejected) = (Vec::new(), Vec::new());
    let position = Arc::new(AtomicU64::new(0));
    read(&inputs[0], options, &position, &mut |row, result| {
        match result {
            Ok(d) => documents.push(d),
            Err(reason) => rejected.push((row, reason)),
        }
        Ok(true)
    })?;
    Ok((documents, rejected))
}

fn with_file<T>(name: &str, bytes: &[u8], f: impl Fn(&Path) -> T) -> T {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join(name);
    fs::write(&path, bytes).unwrap();
    f(&path)
}

fn read_bytes(name: &str, bytes: &[u8]) -> Result<Contents> {
    with_file(name, bytes, |p| read_file(p, &ReadOptions::default()))
}

fn text(s: &str) -> Document {
    Document::Text(s.to_string())
}

fn dialogue(turns: &[(&str, &str)]) -> Document {
    let turn = |(role, content): &(&str, &str)| Turn {
        role: crate::data::chatml::Role::from_name(role).unwrap(),
        content: content.to_string(),
    };
    Document::Dialogue(turns.iter().map(turn).collect())
}

#[test]
fn every_schema_of_json_lines_is_told_by_its_columns() {
    let qa = dialogue(&[("user", "Chi?\n\nIo"), ("assistant", "Tu.")]);
    for (line, want) in [
        (r#"{"text":" ciao\r\nmondo \n","source":"x"}"#, text("ciao\nmondo")),
        (r#"{"prompt":"p","text":"t","audience":"a","format":"f","seed_data":"s","token_length":3}"#, text("t")),
        (r#"{"id":"1","url":"u","title":"Roma","text":"Roma è una città."}"#, text("Roma\n\nRoma è una città.")),
        (r#"{"instruction":"Chi?","input":"Io","output":"Tu."}"#, qa.clone()),
        (r#"{"instruction":"Chi?","output":"Tu."}"#, dialogue(&[("user", "Chi?"), ("assistant", "Tu.")])),
        (r#"{"prompt":"Chi?\n\nIo","completion":"Tu."}"#, qa),
        (
            r#"{"messages":[{"role":"system","content":"S"},{"role":"user","content":"U"},{"role":"assistant","content":"A"}]}"#,
            dialogue(&[("system", "S"), ("user", "U"), ("assistant", "A")]),
        ),
    ] {
        assert_eq!(read_bytes("x.jsonl", line.as_bytes()).unwrap(), (vec![want], vec![]), "{line}");
    }
}

#[test]
fn bad_rows_are_told_with_their_reason_and_the_rest_is_read() {
    let mut file = br#"{"text":"uno"}
not json
[1]
{"text":5}
{"other":"x"}
{"text":null}
{"text":"  "}

{"text":"du"#
        .to_vec();
    file.extend(b"\xff\"}\n{\"text\":\"tre\"}");
    let (documents, rejected) = read_bytes("x.jsonl", &file).unwrap();
    assert_eq!(documents, [text("uno"), text("tre")]);
    let want = [
        (2, "malformed JSON"),
        (3, "not a JSON object"),
        (4, "`text` is not a string"),
        (5, "`text` is missing"),
        (6, "`text` is missing"),
        (7, "empty text"),
        (8, "invalid UTF-8"),
    ];
    assert_eq!(rejected, want.map(|(n, r)| (n, r.to_string())));

    let rows = br#"{"messages":[{"role":"user","content":"U"}]}
{"messages":"x"}
{"messages":[{"role":"robot","content":"U"}]}
{"messages":[]}
{"messages":[{"role":"user","content":"U"},{"role":"assistant","content":" "}]}"#;
    let (documents, rejected) = read_bytes("x.jsonl", rows).unwrap();
    assert!(documents.is_empty());
    let reasons: Vec<&str> = rejected.iter().map(|(_, r)| r.as_str()).collect();
    let end = "the dialogue does not end with the assistant";
    assert_eq!(reasons, [end, "`messages` is not a list", "a message has an unknown `role`", end, "empty text"]);
}

#[test]
fn compressed_files_read_the_same_and_cut_ones_are_refused() {
    let plain = "{\"text\":\"uno\"}\n{\"text\":\"due\"}\n".repeat(500);
    let want = read_bytes("x.jsonl", plain.as_bytes()).unwrap();
    assert_eq!(want.0.len(), 1000);
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(plain.as_bytes()).unwrap();
    let gz = gz.finish().unwrap();
    let zst = zstd::encode_all(plain.as_bytes(), 1).unwrap();
    assert_eq!(read_bytes("x.jsonl.gz", &gz).unwrap(), want);
    assert_eq!(read_bytes("x.jsonl.zst", &zst).unwrap(), want);
    for (name, bytes) in [("x.jsonl.gz", &gz), ("x.jsonl.zst", &zst)] {
        let e = format!("{:#}", read_bytes(name, &bytes[..bytes.len() - 9]).unwrap_err());
        assert!(e.contains(name) && e.contains("truncated or damaged"), "{e}");
    }
}

#[test]
fn text_is_cut_as_asked() {
    let file = "---\n\nA\n\nuno\n\n---\n\n---\nB\n";
    let split = |s| {
        let options = ReadOptions { text_split: s, ..ReadOptions::default() };
        with_file("x.txt", file.as_bytes(), |p| read_file(p, &options).unwrap().0)
    };
    assert_eq!(split(TextSplit::File), [text(file.trim())]);
    assert_eq!(split(TextSplit::Rule), [text("A\n\nuno"), text("B")]);
    assert_eq!(split(TextSplit::Blank).len(), 5);
    assert_eq!(read_bytes("x.txt", b"\xff").unwrap().1, [(1, "invalid UTF-8".to_string())]);
    assert_eq!(read_bytes("x.md", b"").unwrap().1, [(1, "empty text".to_string())]);
}

#[test]
fn openassistant_trees_give_their_best_dialogue() {
    let message = |id: &str, parent: &str, role: &str, rank: &str, more: &str| {
        let parent = if parent.is_empty() { "null".to_string() } else { format!("\"{parent}\"") };
        format!(
            "{{\"message_id\":\"{id}\",\"parent_id\":{parent},\"message_tree_id\":\"t\",\"role\":\"{role}\",\"text\":\"{id}\",\
             \"rank\":{rank},\"lang\":\"it\"{more}}}\n"
        )
    };
    let rows = [
        // Replies may stand before what they reply to.
        message("a2", "p1", "assistant", "0", ""),
        message("p1", "", "prompter", "null", ""),
        message("a1", "p1", "assistant", "1", ""),
        message("a0", "p1", "assistant", "0", ",\"deleted\":true"),
        message("p2", "a2", "prompter", "null", ""),
        message("p3", "a1", "prompter", "null", ""),
        message("q", "", "prompter", "null", ""),
        message("e", "", "prompter", "null", ",\"deleted\":true"),
    ]
    .concat();
    let english = message("en", "", "prompter", "null", "").replace("\"it\"", "\"en\"");
    let options = ReadOptions { languages: vec!["it".to_string()], ..ReadOptions::default() };
    let (documents, rejected) = with_file("x.jsonl", (rows + &english).as_bytes(), |p| read_file(p, &options).unwrap());
    assert_eq!(documents, [dialogue(&[("user", "p1"), ("assistant", "a2")])]);
    let reasons: Vec<&str> = rejected.iter().map(|(_, r)| r.as_str()).collect();
    assert_eq!(
        reasons,
        ["a prompt without an answer", "a deleted or rejected message", "another language than --lang"]
    );
}

/// A parquet file of string columns and one integer column, in several row groups.
fn parquet_file(path: &Path, columns: &[&str], rows: &[Vec<Option<String>>]) {
    let field = |name: &&str| {
        let builder = Type::primitive_type_builder(name, PhysicalType::BYTE_ARRAY);
        let builder = builder.with_repetition(Repetition::OPTIONAL).with_logical_type(Some(LogicalType::String));
        Arc::new(builder.build().unwrap())
    };
    let mut fields: Vec<_> = columns.iter().map(field).collect();
    let length = Type::primitive_type_builder("token_length", PhysicalType::INT32);
    fields.push(Arc::new(length.with_repetition(Repetition::REQUIRED).build().unwrap()));
    let schema = Arc::new(Type::group_type_builder("schema").with_fields(fields).build().unwrap());
    let properties = WriterProperties::builder()
        .set_compression(::parquet::basic::Compression::ZSTD(::parquet::basic::ZstdLevel::default()));
    let mut writer =
        SerializedFileWriter::new(File::create(path).unwrap(), schema, Arc::new(properties.build())).unwrap();
    for rows in rows.chunks(3) {
        let mut group = writer.next_row_group().unwrap();
        for c in 0..columns.len() {
            let values: Vec<ByteArray> =
                rows.iter().filter_map(|r| r[c].as_ref()).map(|s| ByteArray::from(s.as_str())).collect();
            let levels: Vec<i16> = rows.iter().map(|r| i16::from(r[c].is_some())).collect();
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<ByteArrayType>().write_batch(&values, Some(&levels), None).unwrap();
            column.close().unwrap();
        }
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<Int32Type>().write_batch(&vec![7; rows.len()], None, None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
    }
    writer.close().unwrap();
}

#[test]
fn parquet_is_read_across_row_groups() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("x.parquet");
    let rows: Vec<Vec<Option<String>>> = (0..10)
        .map(|i| vec![Some("p".into()), (i != 4).then(|| format!("testo {i}")), Some("x".repeat(1000))])
        .collect();
    parquet_file(&path, &["prompt", "text", "seed_data"], &rows);
    let (documents, rejected) = read_file(&path, &ReadOptions::default()).unwrap();
    let want: Vec<Document> = (0..10).filter(|i| *i != 4).map(|i| text(&format!("testo {i}"))).collect();
    assert_eq!(documents, want);
    assert_eq!(rejected, [(5, "`text` is missing".to_string())]);

    let forced = |schema| read_file(&path, &ReadOptions { schema: Some(schema), ..ReadOptions::default() });
    let e = format!("{:#}", forced(Schema::Wikipedia).unwrap_err());
    assert!(e.contains("x.parquet") && e.contains("needs the column `title`"), "{e}");

    parquet_file(&path, &["foo", "bar"], &[vec![None, None]]);
    let e = format!("{:#}", read_file(&path, &ReadOptions::default()).unwrap_err());
    assert!(e.contains("foo, bar, token_length") && e.contains("--schema"), "{e}");
    fs::write(&path, b"PAR1 nonsense PAR1").unwrap();
    let e = format!("{:#}", read_file(&path, &ReadOptions::default()).unwrap_err());
    assert!(e.contains("x.parquet") && e.contains("not a valid parquet file"), "{e}");
}

#[test]
fn inputs_are_found_in_order_and_others_are_counted() {
    let tmp = tempfile::tempdir().unwrap();
    fs::create_dir(tmp.path().join("b")).unwrap();
    for name in ["z.txt", "b/y.jsonl.gz", "a.parquet", "b/x.bin", "parquet.gz"] {
        fs::write(tmp.path().join(name), "").unwrap();
    }
    let find = |path: PathBuf| find_inputs(&[path], &ReadOptions::default());
    let Found { inputs, ignored, .. } = find(tmp.path().to_path_buf()).unwrap();
    let names: Vec<_> = inputs.iter().map(|i| i.path.strip_prefix(tmp.path()).unwrap().display().to_string()).collect();
    assert_eq!((names, ignored), (["a.parquet", "b/y.jsonl.gz", "z.txt"].map(String::from).to_vec(), 2));
    let fails = |p: &str| format!("{:#}", find(tmp.path().join(p)).unwrap_err());
    assert!(fails("nowhere").contains("nowhere: cannot read"));
    assert!(fails("b/x.bin").contains("unknown kind of file"));
    fs::create_dir(tmp.path().join("empty")).unwrap();
    assert!(fails("empty").contains("no file to read"));
}

#[test]
fn an_array_of_objects_is_read_like_lines() {
    let (documents, rejected) = read_bytes("x.json", b" [\n{\"text\":\"uno\"},\n7,{\n\"text\":\"due\"}\n]\n").unwrap();
    assert_eq!(documents, [text("uno"), text("due")]);
    assert_eq!(rejected, [(2, "not a JSON object".to_string())]);
    assert_eq!(read_bytes("x.json", b"[]").unwrap(), (vec![], vec![]));
    let cut = "[{\"text\":\"uno\"},{\"text\":\"du";
    // What cannot be told apart must not get lost unseen.
    for (file, part) in [
        (cut, "element 2 of the array is malformed JSON"),
        ("[{\"text\":\"uno\"}]\n{\"text\":\"due\"}", "something follows the JSON array"),
        ("[{\"foo\":1}]", "columns (foo)"),
    ] {
        let e = format!("{:#}", read_bytes("x.json", file.as_bytes()).unwrap_err());
        assert!(e.contains("x.json") && e.contains(part), "{file}: {e}");
    }
    let (documents, rejected) = read_bytes("x.json", b"{\n\"text\":\"uno\"\n}").unwrap();
    assert!(
        documents.is_empty() && rejected.len() == 1 && rejected[0].1.contains("one array of objects"),
        "{rejected:?}"
    );
    // No more is read than is wanted.
    let wanted = with_file("x.json", cut.as_bytes(), |p| {
        let found = find_inputs(&[p.to_path_buf()], &ReadOptions::default()).unwrap();
        read(&found.inputs[0], &ReadOptions::default(), &Arc::default(), &mut |_, _| Ok(false))
    });
    wanted.unwrap();
}

#[test]
fn byte_order_marks_and_line_ends_are_no_text() {
    let lines = "\u{feff}{\"text\":\"uno\"}\r\n{\"text\":\"\u{feff}due\"}\r\n";
    let want = (vec![text("uno"), text("\u{feff}due")], vec![]);
    assert_eq!(read_bytes("x.jsonl", lines.as_bytes()).unwrap(), want);
    let zst = zstd::encode_all(lines.as_bytes(), 1).unwrap();
    assert_eq!(read_bytes("x.jsonl.zst", &zst).unwrap(), want);
    assert_eq!(read_bytes("x.json", "\u{feff}[{\"text\":\"uno\"}]".as_bytes()).unwrap().0, [text("uno")]);
    let rule = ReadOptions { text_split: TextSplit::Rule, ..ReadOptions::default() };
    let file = "\u{feff}uno\r\ndue\r\n---\r\ntre\r\n";
    let documents = with_file("x.txt", file.as_bytes(), |p| read_file(p, &rule).unwrap().0);
    assert_eq!(documents, [text("uno\ndue"), text("tre")]);
    // What only begins like a mark is content.
    assert_eq!(read_bytes("x.txt", "\u{fefe}x".as_bytes()).unwrap().0, [text("\u{fefe}x")]);
    assert_eq!(read_bytes("x.txt", b"\xef\xbb").unwrap().1, [(1, "invalid UTF-8".to_string())]);
}

#[test]
fn options_without_effect_are_told_or_refused() {
    let tmp = tempfile::tempdir().unwrap();
    for name in ["a.jsonl", "b.txt"] {
        fs::write(tmp.path().join(name), "x").unwrap();
    }
    let (schema, lang) = (Some(Schema::Text), vec!["it".to_string()]);
    let languages = ReadOptions { languages: lang.clone(), ..ReadOptions::default() };
    let find = |name: &str, options: &ReadOptions| find_inputs(&[tmp.path().join(name)], options);
    let notes = find("", &languages).unwrap().notes;
    assert!(notes.len() == 1 && notes[0].starts_with("1 files are plain text, to which --lang does"), "{notes:?}");
    assert!(find("a.jsonl", &languages).unwrap().notes.is_empty());
    for (name, options, part) in [
        ("b.txt", languages, "b.txt: plain text, which has no columns: --lang does not apply"),
        ("b.txt", ReadOptions { schema, ..ReadOptions::default() }, "--schema does not apply"),
        ("a.jsonl", ReadOptions { schema, languages: lang, ..ReadOptions::default() }, "--lang is for --schema oasst"),
    ] {
        let e = find(name, &options).unwrap_err();
        assert!(e.is::<crate::exit::Usage>() && e.to_string().contains(part), "{e}");
    }
}

#[cfg(unix)]
#[test]
fn links_are_followed_but_not_in_circles() {
    let tmp = tempfile::tempdir().unwrap();
    let at = |name: &str| tmp.path().join(name);
    fs::create_dir_all(at("in/deep")).unwrap();
    fs::create_dir(at("other")).unwrap();
    fs::write(at("in/a.txt"), "uno").unwrap();
    fs::write(at("other/b.txt"), "due").unwrap();
    std::os::unix::fs::symlink(".", at("in/self")).unwrap();
    std::os::unix::fs::symlink("..", at("in/deep/up")).unwrap();
    std::os::unix::fs::symlink(at("other"), at("in/link")).unwrap();
    let found = find_inputs(&[at("in")], &ReadOptions::default()).unwrap();
    let names: Vec<_> = found.inputs.iter().map(|i| i.path.strip_prefix(at("in")).unwrap()).collect();
    assert_eq!(names, [Path::new("a.txt"), Path::new("link/b.txt")]);
    assert_eq!(found.notes.len(), 2, "{:?}", found.notes);
    assert!(found.notes[0].contains("in/deep/up: leads back to") && found.notes[1].contains("in/self: leads back to"));
}
