//! From nested containers to names, and from names to models.

use std::collections::{BTreeMap, HashMap};

use anyhow::{bail, ensure};

use super::Tensor;
use super::pickle::{Machine, Node, Value};

/// Containers inside containers.
const MAX_DEPTH: usize = 16;
/// Bytes of a key on the way to a tensor.
const MAX_KEY: usize = 255;
/// Values that are visited, and bytes of names that are made: shared containers are walked once for every way to them.
const MAX_WORK: usize = 64 << 20;

/// All tensors below a value, with the keys that lead to them. Of equal names the last counts, as in a dictionary.
pub fn flatten(machine: &Machine<'_>, root: &Value) -> anyhow::Result<Vec<Tensor>> {
    let mut walk = Walk { machine, path: Vec::new(), work: 0, found: Vec::new(), index: HashMap::new() };
    walk.visit(root)?;
    Ok(walk.found)
}

struct Walk<'m, 'a> {
    machine: &'m Machine<'a>,
    path: Vec<String>,
    work: usize,
    found: Vec<Tensor>,
    index: HashMap<String, usize>,
}

impl Walk<'_, '_> {
    fn visit(&mut self, value: &Value) -> anyhow::Result<()> {
        self.work += 16;
        ensure!(self.work <= MAX_WORK, "containers that hold each other too often to be a state dict");
        let Value::Node(node) = value else { return Ok(()) };
        match self.machine.node(*node) {
            Node::Tensor(view) => {
                let name = self.path.join(".");
                self.work += name.len();
                let tensor = Tensor { name: name.clone(), view: (**view).clone() };
                match self.index.get(&name) {
                    Some(&at) => self.found[at] = tensor,
                    None => {
                        self.index.insert(name, self.found.len());
                        self.found.push(tensor);
                    }
                }
                Ok(())
            }
            Node::Dict(items) => {
                for (key, value) in items {
                    self.enter(|m| m.key(key), value)?;
                }
                Ok(())
            }
            Node::List(items) | Node::Tuple(items) => {
                for (i, value) in items.iter().enumerate() {
                    self.enter(|_| Ok(i.to_string()), value)?;
                }
                Ok(())
            }
            Node::Storage(_) | Node::Opaque => Ok(()),
        }
    }

    fn enter(&mut self, key: impl Fn(&Self) -> anyhow::Result<String>, value: &Value) -> anyhow::Result<()> {
        self.work += 16;
        if !matches!(value, Value::Node(_)) {
            return Ok(());
        }
        ensure!(self.path.len() < MAX_DEPTH, "containers nested more than {MAX_DEPTH} deep: no state dict");
        let key = key(self)?;
        self.path.push(key);
        self.visit(value)?;
        self.path.pop();
        Ok(())
    }

    fn key(&self, key: &Value) -> anyhow::Result<String> {
        Ok(match (key, self.machine.text(key)) {
            (_, Some(text)) => {
                ensure!(text.len() <= MAX_KEY, "a key of {} bytes", text.len());
                text.to_string()
            }
            (Value::Int(n), _) => n.to_string(),
            _ => "?".to_string(),
        })
    }
}

/// A model in a file: the tensors below one prefix.
#[derive(Clone, Debug, PartialEq)]
pub struct Root {
    /// What stands before the names in the file, without wrappers (`module`, `_orig_mod`).
    pub prefix: String,
    /// Index of every tensor by its name in Elleci's files.
    pub tensors: BTreeMap<String, usize>,
    /// Whether the weights are a running mean.
    pub averaged: bool,
}

/// Segments that wrappers add: data parallelism and averaging, compilation, activation checkpointing, sharding.
const WRAPPERS: [&str; 4] = ["module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"];
/// Segments that say that weights are a running mean.
const AVERAGES: [&str; 8] =
    ["swa", "ema", "avg", "average", "averaged", "swa_state_dict", "ema_state_dict", "swa_model_state_dict"];
/// Every model has it.
const LANDMARK: &str = "tok_emb.weight";

