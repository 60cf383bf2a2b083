//! Which optimizers there are, and the hyper-parameters of a step in their wire forms.

use serde::Deserialize;
use tinker_engine::{AdamW, Dimuon, Family, Optimizer};
use tinker_types::{AdamParams, OptimStepRequest, OptimizerConfig};

use crate::error::{Error, Result};

/// The only version of Dimuon.
const DIMUON_VERSION: u64 = 1;

/// The optimizer that a training run was created with.
///
/// # Errors
/// [`Error::Invalid`] if this server does not have it.
pub(crate) fn family(config: &OptimizerConfig) -> Result<Family> {
    match config.family.as_str() {
        "adamw" => Ok(Family::AdamW),
        "dimuon" => match config.settings.get("version") {
            None => Ok(Family::Dimuon),
            Some(version) if version.as_u64() == Some(DIMUON_VERSION) => Ok(Family::Dimuon),
            Some(version) => Err(Error::Invalid(format!(
                "version {version} of optimizer dimuon is not supported by this server: it has version {DIMUON_VERSION}"
            ))),
        },
        other => Err(unsupported(other)),
    }
}

fn unsupported(family: &str) -> Error {
    Error::Invalid(format!(
        "optimizer {family:?} is not supported by this server: it has adamw and dimuon"
    ))
}

/// Hyper-parameters of a Dimuon step. The last two are settings of early clients.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct DimuonWire {
    learning_rate: f64,
    #[serde(default)]
    grad_clip_norm: f64,
    beta1: Option<f64>,
    damping: Option<f64>,
    rank_lr_correction_exponent: Option<f64>,
    #[serde(rename = "type")]
    _family: String,
}

/// The step that a request asks for, of a run with this optimizer.
///
/// # Errors
/// [`Error::Invalid`] if it is of another optimizer, or names the hyper-parameter at fault.
pub(super) fn optimizer(request: &OptimStepRequest, family: Family) -> Result<Optimizer> {
    let step = match (&request.adam_params, &request.optimizer_params) {
        (Some(params), None) => Optimizer::AdamW(adamw(*params)?),
        (None, Some(value)) => tagged(value)?,
        _ => {
            return Err(Error::Invalid(
                "optim_step takes exactly one of adam_params and optimizer_params".into(),
            ));
        }
    };
    if step.family() == family {
        return Ok(step);
    }
    Err(Error::Invalid(format!(
        "the training run was created with optimizer {}, and this is a step of {}",
        family.name(),
        step.family().name()
    )))
}

fn tagged(value: &serde_json::Value) -> Result<Optimizer> {
    let malformed = |error: serde_json::Error| Error::Invalid(format!("optimizer_params: {error}"));
    match value["type"].as_str() {
        Some("adamw" | "adam") => {
            let params = serde_json::from_value(value.clone()).map_err(malformed)?;
            adamw(params).map(Optimizer::AdamW)
        }
        Some("dimuon") => {
            let params = serde_json::from_value(value.clone()).map_err(malformed)?;
            dimuon(params).map(Optimizer::Dimuon)
        }
        other => Err(unsupported(other.unwrap_or("without a type"))),
    }
}

/// A hyper-parameter: name, value, whether it is in its range, and the range in words.
type Rule = (&'static str, f64, bool, &'static str);

fn check(rules: &[Rule]) -> Result<()> {
    for (name, value, fits, range) in rules {
        if !fits || !(*value as f32).is_finite() {
            return Err(Error::Invalid(format!(
                "{name} {value} must be finite and {range}"
            )));
        }
    }
    Ok(())
}

fn adamw(params: AdamParams) -> Result<AdamW> {
    let at_least_0 = |name, value: f64| -> Rule { (name, value, value >= 0.0, "at least 0") };
    let decay =
        |name, value: f64| -> Rule { (name, value, (0.0..1.0).contains(&value), "in [0, 1)") };
    check(&[
        at_least_0("learning_rate", params.learning_rate),
        decay("beta1", params.beta1),
        decay("beta2", params.beta2),
        ("eps", params.eps, params.eps > 0.0, "above 0"),
        at_least_0("weight_decay", params.weight_decay),
        at_least_0("grad_clip_norm", params.grad_clip_norm),
    ])?;
    Ok(AdamW {
        learning_rate: params.learning_rate as f32,
        beta1: params.beta1 as f32,
        beta2: params.beta2 as f32,
        eps: params.eps as f32,
        weight_decay: params.weight_decay as f32,
        grad_clip_norm: params.grad_clip_norm as f32,
    })
}

