//! `tinker run`, `tinker checkpoint` and `tinker model` against a server with one short run.

use crate::support::{Home, RUN, trained};

#[test]
fn runs_are_listed_in_the_columns_of_the_official_command() {
    let trained = trained();

    let table = trained.home.run(&["run", "list"]).ok().stdout;
    let json = trained.home.run(&["run", "list", "--json"]).ok().json();
    let columns = trained
        .home
        .run(&["run", "list", "-c", "id,owner,checkpoint"])
        .ok()
        .stdout;

    let run = &json["runs"][0];
    assert_eq!(run["base_model"], "tinker/nano");
    assert_eq!(run["lora_rank"], 32);
    assert!(table.trim_start().starts_with("Run ID"), "{table}");
    assert!(
        table.contains(run["training_run_id"].as_str().unwrap()),
        "{table}"
    );
    assert!(columns.contains("weights/final"), "{columns}");
}

#[test]
fn a_run_is_found_by_id_prefix_folder_and_last() {
    let trained = trained();
    let runs = trained.home.run(&["run", "list", "--json"]).ok().json();
    let id = runs["runs"][0]["training_run_id"]
        .as_str()
        .unwrap()
        .to_owned();

    for name in [id.as_str(), &id[..id.len() - 2], RUN, "@last"] {
        let run = trained
            .home
            .run(&["run", "info", name, "--json"])
            .ok()
            .json();
        assert_eq!(run["training_run_id"], id.as_str(), "{name}");
    }
    trained.home.run(&["run", "info", "nobody"]).failed(
        5,
        "there is no training run `nobody`",
        "hint: `tinker run list`",
    );
}

#[test]
fn checkpoints_are_listed_and_described() {
    let trained = trained();

    let list = trained
        .home
        .run(&["checkpoint", "list", "--json"])
        .ok()
        .json();
    let of_run = trained
        .home
        .run(&["checkpoint", "list", "--run-id", RUN, "--json"])
        .ok()
        .json();
    let info = trained
        .home
        .run(&["checkpoint", "info", &trained.sampler, "--json"])
        .ok()
        .json();
    let lines = trained
        .home
        .run(&["checkpoint", "list", "-f", "jsonl"])
        .ok()
        .stdout;

    let paths = |list: &serde_json::Value| -> Vec<String> {
        let rows = list["checkpoints"].as_array().unwrap();
        rows.iter()
            .map(|row| row["tinker_path"].as_str().unwrap().to_owned())
            .collect()
    };
    assert!(paths(&list).contains(&trained.sampler), "{list}");
    assert!(paths(&of_run).contains(&trained.state), "{of_run}");
    // Other tests may have saved since.
    assert!(
        paths(&list).iter().all(|path| lines.contains(path)),
        "{lines}"
    );
    assert_eq!(info["base_model"], "tinker/nano");
    assert_eq!(info["checkpoint_type"], "sampler");
}

#[test]
fn an_unknown_checkpoint_is_answered_with_those_that_exist() {
    let trained = trained();
    let missing = trained.sampler.replace("/final", "/none");

    trained.home.run(&["checkpoint", "info", &missing]).failed(
        5,
        &format!("checkpoint {missing} does not exist"),
        "weights/final",
    );
    trained
        .home
        .run(&["sample", "-p", "hi", "-m", &missing])
        .failed(5, "", "sampler_weights/final");
}

#[test]
fn deleting_reports_what_was_and_what_was_not_deleted() {
    let trained = trained();
    let list = trained
        .home
        .run(&["checkpoint", "list", "--json"])
        .ok()
        .json();
    let rows = list["checkpoints"].as_array().unwrap();
    let step = rows
        .iter()
        .find(|row| row["checkpoint_id"] == "weights/000002")
        .unwrap();
    let path = step["tinker_path"].as_str().unwrap();
    let missing = path.replace("000002", "999999");

    let unasked = trained.home.run(&["checkpoint", "delete", path]);
    let both = trained
        .home
        .run(&["checkpoint", "delete", "-y", "--json", path, &missing]);

    unasked.failed(2, "This cannot be undone", "hint: pass --yes");
    assert_eq!(both.code, 1, "{both:?}");
    assert_eq!(both.json()["deleted_count"], 1);
    assert_eq!(both.json()["failed"][0]["path"], missing.as_str());
    assert!(
        both.stderr.contains("1 checkpoint could not be deleted"),
        "{both:?}"
    );
}

#[test]
fn models_are_listed_and_filtered() {
    let trained = trained();

    let all = trained.home.run(&["model", "list"]).ok().stdout;
    let none = trained.home.run(&["model", "list", "zzz"]);

    assert!(all.contains("tinker/nano  1024"), "{all}");
    none.failed(5, "no model name contains `zzz`", "tinker model list");
}

#[test]
fn tinkex_scripts_save_a_new_adapter_and_get_its_record() {
    let home = Home::new();
    let file = home.path("out/saved.json");
    let name = file.display().to_string();
    let args = [
        "checkpoint",
        "--base-model",
        "tinker/nano",
        "--output",
        &name,
    ];

    let saved = home
        .run(&[&args, ["--rank", "4", "--no-train-unembed"].as_slice()].concat())
        .ok();
    let text = std::fs::read_to_string(&file).unwrap();
    let record: serde_json::Value = serde_json::from_str(&text).unwrap();
    let path = record["weights_path"].as_str().unwrap();
    let info = home.run(&["checkpoint", "info", path, "--json"]);

    assert_eq!(saved.stdout, format!("Checkpoint saved to {name}\n"));
    assert!(
        path.ends_with("/sampler_weights/checkpoint-tinker-nano"),
        "{path}"
    );
    assert!(
        path.contains(record["model_id"].as_str().unwrap()),
        "{text}"
    );
    assert_eq!(info.ok().json()["lora_rank"], 4);
    home.run(&["checkpoint", "--base-model", "tinker/nano"])
        .failed(2, "", "--output <OUTPUT>");
    home.run(&["checkpoint", "--base-model", "tinker/nano", "-o", "/"])
        .failed(2, "cannot write /: it is a directory", "hint: name a file");
}

#[test]
fn an_empty_server_says_how_to_fill_it() {
    let home = Home::new();

    let runs = home.run(&["run", "list"]).ok();
    let checkpoints = home.run(&["checkpoint", "list", "--json"]).ok();
    let missing = home.run(&["checkpoint", "info", "tinker://x/weights/y"]);
    let deleted = home.run(&["checkpoint", "delete", "-y", "tinker://x/weights/y"]);

    assert!(
        runs.stderr
            .contains("no training runs yet; `tinker train sft"),
        "{runs:?}"
    );
    assert!(
        checkpoints.stderr.contains("no checkpoints yet;"),
        "{checkpoints:?}"
    );
    assert_eq!(checkpoints.json()["checkpoints"], serde_json::json!([]));
    missing.failed(
        5,
        "training run x is unknown",
        "hint: `tinker run list` shows",
    );
    assert_eq!(deleted.code, 5, "{deleted:?}");
    assert!(
        deleted
            .stderr
            .contains("hint: `tinker checkpoint list` shows"),
        "{deleted:?}"
    );
}
