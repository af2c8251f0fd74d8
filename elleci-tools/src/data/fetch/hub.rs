//! The reference corpora, from the Hugging Face hub.
//!
//! Files land in the hub's cache (HF_HOME is honoured, and so is HF_ENDPOINT), where other tools find them too, and are linked
//! from the output directory. A download that breaks off goes on where it stopped, within a run and in the next one.

use anyhow::{Context, Result, bail, ensure};
use hf_hub::api::Progress;
use hf_hub::api::sync::{Api, ApiBuilder};
use hf_hub::{Cache, Repo};
use indicatif::ProgressBar;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A corpus of the reference run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Corpus {
    /// HuggingFaceTB/smollm-corpus, cosmopedia-v2: 39 million synthetic English texts, 122 GB (ODC-By).
    Cosmopedia,
    /// wikimedia/wikipedia 20231101.it: Italian Wikipedia, some 3 GB (CC-BY-SA).
    Wikipedia,
    /// OpenAssistant/oasst1: 88,000 messages of dialogues, 50 MB (Apache-2.0).
    Oasst,
}

impl Corpus {
    /// All of them.
    pub const ALL: [Corpus; 3] = [Corpus::Cosmopedia, Corpus::Wikipedia, Corpus::Oasst];

    fn name(self) -> &'static str {
        match self {
            Corpus::Cosmopedia => "cosmopedia",
            Corpus::Wikipedia => "wikipedia",
            Corpus::Oasst => "oasst",
        }
    }

    /// The repository, and the directory in it.
    fn place(self) -> (&'static str, &'static str) {
        match self {
            Corpus::Cosmopedia => ("HuggingFaceTB/smollm-corpus", "cosmopedia-v2/"),
            Corpus::Wikipedia => ("wikimedia/wikipedia", "20231101.it/"),
            Corpus::Oasst => ("OpenAssistant/oasst1", "data/"),
        }
    }
}

/// Attempts at a file, with a pause between that grows to some seconds.
const ATTEMPTS: u32 = 5;

/// Gets the parquet files of `corpora`, at most `limit_files` of each, and links them as `out/CORPUS/FILE`.
///
/// # Errors
/// The hub cannot be reached or has no such files, a file fails its checksum, or the file system refuses.
pub fn fetch(out: &Path, corpora: &[Corpus], limit_files: Option<usize>) -> Result<Vec<PathBuf>> {
    let client = Client::new()?;
    let mut links = Vec::new();
    for corpus in corpora {
        let (id, prefix) = corpus.place();
        let repo = Repo::dataset(id.to_string());
        let mut files = client.list(&repo)?;
        files.retain(|f| f.starts_with(prefix) && f.ends_with(".parquet"));
        ensure!(!files.is_empty(), "{id}: no parquet file under {prefix}; has the dataset been rearranged?");
        let all = files.len();
        files.truncate(limit_files.unwrap_or(all));
        for (i, file) in files.iter().enumerate() {
            crate::exit::errln!("{id}: file {} of {} (there are {all}): {file}", i + 1, files.len());
            let cached = client.download(&repo, file).with_context(|| format!("{id}: {file}"))?;
            let name = Path::new(file).file_name().context("a file without a name")?;
            links.push(link(&cached, &out.join(corpus.name()).join(name))?);
        }
    }
    Ok(links)
}

/// The hub's client with the hub's cache.
pub(super) struct Client {
    api: Api,
    cache: Cache,
    endpoint: String,
}

impl Client {
    /// As the environment says: HF_HOME, HF_ENDPOINT.
    pub fn new() -> Result<Client> {
        let cache = Cache::from_env();
        // The crate resolves links by absolute paths.
        let cache = Cache::new(std::path::absolute(cache.path()).context("cannot resolve the hub's cache directory")?);
        let endpoint = std::env::var("HF_ENDPOINT").unwrap_or_else(|_| "https://huggingface.co".to_string());
        let builder = ApiBuilder::from_cache(cache.clone()).with_progress(false);
        let builder = builder.with_endpoint(endpoint.trim_end_matches('/').to_string());
        Ok(Client { api: builder.build().context("cannot set up the hub's client")?, cache, endpoint })
    }

