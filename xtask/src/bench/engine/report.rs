//! What the programs print, and whether they did the same work.

use anyhow::{Result, ensure};
use serde::Deserialize;

/// What one program printed about one task.
#[derive(Debug, Clone, Default, Deserialize)]
pub(super) struct Report {
    pub(super) name: String,
    /// Seconds per step or pass, warm-up left out.
    pub(super) seconds: Vec<f64>,
    /// Processor time of all of these together.
    pub(super) cpu_seconds: f64,
    /// Tokens per step or pass.
    pub(super) n_tokens: usize,
    /// Largest resident memory of the process.
    pub(super) peak_bytes: u64,
    /// Loss of each training step.
    #[serde(default)]
    pub(super) losses: Vec<f64>,
    /// Greedy tokens of all sequences, one after the other.
    #[serde(default)]
    pub(super) tokens: Vec<u32>,
    /// Log-probability of each greedy token.
    #[serde(default)]
    pub(super) logprobs: Vec<f64>,
}

/// All rounds of one task put together.
#[derive(Debug, Default)]
pub(super) struct Rounds {
    pub(super) ours: Report,
    /// Ours in bf16, which is near.
    pub(super) ours_bf16: Report,
    /// PyTorch in float32, whose results ours must equal.
    pub(super) f32: Report,
    /// PyTorch in bf16, whose results are near.
    pub(super) bf16: Report,
}

impl Rounds {
    /// Checks that all did the same work: losses of all steps agree to 1e-4, of bf16 to 1e-2.
    pub(super) fn agree_on_losses(&self) -> Result<()> {
        compare_losses(&self.ours.losses, &self.f32.losses, 1e-4)?;
        compare_losses(&self.ours_bf16.losses, &self.f32.losses, 1e-2)?;
        compare_losses(&self.ours.losses, &self.bf16.losses, 1e-2)
    }

    /// How many greedy tokens of the `n_sequences` agree with those of PyTorch in float32, each
    /// sequence from its start, with log-probabilities equal to 1e-4; two nearly equal best tokens may
    /// end it. With bf16 they soon do, so only the number of tokens is compared.
    pub(super) fn agree_on_tokens(&self, n_sequences: usize) -> Result<usize> {
        let n = self.ours.tokens.len();
        for (who, report) in [("ours in", &self.ours_bf16), ("PyTorch", &self.bf16)] {
            let beside = report.tokens.len();
            ensure!(n == beside, "{n} tokens against {beside} of {who} bf16");
        }
        let beside = self.f32.tokens.len();
        ensure!(n == beside, "{n} tokens against {beside} of PyTorch");
        for (who, report) in [("ours", &self.ours), ("PyTorch", &self.f32)] {
            let logprobs = report.logprobs.len();
            ensure!(logprobs == n, "{who}: {logprobs} log-probs of {n} tokens");
        }
        let each = n / n_sequences;
        (0..n_sequences)
            .map(|i| self.agree_from(i * each, each))
            .sum()
    }

    /// As [`Self::agree_on_tokens`], of the sequence whose `n` tokens begin at `start`.
    fn agree_from(&self, start: usize, n: usize) -> Result<usize> {
        let (ours, torch) = (&self.ours, &self.f32);
        let range = start..start + n;
        let tokens = ours.tokens[range.clone()]
            .iter()
            .zip(&torch.tokens[range.clone()]);
        let same = tokens.take_while(|(a, b)| a == b).count();
        ensure!(
            same >= 16,
            "greedy tokens differ from token {same} on: {:?} against {:?}",
            &ours.tokens[range.clone()],
            &torch.tokens[range.clone()]
        );
        let logprobs = ours.logprobs[range.clone()]
            .iter()
            .zip(&torch.logprobs[range]);
        for (i, (a, b)) in logprobs.take(same).enumerate() {
            ensure!(
                (a - b).abs() < 1e-4,
                "token {i}: log-prob {a} against {b} of PyTorch"
            );
        }
        Ok(same)
    }
}

fn compare_losses(ours: &[f64], torch: &[f64], tolerance: f64) -> Result<()> {
    ensure!(!ours.is_empty(), "there are no losses to compare");
    ensure!(
        ours.len() == torch.len(),
        "{} losses against {}",
        ours.len(),
        torch.len()
    );
    for (step, (a, b)) in ours.iter().zip(torch).enumerate() {
        ensure!(
            (a / b - 1.0).abs() < tolerance,
            "step {step}: loss {a} against {b} of PyTorch"
        );
    }
    Ok(())
}

