//! Models.

use alloc::boxed::Box;
#[cfg(feature = "capi")]
use alloc::format;
use alloc::sync::Arc;
use core::ffi::c_char;
use core::mem::MaybeUninit;

use super::arrays::array;
use super::status::{Failure, call, free, given};
use super::threads::on;
use super::{ElleciMessage, ElleciStatus, ElleciThreads};
use crate::archive::{AlignedBytes, Archive};

/// Where the bytes of an archive lie.
#[derive(Debug)]
pub(super) enum Bytes {
    #[cfg(feature = "capi")]
    Mapped(memmap2::Mmap),
    Copied(AlignedBytes),
    Borrowed(&'static [u8]),
}

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        match self {
            #[cfg(feature = "capi")]
            Bytes::Mapped(map) => map,
            Bytes::Copied(bytes) => bytes.as_ref(),
            Bytes::Borrowed(bytes) => bytes,
        }
    }
}

/// A model: the weights of an archive, where they lie. It never changes, and any number of threads may use it.
#[derive(Debug)]
pub struct ElleciModel(pub(super) Arc<Archive<Bytes>>);

/// Opens an archive file by mapping it into memory. The file must not be written to while the model or a session of it
/// lives; to replace it, rename another over it. `path` is UTF-8, except on Unix, where it is any bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elleci_model_open(
    path: *const c_char,
    threads: Option<&ElleciThreads>,
    model: Option<&mut MaybeUninit<*mut ElleciModel>>,
    message: Option<&mut MaybeUninit<ElleciMessage>>,
) -> ElleciStatus {
    call(message, || {
        // SAFETY: the caller vouches for a string that ends.
        open(model, threads, || unsafe { map(path) })
    })
}

/// Opens an archive from a copy of `bytes`, which are not needed afterwards.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elleci_model_open_copy(
    bytes: *const u8,
    length: usize,
    threads: Option<&ElleciThreads>,
    model: Option<&mut MaybeUninit<*mut ElleciModel>>,
    message: Option<&mut MaybeUninit<ElleciMessage>>,
) -> ElleciStatus {
    call(message, || {
        // SAFETY: the caller vouches for the array.
        let bytes = unsafe { array(bytes, length, "bytes") }?;
        open(model, threads, || Ok(Bytes::Copied(AlignedBytes::from(bytes))))
    })
}

/// Opens an archive where it lies: `bytes` must start at a multiple of 64, and must stay and not change until the model and
/// all sessions of it have been freed. Nothing is copied: right for an archive in a constant of the program.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elleci_model_open_static(
    bytes: *const u8,
    length: usize,
    threads: Option<&ElleciThreads>,
    model: Option<&mut MaybeUninit<*mut ElleciModel>>,
    message: Option<&mut MaybeUninit<ElleciMessage>>,
) -> ElleciStatus {
    call(message, || {
        // SAFETY: the caller vouches for the array, for as long as anything has it.
        let bytes = unsafe { array(bytes, length, "bytes") }?;
        open(model, threads, || Ok(Bytes::Borrowed(bytes)))
    })
}

fn open(
    model: Option<&mut MaybeUninit<*mut ElleciModel>>,
    threads: Option<&ElleciThreads>,
    bytes: impl FnOnce() -> Result<Bytes, Failure>,
) -> Result<(), Failure> {
    let model = given(model, "model")?.write(core::ptr::null_mut());
    let bytes = bytes()?;
    let archive = on(threads, || Archive::open(bytes))?;
    *model = Box::into_raw(Box::new(ElleciModel(Arc::new(archive))));
    Ok(())
}

/// # Safety
/// When not null, `path` is a string that ends.
#[cfg(feature = "capi")]
unsafe fn map(path: *const c_char) -> Result<Bytes, Failure> {
    if path.is_null() {
        return given(None, "path");
    }
    // SAFETY: not null; the rest is the caller's promise.
    let path = unsafe { core::ffi::CStr::from_ptr(path) };
    #[cfg(unix)]
    let name = <std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(path.to_bytes());
    #[cfg(not(unix))]
    let name = path.to_str().map_err(|_| Failure::new(ElleciStatus::InvalidArgument, "`path` is not UTF-8"))?;
    let path = std::path::Path::new(name);
    let mapped = || -> std::io::Result<memmap2::Mmap> {
        let file = std::fs::File::open(path)?;
        if !file.metadata()?.is_file() {
            return Err(std::io::Error::other("not a regular file"));
        }
        // SAFETY: the map is only read, and the caller has been told to leave the file alone.
        let map = unsafe { memmap2::Mmap::map(&file) }?;
        // Fewer page faults and faster reading where the system can; it maps the file without as well.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(map)
    };
    let map = mapped().map_err(|e| Failure::new(ElleciStatus::Io, format!("{}: {e}", path.display())))?;
    Ok(Bytes::Mapped(map))
}

#[cfg(not(feature = "capi"))]
unsafe fn map(path: *const c_char) -> Result<Bytes, Failure> {
    given((!path.is_null()).then_some(()), "path")?;
    Err(Failure::new(ElleciStatus::Unsupported, "this library was built without files; use elleci_model_open_static"))
}

/// Frees the handle. The weights go with the last session of the model. Null is fine.
#[unsafe(no_mangle)]
pub extern "C" fn elleci_model_free(model: Option<Box<ElleciModel>>) -> ElleciStatus {
    free(model, |_| Ok(()))
}

/// What a model is.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct ElleciModelInfo {
    /// Tokens that there are: logits have as many elements.
    pub vocab_size: usize,
    /// Tokens of the sequences that it was trained on. Longer ones are not refused.
    pub context: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Number of layers.
    pub layers: usize,
    /// Number of parameters.
    pub parameters: u64,
    /// Bytes of the archive.
    pub archive_bytes: u64,
    /// A number that differs between models.
    pub fingerprint: u64,
}

/// Tells what a model is.
#[unsafe(no_mangle)]
pub extern "C" fn elleci_model_info(
    model: Option<&ElleciModel>,
    info: Option<&mut MaybeUninit<ElleciModelInfo>>,
    message: Option<&mut MaybeUninit<ElleciMessage>>,
) -> ElleciStatus {
    call(message, || {
        let (model, info) = (given(model, "model")?.0.model(), given(info, "info")?);
        let c = model.config();
        info.write(ElleciModelInfo {
            vocab_size: c.vocab_size,
            context: c.max_seq_len,
            d_model: c.d_model,
            layers: c.n_layers,
            parameters: model.layout().len() as u64,
            archive_bytes: model.archive_bytes() as u64,
            fingerprint: model.fingerprint(),
        });
        Ok(())
    })
}

/// The `tokenizer.json` that travels with the model, as bytes that stay for as long as the model or a session of it; null
/// and 0 when there is none.
#[unsafe(no_mangle)]
pub extern "C" fn elleci_model_tokenizer(
    model: Option<&ElleciModel>,
    bytes: Option<&mut MaybeUninit<*const u8>>,
    length: Option<&mut MaybeUninit<usize>>,
    message: Option<&mut MaybeUninit<ElleciMessage>>,
) -> ElleciStatus {
    call(message, || {
        let (model, bytes, length) = (given(model, "model")?, given(bytes, "bytes")?, given(length, "length")?);
        let tokenizer = model.0.model().tokenizer();
        bytes.write(tokenizer.map_or(core::ptr::null(), <[u8]>::as_ptr));
        length.write(tokenizer.map_or(0, <[u8]>::len));
        Ok(())
    })
}
