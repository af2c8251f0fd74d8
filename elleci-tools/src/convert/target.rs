//! Where models go: under a temporary name first, and to their own only when they are whole and on the disk.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use elleci_core::archive::{Archive, ArchiveWriter, DenseFormat, Format, PackOptions};
use elleci_core::params::{Id, ParamKind};
use elleci_core::ternary::packed::Packing;
use safetensors::Dtype;

use super::cli::{ConvertArgs, PackChoice};
use super::job::Job;
use super::packing::Chooser;
use super::source::{Source, SourceModel, read_if_there};
use super::temporary::{Temporary, recover};
use super::{is_packed, read_finite};
use crate::checkpoint::tensors::{Bytes, Tensor, TensorFile, f32_bytes};
use crate::data::files::{sync_dir, write_atomically};
use crate::exit::usage;
use crate::hf;
use crate::mapped::{self, BlockWriter};

/// A destination.
pub enum Target {
    /// A Hugging Face folder.
    Folder(PathBuf),
    /// A deployment archive.
    Archive {
        /// Its path.
        path: PathBuf,
        /// How projections are packed.
        pack: PackChoice,
        /// How embedding and head are stored.
        dense: DenseFormat,
    },
}

/// What was written.
pub struct Written {
    /// Bytes of all files.
    pub bytes: u64,
    /// Ternary tensors by packing; empty for a folder.
    pub packing: BTreeMap<&'static str, usize>,
    /// The format of embedding and head in an archive.
    pub dense: Option<&'static str>,
    /// Values that are too large for their format in an archive, and were stored as its largest number.
    pub clamped: usize,
}

impl Written {
    /// What the user should know of values that did not fit.
    pub fn clamped_note(&self) -> Option<String> {
        let (count, dense) = (self.clamped, self.dense.filter(|_| self.clamped > 0)?);
        Some(format!(
            "{count} values are too large for --dense {dense} and became its largest number; --dense f32 keeps them"
        ))
    }
}

impl Target {
    /// The destination of a command line.
    ///
    /// # Errors
    /// [`crate::exit::Usage`] for one that is there and may not be replaced, that cannot be written, or has no use for a flag.
    pub fn new(path: &Path, args: &ConvertArgs) -> anyhow::Result<Target> {
        let at = path.display();
        if path.file_name().is_none() {
            return Err(usage(format!("{at}: not a name that can be written to")));
        }
        let extension = super::source::extension(path);
        if ["pth", "pt", "bin", "safetensors", "gguf", "onnx"].contains(&&*extension) {
            return Err(usage(format!(
                "{at}: .{extension} files are not written; name a folder, or a file in .elleci"
            )));
        }
        if let (Some(Ok(src)), Ok(dst)) = (args.src.as_ref().map(|src| src.canonicalize()), path.canonicalize()) {
            if src == dst {
                return Err(usage(format!("{at}: source and destination are the same")));
            }
            if src.starts_with(&dst) {
                return Err(usage(format!(
                    "{at}: the source lies in it, and would be replaced with it; name another destination"
                )));
            }
        }
        if !args.packs()
            && let Some(old) = recover(path)?
        {
            crate::exit::errln!(
                "note: a conversion that was killed had moved {at} aside; it is back from {}",
                old.file_name().unwrap_or_default().display()
            );
        }
        if path.symlink_metadata().is_ok() {
            if !args.force {
                return Err(usage(format!("{at} is there already; --force replaces it")));
            }
            check_replaceable(path, args.packs())?;
        }
        if args.packs() {
            let (pack, dense) = (args.pack.unwrap_or_default(), args.dense.unwrap_or(PackOptions::default().dense));
            return Ok(Target::Archive { path: path.to_path_buf(), pack, dense });
        }
        if args.pack.is_some() || args.dense.is_some() {
            return Err(usage(format!(
                "--pack and --dense are for archives, and {at} is a folder, whose weights are float32; name it NAME.elleci"
            )));
        }
        Ok(Target::Folder(path.to_path_buf()))
    }