impl Report {
    /// Adds the times of another round; the results are the same in each.
    pub(super) fn merge(&mut self, mut round: Self) {
        let mut seconds = std::mem::take(&mut self.seconds);
        seconds.append(&mut round.seconds);
        let cpu_seconds = self.cpu_seconds + round.cpu_seconds;
        let peak_bytes = self.peak_bytes.max(round.peak_bytes);
        *self = Self {
            seconds,
            cpu_seconds,
            peak_bytes,
            ..round
        };
    }
}

/// Smallest and middle value; 0 for none.
pub(super) fn best_and_median(seconds: &[f64]) -> (f64, f64) {
    let mut sorted = seconds.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |i: usize| sorted.get(i).copied().unwrap_or_default();
    (at(0), at(sorted.len() / 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(tokens: [u32; 32], logprob: f64, n_logprobs: usize) -> Report {
        Report {
            tokens: tokens.to_vec(),
            logprobs: vec![logprob; n_logprobs],
            ..Report::default()
        }
    }

    fn rounds(ours: Report, f32: Report) -> Rounds {
        Rounds {
            ours_bf16: ours.clone(),
            bf16: ours.clone(),
            ours,
            f32,
        }
    }

    fn trained(losses: &[f64]) -> Report {
        Report {
            losses: losses.to_vec(),
            ..Report::default()
        }
    }

    #[test]
    fn rounds_are_put_together() {
        let mut report = Report::default();

        report.merge(Report {
            seconds: vec![3.0, 1.0],
            peak_bytes: 7,
            ..Report::default()
        });
        report.merge(Report {
            seconds: vec![2.0],
            peak_bytes: 5,
            ..Report::default()
        });

        assert_eq!(best_and_median(&report.seconds), (1.0, 2.0));
        assert_eq!(report.peak_bytes, 7);
    }

    #[test]
    fn other_losses_are_refused() {
        let check_all = |ours: &[f64], ours_bf16: &[f64], f32: &[f64], bf16: &[f64]| {
            let [ours, ours_bf16, f32, bf16] = [ours, ours_bf16, f32, bf16].map(trained);
            let rounds = Rounds {
                ours,
                ours_bf16,
                f32,
                bf16,
            };
            rounds.agree_on_losses()
        };
        let check = |ours, f32, bf16| check_all(ours, ours, f32, bf16);

        assert!(check(&[2.0], &[2.0001], &[2.01]).is_ok());
        assert!(check(&[2.0], &[2.001], &[2.0]).is_err());
        assert!(check(&[2.0], &[2.0], &[2.1]).is_err());
        assert!(check(&[2.0], &[2.0, 2.0], &[2.0]).is_err());
        assert!(check(&[2.0], &[f64::NAN], &[2.0]).is_err());
        assert!(check_all(&[2.0], &[2.01], &[2.0], &[2.0]).is_ok());
        assert!(check_all(&[2.0], &[2.1], &[2.0], &[2.0]).is_err());
        let error = check(&[], &[], &[]).unwrap_err().to_string();
        assert_eq!(error, "there are no losses to compare");
    }

    #[test]
    fn other_tokens_are_refused_in_any_sequence() {
        let mut tokens = [1; 32];
        let agree = |tokens, n| {
            rounds(decoded([1; 32], -1.0, 32), decoded(tokens, -1.0, 32)).agree_on_tokens(n)
        };

        assert_eq!(agree(tokens, 2).unwrap(), 32);
        tokens[20] = 2;
        assert_eq!(agree(tokens, 1).unwrap(), 20);
        assert!(agree(tokens, 2).is_err());
    }

    #[test]
    fn other_logprobs_and_other_counts_are_refused() {
        let agree = |logprob, n| {
            rounds(decoded([1; 32], -1.0, 32), decoded([1; 32], logprob, n)).agree_on_tokens(2)
        };

        assert_eq!(agree(-1.00001, 32).unwrap(), 32);
        let error = agree(-1.001, 32).unwrap_err().to_string();
        assert_eq!(error, "token 0: log-prob -1 against -1.001 of PyTorch");
        assert!(agree(-1.0, 31).is_err());
        let mut few = rounds(decoded([1; 32], -1.0, 32), decoded([1; 32], -1.0, 32));
        few.bf16.tokens.pop();
        assert!(few.agree_on_tokens(2).is_err());
        let mut few = rounds(decoded([1; 32], -1.0, 32), decoded([1; 32], -1.0, 32));
        few.ours_bf16.tokens.pop();
        assert!(few.agree_on_tokens(2).is_err());
    }
}
