//! The help of every command, as a snapshot: a change of a flag is seen in review.

use crate::support::Home;

const COMMANDS: [&str; 18] = [
    "",
    "train",
    "train sft",
    "resume",
    "sample",
    "chat",
    "checkpoint",
    "checkpoint list",
    "checkpoint info",
    "checkpoint delete",
    "run",
    "run list",
    "run info",
    "model",
    "model list",
    "serve",
    "serve status",
    "serve stop",
];

#[test]
fn help_is_as_reviewed() {
    let home = Home::new();
    let mut all = String::new();

    for command in COMMANDS {
        let mut args: Vec<&str> = command.split_whitespace().collect();
        args.push("--help");
        let help = home.run(&args).ok().stdout;
        all += &format!("$ tinker {command}\n{help}\n");
    }

    insta::assert_snapshot!(all);
}

#[test]
fn an_unknown_command_is_a_usage_error() {
    let finished = Home::new().run(&["trian"]);

    assert_eq!(finished.code, 2);
    assert!(
        finished.stderr.contains("unrecognized subcommand 'trian'"),
        "{finished:?}"
    );
    assert!(finished.stderr.contains("'train'"), "{finished:?}");
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let home = Home::new();
    let mut command = home.command(&["--help"]);
    let mut child = command
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();

    drop(child.stdout.take());

    assert_eq!(child.wait().unwrap().code(), Some(0));
}