fn dimuon(params: DimuonWire) -> Result<Dimuon> {
    let defaults = Dimuon::new(params.learning_rate as f32);
    let beta1 = params.beta1.unwrap_or(defaults.beta1.into());
    let damping = params.damping.unwrap_or(defaults.damping.into());
    let exponent = params.rank_lr_correction_exponent;
    let exponent = exponent.unwrap_or(defaults.rank_exponent.into());
    let rate = params.learning_rate;
    check(&[
        ("learning_rate", rate, rate >= 0.0, "at least 0"),
        ("beta1", beta1, (0.0..1.0).contains(&beta1), "in [0, 1)"),
        ("grad_clip_norm", params.grad_clip_norm, true, "a number"),
        ("damping", damping, damping > 0.0, "above 0"),
        ("rank_lr_correction_exponent", exponent, true, "a number"),
    ])?;
    Ok(Dimuon {
        beta1: beta1 as f32,
        // Whatever is not above 0 turns clipping off.
        grad_clip_norm: params.grad_clip_norm.max(0.0) as f32,
        damping: damping as f32,
        rank_exponent: exponent as f32,
        ..defaults
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(json: &str) -> OptimStepRequest {
        serde_json::from_str(&format!(r#"{{"model_id":"r","seq_id":1,{json}}}"#)).unwrap()
    }

    #[test]
    fn takes_adamw_in_either_form() {
        let of = |json| optimizer(&request(json), Family::AdamW).unwrap();
        let direct = of(r#""adam_params":{"learning_rate":0.5}"#);

        let tagged = of(r#""optimizer_params":{"type":"adamw","learning_rate":0.5}"#);

        assert_eq!(direct, tagged);
        let Optimizer::AdamW(params) = direct else {
            panic!("{direct:?}");
        };
        assert_eq!((params.learning_rate, params.beta2), (0.5, 0.95));
    }

    #[test]
    fn takes_dimuon_of_old_and_new_clients() {
        let of = |json| optimizer(&request(json), Family::Dimuon).unwrap();

        let new = of(
            r#""optimizer_params":{"type":"dimuon","learning_rate":0.5,"beta1":0.9,"grad_clip_norm":-1.0}"#,
        );
        let old = of(
            r#""optimizer_params":{"type":"dimuon","learning_rate":0.5,"damping":0.01,"rank_lr_correction_exponent":0}"#,
        );

        assert_eq!(new, Dimuon::new(0.5).into());
        let expected = Dimuon {
            damping: 0.01,
            rank_exponent: 0.0,
            ..Dimuon::new(0.5)
        };
        assert_eq!(old, expected.into());
    }

    #[test]
    fn refuses_other_optimizers_and_values_out_of_range() {
        let refusal = |json| {
            let refused = optimizer(&request(json), Family::AdamW);
            refused.unwrap_err().to_string()
        };

        assert_eq!(
            refusal(r#""optimizer_params":{"type":"lion","learning_rate":0.5}"#),
            "optimizer \"lion\" is not supported by this server: it has adamw and dimuon"
        );
        assert_eq!(
            refusal(r#""optimizer_params":{"type":"dimuon","learning_rate":0.5}"#),
            "the training run was created with optimizer adamw, and this is a step of dimuon"
        );
        assert_eq!(
            refusal(r#""optimizer_params":{"type":"dimuon","learning_rate":-0.5}"#),
            "learning_rate -0.5 must be finite and at least 0"
        );
        assert_eq!(
            refusal(r#""adam_params":{"beta1":1.0}"#),
            "beta1 1 must be finite and in [0, 1)"
        );
        assert_eq!(
            refusal(r#""adam_params":{"learning_rate":-1}"#),
            "learning_rate -1 must be finite and at least 0"
        );
        assert!(refusal(r#""ttl":1"#).contains("exactly one of"));
    }

    #[test]
    fn families_are_known_by_type_and_version() {
        let of = |json| family(&serde_json::from_str(json).unwrap());

        assert_eq!(of(r#"{"type":"adamw"}"#).unwrap(), Family::AdamW);
        assert_eq!(
            of(r#"{"type":"dimuon","version":1}"#).unwrap(),
            Family::Dimuon
        );
        assert_eq!(
            of(r#"{"type":"dimuon","version":2}"#)
                .unwrap_err()
                .to_string(),
            "version 2 of optimizer dimuon is not supported by this server: it has version 1"
        );
        assert!(of(r#"{"type":"lion"}"#).is_err());
    }
}
