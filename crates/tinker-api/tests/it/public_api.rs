//! The public surface of the crate, read from its source and compared with
//! `docs/reference/tinker-api.txt`: a change of the surface is a change of that file.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use quote::ToTokens;
use syn::{Attribute, Fields, ImplItem, Item, ItemImpl, UseTree, Visibility};

/// A module: its path below the crate and its items.
struct Module {
    path: String,
    is_public: bool,
    items: Vec<Item>,
}

#[test]
#[expect(
    clippy::disallowed_methods,
    reason = "writes the reference anew when asked to"
)]
fn the_public_surface_is_the_recorded_one() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let surface = surface(&modules(&source));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/reference/tinker-api.txt");
    if std::env::var_os("UPDATE_REFERENCE").is_some() {
        std::fs::write(&path, &surface).unwrap();
    }

    let recorded = std::fs::read_to_string(&path).unwrap();

    let lines = |text: &str| -> BTreeSet<String> { text.lines().map(str::to_owned).collect() };
    let (now, then) = (lines(&surface), lines(&recorded));
    assert!(
        surface == recorded,
        "the public surface has changed; if that is meant, write it anew with UPDATE_REFERENCE=1 \
         cargo test -p tinker-api --test it public_api\nnew: {:#?}\ngone: {:#?}",
        now.difference(&then).collect::<Vec<_>>(),
        then.difference(&now).collect::<Vec<_>>(),
    );
}

/// Every module of the crate, its root first.
fn modules(source: &Path) -> Vec<Module> {
    let mut modules = Vec::new();
    let root = parse(&source.join("lib.rs"));
    collect(source, String::new(), true, root, &mut modules);
    modules
}

fn parse(path: &Path) -> Vec<Item> {
    let text =
        std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    syn::parse_file(&text).unwrap().items
}

fn collect(
    folder: &Path,
    path: String,
    is_public: bool,
    items: Vec<Item>,
    modules: &mut Vec<Module>,
) {
    for item in &items {
        let Item::Mod(module) = item else { continue };
        if is_for_tests(&module.attrs) || module.content.is_some() {
            continue;
        }
        let name = module.ident.to_string();
        let flat = folder.join(format!("{name}.rs"));
        let file: PathBuf = match flat.is_file() {
            true => flat,
            false => folder.join(&name).join("mod.rs"),
        };
        let is_public = is_public && is_pub(&module.vis);
        let below = format!("{path}{name}::");
        collect(&folder.join(name), below, is_public, parse(&file), modules);
    }
    modules.push(Module {
        path,
        is_public,
        items,
    });
}

fn is_for_tests(attributes: &[Attribute]) -> bool {
    attributes
        .iter()
        .any(|attribute| text(attribute) == "#[cfg(test)]")
}

fn is_pub(visibility: &Visibility) -> bool {
    matches!(visibility, Visibility::Public(_))
}

/// One line for each public item, sorted.
fn surface(modules: &[Module]) -> String {
    let mut lines = BTreeSet::new();
    let mut shown = BTreeSet::new();
    for module in modules.iter().filter(|module| module.is_public) {
        for item in &module.items {
            if let Item::Use(item) = item
                && is_pub(&item.vis)
            {
                let mut names = Vec::new();
                leaves(&item.tree, String::new(), &mut names);
                for (from, name) in names {
                    lines.insert(format!("pub use {}{name} = {from}", module.path));
                    shown.insert(name);
                }
            }
            if let Some((name, _)) = describe(item) {
                shown.insert(name);
            }
        }
    }
    for module in modules {
        for item in &module.items {
            match item {
                Item::Impl(item) => lines.extend(of_impl(item, &shown)),
                item => match describe(item) {
                    Some((name, described)) if shown.contains(&name) => lines.extend(described),
                    _ => {}
                },
            }
        }
    }
    let mut page = String::new();
    for line in lines {
        page.push_str(&line);
        page.push('\n');
    }
    page
}

/// What a `use` brings in: where from, and the name it has here.
fn leaves(tree: &UseTree, from: String, names: &mut Vec<(String, String)>) {
    match tree {
        UseTree::Path(path) => leaves(&path.tree, format!("{from}{}::", path.ident), names),
        UseTree::Name(name) => {
            names.push((format!("{from}{}", name.ident), name.ident.to_string()))
        }
        UseTree::Rename(name) => {
            names.push((format!("{from}{}", name.ident), name.rename.to_string()));
        }
        UseTree::Glob(_) => names.push((format!("{from}*"), "*".to_owned())),
        UseTree::Group(group) => {
            for tree in &group.items {
                leaves(tree, from.clone(), names);
            }
        }
    }
}