    /// The form of what is written.
    pub fn form(&self) -> &'static str {
        match self {
            Target::Folder(_) => "Hugging Face folder",
            Target::Archive { .. } => "deployment archive",
        }
    }

    /// Writes a model.
    ///
    /// # Errors
    /// Whatever the source or the file system reports; nothing is left then, and what was there before stays.
    pub fn write(&self, source: &Source, model: &SourceModel, job: &Job) -> anyhow::Result<Written> {
        job.begin("converting", model.layout.len() as u64 * 4);
        match self {
            Target::Folder(path) => write_folder(path, source, model, job),
            Target::Archive { path, pack, dense } => write_archive(path, *pack, *dense, source, model, job),
        }
    }
}

/// `--force` replaces a model by a model: not a home directory by a model.
fn check_replaceable(path: &Path, packs: bool) -> anyhow::Result<()> {
    let at = path.display();
    if packs {
        return match path.is_file() {
            true => Ok(()),
            false => Err(usage(format!("{at} is no file; it is not replaced"))),
        };
    }
    if !path.is_dir() {
        return Err(usage(format!("{at} is no folder; it is not replaced")));
    }
    for entry in fs::read_dir(path).with_context(|| format!("listing {at}"))? {
        let entry = entry?;
        let name = entry.file_name();
        if entry.path().is_dir() || !name.to_str().is_some_and(hf::is_own_file) {
            return Err(usage(format!(
                "{at} holds {}, which is no part of a model; --force replaces whole folders, so this one is left alone",
                name.display()
            )));
        }
    }
    Ok(())
}

fn write_folder(path: &Path, source: &Source, model: &SourceModel, job: &Job) -> anyhow::Result<Written> {
    let kept = kept_tokenizer(path, source)?;
    let temporary = Temporary::folder(path)?;
    let tensor = |(i, &index): (usize, &usize)| {
        let param = &model.layout.params()[i];
        let make = move || {
            let mut values = vec![0.0; param.len()];
            read_finite(source, index, false, &mut values)?;
            job.advance(values.len() as u64 * 4)?;
            Ok(f32_bytes(&values).into_owned())
        };
        Tensor {
            name: param.name.clone(),
            dtype: Dtype::F32,
            shape: param.shape.clone(),
            bytes: Bytes::Later(Box::new(make)),
        }
    };
    let weights = model.index.iter().enumerate().map(tensor).collect();
    let dir = temporary.path();
    hf::write(dir, &model.config, weights, None)?;
    if let Some(json) = &source.tokenizer {
        write_atomically(&dir.join(hf::TOKENIZER), json)?;
    }
    if let Some(config) = kept {
        write_atomically(&dir.join(hf::TOKENIZER_CONFIG), &config)?;
    }
    job.check()?;
    sync_dir(dir)?;
    check_folder(dir, source, model)?;
    let mut bytes = 0;
    for entry in fs::read_dir(dir)? {
        bytes += entry?.metadata()?.len();
    }
    temporary.publish(|there| check_replaceable(there, false))?;
    Ok(Written { bytes, packing: BTreeMap::new(), dense: None, clamped: 0 })
}

