//! The cache folder: where it is, its lock, its stamps.
//!
//! Everything in it can be made again, so deleting it is always safe. One
//! process at a time changes it: whoever writes holds [`Cache::lock`]. Stamps
//! hold a digest of all that went into a result; an equal stamp means that
//! there is nothing to do.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use sha2::{Digest as _, Sha256};

#[derive(Clone)]
pub struct Cache {
    root: PathBuf,
}

/// Held while the cache is changed.
pub struct Guard(#[expect(dead_code, reason = "unlocks when it is closed")] File);

impl Cache {
    pub fn open() -> Result<Self> {
        let root = location()?;
        fs::create_dir_all(&root)
            .with_context(|| format!("cannot make the cache folder {}", root.display()))?;
        Ok(Self {
            root: root.canonicalize()?,
        })
    }

    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.root.join(name)
    }

    /// A folder of the cache, made if it is missing.
    pub fn dir(&self, name: impl AsRef<Path>) -> Result<PathBuf> {
        let dir = self.path(name);
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(dir)
    }

    pub fn lock(&self) -> Result<Guard> {
        let file = File::create(self.path("lock"))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                eprintln!("waiting for another cargo xtask to finish with the cache");
                file.lock()?;
            }
            Err(TryLockError::Error(error)) => return Err(error.into()),
        }
        Ok(Guard(file))
    }
}

fn location() -> Result<PathBuf> {
    let from = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(dir) = from("PRIVMEM_CACHE") {
        return Ok(PathBuf::from(dir));
    }
    if let Some(dir) = from("XDG_CACHE_HOME") {
        return Ok(Path::new(&dir).join("privmem"));
    }
    let home = from("HOME").context("neither PRIVMEM_CACHE nor HOME is set")?;
    Ok(Path::new(&home).join(".cache/privmem"))
}

/// A digest over named parts; each part carries its length, so that parts
/// cannot run into one another.
#[derive(Default)]
pub struct Stamp(Sha256);

impl Stamp {
    pub fn text(&mut self, text: impl AsRef<[u8]>) -> &mut Self {
        let text = text.as_ref();
        self.0.update((text.len() as u64).to_le_bytes());
        self.0.update(text);
        self
    }

    pub fn file(&mut self, path: &Path) -> Result<&mut Self> {
        let content = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(self.text(content))
    }

    pub fn finish(&self) -> String {
        let digest = self.0.clone().finalize();
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// True if `path` holds exactly `content`.
pub fn holds(path: &Path, content: impl AsRef<[u8]>) -> bool {
    fs::read(path).is_ok_and(|found| found == content.as_ref())
}

/// Writes a file only if that changes it: make and ninja look at times.
pub fn write_if_changed(path: &Path, content: impl AsRef<[u8]>) -> Result<()> {
    if holds(path, &content) {
        return Ok(());
    }
    replace(path, content)
}

/// Replaces a file at once, so that an interrupted run leaves the old or the
/// new content, never half of it.
pub fn replace(path: &Path, content: impl AsRef<[u8]>) -> Result<()> {
    let dir = path.parent().context("a file has a folder")?;
    fs::create_dir_all(dir)?;
    let mut file = tempfile::NamedTempFile::new_in(dir)?;
    std::io::Write::write_all(&mut file, content.as_ref())?;
    file.persist(path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(())
}

/// Removes a folder if it is there.
pub fn remove_dir(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_keep_parts_apart() {
        let joined = Stamp::default().text("ab").text("c").finish();
        let split = Stamp::default().text("a").text("bc").finish();
        assert_ne!(joined, split);
        assert_eq!(joined, Stamp::default().text("ab").text("c").finish());
    }

    #[test]
    fn unchanged_content_keeps_its_time() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("file");
        write_if_changed(&path, "one")?;
        let before = fs::metadata(&path)?.modified()?;
        write_if_changed(&path, "one")?;
        assert_eq!(fs::metadata(&path)?.modified()?, before);
        write_if_changed(&path, "two")?;
        assert!(holds(&path, "two"));
        Ok(())
    }
}
