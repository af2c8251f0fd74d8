//! Small helpers for files that are whole or not there.

use std::collections::hash_map::RandomState;
use std::fs::{self, File};
use std::hash::{BuildHasher, Hasher};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::exit::usage;

/// The directory that a path lies in.
pub fn parent_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

/// Makes the names in a directory durable (a no-op where directories cannot be opened).
///
/// # Errors
/// The file system refuses.
pub fn sync_dir(dir: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(dir).and_then(|d| d.sync_all()).with_context(|| format!("{}: cannot sync", dir.display()))?;
    }
    Ok(())
}

/// A name beside `target` that nobody else has, hidden and told by its end: `.NAME.PROCESS-NUMBER.end`. Two processes that write
/// one file do not meet, and nothing of the user's is in the way.
///
/// # Errors
/// A path without a name.
pub fn unique_beside(target: &Path, end: &str) -> Result<PathBuf> {
    let number = RandomState::new().build_hasher().finish();
    Ok(parent_of(target).join(format!("{}{}-{number:016x}.{end}", unique_start(target)?, std::process::id())))
}

/// Whether a file name is one that [`unique_beside`] gave, in this process or another.
pub fn is_unique_beside(name: &str, target: &Path, end: &str) -> bool {
    let middle =
        unique_start(target).ok().and_then(|start| name.strip_prefix(&start)?.strip_suffix(end)?.strip_suffix('.'));
    middle.and_then(|middle| middle.split_once('-')).is_some_and(|(process, number)| {
        process.parse::<u32>().is_ok() && number.len() == 16 && number.bytes().all(|b| b.is_ascii_hexdigit())
    })
}

fn unique_start(target: &Path) -> Result<String> {
    let name = target.file_name().with_context(|| format!("{}: not a file name", target.display()))?;
    let name = name.to_string_lossy();
    // File systems take 255 bytes. What is cut off still tells names apart.
    let cut: String = name.chars().take(50).collect();
    let rest = if cut.len() < name.len() {
        format!("~{}", &blake3::hash(name.as_bytes()).to_hex()[..8])
    } else {
        String::new()
    };
    Ok(format!(".{cut}{rest}."))
}

/// Whether there is something at `path` that is written into and cannot be replaced: a device, a pipe, an open file by its number.
pub fn is_stream(path: &Path) -> bool {
    let link = path.symlink_metadata().is_ok_and(|m| m.is_symlink());
    let named = ["/dev/stdout", "/dev/stderr"].iter().any(|name| path == Path::new(name));
    let by_number = link && (named || path.starts_with("/dev/fd") || path.starts_with("/proc"));
    path.metadata().is_ok_and(|m| !m.is_dir() && (!m.is_file() || by_number))
}

/// Whether [`write_atomic`] has a place for a file at `path`: for programs that work long before they write.
///
/// # Errors
/// [`crate::exit::Usage`] for a directory, or a path whose directory is not there; [`write_atomic`] reports the same as any other
/// failure.
pub fn check_target(path: &Path) -> Result<()> {
    target_of(path).map(|_| ()).map_err(|e| usage(format!("{e:#}")))
}

/// The file that is replaced when `path` is written: what a symbolic link leads to, and not the link.
fn target_of(path: &Path) -> Result<PathBuf> {
    let at = path.display();
    match path.metadata() {
        Ok(found) if found.is_dir() => bail!("{at} is a directory; name a file"),
        Ok(_) if is_stream(path) => Ok(path.to_path_buf()),
        Ok(_) => path.canonicalize().with_context(|| at.to_string()),
        Err(e) if e.kind() == ErrorKind::NotFound => {
            let mut target = path.to_path_buf();
            while let Ok(next) = target.read_link() {
                target = parent_of(&target).join(next);
            }
            if target.file_name().is_none() {
                bail!("{at}: not a file name");
            }
            let parent = parent_of(&target);
            match parent.is_dir() {
                true => Ok(target),
                false => bail!("{at}: there is no directory {}; create it first", parent.display()),
            }
        }
        Err(e) => Err(e).with_context(|| at.to_string()),
    }
}

/// Has `write` make a file under a temporary name that is not there yet, syncs it and renames it. A symbolic link stays, and what it
/// leads to is replaced; the permissions of what is replaced stay too. A device or a pipe is given to `write` itself.
///
/// # Errors
/// What [`check_target`] finds; whatever `write` or the file system reports; the temporary file is gone then, and an
/// older file of that name untouched.
pub fn write_atomic(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let at = || format!("writing {}", path.display());
    let target = target_of(path)?;
    if is_stream(path) {
        return write(path).with_context(at);
    }
    let temporary = unique_beside(&target, "tmp")?;
    let result = write(&temporary).and_then(|()| {
        File::open(&temporary)?.sync_all()?;
        if let Ok(old) = target.metadata() {
            fs::set_permissions(&temporary, old.permissions())?;
        }
        Ok(fs::rename(&temporary, &target)?)
    });
    if result.is_err() {
        // Best effort: the error below is what matters.
        let _ = fs::remove_file(&temporary);
    }
    result.with_context(at)?;
    sync_dir(&parent_of(&target))
}

