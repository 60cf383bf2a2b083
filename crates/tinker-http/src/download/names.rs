//! Names that others chose for files, made harmless or refused.

use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};

/// Most bytes of a name, and of each of its parts.
const MAX_NAME_BYTES: usize = 1024;
const MAX_PART_BYTES: usize = 200;
/// Most folders above a file.
const MAX_DEPTH: usize = 16;

/// The path below a folder that a name stands for. `./` before and within is ignored.
///
/// # Errors
/// If the name is absolute, climbs with `..`, is empty or too long, or holds what means something
/// else on another system: a backslash, a colon, a control character.
pub(super) fn safe_path(name: &str) -> Result<PathBuf> {
    let fault = |why: &str| {
        let shown: String = name.chars().take(100).collect();
        Err(Error::new(
            ErrorKind::Untrusted,
            format!("file name {shown:?} {why}"),
        ))
    };
    if name.len() > MAX_NAME_BYTES {
        return fault("is too long");
    }
    if name.starts_with('/') {
        return fault("is absolute");
    }
    if name.contains(['\\', ':']) || name.chars().any(char::is_control) {
        return fault("holds a character that is not safe in a name");
    }
    let mut path = PathBuf::new();
    let mut depth = 0;
    for part in name.split('/').filter(|part| !matches!(*part, "" | ".")) {
        if part == ".." {
            return fault("climbs out of its folder");
        }
        if part.len() > MAX_PART_BYTES {
            return fault("is too long");
        }
        path.push(part);
        depth += 1;
    }
    match depth {
        0 => fault("is empty"),
        depth if depth > MAX_DEPTH => fault("is too deep"),
        _ => Ok(path),
    }
}

/// A path as manifests spell it: with slashes on every system.
pub(super) fn spelled(path: &Path) -> String {
    let parts: Vec<_> = path
        .components()
        .map(|part| part.as_os_str().to_string_lossy())
        .collect();
    parts.join("/")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn harmless_names_stay_below_their_folder() {
        for (name, expected) in [
            ("adapter.bin", "adapter.bin"),
            ("./a/b.bin", "a/b.bin"),
            ("a//b/./c", "a/b/c"),
            ("..a/b..", "..a/b.."),
        ] {
            assert_eq!(spelled(&safe_path(name).unwrap()), expected);
        }
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for (name, why) in [
            ("/etc/passwd", "is absolute"),
            ("a/../../b", "climbs out of its folder"),
            ("..", "climbs out of its folder"),
            ("", "is empty"),
            ("./", "is empty"),
            ("C:\\x", "not safe"),
            ("a\\..\\b", "not safe"),
            ("a\0b", "not safe"),
            ("a\nb", "not safe"),
            (&"a/".repeat(40), "is too deep"),
            (&"a".repeat(300), "is too long"),
            (&"a".repeat(2000), "is too long"),
        ] {
            let error = safe_path(name).unwrap_err();
            assert_eq!(*error.kind(), ErrorKind::Untrusted);
            assert!(error.message().contains(why), "{error}");
        }
    }

    proptest! {
        #[test]
        fn no_name_leads_out_of_its_folder(name in "[./a\\\\:]{0,12}|\\PC*") {
            if let Ok(path) = safe_path(&name) {
                prop_assert!(path.components().all(|c| matches!(c, std::path::Component::Normal(_))));
                prop_assert!(path.components().count() >= 1);
            }
        }
    }
}
