//! Where a model lies until it is whole: a name beside the final one that is this process's own. Two conversions to one destination
//! do not meet: each writes a whole model, and the one that ends last stays.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::data::files::{is_unique_beside, parent_of, sync_dir, unique_beside};

/// The end of a replaced folder's name, between the two renames where the system cannot exchange names.
const OLD: &str = "old";

/// A file or folder under a temporary name. When it is dropped it goes away, and so do directories that were made for it.
pub struct Temporary {
    path: PathBuf,
    target: PathBuf,
    /// Directories above it that were not there before, the outermost first.
    made: Vec<PathBuf>,
}

impl Temporary {
    /// A file, open to be written.
    ///
    /// # Errors
    /// Whatever the file system reports.
    pub fn file(target: &Path) -> Result<(Temporary, File)> {
        let temporary = Temporary::beside(target)?;
        let file =
            File::create_new(&temporary.path).with_context(|| format!("creating {}", temporary.path.display()))?;
        Ok((temporary, file))
    }

    /// An empty folder.
    ///
    /// # Errors
    /// Whatever the file system reports.
    pub fn folder(target: &Path) -> Result<Temporary> {
        let temporary = Temporary::beside(target)?;
        fs::create_dir(&temporary.path).with_context(|| format!("creating {}", temporary.path.display()))?;
        Ok(temporary)
    }

