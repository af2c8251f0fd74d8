//! Real text without the internet at large: documentation packages of Debian, Italian and English apart.

use super::language::{self, Language};
use super::{fortune, html, roff};
use crate::data::files::write_atomically;
use crate::data::shards::sha256_hex;
use anyhow::{Context, Result, bail, ensure};
use std::collections::HashSet;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use xxhash_rust::xxh3::xxh3_128;

/// How a package's files become text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Html,
    Man,
    Fortune,
    /// Fortunes whose accents are apostrophes.
    ItalianFortune,
}

/// A package and what is read of it.
struct Package {
    name: &'static str,
    version: &'static str,
    sha256: &'static str,
    kind: Kind,
    /// Directories under `/usr/share`.
    roots: &'static [&'static str],
}

/// Debian 12. The order decides which copy of a repeated paragraph stays.
const PACKAGES: [Package; 10] = [
    Package {
        name: "debian-handbook",
        version: "11.20220922",
        sha256: "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
        kind: Kind::Html,
        roots: &["doc/debian-handbook/html/it-IT", "doc/debian-handbook/html/en-US"],
    },
    Package {
        name: "debian-reference-it",
        version: "2.100",
        sha256: "7894062a5e9203a57ec6cb8d6a47d5ffb58c41dc004766522f1b4d78b2a8e0c6",
        kind: Kind::Html,
        roots: &["debian-reference"],
    },
    Package {
        name: "developers-reference-it",
        version: "12.18",
        sha256: "44ff621966997572442579a704d60e520196bf6f7c0c66e808043b54ef274393",
        kind: Kind::Html,
        roots: &["developers-reference"],
    },
    Package {
        name: "debian-edu-doc-it",
        version: "2.12.23~deb12u1",
        sha256: "605dc9fe37321ed3e6a9477f8c5074dede38889e38d3177d8d825eb76385cf1a",
        kind: Kind::Html,
        roots: &["doc/debian-edu-doc-it"],
    },
    Package {
        name: "fortunes-it",
        version: "1.99-4.1",
        sha256: "675df6ecb00c3b67d06b39ab223ff17f1ef1d0ec82a7e40f989356a2eb61a97e",
        kind: Kind::ItalianFortune,
        roots: &["games/fortunes/it"],
    },
    Package {
        name: "fortunes",
        version: "1:1.99.1-7.3",
        sha256: "41d0551dc0ff52f875a2ecef7c39da2f672ab468c37e170119f7e0245a9d63c5",
        kind: Kind::Fortune,
        roots: &["games/fortunes"],
    },
    Package {
        name: "manpages-it",
        version: "4.18.1-1",
        sha256: "4b18e87cc1b6a930d40949ddc86fb8e84b50da1a862cd17e2a504eeb8e3b4e48",
        kind: Kind::Man,
        roots: &["man/it"],
    },
    Package {
        name: "lilypond-doc-html-it",
        version: "2.24.1-2",
        sha256: "adb7283adacfbab412bad126096e27d728dfea751e70da27bed0908cb388df98",
        kind: Kind::Html,
        roots: &["doc/lilypond/html/Documentation"],
    },
    Package {
        name: "libreoffice-help-it",
        version: "4:7.4.7-1+deb12u14",
        sha256: "7fa29342a302bb495981fdabf98f3a9c3628123f3f191b2a5c95cb583c9ff212",
        kind: Kind::Html,
        roots: &["libreoffice/help/it/text"],
    },
    Package {
        name: "libreoffice-help-en-us",
        version: "4:7.4.7-1+deb12u14",
        sha256: "8faa840285734d6cfe1ed25537b48f07e74bd6412e3917bf8e5f8a653f7b3712",
        kind: Kind::Html,
        roots: &["libreoffice/help/en-US/text"],
    },
];

/// What [`fetch`] got.
#[derive(Clone, Debug, Default)]
pub struct Report {
    rows: Vec<Row>,
}

#[derive(Clone, Debug, Default)]
struct Row {
    package: &'static str,
    files: usize,
    italian: Corpus,
    english: Corpus,
    repeated: usize,
    neither: usize,
}

/// Documents of one language of one package.
#[derive(Clone, Debug, Default)]
struct Corpus {
    documents: usize,
    bytes: usize,
    jsonl: String,
}