fn unwrapped(name: &str) -> String {
    let segments = name.split('.').filter(|s| !WRAPPERS.contains(s));
    segments.collect::<Vec<_>>().join(".")
}

impl Root {
    /// All models of a file.
    ///
    /// # Errors
    /// Two tensors that have the same name when wrappers are taken off.
    pub fn all(tensors: &[Tensor]) -> anyhow::Result<Vec<Root>> {
        let names: Vec<String> = tensors.iter().map(|t| unwrapped(&t.name)).collect();
        let prefix = |name: &String| {
            let prefix = name.strip_suffix(LANDMARK)?;
            (prefix.is_empty() || prefix.ends_with('.')).then(|| prefix.to_string())
        };
        let mut prefixes: Vec<String> = names.iter().filter_map(prefix).collect();
        prefixes.sort();
        prefixes.dedup();
        let mut roots: Vec<Root> = Vec::new();
        for prefix in &prefixes {
            let mut found: BTreeMap<String, usize> = BTreeMap::new();
            for (index, name) in names.iter().enumerate() {
                let Some(short) = name.strip_prefix(prefix.as_str()) else { continue };
                // A tensor belongs to the longest prefix that it has.
                let deeper = |p: &String| p.len() > prefix.len() && name.starts_with(p.as_str());
                if prefixes.iter().any(deeper) {
                    continue;
                }
                if let Some(first) = found.insert(short.to_string(), index) {
                    bail!("`{}` and `{}` are the same tensor by name", tensors[first].name, tensors[index].name);
                }
            }
            let counted = found.remove("n_averaged").is_some();
            let averaged = counted || prefix.split('.').any(|s| AVERAGES.contains(&s));
            roots.push(Root { prefix: prefix.clone(), tensors: reference_names(found), averaged });
        }
        Ok(roots)
    }
}

/// Translates the module names of the reference implementation in PyTorch (`layers.0.mixer.in_proj.weight`), which calls both
/// mixers `mixer`; other names stay.
fn reference_names(found: BTreeMap<String, usize>) -> BTreeMap<String, usize> {
    let layer = |name: &str| name.find(".mixer.").map(|at| name[..at].to_string());
    let mamba: Vec<String> = found.keys().filter(|n| n.contains(".mixer.in_proj.")).filter_map(|n| layer(n)).collect();
    let rename = |name: &String| {
        let layer = layer(name)?;
        let rest = &name[layer.len() + ".mixer.".len()..];
        let kind = if mamba.contains(&layer) { "mamba" } else { "mla" };
        let rest = match (kind, rest) {
            ("mamba", "in_proj.weight") => "in.weight",
            ("mamba", "conv_weight") => "conv.weight",
            ("mamba", "conv_bias") => "conv.bias",
            _ => rest,
        };
        Some(format!("{layer}.{kind}.{rest}"))
    };
    // Where the file has a tensor of the new name already, the old one stays, and is reported as superfluous.
    let renamed = |name: &String| rename(name).filter(|new| !found.contains_key(new)).unwrap_or_else(|| name.clone());
    found.iter().map(|(name, &index)| (renamed(name), index)).collect()
}

