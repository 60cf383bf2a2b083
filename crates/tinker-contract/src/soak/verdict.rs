//! Whether a server grew: a line is laid through the last three quarters of what was seen of it.

use super::gauge::Sight;

/// Share of the time at the beginning in which caches may fill.
const WARM_UP: f64 = 0.25;
/// Growth that is allowed, as a share of the level.
const SHARE: f64 = 0.05;
/// And beside it, in bytes: what the rows of finished sessions and runs take.
const MEMORY_SLACK: f64 = 8e6;
/// And beside it, in descriptors: connections come and go.
const FILE_SLACK: f64 = 8.0;
/// Fewest sights that say anything.
const MIN_SIGHTS: usize = 12;

/// A line through points, by least squares.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Line {
    /// The mean of the values.
    pub level: f64,
    /// What the line gains from its first point to its last.
    pub growth: f64,
}

/// Lays a line through points of time and value; flat through fewer than two.
#[must_use]
pub fn fit(points: &[(f64, f64)]) -> Line {
    let n = points.len().max(1) as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / n;
    let (mean_x, level) = (mean(|p| p.0), mean(|p| p.1));
    let (mut xx, mut xy) = (0.0, 0.0);
    for (x, y) in points {
        xx += (x - mean_x).powi(2);
        xy += (x - mean_x) * (y - level);
    }
    let length = match points {
        [first, .., last] => last.0 - first.0,
        _ => 0.0,
    };
    let growth = if xx > 0.0 { xy / xx * length } else { 0.0 };
    Line { level, growth }
}

/// What is judged.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Verdict {
    /// Name of what is judged.
    pub what: &'static str,
    /// The line through it.
    pub line: Line,
    /// The most that it may gain.
    pub allowed: f64,
    /// Whether there was enough to see.
    pub is_seen: bool,
}

impl Verdict {
    /// Whether it stayed as it was.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.is_seen && self.line.growth <= self.allowed
    }
}

/// Judges memory and file descriptors.
#[must_use]
pub fn judge(sights: &[Sight]) -> Vec<Verdict> {
    let end = sights.last().map_or(0.0, |sight| sight.at);
    let late: Vec<&Sight> = sights
        .iter()
        .filter(|sight| sight.at >= WARM_UP * end)
        .collect();
    let verdict = |what, of: fn(&Sight) -> u64, slack| {
        let points: Vec<(f64, f64)> = late.iter().map(|s| (s.at, of(s) as f64)).collect();
        let line = fit(&points);
        Verdict {
            what,
            line,
            allowed: SHARE * line.level + slack,
            is_seen: points.len() >= MIN_SIGHTS,
        }
    };
    vec![
        verdict("rss", |sight| sight.rss, MEMORY_SLACK),
        verdict("fds", |sight| sight.fds, FILE_SLACK),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sights(rss: impl Fn(f64) -> f64) -> Vec<Sight> {
        let at = |i: u32| f64::from(i) * 10.0;
        let sight = |i| Sight {
            at: at(i),
            rss: rss(at(i)) as u64,
            fds: 20 + u64::from(i % 3),
            ..Sight::default()
        };
        (0..=720).map(sight).collect()
    }

    fn grew(rss: impl Fn(f64) -> f64) -> bool {
        let verdicts = judge(&sights(rss));
        assert!(verdicts[1].holds(), "{verdicts:?}");
        !verdicts[0].holds()
    }

    #[test]
    fn a_line_is_found_in_its_points() {
        let points: Vec<(f64, f64)> = (0..5)
            .map(|x| (f64::from(x), f64::from(3 * x + 1)))
            .collect();

        let line = fit(&points);

        assert!((line.level - 7.0).abs() < 1e-9 && (line.growth - 12.0).abs() < 1e-9);
        assert_eq!(fit(&[]).growth, 0.0);
    }

    #[test]
    fn a_level_a_warm_up_and_teeth_are_no_growth() {
        assert!(!grew(|_| 2e8));
        assert!(!grew(|at| 2e8 + 1e8 * (at / 1000.0).min(1.0)));
        assert!(!grew(|at| 2e8 + 2e7 * (at / 900.0).fract()));
    }

    #[test]
    fn a_glance_shows_nothing() {
        let few: Vec<Sight> = sights(|_| 2e8).into_iter().take(10).collect();

        assert!(judge(&few).iter().all(|verdict| !verdict.holds()));
    }

    #[test]
    fn a_kilobyte_for_every_hundredth_of_a_second_is_growth() {
        assert!(grew(|at| 2e8 + 1e5 * at));
        assert!(grew(|at| 2e8 + 1e4 * at));
    }
}
