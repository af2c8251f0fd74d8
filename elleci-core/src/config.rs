//! Model shapes: a [`ModelConfig`] that validates is one that every layer can trust.

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

/// The mixer of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerKind {
    /// `S` in `layer_pattern`: Mamba-2 (state-space dual).
    Mamba,
    /// `A` in `layer_pattern`: multi-head latent attention.
    Mla,
}

/// The shape of a model. Field names are those of `config.json`.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub struct ModelConfig {
    /// Rows of the embedding and of the head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Number of blocks (mixer + feed-forward).
    pub n_layers: usize,
    /// `S` (Mamba-2) and `A` (MLA), repeated to `n_layers`.
    pub layer_pattern: String,
    /// Longest sequence that training uses.
    pub max_seq_len: usize,
    /// Epsilon of every RmsNorm.
    pub norm_eps: f32,
    /// MLA: attention heads.
    pub n_heads: usize,
    /// MLA: width of the cached latent.
    pub kv_rank: usize,
    /// MLA: channels of a query/key head without position.
    pub d_nope: usize,
    /// MLA: rotated channels of a query head and of the shared key (even).
    pub d_rope: usize,
    /// MLA: channels of a value head.
    pub d_v: usize,
    /// RoPE: base of the geometric frequencies.
    pub rope_base: f32,
    /// Mamba-2: inner width (a multiple of `head_dim`).
    pub d_inner: usize,
    /// Mamba-2: channels of a head.
    pub head_dim: usize,
    /// Mamba-2: state size of a channel.
    pub d_state: usize,
    /// Mamba-2: taps of the causal convolution.
    pub d_conv: usize,
    /// Feed-forward: hidden width.
    pub ffn_hidden: usize,
    /// Whether `lm_head` is `tok_emb` itself.
    pub tie_embeddings: bool,
}

/// The names of the built-in shapes, smallest first.
pub const PRESETS: [&str; 4] = ["nano", "mini", "small-160m", "elleci-1.5b"];

/// Parameters that a model may have: far more than a CPU runs, and few enough that no size in bytes overflows.
const MAX_PARAMETERS: u64 = 1 << 40;

/// Why a [`ModelConfig`] is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConfigError {
    /// No preset has this name.
    UnknownPreset(String),
    /// A field must be at least 1.
    Zero(&'static str),
    /// A field, or a product of several, is past what files and indices hold.
    TooLarge {
        /// The field or product.
        field: &'static str,
        /// Its value.
        value: usize,
        /// The largest value allowed.
        max: usize,
    },
    /// `layer_pattern` holds something other than `S` and `A`, or nothing.
    Pattern(String),
    /// `d_rope` is odd.
    OddRope(usize),
    /// `d_inner` is not a multiple of `head_dim`.
    Heads {
        /// `d_inner`
        d_inner: usize,
        /// `head_dim`
        head_dim: usize,
    },
    /// A float field is not a positive finite number.
    NotPositive(&'static str),
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ConfigError::UnknownPreset(name) => {
                write!(f, "unknown preset `{name}`; the presets are {}", PRESETS.join(", "))
            }
            ConfigError::Zero(field) => write!(f, "`{field}` is 0; it must be at least 1"),
            ConfigError::TooLarge { field, value, max } => {
                write!(f, "`{field}` is {value}; at most {max} is supported")
            }
            ConfigError::Pattern(p) => {
                write!(f, "`layer_pattern` is `{p}`; it must be a non-empty string of S (Mamba-2) and A (MLA)")
            }
            ConfigError::OddRope(d) => write!(f, "`d_rope` is {d}; it must be even (pairs are rotated)"),
            ConfigError::Heads { d_inner, head_dim } => {
                write!(f, "`d_inner` is {d_inner}; it must be a multiple of `head_dim` ({head_dim})")
            }
            ConfigError::NotPositive(field) => write!(f, "`{field}` must be a positive, finite number"),
        }
    }
}