impl Report {
    /// The figures by package.
    pub fn table(&self) -> String {
        let mut out = format!(
            "{:<24} {:>6} {:>8} {:>9} {:>8} {:>9} {:>9} {:>8}\n",
            "package", "files", "it docs", "it kB", "en docs", "en kB", "repeated", "neither"
        );
        for r in &self.rows {
            out += &format!(
                "{:<24} {:>6} {:>8} {:>9.1} {:>8} {:>9.1} {:>9} {:>8}\n",
                r.package,
                r.files,
                r.italian.documents,
                r.italian.bytes as f64 / 1e3,
                r.english.documents,
                r.english.bytes as f64 / 1e3,
                r.repeated,
                r.neither
            );
        }
        let sum = |f: fn(&Row) -> usize| self.rows.iter().map(f).sum::<usize>() as f64 / 1e6;
        out + &format!(
            "{:.2} MB of Italian, {:.2} MB of English; `repeated` paragraphs were dropped, and those of `neither` language\n",
            sum(|r| r.italian.bytes),
            sum(|r| r.english.bytes)
        )
    }
}

/// Downloads, checks, unpacks and strips the packages: `out/it/PACKAGE.jsonl`, `out/en/PACKAGE.jsonl`.
///
/// Packages that are already in `out/packages` with the right checksum are not downloaded again.
///
/// # Errors
/// No `apt-get` or `dpkg`, a failed download, another version than the pinned one, or the file system refuses.
pub fn fetch(out: &Path, any_version: bool) -> Result<Report> {
    let debs = out.join("packages");
    fs::create_dir_all(&debs).with_context(|| format!("{}: cannot create", debs.display()))?;
    let mut report = Report::default();
    let mut seen = HashSet::new();
    for package in &PACKAGES {
        let deb = download(package, &debs, any_version)?;
        let unpacked = out.join("packages").join(package.name);
        unpack(&deb, &unpacked)?;
        let row = extract(package, &unpacked, &mut seen);
        let _ = fs::remove_dir_all(&unpacked);
        let row = row?;
        for (language, corpus) in [("it", &row.italian), ("en", &row.english)] {
            let dir = out.join(language);
            let path = dir.join(format!("{}.jsonl", package.name));
            if corpus.documents > 0 {
                fs::create_dir_all(&dir).with_context(|| format!("{}: cannot create", dir.display()))?;
                write_atomically(&path, corpus.jsonl.as_bytes())?;
            } else if path.exists() {
                fs::remove_file(&path).with_context(|| format!("{}: cannot remove", path.display()))?;
            }
        }
        report.rows.push(row);
    }
    Ok(report)
}

/// The package's file in `dir`, downloaded unless it is there.
fn download(package: &Package, dir: &Path, any_version: bool) -> Result<PathBuf> {
    let find = || -> Result<Vec<PathBuf>> {
        let prefix = format!("{}_", package.name);
        let mut found = Vec::new();
        for entry in fs::read_dir(dir).with_context(|| format!("{}: cannot read", dir.display()))? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name.starts_with(&prefix) && name.ends_with(".deb") {
                found.push(dir.join(name));
            }
        }
        found.sort();
        Ok(found)
    };
    let sha256 = |path: &Path| -> Result<String> {
        Ok(sha256_hex(&fs::read(path).with_context(|| format!("{}: cannot read", path.display()))?))
    };
    for deb in find()? {
        if any_version || sha256(&deb)? == package.sha256 {
            return Ok(deb);
        }
        // Another version, or cut short: it would hide the right one.
        fs::remove_file(&deb).with_context(|| format!("{}: cannot remove", deb.display()))?;
    }
    crate::exit::errln!("downloading {}", package.name);
    // First the pinned version: an archive may still have it beside a newer one.
    let pinned = format!("{}={}", package.name, package.version);
    let mut last = apt_get(&pinned, dir)?;
    if last.is_err() {
        last = apt_get(package.name, dir)?;
    }
    if let Err(message) = last {
        bail!("`apt-get download {}` failed: {message}\nRun `apt-get update` and try again.", package.name);
    }
    let Some(deb) = find()?.pop() else {
        bail!("`apt-get download {}` left no package in {}", package.name, dir.display())
    };
    let found = sha256(&deb)?;
    if found != package.sha256 && !any_version {
        bail!(
            "{}: sha256 is {found}, but the pinned version {} has {}. Debian has moved on: fetch with --any-version to take \
             what there is (figures will differ a little), or put the pinned package there (snapshot.debian.org keeps it)",
            deb.display(),
            package.version,
            package.sha256
        );
    }
    Ok(deb)
}

/// Runs `apt-get download` in `dir`; the inner error is what it said.
fn apt_get(what: &str, dir: &Path) -> Result<std::result::Result<(), String>> {
    let output = Command::new("apt-get").args(["download", "-q", what]).current_dir(dir).output();
    let output = output.context("cannot run apt-get: --demo needs a Debian or Ubuntu system (or its apt)")?;
    let message = String::from_utf8_lossy(&output.stderr).trim().to_string();
    Ok(if output.status.success() { Ok(()) } else { Err(message) })
}

