//! Which crate may use which: the layer table, and the purity of the lower layers.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::Deserialize;

use crate::process::{cargo, output};

/// What a member may depend on inside the workspace, tests included.
const LAYERS: &[(&str, &[&str])] = &[
    ("tinker-types", &[]),
    ("tinker-http", &["tinker-types"]),
    ("tinker-chat", &["tinker-types"]),
    ("tinker-engine", &["tinker-types"]),
    ("tinker-runs", &["tinker-types"]),
    ("tinker-api", &["tinker-http", "tinker-types"]),
    (
        "tinker-recipes",
        &["tinker-api", "tinker-chat", "tinker-runs", "tinker-types"],
    ),
    (
        "tinker-server",
        &[
            "tinker-chat",
            "tinker-engine",
            "tinker-runs",
            "tinker-types",
        ],
    ),
    (
        "tinker",
        &[
            "tinker-api",
            "tinker-chat",
            "tinker-recipes",
            "tinker-runs",
            "tinker-server",
            "tinker-types",
        ],
    ),
    (
        "tinker-contract",
        &[
            "tinker-api",
            "tinker-chat",
            "tinker-engine",
            "tinker-http",
            "tinker-recipes",
            "tinker-runs",
            "tinker-server",
            "tinker-types",
        ],
    ),
    (
        "examples",
        &[
            "tinker-api",
            "tinker-chat",
            // In tests: a server to run against.
            "tinker-contract",
            "tinker-recipes",
            "tinker-types",
        ],
    ),
    ("xtask", &[]),
];

/// What a member must not use from outside, with the reason; dev-dependencies are free.
const PURE: &[(&str, &[&str], &str)] = &[
    (
        "tinker-types",
        &["jiff", "reqwest", "tokio", "uuid"],
        "it has no IO, clock or runtime",
    ),
    ("tinker-chat", &["axum", "reqwest", "tokio"], "it is pure"),
    (
        "tinker-runs",
        &["axum", "reqwest", "tokio"],
        "it is a store without network or runtime",
    ),
    (
        "tinker-engine",
        &["axum", "reqwest", "tokenizers", "tokio"],
        "it sees tokens only",
    ),
    ("tinker-server", &["reqwest"], "it never calls out"),
    ("tinker-api", &["reqwest"], "tinker-http owns the wire"),
    (
        "tinker-recipes",
        &["axum", "reqwest"],
        "tinker-http owns the wire",
    ),
];

#[derive(Debug, Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Debug, Deserialize)]
struct Package {
    name: String,
    dependencies: Vec<Dependency>,
}

#[derive(Debug, Deserialize)]
struct Dependency {
    name: String,
    /// `dev`, `build`, or absent for a normal one.
    kind: Option<String>,
    /// Present for workspace members.
    path: Option<String>,
}

pub(crate) fn check(root: &Path) -> Result<Vec<String>> {
    let text = output(&mut cargo(
        root,
        ["metadata", "--no-deps", "--format-version", "1"],
    ))?;
    let metadata: Metadata = serde_json::from_str(&text).context("cannot read cargo metadata")?;
    Ok(complaints(&metadata.packages))
}

fn complaints(packages: &[Package]) -> Vec<String> {
    packages
        .iter()
        .flat_map(|package| {
            let mut complaints = upward_edges(package);
            complaints.extend(impurities(package));
            complaints
        })
        .collect()
}

fn upward_edges(package: &Package) -> Vec<String> {
    let name = &package.name;
    let Some((_, allowed)) = LAYERS.iter().find(|(member, _)| member == name) else {
        return vec![format!(
            "crate {name} is not in the layer table of xtask/src/tidy/layers.rs"
        )];
    };
    let inside: BTreeSet<&str> = package
        .dependencies
        .iter()
        .filter(|dependency| dependency.path.is_some())
        .map(|dependency| dependency.name.as_str())
        .collect();
    inside
        .into_iter()
        .filter(|dependency| !allowed.contains(dependency))
        .map(|dependency| format!("crate {name} must not depend on {dependency} (layer table)"))
        .collect()
}

fn impurities(package: &Package) -> Vec<String> {
    let name = &package.name;
    let used = |other: &str| {
        let shipped = |d: &&Dependency| d.name == other && d.kind.as_deref() != Some("dev");
        package.dependencies.iter().find(shipped).is_some()
    };
    PURE.iter()
        .filter(|(member, ..)| member == name)
        .flat_map(|(_, banned, reason)| banned.iter().map(move |other| (other, reason)))
        .filter(|(other, _)| used(other))
        .map(|(other, reason)| format!("crate {name} must not use {other}: {reason}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, dependencies: &[(&str, Option<&str>, bool)]) -> Package {
        let dependency = |(name, kind, inside): &(&str, Option<&str>, bool)| Dependency {
            name: (*name).into(),
            kind: kind.map(Into::into),
            path: inside.then(|| format!("/crates/{name}")),
        };
        Package {
            name: name.into(),
            dependencies: dependencies.iter().map(dependency).collect(),
        }
    }

    #[test]
    fn upward_edge_is_refused_even_for_tests() {
        let server = package("tinker-server", &[("tinker-api", Some("dev"), true)]);

        assert_eq!(
            complaints(&[server]),
            ["crate tinker-server must not depend on tinker-api (layer table)"]
        );
    }

    #[test]
    fn unlisted_crate_is_refused() {
        let complaints = complaints(&[package("tinker-extra", &[])]);

        assert_eq!(complaints.len(), 1);
        assert!(complaints[0].starts_with("crate tinker-extra is not in the layer table"));
    }

    #[test]
    fn runtime_is_refused_in_types_but_not_in_its_tests() {
        let impure = package("tinker-types", &[("tokio", None, false)]);
        let tested = package("tinker-types", &[("tokio", Some("dev"), false)]);

        assert_eq!(
            complaints(&[impure, tested]),
            ["crate tinker-types must not use tokio: it has no IO, clock or runtime"]
        );
    }
}
