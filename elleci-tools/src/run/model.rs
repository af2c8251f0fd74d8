//! Opening a model for inference, from whatever form it has.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, ensure};
use elleci_core::archive::{AlignedBytes, Archive, ArchiveWriter, Format, PackOptions, PackedModel};
use elleci_core::config::ModelConfig;
use elleci_core::params::{Param, ParamKind};
use memmap2::Mmap;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::checkpoint::write_atomic;
use crate::convert::job::Job;
use crate::convert::source::{Options, Source};
use crate::data::tokenizer::{END_OF_TEXT_ID, IM_END_ID, SPECIALS, Tokenizer};
use crate::exit::usage;
use crate::mapped;
use crate::report::format::si;

/// The archive that is part of the program: docs/model.md says how it was trained.
const BUNDLED: &[u8] = include_bytes!("../../../fixtures/model/talk-nano.elleci");
/// What it is called.
const BUNDLED_NAME: &str = "talk-nano";

/// Bytes of an archive up to which rows of the embedding are read where they are mapped. Those of larger ones come from the file, so that
/// they take no memory for good; a small model feels the call, once a token.
const SMALL: usize = 64 << 20;

/// Where the bytes of an archive lie.
enum ModelBytes {
    /// In a file.
    Mapped(Mmap),
    /// In memory, made by this process.
    Packed(AlignedBytes),
}

impl AsRef<[u8]> for ModelBytes {
    fn as_ref(&self) -> &[u8] {
        match self {
            ModelBytes::Mapped(map) => map,
            ModelBytes::Packed(bytes) => bytes.as_ref(),
        }
    }
}

/// A model that is open, with its tokenizer if it has one.
pub struct OpenModel {
    /// What it is called in reports: the name of its file or folder.
    pub name: String,
    archive: Archive<ModelBytes>,
    tokenizer: Option<Tokenizer>,
    /// What its user should know of it.
    remark: Option<&'static str>,
}

impl OpenModel {
    /// Opens what `-m` names, and the bundled model where it names nothing, and tells of it on standard error.
    ///
    /// # Errors
    /// As [`OpenModel::open`].
    pub fn chosen(path: Option<&Path>) -> anyhow::Result<OpenModel> {
        match path {
            Some(path) => OpenModel::open(path).context("--model"),
            None => OpenModel::bundled(),
        }
    }

    /// The small model that is part of the program.
    ///
    /// # Errors
    /// A program that was built with a damaged archive.
    pub fn bundled() -> anyhow::Result<OpenModel> {
        let bytes = ModelBytes::Packed(AlignedBytes::from(BUNDLED));
        let open = OpenModel::from_bytes(BUNDLED_NAME.to_string(), bytes).context("the bundled model")?;
        Ok(OpenModel { remark: Some("the bundled model; -m takes another"), ..open })
    }

    /// Opens an archive by mapping it; packs every other form that elleci-convert reads in memory, and says so.
    ///
    /// # Errors
    /// What is missing or damaged; a tokenizer that does not fit the model.
    pub fn open(path: &Path) -> anyhow::Result<OpenModel> {
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        let at = || path.display().to_string();
        ensure!(
            path.exists(),
            "{}: there is no such file or folder; `elleci-convert` makes an archive of a trained model",
            path.display()
        );
        let other = path.extension().is_some_and(|e| ["pth", "pt", "safetensors"].iter().any(|o| e == *o));
        if path.is_dir() || other {
            return OpenModel::from_bytes(name, pack(path)?).with_context(at);
        }
        let (bytes, file) = map(path)?;
        let mut open = OpenModel::from_bytes(name, bytes).with_context(at)?;
        if open.bytes() > SMALL {
            open.archive = open.archive.with_row_reader(move |offset, to| mapped::read_at(&file, offset, to));
        }
        Ok(open)
    }

    /// Random weights of a built-in shape, in the default formats and without a tokenizer.
    ///
    /// # Errors
    /// [`crate::exit::Usage`] for a name that there is not.
    pub fn random(preset: &str) -> anyhow::Result<OpenModel> {
        let config = ModelConfig::preset(preset).map_err(|e| usage(format!("--preset: {e}")))?;
        OpenModel::from_bytes(preset.to_string(), ModelBytes::Packed(random_archive(&config)?))
    }

    /// As [`OpenModel::random`], into a file.
    ///
    /// # Errors
    /// A name that there is not; a file that cannot be written.
    pub fn save_random(preset: &str, path: &Path) -> anyhow::Result<()> {
        let config = ModelConfig::preset(preset).map_err(|e| usage(format!("--preset: {e}")))?;
        let bytes = random_archive(&config)?;
        write_atomic(path, |path| Ok(std::fs::write(path, bytes.as_ref())?)).context("--save")
    }

    fn from_bytes(name: String, bytes: ModelBytes) -> anyhow::Result<OpenModel> {
        let archive = Archive::open(bytes)?;
        let model = archive.model();
        let tokenizer = model.tokenizer().map(|json| Tokenizer::from_json(json.to_vec(), None)).transpose();
        let tokenizer = tokenizer.context("its tokenizer is unusable")?;
        if let Some(tokenizer) = &tokenizer {
            let (tokens, rows) = (tokenizer.config().tokens, model.config().vocab_size);
            ensure!(
                tokens <= rows,
                "its tokenizer has {tokens} tokens, more than the model's `vocab_size` of {rows}: they do not belong \
                 together"
            );
        }
        Ok(OpenModel { name, archive, tokenizer, remark: None })
    }