fn unpack(deb: &Path, dir: &Path) -> Result<()> {
    if dir.exists() {
        fs::remove_dir_all(dir).with_context(|| format!("{}: cannot remove", dir.display()))?;
    }
    let output = Command::new("dpkg").arg("-x").args([deb, dir]).output().context("cannot run dpkg")?;
    ensure!(
        output.status.success(),
        "{}: dpkg cannot unpack it: {}",
        deb.display(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

fn extract(package: &Package, unpacked: &Path, seen: &mut HashSet<u128>) -> Result<Row> {
    let mut row = Row { package: package.name, ..Row::default() };
    let mut files = Vec::new();
    for root in package.roots {
        walk(&unpacked.join("usr/share").join(root), &mut files)?;
    }
    files.retain(|f| package.kind.reads(f));
    ensure!(!files.is_empty(), "{}: nothing to read under {:?}; has the package changed?", package.name, package.roots);
    for file in &files {
        row.files += 1;
        let source = file.strip_prefix(unpacked).unwrap_or(file).display().to_string();
        let text = read_text(file)?;
        match package.kind {
            Kind::Html => row.add_page(&source, html::paragraphs(&text), seen),
            Kind::Man => row.add_page(&source, roff::paragraphs(&text), seen),
            Kind::Fortune | Kind::ItalianFortune => {
                for mut aphorism in fortune::aphorisms(&text) {
                    if package.kind == Kind::ItalianFortune {
                        aphorism = fortune::accents(&aphorism);
                    }
                    row.add_page(&source, vec![aphorism], seen);
                }
            }
        }
    }
    Ok(row)
}

impl Kind {
    fn reads(self, file: &Path) -> bool {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        match self {
            // The big pages repeat all the others.
            Kind::Html => name.ends_with(".html") && !name.contains("big-page") && !name.contains("_toc"),
            Kind::Man => name.ends_with(".gz"),
            Kind::Fortune | Kind::ItalianFortune => !name.contains('.'),
        }
    }
}

/// Shorter documents are headings and leftovers.
const MIN_BYTES: usize = 60;

impl Row {
    /// Adds a page's paragraphs to the documents of their languages.
    fn add_page(&mut self, source: &str, paragraphs: Vec<String>, seen: &mut HashSet<u128>) {
        let page = language::detect(&paragraphs.join("\n"));
        let mut documents: [Vec<&str>; 2] = [Vec::new(), Vec::new()];
        for paragraph in &paragraphs {
            let short = language::count(paragraph).words < 5;
            // Headings and list items are too short to tell: they belong to their page.
            let Some(language) = language::detect(paragraph).or(if short { page } else { None }) else {
                self.neither += 1;
                continue;
            };
            if !seen.insert(xxh3_128(paragraph.as_bytes())) {
                self.repeated += 1;
                continue;
            }
            documents[usize::from(language == Language::English)].push(paragraph);
        }
        let [italian, english] = documents;
        self.italian.add(source, &italian);
        self.english.add(source, &english);
    }
}

impl Corpus {
    fn add(&mut self, source: &str, paragraphs: &[&str]) {
        let text = paragraphs.join("\n\n");
        if text.len() < MIN_BYTES {
            return;
        }
        self.documents += 1;
        self.bytes += text.len();
        self.jsonl += &serde_json::json!({ "text": text, "source": source }).to_string();
        self.jsonl.push('\n');
    }
}

fn walk(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let context = || format!("{}: cannot read", dir.display());
    let mut entries: Vec<_> =
        fs::read_dir(dir).with_context(context)?.collect::<std::io::Result<_>>().with_context(context)?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let kind = entry.file_type().with_context(context)?;
        if kind.is_dir() {
            walk(&entry.path(), files)?;
        } else if kind.is_file() {
            // Links lead to files that are read anyway.
            files.push(entry.path());
        }
    }
    Ok(())
}

/// A file's text, unzipped; bytes that are not UTF-8 are taken as Latin-1, as old pages are.
fn read_text(path: &Path) -> Result<String> {
    let context = || format!("{}: cannot read", path.display());
    let mut bytes = fs::read(path).with_context(context)?;
    if path.extension().is_some_and(|e| e == "gz") {
        let mut unzipped = Vec::new();
        flate2::read::MultiGzDecoder::new(bytes.as_slice()).read_to_end(&mut unzipped).with_context(context)?;
        bytes = unzipped;
    }
    Ok(String::from_utf8(bytes).unwrap_or_else(|e| e.as_bytes().iter().map(|b| char::from(*b)).collect()))
}