/// [`write_atomic`] of bytes.
///
/// # Errors
/// As [`write_atomic`].
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomic(path, |to| Ok(create(to)?.write_all(bytes)?))
}

/// Opens what [`write_atomic`] has named: a new file, or a stream as it is.
///
/// # Errors
/// A file that is there, or whatever the file system reports.
pub fn create(path: &Path) -> std::io::Result<File> {
    match is_stream(path) {
        true => File::options().append(true).open(path),
        false => File::create_new(path),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::exit::Usage;

    /// What lies in a directory, in order.
    pub(crate) fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn what_is_replaced_is_whole_and_nothing_else_is_touched() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::create_dir(dir.path().join(".a.tmp")).unwrap();
        fs::write(dir.path().join(".a.partial"), "the user's").unwrap();
        write_atomically(&path, b"one").unwrap();
        write_atomically(&path, b"two").unwrap();
        assert!(
            write_atomic(&path, |to| {
                fs::write(to, "thr")?;
                anyhow::bail!("no more")
            })
            .is_err()
        );
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(names(dir.path()), [".a.partial", ".a.tmp", "a"]);
        // Names of 255 bytes can be written too.
        write_atomically(&dir.path().join("è".repeat(127)), b"").unwrap();
    }

    #[test]
    fn many_write_one_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::thread::scope(|scope| {
            for n in 0..8u8 {
                let path = &path;
                scope.spawn(move || (0..20).for_each(|_| write_atomically(path, &[n; 5000]).unwrap()));
            }
        });
        let bytes = fs::read(&path).unwrap();
        assert!(bytes.len() == 5000 && bytes.iter().all(|b| *b == bytes[0]));
        assert_eq!(names(dir.path()), ["a"]);
    }

    #[test]
    fn a_directory_or_a_mistyped_path_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for (path, part) in
            [(".", "is a directory"), ("typo/a.json", "there is no directory"), ("..", "is a directory")]
        {
            let path = dir.path().join(path);
            let (early, late) = (check_target(&path).unwrap_err(), write_atomically(&path, b"x").unwrap_err());
            assert!(early.downcast_ref::<Usage>().is_some() && late.downcast_ref::<Usage>().is_none());
            assert!(early.to_string().contains(part) && late.to_string().contains(part), "{late:#}");
        }
        assert!(names(dir.path()).is_empty());
    }

    #[test]
    fn names_are_told_from_others() {
        let target = Path::new("x/model");
        let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_string();
        let (one, two) = (unique_beside(target, "old").unwrap(), unique_beside(target, "old").unwrap());
        assert!(one != two && one.parent() == target.parent());
        assert!(is_unique_beside(&name(&one), target, "old"));
        assert!(!is_unique_beside(&name(&one), target, "tmp"));
        assert!(!is_unique_beside(&name(&one), Path::new("other"), "old"));
        let long = |end: &str| PathBuf::from(format!("{}{end}", "n".repeat(60)));
        let moved = name(&unique_beside(&long("1"), "old").unwrap());
        assert!(is_unique_beside(&moved, &long("1"), "old") && !is_unique_beside(&moved, &long("2"), "old"));
        for other in [".model.old", ".model.12.old", ".model.12-34.old", ".model.x-0123456789abcdef.old"] {
            assert!(!is_unique_beside(other, target, "old"), "{other}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn links_stay_and_permissions_too() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let dir = tempfile::tempdir().unwrap();
        let (link, file) = (dir.path().join("link"), dir.path().join("sub/file"));
        fs::create_dir(dir.path().join("sub")).unwrap();
        symlink("sub/file", &link).unwrap();
        write_atomically(&link, b"one").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        write_atomically(&link, b"two").unwrap();
        assert!(link.symlink_metadata().unwrap().is_symlink());
        assert_eq!(fs::read(&file).unwrap(), b"two");
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(names(&dir.path().join("sub")), ["file"]);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn devices_and_pipes_are_written_into() {
        use std::io::Read;
        use std::os::fd::AsRawFd;
        let error = write_atomically(Path::new("/dev/full"), b"x").unwrap_err();
        assert!(format!("{error:#}").contains("/dev/full"), "{error:#}");
        write_atomically(Path::new("/dev/null"), b"x").unwrap();
        let (mut reader, writer) = std::io::pipe().unwrap();
        write_atomically(Path::new(&format!("/proc/self/fd/{}", writer.as_raw_fd())), b"through").unwrap();
        drop(writer);
        let mut read = String::new();
        reader.read_to_string(&mut read).unwrap();
        assert_eq!(read, "through");
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
    }
}