impl core::error::Error for ConfigError {}

impl ModelConfig {
    /// A built-in shape by name.
    ///
    /// # Errors
    /// [`ConfigError::UnknownPreset`].
    pub fn preset(name: &str) -> Result<ModelConfig, ConfigError> {
        let base = ModelConfig {
            vocab_size: 32_128,
            d_model: 2048,
            n_layers: 24,
            layer_pattern: "SSSA".to_string(),
            max_seq_len: 1024,
            norm_eps: 1e-5,
            n_heads: 16,
            kv_rank: 512,
            d_nope: 64,
            d_rope: 64,
            d_v: 128,
            rope_base: 10_000.0,
            d_inner: 4096,
            head_dim: 64,
            d_state: 128,
            d_conv: 4,
            ffn_hidden: 5632,
            tie_embeddings: false,
        };
        let small = ModelConfig { kv_rank: 128, d_nope: 32, d_rope: 32, d_v: 64, d_state: 64, ..base.clone() };
        Ok(match name {
            "elleci-1.5b" => base,
            "small-160m" => {
                ModelConfig { d_model: 768, n_layers: 12, n_heads: 12, d_inner: 1536, ffn_hidden: 2048, ..small }
            }
            "mini" => ModelConfig {
                d_model: 512,
                n_layers: 8,
                n_heads: 8,
                d_inner: 1024,
                ffn_hidden: 1536,
                max_seq_len: 512,
                ..small
            },
            "nano" => ModelConfig {
                vocab_size: 4096,
                d_model: 256,
                n_layers: 4,
                n_heads: 4,
                kv_rank: 64,
                d_inner: 512,
                ffn_hidden: 768,
                max_seq_len: 256,
                ..small
            },
            _ => return Err(ConfigError::UnknownPreset(name.to_string())),
        })
    }

    /// Checks that the sizes fit together. Every other function takes a validated config for granted.
    ///
    /// # Errors
    /// The first field that does not fit.
    pub fn validate(&self) -> Result<(), ConfigError> {
        // Ternary sums must stay below 2^24 in magnitude to be exact in float32: 127 * in < 2^24.
        const MAX_IN: usize = (1 << 24) / 127;
        // Rows of a matrix, and values of a state, for which an index in float32 or in 32 bits would do.
        const MAX_ROWS: usize = 1 << 24;
        let sizes = [
            ("vocab_size", self.vocab_size, u32::MAX as usize),
            ("d_model", self.d_model, MAX_IN),
            ("n_layers", self.n_layers, 4096),
            ("max_seq_len", self.max_seq_len, 1 << 24),
            ("n_heads", self.n_heads, MAX_IN),
            ("kv_rank", self.kv_rank, MAX_IN),
            ("d_nope", self.d_nope, MAX_IN),
            ("d_rope", self.d_rope, MAX_IN),
            ("d_v", self.d_v, MAX_IN),
            ("d_inner", self.d_inner, MAX_IN),
            ("head_dim", self.head_dim, MAX_IN),
            ("d_state", self.d_state, MAX_IN),
            ("d_conv", self.d_conv, 64),
            ("ffn_hidden", self.ffn_hidden, MAX_IN),
        ];
        for (field, value, max) in sizes {
            if value == 0 {
                return Err(ConfigError::Zero(field));
            }
            if value > max {
                return Err(ConfigError::TooLarge { field, value, max });
            }
        }
        // Sums of two of the sizes above cannot overflow, not even where addresses have 32 bits; products can.
        let products = [
            ("n_heads * d_v", [self.n_heads, self.d_v], MAX_IN),
            ("n_heads * (d_nope + d_rope)", [self.n_heads, self.d_qk()], MAX_ROWS),
            ("n_heads * (d_nope + d_v)", [self.n_heads, self.d_nope + self.d_v], MAX_ROWS),
            ("d_inner * d_state", [self.d_inner, self.d_state], MAX_ROWS),
        ];
        for (field, [a, b], max) in products {
            let value = a.saturating_mul(b);
            if value > max {
                return Err(ConfigError::TooLarge { field, value, max });
            }
        }
        if self.layer_pattern.is_empty() || self.layer_pattern.bytes().any(|b| b != b'S' && b != b'A') {
            return Err(ConfigError::Pattern(self.layer_pattern.clone()));
        }
        if !self.d_rope.is_multiple_of(2) {
            return Err(ConfigError::OddRope(self.d_rope));
        }
        if !self.d_inner.is_multiple_of(self.head_dim) {
            return Err(ConfigError::Heads { d_inner: self.d_inner, head_dim: self.head_dim });
        }
        for (field, value) in [("norm_eps", self.norm_eps), ("rope_base", self.rope_base)] {
            if !(value.is_finite() && value > 0.0) {
                return Err(ConfigError::NotPositive(field));
            }
        }
        let (parameters, max) = (self.parameters(), MAX_PARAMETERS.min(isize::MAX as u64 / 4));
        if parameters > max {
            let [value, max] = [parameters, max].map(|n| usize::try_from(n).unwrap_or(usize::MAX));
            return Err(ConfigError::TooLarge { field: "the number of parameters", value, max });
        }
        Ok(())
    }

