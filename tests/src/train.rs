//! Training with LibTorch's own AdamW and gradient clipping.

use std::collections::BTreeMap;

use elleci_core::params::{ParamLayout, Params};
use tch::nn::{self, OptimizerConfig};
use tch::{Device, Kind, Tensor};

use crate::oracle::decays;

/// Constants of a run.
#[derive(Clone, Copy, Debug)]
pub struct Recipe {
    /// First and second moment's decay.
    pub betas: (f64, f64),
    /// Added to the root of the second moment (LibTorch's default).
    pub eps: f64,
    /// Decoupled, on matrices only.
    pub weight_decay: f64,
    /// Largest global norm of the gradients.
    pub clip: f64,
}

impl Default for Recipe {
    /// The values of the reference run.
    fn default() -> Recipe {
        Recipe { betas: (0.9, 0.95), eps: 1e-8, weight_decay: 0.1, clip: 1.0 }
    }
}

/// Weights and LibTorch's optimiser over them.
#[derive(Debug)]
pub struct Trainer {
    /// Autograd leaves by parameter name; the optimiser changes them in place.
    pub vars: BTreeMap<String, Tensor>,
    optimizer: nn::Optimizer,
    recipe: Recipe,
    // Holds the variables that the optimiser refers to.
    _store: nn::VarStore,
}

impl Trainer {
    /// Starts from the given weights, multiplied by `1 + amount * u` with `u` uniform in [-1, 1] from `seed`.
    pub fn new(params: &Params, kind: Kind, recipe: Recipe, (amount, seed): (f64, u64)) -> Trainer {
        let store = nn::VarStore::new(Device::Cpu);
        let mut vars = BTreeMap::new();
        for (i, p) in params.layout().params().iter().enumerate() {
            let shape: Vec<i64> = p.shape.iter().map(|&n| n as i64).collect();
            let data = Tensor::from_slice(&params.data()[p.range.clone()]).view(shape.as_slice()).to_kind(kind);
            let u = crate::compare::uniform(p.len(), seed.wrapping_add(i as u64), kind).view_as(&data);
            let path = store.root().set_group(usize::from(decays(p.kind)));
            // Names may not contain dots there.
            let var = path.add(&format!("p{i}"), data * (u * amount + 1.0), true);
            vars.insert(p.name.clone(), var);
        }
        let config = nn::adamw(recipe.betas.0, recipe.betas.1, 0.0).eps(recipe.eps);
        let mut optimizer = config.build(&store, 1e-3).expect("LibTorch builds an AdamW");
        optimizer.set_weight_decay_group(0, 0.0);
        optimizer.set_weight_decay_group(1, recipe.weight_decay);
        Trainer { vars, optimizer, recipe, _store: store }
    }

    /// Minimises `loss` by one step.
    pub fn step(&mut self, loss: &Tensor, lr: f64) {
        self.optimizer.zero_grad();
        loss.backward();
        self.optimizer.clip_grad_norm(self.recipe.clip);
        self.optimizer.set_lr(lr);
        self.optimizer.step();
    }

    /// One step with gradients from elsewhere.
    pub fn step_with(&mut self, layout: &ParamLayout, grads: &Params, lr: f64) {
        // The gradient of sum(w * g) is g.
        let terms = layout.params().iter().map(|p| {
            let var = &self.vars[&p.name];
            let g = Tensor::from_slice(&grads.data()[p.range.clone()]).view_as(var).to_kind(var.kind());
            (var * g).sum(None)
        });
        let total: Tensor = terms.sum();
        self.step(&total, lr);
    }
}
