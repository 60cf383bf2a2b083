//! The figures side by side, and the ratios that are to be reached.

use anyhow::{Result, bail};
use serde::Serialize;

use super::report::{Report, Rounds, best_and_median};

/// Tokens/s (more is better) or bytes (less is better) of one program.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Figure {
    pub(super) best: f64,
    pub(super) median: f64,
}

impl Figure {
    fn of_one(value: f64) -> Self {
        let (best, median) = (value, value);
        Self { best, median }
    }

    fn over(self, other: Self) -> Self {
        Self {
            best: self.best / other.best,
            median: self.median / other.median,
        }
    }
}

/// What a ratio is to reach.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Goal {
    AtLeast(f64),
    AtMost(f64),
    /// Not promised; reported.
    Nothing,
}

impl Goal {
    /// Whether a ratio is as promised; a NaN is not.
    fn is_met(self, ratio: f64) -> bool {
        match self {
            Self::AtLeast(least) => ratio >= least,
            Self::AtMost(most) => ratio <= most,
            Self::Nothing => true,
        }
    }

    fn text(self) -> String {
        match self {
            Self::AtLeast(least) => format!("{least}"),
            Self::AtMost(most) => format!("<= {most:.3}"),
            Self::Nothing => "-".to_owned(),
        }
    }
}

/// One line of the result.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) what: String,
    pub(super) ours: Figure,
    pub(super) f32: Figure,
    pub(super) ours_bf16: Figure,
    pub(super) bf16: Figure,
    /// Ours to PyTorch, both in float32 and both in bf16.
    pub(super) to_f32: Figure,
    pub(super) to_bf16: Figure,
    pub(super) goals: [Goal; 2],
}

impl Row {
    pub(super) fn tokens_per_second(what: &str, rounds: &Rounds, goals: [Goal; 2]) -> Self {
        Self::new(what, rounds, goals, |report| {
            let (best, median) = best_and_median(&report.seconds);
            let rate = |seconds: f64| report.n_tokens as f64 / seconds;
            Figure {
                best: rate(best),
                median: rate(median),
            }
        })
    }

    /// As good on a loaded machine as on a quiet one.
    pub(super) fn per_cpu_second(what: &str, rounds: &Rounds) -> Self {
        Self::new(what, rounds, [Goal::Nothing; 2], |report| {
            let n_tokens = report.n_tokens * report.seconds.len();
            Figure::of_one(n_tokens as f64 / report.cpu_seconds)
        })
    }

    pub(super) fn memory(what: &str, rounds: &Rounds, goals: [Goal; 2]) -> Self {
        Self::new(what, rounds, goals, |report| {
            Figure::of_one(report.peak_bytes as f64 / 1e6)
        })
    }

    fn new(
        what: &str,
        rounds: &Rounds,
        goals: [Goal; 2],
        figure: impl Fn(&Report) -> Figure,
    ) -> Self {
        let all = [&rounds.ours, &rounds.f32, &rounds.ours_bf16, &rounds.bf16];
        let [ours, f32, ours_bf16, bf16] = all.map(figure);
        Self {
            what: what.to_owned(),
            ours,
            f32,
            ours_bf16,
            bf16,
            to_f32: ours.over(f32),
            to_bf16: ours_bf16.over(bf16),
            goals,
        }
    }

    /// The ratios that miss their goal, in words.
    fn misses(&self) -> Vec<String> {
        let [f32, bf16] = self.goals;
        let ratios = [("f32", self.to_f32, f32), ("bf16", self.to_bf16, bf16)];
        let mut misses = Vec::new();
        for (beside, ratio, goal) in ratios {
            for (which, value) in [("best", ratio.best), ("median", ratio.median)] {
                if !goal.is_met(value) {
                    let (what, goal) = (&self.what, goal.text());
                    misses.push(format!(
                        "{what}: the {which} is {value:.3} times PyTorch's in {beside}, promised is {goal}"
                    ));
                }
            }
        }
        misses
    }