    fn beside(target: &Path) -> Result<Temporary> {
        // A link stays: what it leads to is replaced.
        let target = target.canonicalize().unwrap_or_else(|_| target.to_path_buf());
        let mut temporary = Temporary { path: unique_beside(&target, "tmp")?, made: Vec::new(), target };
        let parent = parent_of(&temporary.target);
        let missing: Vec<&Path> = parent.ancestors().take_while(|p| !p.as_os_str().is_empty() && !p.exists()).collect();
        for dir in missing.into_iter().rev() {
            match fs::create_dir(dir) {
                Ok(()) => temporary.made.push(dir.to_path_buf()),
                // Another conversion has made it meanwhile.
                Err(_) if dir.is_dir() => {}
                Err(e) => return Err(e).with_context(|| format!("creating {}", dir.display())),
            }
        }
        Ok(temporary)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives it the final name. A folder that is there by then is replaced if `may_replace` agrees.
    ///
    /// # Errors
    /// Whatever the file system or `may_replace` reports; what was there before stays then.
    pub fn publish(mut self, may_replace: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let at = || format!("renaming {} to {}", self.path.display(), self.target.display());
        let renamed = match self.target.is_dir() {
            true => Err(io::ErrorKind::AlreadyExists.into()),
            false => fs::rename(&self.path, &self.target),
        };
        match renamed {
            Ok(()) => {}
            // Another conversion may have ended since the look at the target.
            Err(_) if self.target.is_dir() && self.path.is_dir() => {
                may_replace(&self.target)?;
                if !exchange(&self.path, &self.target).with_context(at)? {
                    rename_twice(&self.path, &self.target).with_context(at)?;
                }
            }
            Err(e) => return Err(e).with_context(at),
        }
        self.made.clear();
        // What is under the temporary name now, if anything is, is the folder that was replaced: it goes with this value.
        sync_dir(&parent_of(&self.target))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = match self.path.is_dir() {
            true => fs::remove_dir_all(&self.path),
            false => fs::remove_file(&self.path),
        };
        for dir in self.made.iter().rev() {
            let _ = fs::remove_dir(dir);
        }
    }
}

/// Two names change places in one step; `false` where the system cannot do that.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn exchange(a: &Path, b: &Path) -> io::Result<bool> {
    use nix::errno::Errno;
    use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
    match renameat2(AT_FDCWD, a, AT_FDCWD, b, RenameFlags::RENAME_EXCHANGE) {
        Ok(()) => Ok(true),
        Err(Errno::EINVAL | Errno::ENOSYS | Errno::EOPNOTSUPP) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn exchange(_: &Path, _: &Path) -> io::Result<bool> {
    Ok(false)
}

/// The same in two steps: the old folder is moved aside, and back if the new one cannot take its place. A process that ends between the
/// two leaves what [`recover`] finds.
fn rename_twice(path: &Path, target: &Path) -> Result<()> {
    let old = unique_beside(target, OLD)?;
    fs::rename(target, &old)?;
    if let Err(e) = fs::rename(path, target) {
        fs::rename(&old, target).with_context(|| format!("{} is now {}", target.display(), old.display()))?;
        return Err(e.into());
    }
    fs::remove_dir_all(&old).with_context(|| format!("removing {}", old.display()))
}

/// Puts a folder back that a process moved aside and then was killed; returns the name that it had.
///
/// # Errors
/// Whatever the file system reports.
pub fn recover(target: &Path) -> Result<Option<PathBuf>> {
    let parent = parent_of(target);
    if target.symlink_metadata().is_ok() || !parent.is_dir() {
        return Ok(None);
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(&parent).with_context(|| format!("listing {}", parent.display()))? {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(|name| is_unique_beside(name, target, OLD)) {
            found.push((entry.metadata()?.modified()?, entry.path()));
        }
    }
    let Some((_, newest)) = found.into_iter().max() else { return Ok(None) };
    fs::rename(&newest, target).with_context(|| format!("renaming {} to {}", newest.display(), target.display()))?;
    Ok(Some(newest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::files::tests::names;

    fn folder(target: &Path, text: &str) -> Temporary {
        let temporary = Temporary::folder(target).unwrap();
        fs::write(temporary.path().join("model"), text).unwrap();
        temporary
    }

    /// Of two at once the last one stays, whole, and neither harms the other or what else is there.
    #[test]
    fn two_to_one_target() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("m");
        fs::create_dir(dir.path().join(".m.tmp")).unwrap();
        let (one, two) = (folder(&target, "one"), folder(&target, "two"));
        one.publish(|_| panic!("nothing is there yet")).unwrap();
        two.publish(|_| Ok(())).unwrap();
        assert_eq!(fs::read(target.join("model")).unwrap(), b"two");
        let refused = folder(&target, "three").publish(|_| anyhow::bail!("it holds a thesis")).unwrap_err();
        assert!(refused.to_string().contains("thesis"));
        assert_eq!(fs::read(target.join("model")).unwrap(), b"two");
        assert_eq!(names(dir.path()), [".m.tmp", "m"]);

        let target = dir.path().join("m.elleci");
        let open = || Temporary::file(&target).unwrap();
        let ((one, mut to_one), (two, mut to_two)) = (open(), open());
        io::Write::write_all(&mut to_two, b"two").unwrap();
        io::Write::write_all(&mut to_one, b"one").unwrap();
        two.publish(|_| Ok(())).unwrap();
        one.publish(|_| Ok(())).unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"one");
        assert_eq!(names(dir.path()), [".m.tmp", "m", "m.elleci"]);
    }

    #[test]
    fn directories_that_were_made_go_with_what_failed() {
        let dir = tempfile::tempdir().unwrap();
        drop(folder(&dir.path().join("a/b/m"), "one"));
        assert!(names(dir.path()).is_empty());
        folder(&dir.path().join("a/b/m"), "one").publish(|_| Ok(())).unwrap();
        drop(folder(&dir.path().join("a/c/m"), "one"));
        assert_eq!(names(&dir.path().join("a")), ["b"]);
    }

    /// Where names cannot be exchanged, and a process is killed in between.
    #[test]
    fn a_folder_that_was_moved_aside_is_put_back() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("m");
        folder(&target, "one").publish(|_| Ok(())).unwrap();
        let two = folder(&target, "two");
        rename_twice(two.path(), &target).unwrap();
        drop(two);
        assert_eq!(fs::read(target.join("model")).unwrap(), b"two");
        assert_eq!((names(dir.path()), recover(&target).unwrap()), (vec!["m".into()], None));

        fs::create_dir(dir.path().join(".m.old")).unwrap();
        fs::rename(&target, unique_beside(&target, OLD).unwrap()).unwrap();
        assert!(recover(&target).unwrap().is_some());
        assert_eq!(fs::read(target.join("model")).unwrap(), b"two");
        assert_eq!(names(dir.path()), [".m.old", "m"]);
    }
}
