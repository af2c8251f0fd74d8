//! What the callables of the allow-list do: they put together tensors from storages, offsets, sizes and strides.

use anyhow::{Context, bail, ensure};

use super::globals::Global;
use super::pickle::{Machine, Node, Value};
use super::view::{Dtype, Storage, View};

/// Arguments of a call: none of the callables takes as many, and a long tuple could be passed again and again.
const MAX_ARGUMENTS: usize = 16;
/// Characters of a storage's key; torch numbers them.
const MAX_KEY: usize = 255;
/// Dimensions of a tensor.
const MAX_DIMS: usize = 16;

impl Machine<'_> {
    pub(super) fn arguments(&self, value: &Value) -> anyhow::Result<Vec<Value>> {
        let items = self.tuple_items(value).context("a call without a tuple of arguments")?;
        ensure!(items.len() <= MAX_ARGUMENTS, "a call with {} arguments", items.len());
        Ok(items.to_vec())
    }

    /// Does what a callable of the allow-list does.
    pub(super) fn call(&mut self, callable: Global, arguments: &[Value]) -> anyhow::Result<Value> {
        use Global as G;
        Ok(match (callable, arguments) {
            (G::OrderedDict, []) => self.new_node(Node::Dict(Vec::new())),
            (G::OrderedDict, [pairs]) => {
                let dict = self.pairs(pairs).context("not a list of pairs")?;
                // The same list can be given again and again.
                self.charge(dict.len())?;
                self.new_node(Node::Dict(dict))
            }
            (G::Size, [items]) => {
                ensure!(self.tuple_items(items).is_some(), "not a tuple");
                items.clone()
            }
            // (storage, offset, size, stride, requires_grad, backward_hooks[, metadata])
            (G::RebuildTensor, [storage, offset, size, stride, ..]) => {
                let view = self.view(storage, offset, size, stride, None)?;
                self.new_node(Node::Tensor(Box::new(view)))
            }
            // (storage, offset, size, stride, requires_grad, backward_hooks, dtype[, metadata])
            (G::RebuildTensorV3, [storage, offset, size, stride, _, _, dtype, ..]) => {
                let Value::Global(G::Dtype(dtype)) = dtype else { bail!("no data type") };
                let view = self.view(storage, offset, size, stride, Some(*dtype))?;
                self.new_node(Node::Tensor(Box::new(view)))
            }
            // (data, requires_grad, backward_hooks[, state])
            (G::RebuildParameter, [data, ..]) => {
                ensure!(matches!(self.as_node(data), Some(Node::Tensor(_))), "no tensor");
                data.clone()
            }
            // (function, type, arguments, state): a tensor of a subclass, or one with attributes.
            (G::RebuildFromType, [function, Value::Global(G::TensorType), arguments, _]) => {
                let Value::Global(function) = function else { bail!("no function") };
                ensure!(*function != G::RebuildFromType, "nested in itself");
                let arguments = self.arguments(arguments)?;
                self.call(*function, &arguments)?
            }
            (G::Opaque, _) => self.new_node(Node::Opaque),
            _ => bail!("called with {} arguments that it does not take", arguments.len()),
        })
    }

    fn pairs(&self, value: &Value) -> Option<Vec<(Value, Value)>> {
        let Node::List(items) = self.as_node(value)? else { return None };
        let pair = |item: &Value| match self.as_node(item)? {
            Node::Tuple(kv) | Node::List(kv) => <&[Value; 2]>::try_from(kv.as_slice()).ok(),
            _ => None,
        };
        items.iter().map(|item| pair(item).map(|[k, v]| (k.clone(), v.clone()))).collect()
    }

    /// `('storage', type, key, location, elements[, view])`.
    pub(super) fn storage(&mut self, id: &Value) -> anyhow::Result<Value> {
        let items = self.tuple_items(id).context("not a tuple")?;
        let [tag, kind, key, _location, elements, rest @ ..] = items else { bail!("too short a tuple") };
        ensure!(self.text(tag) == Some("storage"), "not of a storage");
        ensure!(
            rest.iter().all(|v| *v == Value::None),
            "a view of another storage; re-save the file with torch >= 1.6"
        );
        let Value::Global(kind) = kind else { bail!("a storage of no type") };
        let dtype = match kind {
            Global::Storage(dtype) => Some(*dtype),
            Global::UntypedStorage => None,
            _ => bail!("{} is no type of storage", kind.name()),
        };
        let key = self.text(key).context("a storage whose key is no text")?;
        ensure!(key.len() <= MAX_KEY, "a storage whose key has {} characters", key.len());
        let key = key.to_string();
        let Value::Int(elements) = elements else { bail!("a storage of no length") };
        let elements = u64::try_from(*elements).context("a storage of negative length")?;
        let bytes = elements.checked_mul(dtype.map_or(1, Dtype::bytes)).context("a storage past 2^64 bytes")?;
        let storage = Storage { key: key.clone(), dtype, bytes };
        // The same storage is named once for every tensor over it.
        let index = match self.by_key.get(&key) {
            Some(&known) => {
                ensure!(self.storages[known] == storage, "storage `{key}` is of two types or lengths");
                known
            }
            None => {
                self.storages.push(storage);
                self.by_key.insert(key, self.storages.len() - 1);
                self.storages.len() - 1
            }
        };
        Ok(self.new_node(Node::Storage(index)))
    }

    fn sizes(&self, value: &Value) -> anyhow::Result<Vec<u64>> {
        let items = self.tuple_items(value).context("a shape that is no tuple")?;
        ensure!(items.len() <= MAX_DIMS, "{} dimensions; {MAX_DIMS} can be read", items.len());
        let size = |item: &Value| match item {
            Value::Int(n) => u64::try_from(*n).context("a negative size or stride"),
            _ => bail!("a size that is no integer"),
        };
        items.iter().map(size).collect()
    }

    fn view(
        &self,
        storage: &Value,
        offset: &Value,
        size: &Value,
        stride: &Value,
        dtype: Option<Dtype>,
    ) -> anyhow::Result<View> {
        let Some(Node::Storage(index)) = self.as_node(storage) else { bail!("a tensor without storage") };
        let Value::Int(offset) = offset else { bail!("an offset that is no integer") };
        let offset = u64::try_from(*offset).context("a negative offset")?;
        let storage = &self.storages[*index];
        let dtype = dtype.or(storage.dtype).context("an untyped storage without a data type")?;
        View::new(*index, storage.bytes, dtype, offset, self.sizes(size)?, self.sizes(stride)?)
    }
}
