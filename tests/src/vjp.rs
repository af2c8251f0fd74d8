//! One operation's outputs and gradients by LibTorch's autograd, with their rounding noise.

use std::collections::BTreeMap;

use tch::Tensor;

use crate::compare::{Evaluation, Noise, ROUNDOFF, Reference, references, uniform};
use crate::ops::Scan;

/// The float inputs of an operation by name, with their shapes.
#[derive(Clone, Debug, Default)]
pub struct Inputs(BTreeMap<&'static str, (Vec<usize>, Vec<f32>)>);

impl Inputs {
    /// Adds an input.
    pub fn with(mut self, name: &'static str, shape: &[usize], data: Vec<f32>) -> Inputs {
        assert_eq!(shape.iter().product::<usize>(), data.len(), "{name}");
        self.0.insert(name, (shape.to_vec(), data));
        self
    }

    /// Adds a normal one.
    pub fn normal(self, name: &'static str, shape: &[usize], scale: f32, noise: &mut Noise) -> Inputs {
        let data = noise.normals(shape.iter().product(), scale);
        self.with(name, shape, data)
    }

    /// The elements of an input.
    pub fn data(&self, name: &str) -> &[f32] {
        &self.0[name].1
    }
}

/// Tensors by name, as an operation sees them.
#[derive(Debug)]
pub struct Leaves {
    tensors: BTreeMap<&'static str, Tensor>,
    /// The scan that this evaluation uses.
    pub scan: Scan,
}

impl std::ops::Index<&str> for Leaves {
    type Output = Tensor;
    fn index(&self, name: &str) -> &Tensor {
        &self.tensors[name]
    }
}

/// References of `f`'s output as `y`, and of the gradients of `sum(dy * y)` as `d{name}` for every input but `dy` and those
/// whose name starts with an underscore.
pub fn vjp(inputs: &Inputs, f: impl Fn(&Leaves) -> Tensor) -> BTreeMap<String, Reference> {
    references(|evaluation| {
        let (kind, scan) = evaluation.mode();
        let leaf = |i: usize, name: &'static str, shape: &[usize], data: &[f32]| {
            let shape: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
            let mut x = Tensor::from_slice(data).view(shape.as_slice()).to_kind(kind);
            if let Evaluation::Perturbed(seed) = evaluation {
                x *= uniform(data.len(), seed * 100 + i as u64, kind).view_as(&x) * ROUNDOFF + 1.0;
            }
            (name, x.set_requires_grad(name != "dy" && !name.starts_with('_')))
        };
        let named = inputs.0.iter().enumerate();
        let tensors = named.map(|(i, (name, (shape, data)))| leaf(i, name, shape, data)).collect();
        let leaves = Leaves { tensors, scan };
        let y = f(&leaves);
        if let Some(dy) = leaves.tensors.get("dy") {
            (&y * dy.view_as(&y)).sum(None).backward();
        }
        let grads = leaves.tensors.iter().filter(|(_, x)| x.requires_grad() && inputs.0.contains_key("dy"));
        let grads = grads.map(|(name, x)| {
            let grad = x.grad();
            (format!("d{name}"), if grad.defined() { grad } else { x.zeros_like() })
        });
        let mut out: BTreeMap<String, Tensor> = grads.collect();
        out.insert("y".into(), y.detach());
        out
    })
}