/// Why no model was found among tensors of other names.
pub fn describe_misfit(tensors: &[Tensor]) -> String {
    const SHOWN: usize = 12;
    let names: Vec<String> = tensors.iter().map(|t| unwrapped(&t.name)).collect();
    let has = |part: &str| names.iter().any(|n| n.contains(part));
    if has("token_emb.weight") && has(".ffn.0.rms_norm.weight") && (has(".attn.w_kv_down") || has(".attn.x_proj")) {
        return "weights of the first Elleci prototype (token_emb, blocks.N.attn, ffn.0.rms_norm), which cannot be converted: \
                its feed-forward weights never ran ternary (its quantisers passed the unquantised values on), and its \
                mixers are other functions than today's (learned positions without rotation, a per-channel step size, no gated \
                norm). Train the model again"
            .to_string();
    }
    let list: Vec<String> = tensors.iter().take(SHOWN).map(|t| format!("{} {:?}", t.name, t.view.shape())).collect();
    let more = tensors.len().saturating_sub(SHOWN);
    let more = if more > 0 { format!(", and {more} more") } else { String::new() };
    match tensors.is_empty() {
        true => "it holds no tensors".to_string(),
        false => format!(
            "none of its {} tensors is `{LANDMARK}`, which every Elleci model has: {}{more}. `elleci-convert inspect` lists \
             them all",
            tensors.len(),
            list.join(", ")
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::view::{Dtype, View};
    use super::*;

    fn tensors(names: &[&str]) -> Vec<Tensor> {
        let view = View::new(0, 4, Dtype::F32, 0, vec![], vec![]).unwrap();
        names.iter().map(|n| Tensor { name: n.to_string(), view: view.clone() }).collect()
    }

    fn roots(names: &[&str]) -> Vec<Root> {
        Root::all(&tensors(names)).unwrap()
    }

    #[test]
    fn wrappers_and_prefixes() {
        for (a, b) in [
            ("tok_emb.weight", "layers.0.ffn.up.weight"),
            ("module.tok_emb.weight", "module.layers.0.ffn.up.weight"),
            ("_orig_mod.module.tok_emb.weight", "_orig_mod.module.layers.0._orig_mod.ffn.up.weight"),
            ("model.tok_emb.weight", "model.layers.0.ffn.up.weight"),
        ] {
            let found = roots(&[a, b, "optimizer.state.0.exp_avg"][..if a.starts_with("model") { 3 } else { 2 }]);
            assert_eq!(found.len(), 1);
            assert_eq!(found[0].tensors, [("tok_emb.weight".into(), 0), ("layers.0.ffn.up.weight".into(), 1)].into());
            assert!(!found[0].averaged);
        }
        assert!(roots(&["n_averaged", "module.tok_emb.weight"])[0].averaged);
        let two = roots(&["tok_emb.weight", "a", "swa_state_dict.module.tok_emb.weight", "swa_state_dict.n_averaged"]);
        assert_eq!(two.len(), 2);
        assert!(!two[0].averaged && two[0].tensors.len() == 2);
        assert!(two[1].averaged && two[1].tensors.len() == 1);
        assert!(Root::all(&tensors(&["tok_emb.weight", "module.tok_emb.weight"])).is_err());
        assert!(roots(&["my_tok_emb.weight"]).is_empty());
    }

    #[test]
    fn names_of_the_reference() {
        let found = roots(&[
            "tok_emb.weight",
            "layers.0.mixer.in_proj.weight",
            "layers.0.mixer.out.weight",
            "layers.0.mixer.conv_bias",
            "layers.0.mixer.d",
            "layers.1.mixer.out.weight",
            "layers.1.mixer.kv_norm.weight",
        ]);
        let names: Vec<&str> = found[0].tensors.keys().map(String::as_str).collect();
        assert_eq!(
            names,
            [
                "layers.0.mamba.conv.bias",
                "layers.0.mamba.d",
                "layers.0.mamba.in.weight",
                "layers.0.mamba.out.weight",
                "layers.1.mla.kv_norm.weight",
                "layers.1.mla.out.weight",
                "tok_emb.weight"
            ]
        );
    }

    #[test]
    fn misfits() {
        assert!(describe_misfit(&[]).contains("no tensors"));
        let text = describe_misfit(&tensors(&["conv1.weight", "fc.bias"]));
        assert!(text.contains("conv1.weight []") && text.contains("tok_emb.weight"), "{text}");
        let old = ["token_emb.weight", "blocks.0.attn.x_proj.weight", "blocks.0.ffn.0.rms_norm.weight"];
        assert!(describe_misfit(&tensors(&old)).contains("prototype"));
        assert!(
            describe_misfit(&tensors(&old.map(|n| ["module.", n].concat()).each_ref().map(|n| n.as_str())))
                .contains("never ran ternary")
        );
    }
}
