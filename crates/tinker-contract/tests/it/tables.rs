//! `docs/contract.md`: which test shows each behaviour, and which endpoints our server lacks.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use tinker_contract::cases::{CASES, Tinkex};
use tinker_contract::endpoints::ENDPOINTS;
use tinker_contract::target::Target;

use crate::plain_http::plain_http;

/// The least number of named cases.
const N_CASES: usize = 250;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The file that a test of [`CASES`] is in, below the root.
fn file_of(place: &str) -> PathBuf {
    let (folder, rest) = place.split_once('/').expect("a folder");
    match folder {
        "contract" => format!("crates/tinker-contract/tests/it/{rest}.rs").into(),
        "suite" => format!("crates/tinker-contract/src/suite/{rest}.rs").into(),
        _ => Path::new("crates").join(place),
    }
}

/// The names of tests of this crate: its own and, by a macro, those of the suite.
fn named_cases() -> BTreeSet<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it");
    let files = std::fs::read_dir(folder).unwrap();
    let texts = files.map(|file| {
        let path = file.unwrap().path();
        (
            path.file_stem().unwrap().to_string_lossy().into_owned(),
            read(&path),
        )
    });
    let mut names = BTreeSet::new();
    for (module, text) in texts {
        let mut is_test = false;
        for line in text.lines() {
            let is_attribute = line.starts_with("#[tokio::test") || line.starts_with("#[test]");
            is_test |= is_attribute;
            let name = line
                .split("fn ")
                .nth(1)
                .and_then(|rest| rest.split('(').next());
            if let (true, Some(name)) = (is_test, name) {
                names.insert(format!("{module}::{name}"));
                is_test = false;
            }
        }
    }
    macro_rules! suite {
        ($($group:ident: $($case:ident),+ $(,)?;)+) => {$($(
            names.insert(format!("suite::{}::{}", stringify!($group), stringify!($case)));
        )+)+};
    }
    tinker_contract::suite_cases!(suite);
    names
}

#[test]
fn there_are_at_least_250_named_cases() {
    let n = named_cases().len();

    assert!(n >= N_CASES, "{n} cases");
}

#[test]
fn every_behaviour_has_a_test_that_exists() {
    let mut numbers = BTreeSet::new();
    for (number, what, _, test) in CASES {
        assert!(numbers.insert(*number), "{number} is there twice");
        if test.starts_with("- ") || test.starts_with("-:") {
            continue;
        }
        let (place, name) = test
            .split_once("::")
            .unwrap_or_else(|| panic!("{number}: {test}"));
        let text = read(&root().join(file_of(place)));
        assert!(
            text.contains(&format!("fn {name}(")),
            "{number} ({what}): {place} has no {name}"
        );
    }
    assert_eq!(numbers, (1..=153).collect());
}

/// Method and path of the endpoints that our server does not have.
async fn pending(target: &Target) -> Vec<(&'static str, &'static str)> {
    let http = plain_http();
    let mut pending = Vec::new();
    for (method, path) in ENDPOINTS {
        let filled = path
            .replace("{id}", "S:train:0")
            .replace("{checkpoint}", "weights/a");
        let answer = http
            .request(
                method.parse().unwrap(),
                format!("{}{filled}", target.base_url),
            )
            .header("x-api-key", &target.api_key)
            .header("content-type", "application/json")
            .body("{}")
            .send()
            .await
            .unwrap();
        let status = answer.status().as_u16();
        let text = answer.text().await.unwrap();
        if status == 405 || text.contains("is not part of this server") {
            pending.push((*method, *path));
        }
    }
    pending
}

/// What `cargo xtask chaos` found so far.
const CHAOS: &str = "
## Every fault at once

`cargo xtask chaos --seeds N` (`--first S` begins elsewhere) trains for 200 steps and samples, left alone and once more
for each seed. One request in five is refused (408, 429, 500, 502, 503) before or after delivery, reset before or after
delivery or within the answer, cut, stalled, delivered twice with or without an answer, or held back so that others
overtake it. The server is killed every 50 steps, the client every 70. A seed passes if checkpoints, losses and
samples are the same to the byte, no number was sent with other bytes, each number of the undisturbed run was used and
no other, and every acknowledged sample came.

| date | commit | seeds | requests | faults | failed |
|---|---|---|---|---|---|
| 2026-11-21 | 83b6dcd | 101 to 500 | 648,604 | 130,159 | 0 |
| 2026-11-21 | 0dd06f4 | 1001 to 1084 | 137,851 | 27,419 | 0 |
";

/// What `cargo xtask kill` found so far.
const KILLS: &str = "
## A server killed at random moments

`cargo xtask kill --times N` (`--seed S` begins elsewhere) loads a server with three runs at once, each of 60 steps sent
two ahead, with saves of every kind and samples between them, and kills it with signal 9 within 20 ms of a random step,
and one time in four again within 40 ms of its start. It passes if every acknowledged operation gets its result, losses,
samples and all saved weights are the same to the byte as those of a server left alone (so none is applied twice), and
after every kill every directory of weights is what its manifest says. A server with 10,000 finished futures must then
start within a second.

| date | commit | seeds | kills | of them in start-up | operations | failed | start-up |
|---|---|---|---|---|---|---|---|
| 2026-11-21 | 07a7585 | 101 to 148 | 500 | 97 | 24,048 | 0 | 760 ms |
| 2026-11-22 | 526f40d | 1 to 48 | 500 | 102 | 24,048 | 0 | 165 ms |
";