    /// Values of all parameters, where the fields are within their bounds: then no step of this overflows (a matrix has at most
    /// 2^24 · 2^18 values, an embedding 2^32 · 2^17, and there are 4096 layers).
    fn parameters(&self) -> u64 {
        let matrix = |rows: usize, columns: usize| rows as u64 * columns as u64;
        let (d, attention) = (self.d_model, self.n_heads * self.d_v);
        let mla = matrix(self.n_heads * self.d_qk(), d)
            + matrix(self.kv_rank + self.d_rope, d)
            + matrix(self.n_heads * (self.d_nope + self.d_v), self.kv_rank)
            + matrix(attention, d)
            + (self.kv_rank + attention) as u64;
        let mamba = matrix(3 * self.d_inner + 2 * self.d_state + self.mamba_heads(), d)
            + matrix(self.conv_channels(), self.d_conv + 1)
            + (3 * self.mamba_heads() + self.d_inner) as u64;
        let ffn = 3 * matrix(self.ffn_hidden, d) + self.ffn_hidden as u64;
        let mixers = self.layer_kinds().into_iter().map(|kind| if kind == LayerKind::Mla { mla } else { mamba });
        let layers: u64 = mixers.map(|mixer| mixer + ffn + 2 * d as u64).sum();
        let embeddings = if self.tie_embeddings { 1 } else { 2 };
        layers + embeddings * matrix(self.vocab_size, d) + d as u64
    }

    /// The mixer of every layer, in order.
    pub fn layer_kinds(&self) -> Vec<LayerKind> {
        let pattern = self.layer_pattern.as_bytes();
        (0..self.n_layers)
            .map(|i| if pattern[i % pattern.len()] == b'A' { LayerKind::Mla } else { LayerKind::Mamba })
            .collect()
    }

    /// Mamba-2: number of heads, `d_inner / head_dim`.
    pub fn mamba_heads(&self) -> usize {
        self.d_inner / self.head_dim
    }

    /// Mamba-2: channels of the causal convolution, `d_inner + 2 * d_state` (x, B, C).
    pub fn conv_channels(&self) -> usize {
        self.d_inner + 2 * self.d_state
    }

