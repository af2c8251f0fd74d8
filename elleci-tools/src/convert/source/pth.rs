//! PyTorch files as models.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, bail, ensure};
use elleci_core::config::{ModelConfig, PRESETS};
use elleci_core::params::ParamLayout;
use memmap2::Mmap;

use super::super::cli::Weights;
use super::super::job::Job;
use super::{Form, Options, Source, TensorInfo, Tensors, tokenizer_in};
use crate::exit::usage;
use crate::hf;
use crate::pth::{Checksums, Pth, Root, Tensor, describe_misfit};

struct PthTensors {
    file: Pth<Mmap>,
    list: Vec<TensorInfo>,
    /// For every entry of the list, its index in the file.
    place: Vec<usize>,
}

impl Tensors for PthTensors {
    fn list(&self) -> &[TensorInfo] {
        &self.list
    }

    fn read(&self, index: usize, values: &mut [f32]) -> anyhow::Result<()> {
        ensure!(
            values.len() == self.list[index].elements(),
            "room for another tensor than `{}`",
            self.list[index].name
        );
        self.file.read(&self.file.tensors()[self.place[index]], 0, values);
        Ok(())
    }
}

/// Opens a file, compares its checksums and looks for a model in it.
pub fn open(path: &Path, map: Mmap, options: &Options, job: &Job) -> anyhow::Result<Source> {
    let file = Pth::open(map).with_context(|| path.display().to_string())?;
    job.begin("checking", file.record_bytes());
    let sums = file.verify(&mut |bytes| job.advance(bytes)).with_context(|| path.display().to_string())?;
    let mut notes = Vec::new();
    if sums == Checksums::Absent {
        notes.push("the file carries no checksums: damage to its weights cannot be told".to_string());
    }
    let mut problems = Vec::new();
    let roots = Root::all(file.tensors()).with_context(|| path.display().to_string())?;
    let all = file.tensors();
    let (mut chosen, averaged) = match choose(&roots, options.weights, path)? {
        Some(root) => (root.tensors.clone(), root.averaged),
        None => {
            problems.push(describe_misfit(all));
            // Names of another model are listed as they are.
            (all.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect(), false)
        }
    };
    let dir = path.parent().unwrap_or(Path::new("."));
    let config = match &options.config {
        Some(_) => None,
        None if roots.is_empty() => None,
        None if hf::has_config(dir) => hf::read_config(dir).map_err(|e| problems.push(format!("{e:#}"))).ok(),
        None => fitting_preset(&chosen, all).map(|(name, config)| {
            notes.push(format!(
                "the file does not say the sizes of its model; its shapes are those of the preset {name}. Shapes cannot tell \
                 max_seq_len, norm_eps and rope_base: taken are {}, {} and {}; --config gives others",
                config.max_seq_len, config.norm_eps, config.rope_base
            ));
            config
        }),
    };
    let mut tied = config.as_ref().is_some_and(|c| c.tie_embeddings);
    if let Some(named) = &options.config {
        tied = super::named_config(named)?.tie_embeddings;
    }
    if tied {
        drop_tied_head(&mut chosen, all, &file);
    }
    let place: Vec<usize> = chosen.values().copied().collect();
    let list: Vec<TensorInfo> = chosen.iter().map(|(name, &i)| info(name, &all[i])).collect();
    if !roots.is_empty() {
        problems.extend(
            list.iter()
                .zip(&place)
                .filter(|(_, i)| !all[**i].view.dtype().is_float())
                .map(|(t, _)| format!("`{}` has type {}; weights are floats", t.name, t.format)),
        );
    }
    let tokenizer = tokenizer_in(dir, options, &mut problems);
    Ok(Source {
        path: path.to_path_buf(),
        form: Form::Pth,
        facts: vec![("format", file.format().into()), ("tensors in the file", all.len().into())],
        config,
        tokenizer,
        tokenizer_sha256: None,
        tensors: Box::new(PthTensors { list, place, file }),
        averaged,
        notes,
        problems,
    })
}