    /// The files of a repository, in order.
    pub fn list(&self, repo: &Repo) -> Result<Vec<String>> {
        let info = self.api.repo(repo.clone()).info().with_context(|| {
            let id = repo.folder_name().trim_start_matches("datasets--").replacen("--", "/", 1);
            let endpoint = &self.endpoint;
            format!("{endpoint}: cannot list the dataset {id}; is the network up (HF_ENDPOINT names a mirror)?")
        })?;
        let mut files: Vec<String> = info.siblings.into_iter().map(|s| s.rfilename).collect();
        files.sort();
        Ok(files)
    }

    /// The file in the cache, downloaded and verified unless it is there.
    pub fn download(&self, repo: &Repo, file: &str) -> Result<PathBuf> {
        if let Some(path) = self.cache.repo(repo.clone()).get(file) {
            return Ok(path);
        }
        let mut attempt = 0;
        loop {
            attempt += 1;
            // The crate's own retries restart a resumed part from its beginning: each attempt here looks at the part anew.
            match self.try_download(repo, file) {
                Ok(path) => return Ok(path),
                Err(e) if attempt == ATTEMPTS => return Err(e),
                Err(e) => {
                    crate::exit::errln!("  attempt {attempt} of {ATTEMPTS} failed: {e:#}");
                    std::thread::sleep(Duration::from_millis(250 << attempt));
                }
            }
        }
    }

    fn try_download(&self, repo: &Repo, file: &str) -> Result<PathBuf> {
        let remote = self.api.repo(repo.clone());
        let meta = self.api.metadata(&remote.url(file)).context("cannot ask the hub for the file")?;
        let blob = self.cache.repo(repo.clone()).blob_path(meta.etag());
        let part = blob.with_extension("part");
        // Complete but not renamed, or of another length: asking for what follows it would fail for ever.
        if fs::metadata(&part).is_ok_and(|m| m.len() >= meta.size() as u64) {
            fs::remove_file(&part).with_context(|| format!("{}: cannot remove", part.display()))?;
        }
        let path = remote.download_with_progress(file, Bar(ProgressBar::hidden())).context("download broke off")?;
        let size = fs::metadata(&path).with_context(|| format!("{}: cannot read", path.display()))?.len();
        let sound = size == meta.size() as u64 && checksum_agrees(&path, meta.etag())?;
        if !sound {
            for wrong in [&path, &blob] {
                let _ = fs::remove_file(wrong);
            }
            bail!("the downloaded file does not have the size or the checksum that the hub states; it was removed");
        }
        Ok(path)
    }
}

/// Large files have their SHA-256 as the tag.
fn checksum_agrees(path: &Path, etag: &str) -> Result<bool> {
    use sha2::Digest;
    if etag.len() != 64 || !etag.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Ok(true);
    }
    let context = || format!("{}: cannot read", path.display());
    let mut file = File::open(path).with_context(context)?;
    let mut hash = sha2::Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).with_context(context)? {
            0 => break,
            n => hash.update(&buffer[..n]),
        }
    }
    let hex: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    Ok(hex == etag.to_ascii_lowercase())
}

/// Makes `link` lead to `target`.
pub(super) fn link(target: &Path, link: &Path) -> Result<PathBuf> {
    let parent = crate::data::files::parent_of(link);
    fs::create_dir_all(&parent).with_context(|| format!("{}: cannot create", parent.display()))?;
    if fs::symlink_metadata(link).is_ok() {
        fs::remove_file(link).with_context(|| format!("{}: cannot replace", link.display()))?;
    }
    let real = fs::canonicalize(target).with_context(|| format!("{}: cannot resolve", target.display()))?;
    #[cfg(unix)]
    let made = std::os::unix::fs::symlink(&real, link);
    #[cfg(not(unix))]
    let made = fs::hard_link(&real, link).or_else(|_| fs::copy(&real, link).map(|_| ()));
    made.with_context(|| format!("{}: cannot link", link.display()))?;
    Ok(link.to_path_buf())
}

/// Shows a download.
struct Bar(ProgressBar);

impl Progress for Bar {
    fn init(&mut self, size: usize, _: &str) {
        self.0 = crate::data::cli::bar(size as u64);
    }

    fn update(&mut self, size: usize) {
        self.0.inc(size as u64);
    }

    fn finish(&mut self) {
        self.0.finish_and_clear();
    }
}
