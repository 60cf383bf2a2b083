//! Crates of which the binary must hold one version only.

use std::collections::BTreeMap;

/// Two versions of one of these mean two connection pools, two TLS stacks or two codecs.
const SINGLE: [&str; 4] = ["hyper", "reqwest", "rustls", "zstd"];

/// `lock` is the text of Cargo.lock, whose entries have a `name` line before a `version` line.
pub(crate) fn check(lock: &str) -> Vec<String> {
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut name = None;
    for line in lock.lines() {
        if let Some(value) = value_of(line, "name") {
            name = Some(value);
        } else if let (Some(version), Some(name)) = (value_of(line, "version"), name) {
            versions.entry(name).or_default().push(version);
        }
    }
    SINGLE
        .iter()
        .filter_map(
            |name| match versions.get(name).map_or(&[][..], Vec::as_slice) {
                [_] => None,
                found => Some(format!(
                    "Cargo.lock must have one {name}, but has {found:?}"
                )),
            },
        )
        .collect()
}

fn value_of<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    line.strip_prefix(key)?
        .strip_prefix(" = \"")?
        .strip_suffix('"')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lock(packages: &[(&str, &str)]) -> String {
        let entry = |(name, version): &(&str, &str)| {
            format!("[[package]]\nname = \"{name}\"\nversion = \"{version}\"\n\n")
        };
        packages.iter().map(entry).collect()
    }

    #[test]
    fn second_or_missing_version_is_refused() {
        let one_each = [
            ("hyper", "1.0.0"),
            ("reqwest", "0.13.0"),
            ("rustls", "0.23.0"),
        ];
        let zstd = [("zstd", "0.13.0"), ("zstd", "0.14.0")];

        let missing = check(&lock(&one_each));
        let twice = check(&lock(&[&one_each[..], &zstd[..]].concat()));
        let good = check(&lock(&[&one_each[..], &zstd[..1]].concat()));

        assert_eq!(missing, ["Cargo.lock must have one zstd, but has []"]);
        assert_eq!(
            twice,
            [r#"Cargo.lock must have one zstd, but has ["0.13.0", "0.14.0"]"#]
        );
        assert!(good.is_empty());
    }
}
