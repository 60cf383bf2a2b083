//! Rotary frequencies and their scaling, fixed when a model is loaded.
//!
//! A frequency that depended on the length of the sequence would change the bits of its first tokens
//! as it grows. Where a scaling is of that kind (`dynamic`, `longrope`), the context ends where it
//! would begin to change, and up to there the result is the one that transformers gives.

use std::f64::consts::TAU;

use super::config::RopeConfig;

/// Rotary positions of one kind of block (Su et al. 2021, section 3.2.2).
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Inverse frequency of each pair of a head that is rotated, radians per position; at most
    /// `head_dim / 2`. What lies beyond these pairs is not rotated.
    pub frequencies: Vec<f32>,
    /// Factor on cosine and sine, which scales the scores of attention by its square.
    pub amplitude: f32,
}

/// Where a scaling is computed from beside its own fields.
#[derive(Debug, Clone, Copy)]
pub(super) struct Setting {
    pub(super) head_dim: usize,
    /// The family's default where neither `rope_theta` is given.
    pub(super) theta: f64,
    /// Part of each head that is rotated, where the family has one.
    pub(super) partial: f64,
    pub(super) max_positions: f64,
    /// Context of pretraining, where it stands beside the scaling.
    pub(super) original_positions: Option<f64>,
}

const SUPPORTED: &str = "default, linear, dynamic, llama3, yarn, longrope";

/// Computes the frequencies of a scaling; the second is the longest context it holds for, if that
/// is less than the model's.
pub(super) fn rope(
    scaling: &RopeConfig,
    setting: Setting,
) -> Result<(Rope, Option<usize>), String> {
    let theta = scaling.rope_theta.unwrap_or(setting.theta);
    if !(theta.is_finite() && theta > 0.0) {
        return Err(format!("rope_theta is {theta}, it must be above 0"));
    }
    let rule = Rule {
        scaling,
        setting,
        theta,
        width: rotated_width(scaling, setting)?,
    };
    let (frequencies, amplitude, context) = rule.compute()?;
    let rope = Rope {
        frequencies: frequencies.into_iter().map(|f| f as f32).collect(),
        amplitude: amplitude as f32,
    };
    let is_wrong = |f: &&f32| !f.is_finite();
    if let Some(f) = rope.frequencies.iter().find(is_wrong) {
        return Err(format!("rope_theta {theta} gives the frequency {f}"));
    }
    if !rope.amplitude.is_finite() {
        return Err(format!("rope scaling gives the amplitude {amplitude}"));
    }
    Ok((rope, context))
}

/// Elements of a head that are rotated.
fn rotated_width(scaling: &RopeConfig, setting: Setting) -> Result<usize, String> {
    let partial = scaling.partial_rotary_factor.unwrap_or(setting.partial);
    let width = (setting.head_dim as f64 * partial) as usize;
    if partial > 0.0 && partial <= 1.0 && width >= 2 && width.is_multiple_of(2) {
        return Ok(width);
    }
    let size = setting.head_dim;
    Err(format!(
        "partial_rotary_factor {partial} of head_dim {size} is not an even number of elements"
    ))
}

/// Frequencies, amplitude, and the context they end at.
type Computed = (Vec<f64>, f64, Option<usize>);

struct Rule<'a> {
    scaling: &'a RopeConfig,
    setting: Setting,
    theta: f64,
    width: usize,
}

