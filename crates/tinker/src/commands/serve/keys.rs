//! `tinker serve keys`: keys for other people, each with what it is good for.

use std::collections::BTreeSet;

use clap::builder::PossibleValue;
use jiff::Timestamp;
use serde_json::json;
use tinker_server::{KeyLimits, KeyName, Scope, StoredKey, add_key, list_keys, remove_key};

use crate::context::Ctx;
use crate::failure::Result;
use crate::human;
use crate::numbers::whole;
use crate::output::Output;

/// Give, list and take away keys for other people
///
/// What is made with a key belongs to it: with another key it does not exist, unless it is published.
/// A running server sees changes at once. Without a key of this kind a server is for this machine alone.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Add(AddArgs),
    List(ListArgs),
    Remove(RemoveArgs),
}

/// Make a key and print it, once
#[derive(Debug, clap::Args)]
struct AddArgs {
    /// What to call it; what is made with it belongs to this name
    #[arg(value_name = "NAME", value_parser = parse_name)]
    name: KeyName,
    /// What it is good for; may be repeated
    #[arg(long = "scope", value_name = "SCOPE", default_values = ["read", "sample", "train"])]
    scopes: Vec<ScopeArg>,
    /// Most operations and samples without a result
    #[arg(long, value_name = "N", default_value_t = KeyLimits::default().operations, value_parser = whole::<usize>)]
    max_operations: usize,
    /// Most bytes of their requests
    #[arg(long, value_name = "N", default_value_t = KeyLimits::default().bytes, value_parser = whole::<u64>)]
    max_bytes: u64,
    /// Most open sessions
    #[arg(long, value_name = "N", default_value_t = KeyLimits::default().sessions, value_parser = whole::<usize>)]
    max_sessions: usize,
    /// Most training runs in open sessions
    #[arg(long, value_name = "N", default_value_t = KeyLimits::default().adapters, value_parser = whole::<usize>)]
    max_adapters: usize,
}

/// Show the keys and what they are good for
#[derive(Debug, clap::Args)]
struct ListArgs {}

/// Take a key away; what was made with it stays
#[derive(Debug, clap::Args)]
struct RemoveArgs {
    /// The key's name
    #[arg(value_name = "NAME", value_parser = parse_name)]
    name: KeyName,
}

/// A scope as an argument.
#[derive(Debug, Clone, Copy)]
struct ScopeArg(Scope);

impl clap::ValueEnum for ScopeArg {
    fn value_variants<'a>() -> &'a [Self] {
        const {
            &[
                Self(Scope::Read),
                Self(Scope::Sample),
                Self(Scope::Train),
                Self(Scope::Admin),
            ]
        }
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        let help = match self.0 {
            Scope::Read => "lists, look-ups, downloads and results; every key has it",
            Scope::Sample => "samples, also through the compatible endpoints",
            Scope::Train => "training runs and checkpoints",
            Scope::Admin => "everything, of all keys: also counters and the audit log",
        };
        Some(PossibleValue::new(self.0.as_str()).help(help))
    }
}

pub(super) fn run(ctx: &Ctx, args: Args) -> Result<Output> {
    match args.command {
        Command::Add(args) => add(ctx, args),
        Command::List(_) => list(ctx),
        Command::Remove(args) => remove(ctx, &args.name),
    }
}

fn add(ctx: &Ctx, args: AddArgs) -> Result<Output> {
    let scopes: BTreeSet<Scope> = args.scopes.iter().map(|scope| scope.0).collect();
    let limits = KeyLimits {
        operations: args.max_operations,
        bytes: args.max_bytes,
        sessions: args.max_sessions,
        adapters: args.max_adapters,
    };
    let key = add_key(&ctx.settings.home, args.name.clone(), scopes, limits)?;
    let json = json!({ "name": args.name, "api_key": key.expose() });
    let once = format!(
        "this is the only time that the key of {} is shown",
        args.name
    );
    Ok(Output::text(key.expose(), json).with_note(once))
}

/// A key without its digest.
#[derive(Debug, serde::Serialize)]
struct Listed<'a> {
    name: &'a KeyName,
    scopes: &'a BTreeSet<Scope>,
    limits: KeyLimits,
    created: &'a str,
}

fn list(ctx: &Ctx) -> Result<Output> {
    let keys = list_keys(&ctx.settings.home)?;
    let listed: Vec<Listed<'_>> = keys.iter().map(Listed::of).collect();
    let header = [
        "Name",
        "Scopes",
        "Operations",
        "Sessions",
        "Adapters",
        "Made",
    ];
    let output = Output::list("keys", &listed, &header, Listed::row)?;
    Ok(output.or_note("no keys for other people; `tinker serve keys add NAME` makes one"))
}

impl<'a> Listed<'a> {
    fn of(key: &'a StoredKey) -> Self {
        Self {
            name: &key.name,
            scopes: &key.scopes,
            limits: key.limits,
            created: &key.created,
        }
    }

    fn row(&self) -> Vec<String> {
        let scopes: Vec<&str> = self.scopes.iter().map(|scope| scope.as_str()).collect();
        vec![
            self.name.to_string(),
            scopes.join(", "),
            human::count(self.limits.operations as u64),
            human::count(self.limits.sessions as u64),
            human::count(self.limits.adapters as u64),
            human::age(self.created, Timestamp::now()),
        ]
    }
}

fn remove(ctx: &Ctx, name: &KeyName) -> Result<Output> {
    remove_key(&ctx.settings.home, name)?;
    let text = format!("removed the key of {name}; what was made with it stays");
    Ok(Output::text(text, json!({ "removed": name })))
}

fn parse_name(text: &str) -> std::result::Result<KeyName, String> {
    text.parse()
        .map_err(|error: tinker_server::Error| error.to_string())
}