/// The model that is meant: a file may hold the last weights and their running mean.
fn choose<'r>(roots: &'r [Root], weights: Weights, path: &Path) -> anyhow::Result<Option<&'r Root>> {
    let at = path.display();
    let wanted = |root: &&Root| root.averaged == (weights == Weights::Swa);
    let fitting: Vec<&Root> = roots.iter().filter(wanted).collect();
    match (fitting[..].as_ref(), roots, weights) {
        ([one], _, _) => Ok(Some(one)),
        // A file with nothing but a running mean is taken for what it is.
        ([], [one], Weights::Last) => Ok(Some(one)),
        ([], [], _) => Ok(None),
        ([], _, Weights::Swa) => Err(usage(format!("--weights swa: {at} holds no running mean of weights"))),
        (several, _, _) => {
            let several = if several.is_empty() { roots.iter().collect() } else { several.to_vec() };
            let names: Vec<String> = several.iter().map(|r| format!("`{}`", r.prefix.trim_end_matches('.'))).collect();
            bail!("{at}: it holds several models ({}); save one of them alone", names.join(", "))
        }
    }
}

fn info(name: &str, tensor: &Tensor) -> TensorInfo {
    TensorInfo {
        name: name.to_string(),
        stored_as: (tensor.name != name).then(|| tensor.name.clone()),
        shape: tensor.shape(),
        format: tensor.view.dtype().name().to_string(),
        bytes: tensor.view.elements() * tensor.view.dtype().bytes(),
        gamma: None,
    }
}

/// The preset that has exactly these tensors, if one does.
fn fitting_preset(chosen: &BTreeMap<String, usize>, all: &[Tensor]) -> Option<(&'static str, ModelConfig)> {
    let shapes: Vec<(&str, Vec<usize>)> = chosen.iter().map(|(n, &i)| (n.as_str(), all[i].shape())).collect();
    let found: BTreeMap<&str, &[usize]> = shapes.iter().map(|(n, s)| (*n, s.as_slice())).collect();
    PRESETS.iter().filter_map(|name| Some((*name, ModelConfig::preset(name).ok()?))).find(|(_, config)| {
        let layout = ParamLayout::new(config);
        let expected = layout.params().iter().map(|p| (p.name.as_str(), p.shape.as_slice()));
        hf::check_tensors(expected, &found).is_ok()
    })
}

/// PyTorch saves a tied head twice: the second time it is the same memory, and not a tensor of its own.
fn drop_tied_head(chosen: &mut BTreeMap<String, usize>, all: &[Tensor], file: &Pth<Mmap>) {
    if let (Some(&head), Some(&embedding)) = (chosen.get("lm_head.weight"), chosen.get("tok_emb.weight"))
        && file.same_memory(&all[head], &all[embedding])
    {
        chosen.remove("lm_head.weight");
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// A file of a preset's tensors alone, all of them zero.
    fn preset_file(name: &str) -> Vec<u8> {
        let int = |n: usize| [&b"J"[..], &(n as i32).to_le_bytes()].concat();
        let tuple =
            |items: &[usize]| [&b"("[..], &items.iter().flat_map(|&n| int(n)).collect::<Vec<_>>(), b"t"].concat();
        let layout = ParamLayout::new(&ModelConfig::preset(name).unwrap());
        let mut pickle = b"\x80\x02}".to_vec();
        for p in layout.params() {
            let strides: Vec<usize> = (1..=p.shape.len()).map(|i| p.shape[i..].iter().product()).collect();
            pickle.extend([&[b'U', p.name.len() as u8], p.name.as_bytes()].concat());
            pickle.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\nFloatStorage\nU\x010U\x03cpu");
            pickle.extend(
                [int(layout.len()), b"tQ".to_vec(), int(p.range.start), tuple(&p.shape), tuple(&strides)].concat(),
            );
            pickle.extend(b"\x89}tRs");
        }
        pickle.push(b'.');
        let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
        for (name, data) in [("a/data.pkl", pickle), ("a/data/0", vec![0; 4 * layout.len()])] {
            let options = zip::write::SimpleFileOptions::default();
            zip.start_file(name, options.compression_method(zip::CompressionMethod::Stored)).unwrap();
            zip.write_all(&data).unwrap();
        }
        zip.finish().unwrap().into_inner()
    }

    #[test]
    fn a_preset_that_is_told_by_shapes_alone_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nano.pth");
        std::fs::write(&path, preset_file("nano")).unwrap();
        let open = |options: &Options| Source::open(&path, options, &Job::quiet()).unwrap();
        let source = open(&Options::default());
        assert_eq!((source.config.unwrap(), source.problems), (ModelConfig::preset("nano").unwrap(), vec![]));
        let [note] = &source.notes[..] else { panic!("{:?}", source.notes) };
        assert!(
            note.contains("preset nano") && note.contains("256, 0.00001 and 10000") && note.contains("--config"),
            "{note}"
        );
        assert!(open(&Options { config: Some("nano".into()), ..Options::default() }).notes.is_empty());
    }
}