impl Rule<'_> {
    fn compute(&self) -> Result<Computed, String> {
        match self.scaling.rope_type.as_deref().unwrap_or("default") {
            "default" => Ok((self.plain().collect(), 1.0, None)),
            "linear" => {
                let factor = need("factor", self.scaling.factor)?;
                Ok((self.plain().map(|f| f / factor).collect(), 1.0, None))
            }
            // It grows the base beyond `max_position_embeddings` only, where the context ends.
            "dynamic" => Ok((self.plain().collect(), 1.0, None)),
            "llama3" => self.llama3(),
            "yarn" => self.yarn(),
            // "su" is the name that Phi-3 gave it first.
            "longrope" | "su" => self.longrope(),
            other => Err(format!(
                "rope type `{other}` is not supported; supported: {SUPPORTED}"
            )),
        }
    }

    fn plain(&self) -> impl Iterator<Item = f64> {
        let exponents = (0..self.width / 2).map(|i| (2 * i) as f64 / self.width as f64);
        exponents.map(|e| 1.0 / self.theta.powf(e))
    }

    /// Context of pretraining.
    fn original(&self) -> Result<f64, String> {
        let own = self.scaling.original_max_position_embeddings;
        let given = self.setting.original_positions.or(own);
        need(
            "original_max_position_embeddings",
            Some(given.unwrap_or(self.setting.max_positions)),
        )
    }

    /// How much longer the context is than in pretraining.
    fn factor(&self) -> Result<f64, String> {
        let stretch = self.setting.max_positions / self.original()?;
        need("factor", Some(self.scaling.factor.unwrap_or(stretch)))
    }

    /// Llama 3.1: short wavelengths stay, long ones are stretched, between them a blend.
    fn llama3(&self) -> Result<Computed, String> {
        let factor = need("factor", self.scaling.factor)?;
        let low = need("low_freq_factor", self.scaling.low_freq_factor)?;
        let high = need("high_freq_factor", self.scaling.high_freq_factor)?;
        let context = self.original()?;
        let scale = |frequency: f64| {
            let wavelength = TAU / frequency;
            if wavelength < context / high {
                frequency
            } else if wavelength > context / low {
                frequency / factor
            } else {
                let blend = (context / wavelength - low) / (high - low);
                (1.0 - blend) * frequency / factor + blend * frequency
            }
        };
        Ok((self.plain().map(scale).collect(), 1.0, None))
    }

    /// Peng et al. 2023, section 3.2 (frequencies) and 3.4 (amplitude).
    fn yarn(&self) -> Result<Computed, String> {
        let (factor, context) = (self.factor()?, self.original()?);
        let scaling = self.scaling;
        let pair_of_rotations = |n: f64| {
            let width = self.width as f64;
            width * (context / (n * TAU)).ln() / (2.0 * self.theta.ln())
        };
        let mut low = pair_of_rotations(or_default(scaling.beta_fast, 32.0));
        let mut high = pair_of_rotations(or_default(scaling.beta_slow, 1.0));
        if scaling.truncate.unwrap_or(true) {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0), high.min(self.width as f64 - 1.0));
        if low == high {
            high += 0.001;
        }
        let scale = |(i, frequency): (usize, f64)| {
            let stretched = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
            frequency / factor * stretched + frequency * (1.0 - stretched)
        };
        let frequencies = self.plain().enumerate().map(scale).collect();
        let amplitude = match (
            scaling.attention_factor,
            scaling.mscale,
            scaling.mscale_all_dim,
        ) {
            (Some(amplitude), ..) => amplitude,
            (None, Some(all), Some(dim)) if all != 0.0 && dim != 0.0 => {
                yarn_amplitude(factor, all) / yarn_amplitude(factor, dim)
            }
            _ => yarn_amplitude(factor, 1.0),
        };
        Ok((frequencies, amplitude, None))
    }

    /// Ding et al. 2024: one factor per pair. Those for short sequences hold up to the context of
    /// pretraining, where those for long ones would take over for the whole sequence.
    fn longrope(&self) -> Result<Computed, String> {
        let (factor, context) = (self.factor()?, self.original()?);
        let factors = self.scaling.short_factor.as_deref().unwrap_or_default();
        let pairs = self.width / 2;
        if factors.len() != pairs || factors.iter().any(|f| !(f.is_finite() && *f > 0.0)) {
            let n = factors.len();
            return Err(format!(
                "rope scaling has {n} usable numbers in `short_factor` for {pairs} pairs"
            ));
        }
        let frequencies = self.plain().zip(factors).map(|(f, by)| f / by).collect();
        let default = if factor > 1.0 {
            (1.0 + factor.ln() / context.ln()).sqrt()
        } else {
            1.0
        };
        let amplitude = self.scaling.attention_factor.unwrap_or(default);
        Ok((frequencies, amplitude, Some(context as usize)))
    }
}

fn yarn_amplitude(factor: f64, by: f64) -> f64 {
    if factor <= 1.0 {
        1.0
    } else {
        0.1 * by * factor.ln() + 1.0
    }
}

/// As transformers reads these two: 0 means absent.
fn or_default(value: Option<f64>, default: f64) -> f64 {
    value.filter(|v| *v != 0.0).unwrap_or(default)
}

fn need(name: &str, value: Option<f64>) -> Result<f64, String> {
    let value = value.filter(|v| v.is_finite() && *v > 0.0);
    value.ok_or_else(|| format!("rope scaling has no usable `{name}`"))
}