/// What `cargo xtask soak` found so far.
const SOAK: &str = "
## A server under mixed traffic for hours

`cargo xtask soak --minutes N` (`--seed S` for other requests) loads a release server with clients of eight kinds, each
at its pace, together about a seventh of a core: runs of rank 4, 8 and 16 that step, save in every way, load and end;
samples with and without a shared beginning; samplers made and dropped; samples given up; polls left without their
answer; OpenAI's and Anthropic's requests, whole, streamed and left midway; bad requests; sessions that are ended or
fall silent. The cache of prompts is filled before. It notes memory, files, threads, disk, adapters, futures, requests
and latency every 10 s in `target/soak/sights.jsonl`, and lays a line through the last three quarters of them. It passes
if no client finds anything wrong and the line gains no more than 5 % of the level and 8 MB of memory, and 5 % and 8 of
open files.

| date | commit | minutes | requests | wrong answers | open files | memory |
|---|---|---|---|---|---|---|
| 2026-11-21 | 5420461 | 120 | 260,944 | 0 | 46 to 56, flat | 95 to 345 MB; **grew** by 88 MB over the last 90 minutes, of 24 allowed |
| 2026-11-22 | 7f8f1ce | 120 | 278,292 | 0 | 39 to 59, flat | 424 to 459 MB; flat: 20 MB over the last 90 minutes, of 31 allowed |

What grew in the first run was the cache of prompts, which it did not fill before, and what is known of each future: those
of runs whose logs were closed stayed. They are let go since. The second run gained 26 MB until its log of samples had
40,000 entries, which it forgot then, and 9 MB in the 70 minutes after that. Since then that log forgets at 20,000.
";

/// What `cargo xtask fuzz` found so far.
const FUZZ: &str = "
## Mutated requests

`cargo xtask fuzz --minutes N` (`--seed S` to repeat one) begins with what was recorded of the official SDK, chats of
other APIs, a custom loss and the files of an export; changes structure, bytes, compression, types and addresses; and
sends them to the router in its own process, over the real engine and a tiny model. It passes if nothing panics, no
request is answered by a 5xx, a 409, a 408 that is no poll's, or an empty refusal, each is answered in 30 s, and none
takes more than 400 MB where the largest body has 16 MiB.

| date | seed | cases | per second | findings |
|---|---|---|---|---|
| 2026-11-21 | 2 | 241,691 | 419 | one: a cursor of 2^64 - 1 in `retrieve_futures` overflowed its successor; mended |
| 2026-11-21 | 2 | 218,037 | 363 | none; at most 114 MB for one |
| 2026-11-22 | 20261122 | 319,280 | 532 | none, weights that are uploaded among them for the first time; at most 81 MB for one |
";

fn render(pending: &[(&str, &str)]) -> String {
    let mut page = String::from(
        "# What client and server agree on\n\n\
         Written by the tests of `tinker-contract`; anew with\n\
         `UPDATE_REFERENCE=1 cargo test -p tinker-contract --test it tables`.\n\n\
         ## Endpoints that the embedded server does not have yet\n\n",
    );
    if pending.is_empty() {
        page.push_str("None: it has every endpoint of the protocol.\n");
    } else {
        page.push_str(
            "Clients get an error of kind `Unsupported` there, which names the capability.\n\n\
             | endpoint |\n|---|\n",
        );
    }
    for (method, path) in pending {
        writeln!(page, "| `{method} {path}` |").unwrap();
    }
    let n_wrong = CASES.iter().filter(|case| case.2 == Tinkex::Wrong).count();
    page.push_str(CHAOS);
    page.push_str(KILLS);
    page.push_str(SOAK);
    page.push_str(FUZZ);
    write!(
        page,
        "\n## Behaviours and their tests\n\n\
         The behaviours that Tinkex 0.4.0 was studied for. It is wrong or silent in {n_wrong} of \
         them, marked ✗;\n○ is right there without a test. `contract/` is \
         `crates/tinker-contract/tests/it/`, `suite/` is\n`crates/tinker-contract/src/suite/`.\n\n\
         | # | behaviour | Tinkex | test |\n|---|---|---|---|\n"
    )
    .unwrap();
    for (number, what, tinkex, test) in CASES {
        let mark = match tinkex {
            Tinkex::Tested => "✓",
            Tinkex::Untested => "○",
            Tinkex::Wrong => "✗",
        };
        let test = match test.strip_prefix("-: ") {
            Some(reason) => format!("none: {reason}"),
            None => format!("`{test}`"),
        };
        writeln!(page, "| {number} | {what} | {mark} | {test} |").unwrap();
    }
    page
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[expect(
    clippy::disallowed_methods,
    reason = "writes the page anew when asked to"
)]
async fn the_page_shows_what_is_tested_and_what_is_pending() {
    let target = Target::start().await;
    let page = render(&pending(&target).await);
    target.stop().await;
    let path = root().join("docs/contract.md");
    if std::env::var_os("UPDATE_REFERENCE").is_some() {
        std::fs::write(&path, &page).unwrap();
    }

    assert!(
        read(&path) == page,
        "docs/contract.md is out of date; write it anew with UPDATE_REFERENCE=1 cargo test -p \
         tinker-contract --test it tables"
    );
}
