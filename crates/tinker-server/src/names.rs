//! Ids and checkpoint names as file names: readable, and different names stay different.

/// A file name for an id such as `S1:train:0`: `:` becomes `_`, other unsafe bytes `%XX`.
pub(crate) fn safe_id(id: &str) -> String {
    escape(id, |c| match c {
        ':' => Some('_'),
        '_' => None,
        c if is_plain(c) => Some(c),
        _ => None,
    })
}

/// A file name for a checkpoint name: unsafe bytes become `%XX`.
pub(crate) fn safe_name(name: &str) -> String {
    escape(name, |c| (c == '_' || is_plain(c)).then_some(c))
}

fn is_plain(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '.')
}

fn escape(text: &str, keep: impl Fn(char) -> Option<char>) -> String {
    let mut name = String::with_capacity(text.len());
    for (i, c) in text.char_indices() {
        match keep(c) {
            // A leading dot would hide the file or mean a parent directory.
            Some(c) if c != '.' || i > 0 => name.push(c),
            _ => {
                let mut bytes = [0; 4];
                for byte in c.encode_utf8(&mut bytes).bytes() {
                    name.push_str(&format!("%{byte:02X}"));
                }
            }
        }
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn ids_stay_readable() {
        assert_eq!(safe_id("9f2c-1:train:0"), "9f2c-1_train_0");
        assert_eq!(safe_name("step_0001.v2"), "step_0001.v2");
    }

    #[test]
    fn nothing_leaves_the_directory() {
        for name in ["..", ".", "a/b", "a\\b", ".hidden", "C:x", "é"] {
            let safe = safe_name(name);
            assert!(
                !safe.starts_with('.') && !safe.contains(['/', '\\', ':']),
                "{safe}"
            );
        }
    }

    #[test]
    fn different_ids_get_different_names() {
        let ids = ["a:b", "a_b", "a%3Ab", "a%5Fb", ".a", "a.", "%2Ea"];
        let names: HashSet<String> = ids.iter().map(|id| safe_id(id)).collect();
        assert_eq!(names.len(), ids.len());
    }
}
