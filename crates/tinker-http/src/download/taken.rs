//! The names that are taken below a folder, so that no two files meet in one. Pure.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use icu_normalizer::DecomposingNormalizerBorrowed;

use super::manifest::MANIFEST;
use super::names::safe_path;
use crate::error::{Error, ErrorKind, Result};

/// Names that have been given out below a folder, where the manifest is to be as well. Two names
/// that some system takes for one count as one: they differ in `./`, in case, in the normal form of
/// Unicode, or in dots and spaces at the end of a part.
#[derive(Debug)]
pub(super) struct Taken {
    /// Who gives the names, as in "the archive holds".
    who: &'static str,
    root: Folder,
}

/// What stands in a folder, by folded name.
type Folder = BTreeMap<String, Node>;

#[derive(Debug)]
enum Node {
    /// Where the sums are written.
    Manifest,
    /// A file, by the name that was given.
    File(String),
    /// A folder, with the first name that needed it.
    Folder(String, Folder),
}

impl Taken {
    /// Nothing but the manifest's name; `who` gives the others, as in "the archive holds".
    pub(super) fn new(who: &'static str) -> Self {
        Self {
            who,
            root: [(folded(MANIFEST.as_ref()), Node::Manifest)].into(),
        }
    }

    /// The path below the folder for a file called `name`.
    ///
    /// # Errors
    /// Of kind `Untrusted` if the name is not safe, or stands for what another name does; the error
    /// gives both.
    pub(super) fn file(&mut self, name: &str) -> Result<PathBuf> {
        let path = safe_path(name)?;
        let parent = path.parent().unwrap_or(Path::new(""));
        let folder = enter(&mut self.root, parent, name, self.who)?;
        let key = folded(path.file_name().unwrap_or_default());
        match folder.entry(key) {
            Entry::Vacant(place) => place.insert(Node::File(name.to_owned())),
            Entry::Occupied(node) => return Err(collision(self.who, name, false, node.get())),
        };
        Ok(path)
    }

    /// The path below the folder for a folder called `name`, which may be there already.
    ///
    /// # Errors
    /// As [`file`](Self::file).
    pub(super) fn folder(&mut self, name: &str) -> Result<PathBuf> {
        let path = safe_path(name)?;
        enter(&mut self.root, &path, name, self.who)?;
        Ok(path)
    }
}

/// The folder at `path`, made where it is missing because `name` needs it.
fn enter<'a>(root: &'a mut Folder, path: &Path, name: &str, who: &str) -> Result<&'a mut Folder> {
    let mut folder = root;
    for part in path {
        let new = || Node::Folder(name.to_owned(), Folder::new());
        folder = match folder.entry(folded(part)).or_insert_with(new) {
            Node::Folder(_, inner) => inner,
            node => return Err(collision(who, name, true, node)),
        };
    }
    Ok(folder)
}

/// A part of a path as systems read it that care neither for case (NTFS, APFS), nor for how a letter
/// with a mark is composed (APFS), nor for dots and spaces at its end (Windows).
fn folded(part: &OsStr) -> String {
    let part = part.to_string_lossy();
    let part = DecomposingNormalizerBorrowed::new_nfd().normalize(&part);
    let part = part.to_lowercase();
    part.trim_end_matches(['.', ' ']).to_owned()
}

fn collision(who: &str, name: &str, needs_folder: bool, node: &Node) -> Error {
    let text = match node {
        Node::Manifest => {
            format!("{who} {name:?}, but {MANIFEST} is where the sums of the files are written")
        }
        Node::File(other) if needs_folder => {
            format!("{who} {name:?} below {other:?}, which is a file")
        }
        Node::Folder(other, _) => format!("{who} {other:?} below {name:?}, which is a file"),
        Node::File(other) if other == name => format!("{who} {name:?} twice"),
        Node::File(other) => format!("{who} two files of one name: {other:?} and {name:?}"),
    };
    Error::new(ErrorKind::Untrusted, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is said to the last of `names`, the ones before being free. Names with a slash at their
    /// end are folders.
    fn last(names: &[&str]) -> Result<PathBuf> {
        let mut taken = Taken::new("somebody offers");
        let mut take = |name: &str| match name.strip_suffix('/') {
            Some(name) => taken.folder(name),
            None => taken.file(name),
        };
        let (last, before) = names.split_last().unwrap();
        for name in before {
            take(name).unwrap();
        }
        take(last)
    }

    #[test]
    fn names_of_one_place_are_refused_and_both_are_told() {
        for (names, expected) in [
            (&["a", "a"][..], "\"a\" twice"),
            (
                &["a/b", "a//b"],
                "two files of one name: \"a/b\" and \"a//b\"",
            ),
            (&["./a", "a"], "two files of one name: \"./a\" and \"a\""),
            (
                &["A/b.bin", "a/B.bin"],
                "two files of one name: \"A/b.bin\" and \"a/B.bin\"",
            ),
            (&["Ä", "ä"], "two files of one name: \"Ä\" and \"ä\""),
            // Composed, and a letter with its mark; in case as well.
            (
                &["\u{e4}", "a\u{308}"],
                "two files of one name: \"\u{e4}\" and \"a\\u{308}\"",
            ),
            (
                &["A\u{308}/b", "\u{e4}"],
                "\"A\\u{308}/b\" below \"\u{e4}\", which is a file",
            ),
            (
                &["a/b.", "a./b "],
                "two files of one name: \"a/b.\" and \"a./b \"",
            ),
            (&["a", "A/b"], "\"A/b\" below \"a\", which is a file"),
            (&["a/b/c", "a"], "\"a/b/c\" below \"a\", which is a file"),
            (&["a/", "A"], "\"a\" below \"A\", which is a file"),
            (&["a", "A/"], "\"A\" below \"a\", which is a file"),
        ] {
            let error = last(names).unwrap_err();
            assert_eq!(*error.kind(), ErrorKind::Untrusted);
            assert_eq!(error.message(), format!("somebody offers {expected}"));
        }
    }

    #[test]
    fn the_manifest_has_its_place_to_itself() {
        for name in [MANIFEST, "./sha256sums", "SHA256SUMS/a", "Sha256Sums/"] {
            let error = last(&[name]).unwrap_err();
            let text = error.message();
            assert!(text.ends_with("SHA256SUMS is where the sums of the files are written"));
            assert!(text.contains(name.trim_end_matches('/')), "{text}");
        }
    }

    #[test]
    fn names_of_different_places_are_free() {
        for names in [
            &["a", "b"][..],
            &["a/b", "b/a", "a/a"],
            &["a/", "a/", "A/b"],
            &["sub/SHA256SUMS"],
            &["a.", "a.b"],
        ] {
            last(names).unwrap();
        }
    }
}
