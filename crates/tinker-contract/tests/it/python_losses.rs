//! Losses and optimizers of the server, used by the official SDK.

use serde_json::Value;
use tinker_contract::python;
use tinker_contract::target::Target;

fn losses(steps: &Value) -> Vec<f64> {
    let steps = steps.as_array().unwrap().iter();
    steps.map(|s| s["loss:sum"].as_f64().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_official_sdk_uploads_losses_and_chooses_optimizers() {
    let Some(python) = python::find() else {
        return;
    };
    let target = Target::start().await;
    let arguments = [target.base_url.clone(), target.base_model.clone()];
    let script = "sdk_losses.py";
    let run = python::run_script(&python, script, &arguments, &target.api_key, target.home()).await;
    let result = run.summary;
    if result.as_object().unwrap().is_empty() {
        println!("skipped: this Python has no torch, which the SDK needs to trace a loss");
        return;
    }

    assert!(result["loss_id"].as_str().unwrap().ends_with(":loss:0"));
    let uploaded = losses(&result["uploaded"]);
    assert_eq!(uploaded.len(), 3);
    for other in [losses(&result["here"]), losses(&result["built_in"])] {
        for (a, b) in uploaded.iter().zip(other) {
            assert!((a - b).abs() < 1e-4, "{result}");
        }
    }
    let tokens = &result["uploaded"][0]["custom/n:sum"];
    assert_eq!(tokens.as_f64(), Some(18.0), "one for each target");
    assert_eq!(result["dimuon"]["family"], "dimuon");
    let falling: Vec<f64> = serde_json::from_value(result["dimuon"]["losses"].clone()).unwrap();
    assert!(falling.is_sorted_by(|a, b| a > b), "{falling:?}");
    assert!(
        result["dimuon"]["step"]["unclipped_grad_l2:mean"]
            .as_f64()
            .unwrap()
            > 0.0
    );
    let parts: Vec<f64> = serde_json::from_value(result["gspo"]["parts"].clone()).unwrap();
    let loss = result["gspo"]["loss"].as_f64().unwrap();
    assert!(
        (parts.iter().sum::<f64>() - loss).abs() < 1e-4,
        "{parts:?} {loss}"
    );
    target.stop().await;
}