    /// MLA: channels of one query or key head, `d_nope + d_rope`.
    pub fn d_qk(&self) -> usize {
        self.d_nope + self.d_rope
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_validate_and_unknown_names_do_not() {
        for name in PRESETS {
            assert_eq!(ModelConfig::preset(name).unwrap().validate(), Ok(()), "{name}");
        }
        assert_eq!(ModelConfig::preset("huge"), Err(ConfigError::UnknownPreset("huge".into())));
    }

    #[test]
    fn every_misfit_is_named() {
        let nano = ModelConfig::preset("nano").unwrap();
        let with = |change: fn(&mut ModelConfig)| {
            let mut c = nano.clone();
            change(&mut c);
            c.validate()
        };
        assert_eq!(with(|c| c.d_state = 0), Err(ConfigError::Zero("d_state")));
        assert_eq!(with(|c| c.d_rope = 31), Err(ConfigError::OddRope(31)));
        assert_eq!(with(|c| c.head_dim = 60), Err(ConfigError::Heads { d_inner: 512, head_dim: 60 }));
        assert_eq!(with(|c| c.layer_pattern = "SSX".into()), Err(ConfigError::Pattern("SSX".into())));
        assert_eq!(with(|c| c.layer_pattern = String::new()), Err(ConfigError::Pattern(String::new())));
        assert_eq!(with(|c| c.norm_eps = f32::NAN), Err(ConfigError::NotPositive("norm_eps")));
        assert!(matches!(with(|c| c.d_model = 1 << 20), Err(ConfigError::TooLarge { field: "d_model", .. })));
    }

    /// Each field is within its own bound, and the product is not: what would overflow later is refused here.
    #[test]
    fn every_product_is_bounded() {
        let nano = ModelConfig::preset("nano").unwrap();
        let refused = |change: fn(&mut ModelConfig)| {
            let mut c = nano.clone();
            change(&mut c);
            match c.validate() {
                Err(ConfigError::TooLarge { field, value, max }) if value > max => field,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(refused(|c| (c.n_heads, c.d_v) = (363, 364)), "n_heads * d_v");
        assert_eq!(refused(|c| (c.n_heads, c.d_nope, c.d_v) = (132_000, 132_000, 1)), "n_heads * (d_nope + d_rope)");
        assert_eq!(refused(|c| (c.n_heads, c.d_rope, c.d_v) = (132_000, 132_000, 1)), "n_heads * (d_nope + d_rope)");
        // 4096 · (4094 + 2) is 2^24 exactly, and a value of a head makes it more.
        let edge = |c: &mut ModelConfig| (c.n_heads, c.d_nope, c.d_rope, c.d_v) = (4096, 4094, 2, 3);
        assert_eq!(refused(edge), "n_heads * (d_nope + d_v)");
        let mut fits = nano.clone();
        edge(&mut fits);
        fits.d_v = 2;
        assert_eq!(fits.validate(), Ok(()));
        assert_eq!(refused(|c| (c.d_inner, c.d_state) = (1 << 14, (1 << 10) + 1)), "d_inner * d_state");
        let all = "the number of parameters";
        assert_eq!(refused(|c| (c.vocab_size, c.d_model) = (u32::MAX as usize, 128)), all);
        assert_eq!(refused(|c| (c.n_layers, c.d_model, c.ffn_hidden) = (4096, 32_768, 32_768)), all);
    }

    #[test]
    fn parameters_are_those_of_the_layout() {
        let mut configs: Vec<_> = PRESETS.map(|name| ModelConfig::preset(name).unwrap()).into();
        configs.push(ModelConfig {
            tie_embeddings: true,
            d_conv: 3,
            n_layers: 7,
            d_rope: 18,
            d_nope: 5,
            ..configs[0].clone()
        });
        for c in configs {
            assert_eq!(c.parameters(), crate::params::ParamLayout::new(&c).len() as u64, "{c:?}");
        }
    }

    #[test]
    fn the_pattern_repeats() {
        let kinds = ModelConfig::preset("mini").unwrap().layer_kinds();
        assert_eq!(kinds.iter().filter(|k| **k == LayerKind::Mla).count(), 2);
        assert_eq!(kinds[3], LayerKind::Mla);
        assert_eq!(kinds[0], LayerKind::Mamba);
    }
}