    fn print(&self) {
        let Self {
            what,
            ours,
            f32,
            ours_bf16,
            bf16,
            to_f32,
            to_bf16,
            goals: [goal_f32, goal_bf16],
        } = self;
        print!("| {what} ");
        for (ours, torch, ratio, goal) in [
            (ours, f32, to_f32, goal_f32),
            (ours_bf16, bf16, to_bf16, goal_bf16),
        ] {
            print!(
                "| {:.0} ({:.0}) | {:.0} ({:.0}) | {:.2} ({:.2}) | {} ",
                ours.best,
                ours.median,
                torch.best,
                torch.median,
                ratio.best,
                ratio.median,
                goal.text(),
            );
        }
        println!("|");
    }
}

#[derive(Debug, Serialize)]
pub(super) struct Outcome {
    pub(super) machine: String,
    pub(super) shape: &'static str,
    pub(super) weights: &'static str,
    pub(super) threads: usize,
    pub(super) rounds: usize,
    pub(super) repeats: usize,
    pub(super) ours: String,
    pub(super) torch: String,
    /// Greedy tokens that agree with PyTorch in float32, and all of them.
    pub(super) same_tokens: usize,
    pub(super) n_tokens: usize,
    pub(super) rows: Vec<Row>,
}

impl Outcome {
    pub(super) fn print(&self) {
        let Self {
            machine,
            shape,
            weights,
            threads,
            rounds,
            repeats,
            ours,
            torch,
            same_tokens,
            n_tokens,
            ..
        } = self;
        println!("{machine}; {threads} threads; {rounds} rounds of {repeats}, alternating");
        println!(
            "shape {shape}, weights in {weights}; ours: {ours} and bf16; beside it: {torch} and bf16"
        );
        println!("{same_tokens} of {n_tokens} greedy tokens the same in f32; best (median)\n");
        println!("| | ours f32 | PyTorch | ratio | goal | ours bf16 | PyTorch | ratio | goal |");
        println!("|---|---|---|---|---|---|---|---|---|");
        self.rows.iter().for_each(Row::print);
    }

    /// Fails with all ratios that miss their goals.
    pub(super) fn hold_to_goals(&self) -> Result<()> {
        let misses: Vec<String> = self.rows.iter().flat_map(Row::misses).collect();
        if misses.is_empty() {
            Ok(())
        } else {
            bail!("{}", misses.join("\n"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(seconds: f64, peak_bytes: u64) -> Report {
        Report {
            seconds: vec![seconds, seconds],
            n_tokens: 100,
            peak_bytes,
            ..Report::default()
        }
    }

    #[test]
    fn ratios_are_held_to_their_goals() {
        let rounds = Rounds {
            ours: report(1.0, 10),
            f32: report(3.0, 100),
            ours_bf16: report(0.5, 10),
            bf16: report(1.0, 80),
        };
        let misses = |f32, bf16| {
            let goals = [Goal::AtLeast(f32), Goal::AtLeast(bf16)];
            Row::tokens_per_second("speed", &rounds, goals).misses()
        };

        assert_eq!(misses(3.0, 2.0).len(), 0);
        assert_eq!(misses(3.1, 2.0).len(), 2);
        assert_eq!(
            misses(3.0, 2.5)[0],
            "speed: the best is 2.000 times PyTorch's in bf16, promised is 2.5"
        );
        let memory = |most| {
            let goals = [Goal::AtMost(most), Goal::Nothing];
            Row::memory("memory", &rounds, goals).misses().len()
        };
        assert_eq!(memory(0.1), 0);
        assert_eq!(memory(0.09), 2);
    }

    #[test]
    fn no_figures_miss_their_goal() {
        assert!(!Goal::AtLeast(1.0).is_met(f64::NAN));
        assert!(!Goal::AtMost(1.0).is_met(f64::NAN));
        assert!(Goal::Nothing.is_met(f64::NAN));
    }
}