/// The name of a public item and the lines that describe it.
fn describe(item: &Item) -> Option<(String, Vec<String>)> {
    match item {
        Item::Struct(item) if is_pub(&item.vis) => {
            let name = item.ident.to_string();
            let head = format!("pub struct {name}{}", text(&item.generics));
            let mut lines = vec![with_attributes(&item.attrs, head)];
            for field in &item.fields {
                if let (true, Some(field_name)) = (is_pub(&field.vis), &field.ident) {
                    lines.push(format!("pub {name}.{field_name}: {}", text(&field.ty)));
                }
            }
            Some((name, lines))
        }
        Item::Enum(item) if is_pub(&item.vis) => {
            let name = item.ident.to_string();
            let head = format!("pub enum {name}{}", text(&item.generics));
            let mut lines = vec![with_attributes(&item.attrs, head)];
            for variant in &item.variants {
                lines.push(format!(
                    "pub {name}::{}{}",
                    variant.ident,
                    fields(&variant.fields)
                ));
            }
            Some((name, lines))
        }
        Item::Trait(item) if is_pub(&item.vis) => {
            let name = item.ident.to_string();
            let mut lines = vec![format!("pub trait {name}{}", text(&item.generics))];
            for member in &item.items {
                if let syn::TraitItem::Fn(member) = member {
                    lines.push(format!("pub trait {name}: {}", text(&member.sig)));
                }
            }
            Some((name, lines))
        }
        Item::Fn(item) if is_pub(&item.vis) => Some((
            item.sig.ident.to_string(),
            vec![format!("pub {}", text(&item.sig))],
        )),
        Item::Const(item) if is_pub(&item.vis) => {
            let line = format!("pub const {}: {}", item.ident, text(&item.ty));
            Some((item.ident.to_string(), vec![line]))
        }
        Item::Type(item) if is_pub(&item.vis) => {
            let (name, generics) = (&item.ident, text(&item.generics));
            let line = format!("pub type {name}{generics} = {}", text(&item.ty));
            Some((name.to_string(), vec![line]))
        }
        _ => None,
    }
}

/// A type's first line, with what is derived for it and whether it may grow.
fn with_attributes(attributes: &[Attribute], head: String) -> String {
    let mut line = head;
    for attribute in attributes {
        let text = text(attribute);
        if let Some(derived) = text.strip_prefix("#[derive") {
            line.push_str(&format!(" {}", derived.trim_end_matches(']')));
        } else if attribute.path().is_ident("non_exhaustive") {
            line.push_str(" (non-exhaustive)");
        }
    }
    line
}

/// The fields of a variant.
fn fields(fields: &Fields) -> String {
    let types = fields.iter().map(|field| match &field.ident {
        Some(name) => format!("{name}: {}", text(&field.ty)),
        None => text(&field.ty),
    });
    let types = types.collect::<Vec<_>>().join(", ");
    match fields {
        Fields::Unit => String::new(),
        Fields::Unnamed(_) => format!("({types})"),
        Fields::Named(_) => format!(" {{ {types} }}"),
    }
}

/// The public methods of a shown type, or the trait that it implements.
fn of_impl(item: &ItemImpl, shown: &BTreeSet<String>) -> Vec<String> {
    let subject = text(&item.self_ty);
    let name = subject.split('<').next().unwrap_or_default();
    if is_for_tests(&item.attrs) || !shown.contains(name) {
        return Vec::new();
    }
    if let Some((_, path, _)) = &item.trait_ {
        return vec![format!("impl {} for {subject}", text(path))];
    }
    let methods = item.items.iter().filter_map(|member| match member {
        ImplItem::Fn(method) if is_pub(&method.vis) => {
            Some(format!("pub {name}: {}", text(&method.sig)))
        }
        ImplItem::Const(value) if is_pub(&value.vis) => Some(format!(
            "pub {name}: const {}: {}",
            value.ident,
            text(&value.ty)
        )),
        _ => None,
    });
    methods.collect()
}

/// Tokens as text, without the spaces between them that nobody writes.
fn text(tokens: &impl ToTokens) -> String {
    let mut text = tokens.to_token_stream().to_string();
    for (spaced, tight) in [
        (" :: ", "::"),
        (" ::", "::"),
        (":: ", "::"),
        (" < ", "<"),
        ("< ", "<"),
        (" >", ">"),
        (" <", "<"),
        ("& ", "&"),
        (" ,", ","),
        (" :", ":"),
        (" (", "("),
        ("( ", "("),
        (" )", ")"),
        (" [", "["),
        ("[ ", "["),
        (" ]", "]"),
        ("# ", "#"),
        ("' ", "'"),
        (",)", ")"),
        (" ;", ";"),
        ("-> ", "-> "),
        (" ->", " ->"),
        ("- >", "->"),
        ("fn(", "fn("),
    ] {
        text = text.replace(spaced, tight);
    }
    text
}