fn write_archive(
    path: &Path,
    pack: PackChoice,
    dense: DenseFormat,
    source: &Source,
    model: &SourceModel,
    job: &Job,
) -> anyhow::Result<Written> {
    let (temporary, file) = Temporary::file(path)?;
    let at = || format!("writing {}", path.display());
    let fixed = match pack {
        PackChoice::Auto => None,
        PackChoice::I2 => Some([Packing::I2; 2]),
        PackChoice::T5 => Some([Packing::T5; 2]),
        PackChoice::C5 => Some([Packing::T5, Packing::C5]),
    };
    let mut chooser = Chooser::new(fixed, &model.layout);
    let options = PackOptions { dense, ..PackOptions::default() };
    let mut writer = ArchiveWriter::new(&model.config, source.tokenizer.as_deref(), options)?;
    let mut out = BlockWriter::new(file);
    // The header is known last.
    out.append(&vec![0; writer.header_bytes()]).with_context(at)?;
    let mut values = Vec::new();
    let sparse: Vec<&str> = model.layout.layers().iter().map(|l| &*model.layout.param(l.ffn.down).name).collect();
    for (param, &index) in model.layout.params().iter().zip(&model.index) {
        values.resize(param.len(), 0.0);
        read_finite(source, index, is_packed(source), &mut values)?;
        let packing = match param.kind {
            ParamKind::Ternary => {
                let sparse = sparse.contains(&&*param.name);
                chooser.choose(&values, param.shape[0], param.shape[1], sparse)
            }
            _ => options.packing,
        };
        let section = writer.pack_as(&values, PackOptions { packing, sparse: packing, ..options });
        out.append(&section).with_context(at)?;
        job.advance(param.len() as u64 * 4)?;
    }
    drop(values);
    let clamped = writer.clamped();
    let header = writer.finish();
    let mut file = out.finish().with_context(at)?;
    let written = file.seek(SeekFrom::Start(0)).and_then(|_| file.write_all(&header)).and_then(|()| file.sync_all());
    written.with_context(at)?;
    job.check()?;
    let packing = check_archive(temporary.path(), source, model)?;
    let bytes = file.metadata().with_context(at)?.len();
    temporary.publish(|there| check_replaceable(there, true))?;
    Ok(Written { bytes, packing, dense: Some(dense.name()), clamped })
}

/// What `--force` must not lose: a tokenizer in the folder to be replaced. Returns its config where the tokenizer is the new model's.
fn kept_tokenizer(path: &Path, source: &Source) -> anyhow::Result<Option<Vec<u8>>> {
    let old = path.join(hf::TOKENIZER);
    let (at, there) = (old.display(), read_if_there(&old)?);
    match (&there, &source.tokenizer) {
        (Some(_), None) => Err(usage(format!(
            "{at} would be lost: {} has no tokenizer; keep it by --tokenizer {at}, or move it away",
            source.path.display()
        ))),
        (Some(old), Some(new)) if old == new => read_if_there(&path.join(hf::TOKENIZER_CONFIG)),
        _ => Ok(None),
    }
}

/// Opens a folder that was written as a reader would. Its weights have been compared with what was to be written already.
fn check_folder(dir: &Path, source: &Source, model: &SourceModel) -> anyhow::Result<()> {
    let lost = "what was written does not read back";
    ensure!(hf::read_config(dir).context(lost)? == model.config, "what was written has another configuration");
    let files = hf::weight_files(dir).context(lost)?;
    let found = files.iter().flat_map(TensorFile::entries).map(|(n, e)| (n.as_str(), e.shape.as_slice())).collect();
    let expected = model.layout.params().iter().map(|p| (p.name.as_str(), p.shape.as_slice()));
    hf::check_tensors(expected, &found).context(lost)?;
    let tokenizer = read_if_there(&dir.join(hf::TOKENIZER))?;
    ensure!(tokenizer == source.tokenizer, "what was written has another tokenizer");
    Ok(())
}

/// Opens what was written as a reader would; counts packings.
fn check_archive(path: &Path, source: &Source, model: &SourceModel) -> anyhow::Result<BTreeMap<&'static str, usize>> {
    let archive = Archive::open(mapped::map(path)?).context("what was written does not read back")?;
    let read = archive.model();
    ensure!(*read.config() == model.config, "what was written has another configuration");
    if read.tokenizer() != source.tokenizer.as_deref() {
        bail!("what was written has another tokenizer");
    }
    let mut packing = BTreeMap::new();
    for (i, tensor) in read.tensors().enumerate() {
        if let Format::Ternary(p) = tensor.format {
            *packing.entry(p.name()).or_insert(0) += 1;
            // A packed source must keep its scale to the bit.
            let source_gamma = source.tensors.list()[model.index[i]].gamma;
            ensure!(
                source_gamma.is_none() || source_gamma == tensor.gamma,
                "`{}`: the scale would change from {source_gamma:?} to {:?}",
                model.layout.param(Id(i)).name,
                tensor.gamma
            );
        }
    }
    Ok(packing)
}