    /// The model, as sessions take it.
    pub fn packed(&self) -> PackedModel<'_> {
        self.archive.model()
    }

    /// Its shape.
    pub fn config(&self) -> &ModelConfig {
        self.archive.model().config()
    }

    /// Bytes of the archive.
    pub fn bytes(&self) -> usize {
        self.archive.model().archive_bytes()
    }

    /// Number of parameters.
    pub fn parameters(&self) -> usize {
        self.archive.model().layout().len()
    }

    /// One line on what was opened.
    pub fn announcement(&self) -> String {
        let model = self.archive.model();
        let formats = |ternary: bool| {
            let mut names: Vec<&str> = model
                .tensors()
                .filter(|t| t.format != Format::Floats && matches!(t.format, Format::Ternary(_)) == ternary)
                .map(|t| t.format.name())
                .collect();
            names.sort_unstable();
            names.dedup();
            names.join("+")
        };
        format!(
            "model {}{} | {} parameters in {:.1} MiB | ternary {}, dense {} | vocabulary {} | trained on {} tokens at a time",
            self.name,
            self.remark.map_or(String::new(), |r| format!(" ({r})")),
            si(self.parameters() as f64),
            self.bytes() as f64 / (1 << 20) as f64,
            formats(true),
            formats(false),
            self.config().vocab_size,
            self.config().max_seq_len
        )
    }

    /// The tokenizer, where the model has one.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// When the model has none.
    pub fn need_tokenizer(&self) -> anyhow::Result<&Tokenizer> {
        self.tokenizer.as_ref().with_context(|| {
            format!(
                "{} has no tokenizer: only `generate --tokens`, `bench` and `logits` can use it; \
                 `elleci-convert --tokenizer` adds one",
                self.name
            )
        })
    }

    /// Tokens that end a text.
    pub fn ends(&self) -> &'static [&'static [u32]] {
        if self.tokenizer.is_some() { &[&[END_OF_TEXT_ID], &[IM_END_ID]] } else { &[] }
    }

    /// Tokens that must never be chosen: rows that only pad the vocabulary, and special tokens that no text holds; with
    /// `ends_too`, those that would end the text.
    pub fn banned(&self, ends_too: bool) -> Vec<u32> {
        let Some(tokenizer) = &self.tokenizer else { return Vec::new() };
        let specials = (0..SPECIALS.len() as u32).filter(|t| ends_too || ![END_OF_TEXT_ID, IM_END_ID].contains(t));
        specials.chain(tokenizer.config().tokens as u32..self.config().vocab_size as u32).collect()
    }
}

fn map(path: &Path) -> anyhow::Result<(ModelBytes, File)> {
    let (map, file) = mapped::open(path).context("no archive that elleci-convert wrote")?;
    ensure!(!map.is_empty(), "{} is empty", path.display());
    Ok((ModelBytes::Mapped(map), file))
}

/// Packs a model that has float weights, in the default formats.
fn pack(path: &Path) -> anyhow::Result<ModelBytes> {
    let source = Source::open(path, &Options::default(), &Job::quiet())?;
    let model = source.model()?;
    let at = path.display();
    crate::exit::errln!("packing {at} ({}) in memory; `elleci-convert {at} MODEL.elleci` does it once", source.title());
    let mut index = model.index.iter();
    let bytes = archive(&model.config, source.tokenizer.as_deref(), |param, values| {
        source.tensors.read(*index.next().context("more parameters than tensors")?, values)?;
        ensure!(values.iter().all(|v| v.is_finite()), "{at}: `{}` holds values that are not finite", param.name);
        Ok(())
    })?;
    Ok(ModelBytes::Packed(bytes))
}

/// An archive of random weights. Only speed is asked of these: matrices are uniform with the deviation that training
/// starts from, recurrences decay as they do there.
fn random_archive(config: &ModelConfig) -> anyhow::Result<AlignedBytes> {
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let mut uniform = move |low: f32, high: f32| low + (high - low) * (rng.next_u32() >> 8) as f32 / (1 << 24) as f32;
    archive(config, None, |param, values| {
        match param.kind {
            // Uniform in ±w has deviation w/√3.
            ParamKind::Ternary | ParamKind::Matrix | ParamKind::Embedding => {
                values.fill_with(|| uniform(-0.0346, 0.0346));
            }
            ParamKind::Norm | ParamKind::Skip => values.fill(1.0),
            ParamKind::ConvWeight => values.fill_with(|| uniform(-0.5, 0.5)),
            ParamKind::ConvBias => values.fill(0.0),
            ParamKind::ALog => values.fill_with(|| uniform(0.0, 2.7)),
            ParamKind::DtBias => values.fill_with(|| uniform(-6.9, -2.2)),
        }
        Ok(())
    })
}

/// An archive in memory whose parameters `fill` gives one by one: the float weights of a large model never exist together.
fn archive(
    config: &ModelConfig,
    tokenizer: Option<&[u8]>,
    mut fill: impl FnMut(&Param, &mut [f32]) -> anyhow::Result<()>,
) -> anyhow::Result<AlignedBytes> {
    let mut writer = ArchiveWriter::new(config, tokenizer, PackOptions::default())?;
    let mut file = AlignedBytes::with_capacity(writer.file_bytes().context("the model is too large for this machine")?);
    file.extend_from_slice(&vec![0; writer.header_bytes()]);
    let mut values = Vec::new();
    while let Some(param) = writer.next() {
        values.resize(param.len(), 0.0);
        fill(param, &mut values)?;
        file.extend_from_slice(&writer.pack(&values));
    }
    let header = writer.finish();
    file.as_mut_slice()[..header.len()].copy_from_slice(&header);
    Ok(file)
}
