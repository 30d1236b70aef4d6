//! A source tree with our changes on top, kept fresh for incremental builds.
//!
//! The pristine tree is only read. What we add to it is worked out aside, each
//! patch on pristine files, and then brought into the work tree file by file:
//! a file whose content stays the same keeps its time, and one that no patch
//! touches any more goes back to what it was.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use tempfile::TempDir;
use walkdir::{DirEntry, WalkDir};

use crate::cache::{self, Stamp};

/// The files that differ from the pristine tree, by their place in it.
pub struct Overlay {
    files: BTreeMap<PathBuf, PathBuf>,
    #[expect(dead_code, reason = "removes the patched copies when dropped")]
    aside: TempDir,
}

/// A patch, and the new files that come with it, by their place in the tree.
pub struct Step {
    pub patch: PathBuf,
    additions: BTreeMap<PathBuf, PathBuf>,
}

/// The steps of a series in the order in which they apply. A new file below
/// `files`, if there are any, comes with the first patch that names it, so that every part of the
/// series has the files that it builds; one that none names, with the last.
pub fn series(dir: &Path, files: Option<&Path>) -> Result<Vec<Step>> {
    let text = read(&dir.join("series"))?;
    let mut left = files.map(additions).transpose()?.unwrap_or_default();
    let mut steps = Vec::new();
    for name in names(&text) {
        let patch = dir.join(name);
        let named = named(&read(&patch)?);
        let comes = |path: &Path| named.contains(path) || named.contains(&path.with_extension(""));
        let (additions, rest) = left.into_iter().partition(|(path, _)| comes(path));
        left = rest;
        steps.push(Step { patch, additions });
    }
    if let Some(last) = steps.last_mut() {
        last.additions.append(&mut left);
    }
    Ok(steps)
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

fn additions(files: &Path) -> Result<BTreeMap<PathBuf, PathBuf>> {
    let mut found = BTreeMap::new();
    for entry in walk(files) {
        let entry = entry?;
        if entry.file_type().is_file() {
            let path = entry.path().strip_prefix(files)?.to_owned();
            found.insert(path, entry.into_path());
        }
    }
    Ok(found)
}

/// The paths that the lines which a patch adds may name, without a suffix where
/// those have none. A name is what stands in quotes, as Meson, C and QAPI have
/// it, or alone, as documents list others. It is of the folder of the file that
/// names it, or a header's. A patch's message names files by their whole paths.
fn named(patch: &str) -> BTreeSet<PathBuf> {
    let message = patch.split("diff --git ").next().unwrap_or_default();
    let mut dir = Path::new("");
    let mut found: BTreeSet<_> = message
        .split_whitespace()
        .map(|word| PathBuf::from(word.trim_end_matches(['.', ','])))
        .collect();
    for line in patch.lines() {
        if let Some(path) = line.strip_prefix("+++ b/") {
            dir = Path::new(path).parent().unwrap_or(dir);
        } else if let Some(line) = line.strip_prefix('+') {
            let quoted = ['\'', '"'].map(|quote| line.split(quote).skip(1).step_by(2));
            let words = quoted.into_iter().flatten().chain([line.trim()]);
            for word in words.filter(|word| !word.is_empty()) {
                found.extend([dir.join(word), Path::new("include").join(word)]);
            }
        }
    }
    found
}

fn names(series: &str) -> impl Iterator<Item = &str> {
    series
        .lines()
        .map(|line| line.split('#').next().unwrap_or_default().trim())
        .filter(|name| !name.is_empty())
}

impl Overlay {
    /// Applies the patches to copies of the files they touch, and adds the new
    /// files that come with them. A patch must fit as it is, without fuzz.
    pub fn new(pristine: &Path, series: &[Step]) -> Result<Self> {
        let aside = tempfile::tempdir()?;
        let mut files = BTreeMap::new();
        for step in series {
            for path in touched(&read(&step.patch)?) {
                let copy = aside.path().join(&path);
                if !copy.exists() && pristine.join(&path).exists() {
                    create_parent(&copy)?;
                    fs::copy(pristine.join(&path), &copy)?;
                }
                files.insert(path, copy);
            }
            apply(&step.patch, aside.path())?;
            files.extend(step.additions.clone());
        }
        Ok(Self { files, aside })
    }

    /// The way from an earlier part of the same series to this one, in git's
    /// format and with the context that people are used to.
    pub fn since(&self, before: &Self, pristine: &Path) -> Result<String> {
        let mut text = String::new();
        for (path, new) in &self.files {
            let earlier = before.files.get(path).cloned();
            let old = earlier.unwrap_or_else(|| pristine.join(path));
            text += &difference(&path.display().to_string(), &old, new)?;
        }
        Ok(text)
    }

    pub fn stamp(&self, stamp: &mut Stamp) -> Result<()> {
        for (path, content) in &self.files {
            stamp
                .text(path.as_os_str().as_encoded_bytes())
                .file(content)?;
        }
        Ok(())
    }
}

fn difference(path: &str, old: &Path, new: &Path) -> Result<String> {
    let (from, mode) = match old.exists() {
        true => (format!("a/{path}"), ""),
        false => ("/dev/null".to_owned(), "new file mode 100644\n"),
    };
    let output = Command::new("diff")
        .args(["-uN", "--label", &from, "--label", &format!("b/{path}")])
        .args([old, new])
        .output()
        .context("cannot run diff")?;
    let text = String::from_utf8_lossy(&output.stdout);
    match output.status.code() {
        Some(0) => Ok(String::new()),
        Some(1) => Ok(format!("diff --git a/{path} b/{path}\n{mode}{text}")),
        _ => bail!("diff: {}", String::from_utf8_lossy(&output.stderr).trim()),
    }
}

/// The paths that a git-format patch with prefixes a/ and b/ changes.
fn touched(patch: &str) -> BTreeSet<PathBuf> {
    let lines: Vec<&str> = patch.lines().collect();
    lines
        .windows(2)
        .filter_map(|pair| Some((pair[0].strip_prefix("--- ")?, pair[1].strip_prefix("+++ ")?)))
        .flat_map(|(old, new)| [old.strip_prefix("a/"), new.strip_prefix("b/")])
        .flatten()
        .map(|path| PathBuf::from(path.split('\t').next().unwrap_or(path)))
        .collect()
}

fn apply(patch: &Path, dir: &Path) -> Result<()> {
    let output = Command::new("patch")
        .args([
            "-p1",
            "--fuzz=0",
            "--force",
            "--no-backup-if-mismatch",
            "--reject-file=-",
        ])
        .arg("-i")
        .arg(patch)
        .arg("-d")
        .arg(dir)
        .stdin(Stdio::null())
        .output()
        .context("cannot run patch")?;
    if !output.status.success() {
        bail!(
            "{} does not apply to this tree:\n{}",
            patch.display(),
            String::from_utf8_lossy(&output.stdout).trim_end()
        );
    }
    Ok(())
}

/// Makes `work` the pristine tree with the overlay on top. Files that neither
/// has, such as what a build left there, stay.
pub fn sync(pristine: &Path, overlay: &Overlay, work: &Path, manifest: &Path) -> Result<()> {
    let before: Option<BTreeSet<PathBuf>> = fs::read(manifest)
        .ok()
        .and_then(|text| serde_json::from_slice(&text).ok());
    let mut present = BTreeSet::new();
    fs::create_dir_all(work)?;
    for entry in walk(pristine) {
        let entry = entry?;
        let path = entry.path().strip_prefix(pristine)?.to_owned();
        let target = work.join(&path);
        if entry.file_type().is_dir() {
            fs::create_dir_all(&target)?;
            continue;
        }
        if !overlay.files.contains_key(&path) {
            bring(entry.path(), &target, before.is_none())?;
        }
        present.insert(path);
    }
    for (path, content) in &overlay.files {
        create_parent(&work.join(path))?;
        bring(content, &work.join(path), false)?;
        present.insert(path.clone());
    }
    for gone in before
        .iter()
        .flatten()
        .filter(|path| !present.contains(*path))
    {
        fs::remove_file(work.join(gone)).ok();
    }
    cache::replace(manifest, serde_json::to_vec(&present)?)
}

/// A digest of the tree by names, sizes and times: quick, and enough to see
/// that the user worked on it.
pub fn fingerprint(tree: &Path) -> Result<String> {
    let mut stamp = Stamp::default();
    for entry in walk(tree) {
        let entry = entry?;
        let metadata = entry.metadata()?;
        if metadata.is_file() {
            let time = metadata.modified()?.duration_since(std::time::UNIX_EPOCH)?;
            stamp
                .text(entry.path().as_os_str().as_encoded_bytes())
                .text(metadata.len().to_le_bytes())
                .text(time.as_nanos().to_le_bytes());
        }
    }
    Ok(stamp.finish())
}

/// Everything in a tree but version control and build folders, sorted.
fn walk(tree: &Path) -> impl Iterator<Item = walkdir::Result<DirEntry>> {
    WalkDir::new(tree)
        .min_depth(1)
        .sort_by_file_name()
        .into_iter()
        .filter_entry(|entry| {
            entry.file_name() != ".git" && !entry.path().join("build.ninja").exists()
        })
}

/// Copies a file if the content differs. A first copy keeps the file's time,
/// so that the next comparison need not read it; a later change is as new as
/// it looks to ninja.
fn bring(from: &Path, to: &Path, first: bool) -> Result<()> {
    let metadata = fs::symlink_metadata(from)?;
    if metadata.is_symlink() {
        return bring_link(from, to);
    }
    if let Ok(found) = fs::symlink_metadata(to) {
        let same_time = found.modified()? == metadata.modified()?;
        let same_size = found.len() == metadata.len();
        if same_size && (same_time || fs::read(from)? == fs::read(to)?) {
            return Ok(());
        }
        fs::remove_file(to)?;
    }
    fs::copy(from, to).with_context(|| format!("cannot write {}", to.display()))?;
    if first {
        File::open(to)?.set_modified(metadata.modified()?)?;
    }
    Ok(())
}

fn bring_link(from: &Path, to: &Path) -> Result<()> {
    let target = fs::read_link(from)?;
    if fs::read_link(to).is_ok_and(|found| found == target) {
        return Ok(());
    }
    fs::remove_file(to).ok();
    symlink(target, to).with_context(|| format!("cannot link {}", to.display()))
}

fn create_parent(path: &Path) -> Result<()> {
    fs::create_dir_all(path.parent().context("a file has a folder")?)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATCH: &str = "Subject: say two\n---\n hello | 2 +-\n\n\
                         diff --git a/hello b/hello\n--- a/hello\n+++ b/hello\n\
                         @@ -1,3 +1,3 @@\n above\n-one\n+say 'new/two'\n below\n";
    const PATCHED: &str = "above\nsay 'new/two'\nbelow\n";

    fn project() -> Result<TempDir> {
        let dir = tempfile::tempdir()?;
        for sub in ["pristine/sub", "files/new"] {
            fs::create_dir_all(dir.path().join(sub))?;
        }
        fs::write(dir.path().join("pristine/hello"), "above\none\nbelow\n")?;
        fs::write(dir.path().join("pristine/sub/other"), "other\n")?;
        fs::write(dir.path().join("files/new/two.c"), "new\n")?;
        fs::write(dir.path().join("say-two.patch"), PATCH)?;
        fs::write(dir.path().join("series"), "say-two.patch\n")?;
        Ok(dir)
    }

    fn bring_up(dir: &Path) -> Result<()> {
        let pristine = dir.join("pristine");
        let overlay = Overlay::new(&pristine, &series(dir, Some(&dir.join("files")))?)?;
        sync(
            &pristine,
            &overlay,
            &dir.join("work"),
            &dir.join("manifest"),
        )
    }

    #[test]
    fn series_files_may_carry_comments() {
        let text = "# why\n0001-a.patch\n\n0002-b.patch # note\n";
        assert_eq!(
            names(text).collect::<Vec<_>>(),
            ["0001-a.patch", "0002-b.patch"]
        );
    }

    #[test]
    fn new_files_come_with_the_patch_that_names_them() -> Result<()> {
        let dir = project()?;
        let files = dir.path().join("files");
        let steps = series(dir.path(), Some(&files))?;
        let of = |step: &Step| step.additions.keys().cloned().collect::<Vec<_>>();
        assert_eq!(
            steps.iter().map(of).collect::<Vec<_>>(),
            [[PathBuf::from("new/two.c")]]
        );
        let patch = "Adds t/test_y.py.\ndiff --git x\n+++ b/qapi/x.json\n+{ 'include': 'y.json' }\n-'gone'\n\
                     +++ b/docs/index.rst\n+   y\n+++ b/a.c\n+#include \"s/y.h\"\n+ of ''\n";
        let found = named(patch);
        for path in ["qapi/y.json", "docs/y", "include/s/y.h", "t/test_y.py"] {
            assert!(found.contains(Path::new(path)), "{path}");
        }
        for path in ["qapi/gone", "docs/y.json", "system/y", ""] {
            assert!(!found.contains(Path::new(path)), "{path}");
        }

        fs::write(files.join("stray"), "")?;
        let steps = series(dir.path(), Some(&files))?;
        assert!(steps[0].additions.contains_key(Path::new("stray")));
        Ok(())
    }

    #[test]
    fn a_step_is_shown_as_git_shows_it() -> Result<()> {
        let dir = project()?;
        let pristine = dir.path().join("pristine");
        let steps = series(dir.path(), Some(&dir.path().join("files")))?;
        let none = Overlay::new(&pristine, &[])?;
        let all = Overlay::new(&pristine, &steps)?;
        let shown = all.since(&none, &pristine)?;
        let new = "diff --git a/new/two.c b/new/two.c\nnew file mode 100644\n\
                   --- /dev/null\n+++ b/new/two.c\n@@ -0,0 +1 @@\n+new\n";
        let (_, changed) = PATCH.split_once("\n\n").unwrap_or_default();
        assert_eq!(shown, format!("{changed}{new}"));
        assert_eq!(all.since(&all, &pristine)?, "");
        Ok(())
    }

    #[test]
    fn patches_say_what_they_touch() {
        let added = "--- /dev/null\n+++ b/x/new\n@@ -0,0 +1 @@\n+--- a/decoy\n";
        assert_eq!(touched(PATCH), BTreeSet::from(["hello".into()]));
        assert_eq!(touched(added), BTreeSet::from(["x/new".into()]));
    }

    #[test]
    fn changes_come_and_go_and_leave_the_rest_alone() -> Result<()> {
        let dir = project()?;
        let work = dir.path().join("work");
        bring_up(dir.path())?;
        assert_eq!(fs::read_to_string(work.join("hello"))?, PATCHED);
        assert_eq!(fs::read_to_string(work.join("new/two.c"))?, "new\n");
        let time = |name: &str| -> Result<_> { Ok(fs::metadata(work.join(name))?.modified()?) };
        let (patched, other) = (time("hello")?, time("sub/other")?);

        bring_up(dir.path())?;
        assert_eq!((time("hello")?, time("sub/other")?), (patched, other));

        fs::remove_file(dir.path().join("files/new/two.c"))?;
        fs::write(dir.path().join("series"), "")?;
        bring_up(dir.path())?;
        assert_eq!(
            fs::read_to_string(work.join("hello"))?,
            "above\none\nbelow\n"
        );
        assert!(
            time("hello")? > patched,
            "ninja must see that it changed back"
        );
        assert_eq!(time("sub/other")?, other);
        assert!(!work.join("new/two.c").exists());
        Ok(())
    }

    #[test]
    fn a_patch_that_needs_fuzz_is_refused_by_name() -> Result<()> {
        let dir = project()?;
        fs::write(dir.path().join("pristine/hello"), "changed\none\nbelow\n")?;
        let error = bring_up(dir.path()).unwrap_err();
        assert!(
            error.to_string().contains("say-two.patch does not apply"),
            "{error}"
        );
        Ok(())
    }
}
