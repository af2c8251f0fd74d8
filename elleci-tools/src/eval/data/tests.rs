use std::io::Write;

use super::*;
use crate::eval::task::built_in;

fn task(name: &str) -> Task {
    built_in().unwrap().into_iter().find(|t| t.name == name).unwrap()
}

fn put(dir: &Path, name: &str, bytes: &[u8]) {
    let path = dir.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

fn pair(n: u32) -> String {
    format!("{{\"sen\":\"Io vado {n}.\",\"wrong_sen\":\"Io va.\"}}\n")
}

#[test]
fn a_split_is_found_wherever_tools_put_it() {
    let t = task("multiblimp_ita");
    let repo = "jumelet/multiblimp";
    for place in [
        "multiblimp_ita.jsonl".to_string(),
        "multiblimp_ita/train.jsonl".into(),
        format!("{repo}/ita/train/0000.jsonl"),
        format!("{repo}/ita/train-00000-of-00001.jsonl"),
        format!("{repo}/train.jsonl"),
        format!("{repo}/data/train.jsonl"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), &format!("{repo}/ita/training.jsonl"), b"{}\n");
        put(dir.path(), &place, pair(1).as_bytes());
        let found = load(&t, Some(dir.path()), 0).unwrap_or_else(|e| panic!("{place}: {e:#}"));
        assert_eq!(found.rows.len(), 1, "{place}");
        assert!(found.place.ends_with(&place), "{} {place}", found.place);
    }
}

#[test]
fn forms_and_compressions_hold_the_same_rows() {
    let t = task("multiblimp_ita");
    let lines = [pair(1), pair(2), "\n".into()].concat();
    let gzip = {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(lines.as_bytes()).unwrap();
        encoder.finish().unwrap()
    };
    let array = format!("[{},\n{}]", pair(1).trim(), pair(2).trim());
    let csv = "sen,wrong_sen\nIo vado 1.,Io va.\n\"Io vado 2.\",Io va.\n";
    let files: [(&str, Vec<u8>); 6] = [
        ("jsonl", lines.clone().into()),
        ("jsonl.gz", gzip),
        ("jsonl.zst", zstd::encode_all(lines.as_bytes(), 1).unwrap()),
        ("json", array.into()),
        ("json", lines.clone().into()),
        ("csv", csv.into()),
    ];
    for (form, bytes) in files {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), &format!("multiblimp_ita.{form}"), &bytes);
        let rows = load(&t, Some(dir.path()), 0).unwrap_or_else(|e| panic!("{form}: {e:#}")).rows;
        assert_eq!(rows.iter().map(|r| r["sen"].as_str().unwrap()).collect::<Vec<_>>(), ["Io vado 1.", "Io vado 2."]);
    }
}

#[test]
fn parquet_lists_and_structures_arrive_as_they_are() {
    use parquet::data_type::{ByteArray, ByteArrayType, Int32Type};
    use parquet::file::writer::SerializedFileWriter;
    let schema = "message m { REQUIRED BINARY context (UTF8); REQUIRED BINARY question (UTF8);
        REQUIRED GROUP answers { REQUIRED GROUP text (LIST) { REPEATED GROUP list { REQUIRED BINARY element (UTF8); } }
        REQUIRED INT32 answer_start; } }";
    let schema = std::sync::Arc::new(parquet::schema::parser::parse_message_type(schema).unwrap());
    let mut bytes = Vec::new();
    let mut writer = SerializedFileWriter::new(&mut bytes, schema, Default::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let texts = |values: &[&str]| values.iter().map(|v| ByteArray::from(*v)).collect::<Vec<_>>();
    for (values, repeated) in
        [(texts(&["Roma è grande."]), None), (texts(&["Chi?"]), None), (texts(&["Roma", "la città"]), Some([0, 1]))]
    {
        let mut column = group.next_column().unwrap().unwrap();
        let levels = repeated.map(|_| [1i16, 1]);
        let typed = column.typed::<ByteArrayType>();
        typed.write_batch(&values, levels.as_ref().map(|l| &l[..]), repeated.as_ref().map(|r| &r[..])).unwrap();
        column.close().unwrap();
    }
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<Int32Type>().write_batch(&[3], None, None).unwrap();
    column.close().unwrap();
    group.close().unwrap();
    writer.close().unwrap();
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), "crux82/squad_it/default/test/0000.parquet", &bytes);
    let t = task("squad_it");
    let found = load(&t, Some(dir.path()), 0).unwrap();
    let items = crate::eval::item::items(&t, &found, 0).unwrap();
    assert_eq!(items[0].context, "Contesto: Roma è grande.\nDomanda: Chi?\nRisposta:");
    assert_eq!(items[0].references, ["Roma", "la città"]);
    put(dir.path(), "crux82/squad_it/default/test/0000.parquet", &bytes[..bytes.len() / 2]);
    assert!(format!("{:#}", load(&t, Some(dir.path()), 0).unwrap_err()).contains("truncated or damaged"));
}

#[test]
fn what_is_missing_is_told_with_the_command_that_gets_it() {
    let t = task("evalita-mp_te_prompt-2");
    let error = load(&t, None, 0).unwrap_err();
    assert!(error.downcast_ref::<Missing>().is_some());
    let text = error.to_string();
    assert!(
        text.contains("fetch --eval --tasks evalita-mp_te ") && text.contains("evalitahf/textual_entailment"),
        "{text}"
    );
    // The evaluated split is there, the one of the examples is not.
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), "evalita-mp_te.jsonl", b"{\"text1\":\"a\",\"text2\":\"b\",\"entailment\":\"SI\"}\n");
    assert_eq!(load(&t, Some(dir.path()), 0).unwrap().rows.len(), 1);
    assert!(load(&t, Some(dir.path()), 1).unwrap_err().to_string().contains(" dev)"));
    assert!(load(&task("invalsi_ita"), Some(dir.path()), 0).unwrap_err().downcast_ref::<Missing>().is_some());
}

#[test]
fn hostile_files_are_refused_by_name_and_line() {
    let t = task("multiblimp_ita");
    for (name, bytes, part) in [
        ("multiblimp_ita.jsonl", &b"{\"sen\":\"a\",\"wrong_sen\":\"b\"}\n[1]\n"[..], "line 2 is not a JSON object"),
        ("multiblimp_ita.jsonl", b"{\"sen\":\"a\"}\n", "no column `wrong_sen`; it has sen"),
        ("multiblimp_ita.jsonl", b"\xff\xfe{}\n", "line 1"),
        ("multiblimp_ita.jsonl", b"\n\n", "no rows"),
        ("multiblimp_ita.jsonl.gz", b"not gzip", "line"),
        ("multiblimp_ita.parquet", b"PAR1 but no more", "not a valid parquet file"),
        ("multiblimp_ita.csv", b"sen,wrong_sen\na\n", "not valid CSV"),
        ("multiblimp_ita.json", b"[{\"sen\":1},2]", "not an array of objects"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), name, bytes);
        let error = format!("{:#}", load(&t, Some(dir.path()), 0).unwrap_err());
        assert!(error.contains(name) && (error.contains(part) || name.ends_with("gz")), "{name}: {error}");
    }
}
