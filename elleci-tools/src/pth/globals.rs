//! The names that a pickle may use: the allow-list.

use anyhow::bail;

use super::view::Dtype;

/// A name on the allow-list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Global {
    /// `collections.OrderedDict`
    OrderedDict,
    /// `torch.Size`
    Size,
    /// `torch._utils._rebuild_tensor_v2`, and `_rebuild_tensor` with fewer arguments.
    RebuildTensor,
    /// `torch._utils._rebuild_tensor_v3`, with the data type apart from the storage.
    RebuildTensorV3,
    /// `torch._utils._rebuild_parameter` and `_rebuild_parameter_with_state`.
    RebuildParameter,
    /// `torch._tensor._rebuild_from_type_v2`
    RebuildFromType,
    /// A subclass of tensor that holds nothing else.
    TensorType,
    /// `torch.FloatStorage` and its kin.
    Storage(Dtype),
    /// `torch.storage.UntypedStorage`
    UntypedStorage,
    /// `torch.float32` and its kin.
    Dtype(Dtype),
    /// What makes something without weights: a device, a set.
    Opaque,
}

impl Global {
    /// A name on the list.
    ///
    /// # Errors
    /// Any other name, with what to do about it.
    pub fn find(module: &str, name: &str) -> anyhow::Result<Global> {
        use Dtype as D;
        Ok(match (module, name) {
            ("collections", "OrderedDict") => Global::OrderedDict,
            ("torch", "Size") => Global::Size,
            ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => Global::RebuildTensor,
            ("torch._utils", "_rebuild_tensor_v3") => Global::RebuildTensorV3,
            ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") => Global::RebuildParameter,
            ("torch._tensor", "_rebuild_from_type_v2") => Global::RebuildFromType,
            ("torch", "Tensor") | ("torch.nn.parameter", "Parameter" | "Buffer") => Global::TensorType,
            ("torch", "DoubleStorage") => Global::Storage(D::F64),
            ("torch", "FloatStorage") => Global::Storage(D::F32),
            ("torch", "HalfStorage") => Global::Storage(D::F16),
            ("torch", "BFloat16Storage") => Global::Storage(D::BF16),
            ("torch", "LongStorage") => Global::Storage(D::I64),
            ("torch", "IntStorage") => Global::Storage(D::I32),
            ("torch", "ShortStorage") => Global::Storage(D::I16),
            ("torch", "CharStorage") => Global::Storage(D::I8),
            ("torch", "ByteStorage") => Global::Storage(D::U8),
            ("torch", "BoolStorage") => Global::Storage(D::Bool),
            ("torch.storage", "UntypedStorage") | ("torch", "UntypedStorage") => Global::UntypedStorage,
            ("torch", "float64" | "double") => Global::Dtype(D::F64),
            ("torch", "float32" | "float") => Global::Dtype(D::F32),
            ("torch", "float16" | "half") => Global::Dtype(D::F16),
            ("torch", "bfloat16") => Global::Dtype(D::BF16),
            ("torch", "int64" | "long") => Global::Dtype(D::I64),
            ("torch", "int32" | "int") => Global::Dtype(D::I32),
            ("torch", "int16" | "short") => Global::Dtype(D::I16),
            ("torch", "int8") => Global::Dtype(D::I8),
            ("torch", "uint8") => Global::Dtype(D::U8),
            ("torch", "bool") => Global::Dtype(D::Bool),
            ("torch", "device") | ("builtins" | "__builtin__", "set" | "frozenset") => Global::Opaque,
            _ if module.starts_with("torch.nn.modules") || module == "__main__" => bail!(
                "the file holds a `{module}.{name}`, code that is not run here; save the weights alone: \
                 torch.save(model.state_dict(), path)"
            ),
            _ => bail!(
                "the file asks for `{module}.{name}`, which is not on the list of what a state dict needs; nothing was run. \
                 If you trust the file, load it in PyTorch and save the weights alone: \
                 torch.save(model.state_dict(), path)"
            ),
        })
    }

    /// A name for messages.
    pub fn name(self) -> &'static str {
        match self {
            Global::OrderedDict => "collections.OrderedDict",
            Global::Size => "torch.Size",
            Global::RebuildTensor => "_rebuild_tensor",
            Global::RebuildTensorV3 => "_rebuild_tensor_v3",
            Global::RebuildParameter => "_rebuild_parameter",
            Global::RebuildFromType => "_rebuild_from_type_v2",
            Global::TensorType => "a tensor type",
            Global::Storage(_) | Global::UntypedStorage => "a storage type",
            Global::Dtype(_) => "a data type",
            Global::Opaque => "an object without weights",
        }
    }
}
